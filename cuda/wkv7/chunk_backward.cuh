// The backward of the chunked form, the parts that the fast and the fused kernel share. Notation: chunk.cuh; S is the
// state at the chunk's start, G the gradient of the state at its end, dM the gradient of a matrix M:
//     G  <- G diag(P)
//     dU  = B G^T + RB^T dY          dZ = M^T dU          dV = K G^T + RK^T dY + AK^T dZ
//     dAB = stril(dZ U^T)  dAK = stril(dZ V^T)  dRK = tril(dY V^T)  dRB = tril(dY U^T)
//     dA  = dZ S + dAB B + dAK K     dR = dY S + dRK K + dRB B
//     dK  = V G + dAK^T A + dRK^T R  dB = U G + dAB^T A + dRB^T R
//     G  <- G + dY^T R + dZ^T A
// A decay acts on all that passes it: on S on its way to the chunk's end (the column sums of S * G), on K and B of earlier
// tokens on their way there, on R and A of later tokens coming from S, and on the pairs it lies between. The pairs are
// summed as those that begin before t less those that end before t: both are sums of the same products of bf16 numbers,
// so that they cancel to the last bits of fp32.
#pragma once

#include "chunk.cuh"

namespace wkv7 {

// What a block has in shared memory; `tile` is the kernel's own. U and dZ are transposed: row = value.
template <int N>
struct Backward {
  bf16 state[GROUP / C][N * N];  // at the chunks' starts; an odd group has its in reverse order
  bf16 G[N * N];
  bf16 U[N * C], dZ[N * C];
  bf16 matrix[MATRICES][C * C];  // the matrices, later their gradients
  float P_end[N];
  __device__ float* room() { return reinterpret_cast<float*>(dZ); }  // for pair_matrices; dZ comes later
};

// With the scaled tiles in shared memory: what G and S give to Z^T, dU^T and dV. G becomes G diag(P), for all in `at.G`.
template <int N>
__device__ inline void read_states(Sum& Z, Sum& dU, Sum& dV, Sum* Y, Sum (&G)[N / 16], Backward<N>& shared, const bf16* state,
                                   const Tiles& tile, const Thread& at) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    Block x, y;
    load<N>(x, state, 16 * at.warp, 16 * j, at);
    load<N>(y, tile.A, 0, 16 * j, at);
    add_product(Z, x, y);
    if (Y) {
      load<N>(y, tile.R, 0, 16 * j, at);
      add_product(*Y, y, x);
    }
    scale_columns(G[j], shared.P_end + 16 * j, at);
    to_block(x, G[j]);
    store<N>(shared.G, 16 * at.warp, 16 * j, x, at);
    load<N>(y, tile.B, 0, 16 * j, at);
    add_product(dU, x, y);
    load<N>(y, tile.K, 0, 16 * j, at);
    add_product(dV, y, x);
  }
}

// With the matrices in shared memory: U for all, and completes Y, if there is one.
template <int N>
__device__ inline void finish_U(Sum& Z, Sum* Y, Backward<N>& shared, const Tiles& tile, const Thread& at) {
  Block v, u, x;
  load_transpose<N>(v, tile.V, 0, 16 * at.warp, at);
  load<C>(x, shared.matrix[AK], 0, 0, at);
  add_product(Z, v, x);
  solve<true>(u, Z, shared.matrix, at);
  store<C>(shared.U, 16 * at.warp, 0, u, at);
  if (Y) {
    load<C>(x, shared.matrix[RK], 0, 0, at);
    add_product(*Y, x, v);
    load<C>(x, shared.matrix[RB], 0, 0, at);
    add_product(*Y, x, u);
  }
}

// With the matrices and dY in shared memory: completes dV and G; dZ for all.
template <int N>
__device__ inline void finish_values(Sum& dU, Sum& dV, Sum (&G)[N / 16], Backward<N>& shared, const Tiles& tile,
                                     const Thread& at) {
  Block dy, dz, x;
  load_transpose<N>(dy, tile.DY, 0, 16 * at.warp, at);
  load_transpose<C>(x, shared.matrix[RB], 0, 0, at);
  add_product(dU, dy, x);
  solve<false>(dz, dU, shared.matrix, at);
  store<C>(shared.dZ, 16 * at.warp, 0, dz, at);
  load_transpose<C>(x, shared.matrix[RK], 0, 0, at);
  add_product(dV, x, dy);
  load_transpose<C>(x, shared.matrix[AK], 0, 0, at);
  add_product(dV, x, dz);
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    load_transpose<N>(x, tile.R, 0, 16 * j, at);
    add_product(G[j], dy, x);
    load_transpose<N>(x, tile.A, 0, 16 * j, at);
    add_product(G[j], dz, x);
  }
}

// With U, dZ, dY and G in shared memory: the gradients of r, k, a, b in the warp's channels and of log d. One barrier.
template <int N>
__device__ inline void keys(Sum& dR, Sum& dK, Sum& dA, Sum& dB, Elements& d_log, const Decays<N>& decays,
                            Backward<N>& shared, const bf16* state, const Tiles& tile) {
  Elements ends;  // K dK + B dB where it concerns the state at the chunk's end
  float passed[2] = {0.f, 0.f};  // column sums of S * G, of columns g and g + 8
  {
    const Thread at;
    Block x, y;
    Sum c = {};  // of one of the matrices' gradients, for the first four warps
#pragma unroll 2
    for (int j = 0; j < N; j += 16) {
      Block s, g, dz, dy, v, u;
      load_transpose<N>(s, state, j, 16 * at.warp, at);
      load_transpose<N>(g, shared.G, j, 16 * at.warp, at);
      load_transpose<C>(dz, shared.dZ, j, 0, at);
      add_product(dA, dz, s);
      load<N>(dy, tile.DY, 0, j, at);
      add_product(dR, dy, s);
      load<N>(v, tile.V, 0, j, at);
      add_product(dK, v, g);
      load_transpose<C>(u, shared.U, j, 0, at);
      add_product(dB, u, g);
      for (int i = 0; i < 4; ++i) x[i] = at.warp < RB ? dz[i] : dy[i], y[i] = at.warp % 2 ? v[i] : u[i];
      if (N == 64 || at.warp < 4) add_product(c, x, y);
      for (int i = 0; i < 4; ++i)
        passed[i % 2] += low_bf16(s[i]) * low_bf16(g[i]) + high_bf16(s[i]) * high_bf16(g[i]);
    }
    if (at.warp < 4) {
      keep_lower(c, at.warp >= RB, at);
      to_block(x, c);
      store<C>(shared.matrix[at.warp], 0, 0, x, at);
    }
    for (int i = 0; i < 2; ++i)
      for (int by = 1; by < 4; by *= 2) passed[i] += shuffle_xor(passed[i], by);
    load<N>(x, tile.K, 0, 16 * at.warp, at);
    load<N>(y, tile.B, 0, 16 * at.warp, at);
    FOR_ELEMENTS ends[row][half][e] = element(x, row, half, e) * dK[half][2 * row + e] +
                                      element(y, row, half, e) * dB[half][2 * row + e];
  }
  sync_block();

  const Thread at;
  Block k, b, r, a, x;
  load_transpose<N>(k, tile.K, 0, 16 * at.warp, at);
  load_transpose<N>(b, tile.B, 0, 16 * at.warp, at);
  load_transpose<N>(r, tile.R, 0, 16 * at.warp, at);
  load_transpose<N>(a, tile.A, 0, 16 * at.warp, at);
  load<C>(x, shared.matrix[M], 0, 0, at);
  add_product(dA, x, b);
  load<C>(x, shared.matrix[AK], 0, 0, at);
  add_product(dA, x, k);
  load<C>(x, shared.matrix[RB], 0, 0, at);
  add_product(dR, x, b);
  load<C>(x, shared.matrix[RK], 0, 0, at);
  add_product(dR, x, k);
  load_transpose<C>(x, shared.matrix[M], 0, 0, at);
  add_product(dB, x, a);
  load_transpose<C>(x, shared.matrix[RB], 0, 0, at);
  add_product(dB, x, r);
  load_transpose<C>(x, shared.matrix[AK], 0, 0, at);
  add_product(dK, x, a);
  load_transpose<C>(x, shared.matrix[RK], 0, 0, at);
  add_product(dK, x, r);

  load<N>(k, tile.K, 0, 16 * at.warp, at);
  load<N>(b, tile.B, 0, 16 * at.warp, at);
  load<N>(r, tile.R, 0, 16 * at.warp, at);
  load<N>(a, tile.A, 0, 16 * at.warp, at);
  Elements change, from_a;
  float later[2][2] = {};  // the sum over all rows of what comes from S or from a pair's earlier token
  FOR_ELEMENTS {
    float &to_r = dR[half][2 * row + e], &to_a = dA[half][2 * row + e];
    float &to_k = dK[half][2 * row + e], &to_b = dB[half][2 * row + e];
    from_a[row][half][e] = element(a, row, half, e) * to_a;
    const float from = element(r, row, half, e) * to_r + from_a[row][half][e] + ends[row][half][e] -
                       (element(k, row, half, e) * to_k + element(b, row, half, e) * to_b);
    later[half][e] += from;
    d_log[row][half][e] = change[row][half][e] = ends[row][half][e] - from;
    to_r *= decays.P(row, half, e);
    to_a *= decays.before(row, half, e);
    to_k *= decays.inverse(row, half, e);
    to_b *= decays.inverse(row, half, e);
  }
  sum_down(d_log, at);
  for (int i = 0; i < 4; ++i)
    for (int by = 4; by < 32; by *= 2) later[i / 2][i % 2] += shuffle_xor(later[i / 2][i % 2], by);
  FOR_ELEMENTS d_log[row][half][e] += shuffle(passed[half], 4 * (2 * at.q + e)) + later[half][e] - change[row][half][e] -
                                      from_a[row][half][e];
}

// sigmoid(x) sigmoid(-x), the derivative of sigmoid, without cancellation for any x.
__device__ inline float sigmoid_slope(float x) {
  const float y = fminf(fast_exp2(-LOG2_E * x), 1e30f), s = fast_reciprocal(1.f + y);
  return y * s * s;
}

// dw from the gradient of log d, log d = -e^{-1/2} sigmoid(w).
__device__ inline float decay_gradient(float d_log, float w) { return -DECAY_BOUND * sigmoid_slope(w) * d_log; }

}  // namespace wkv7
