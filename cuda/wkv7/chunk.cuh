// The chunked form of WKV-7, the parts that the fast and the fused kernel share. A block works on one head of one
// sequence, with a warp for every 16 of the N channels, through chunks of C = 16 tokens. In a chunk, with S the state
// at its start (row = value, column = key), P_t the product of the decays up to token t and P = P_C
// (kernels of this kind: RWKV-7 paper, arXiv 2503.14456; the WY form of Yang et al., arXiv 2406.06484):
//     R = r P_t    A = a P_{t-1}    K = k / P_t    B = b / P_t
//     AB = stril(A B^T)   AK = stril(A K^T)   RK = tril(R K^T)   RB = tril(R B^T)   M = (1 - AB)^{-1}
//     Z = A S^T + AK V    U = M Z    Y = R S^T + RK V + RB U    S <- (S + V^T K + U^T B) diag(P)
// All decays lie in (0.545, 1), so P_16 > e^{-9.8} and neither P nor 1/P leaves the range of bf16.
// Threads, products: tiles.cuh. Of what is C x N a warp has the columns 16i... S, Z, U and their gradients go from product
//          to product without shared memory.
// Numerics bf16 operands, fp32 sums; S, its gradient, decays, the inverse (by substitution: the powers of AB grow like
//          binomials where keys repeat, and bf16 products of them are wrong) and the gradient of the decay in fp32.
#pragma once

#include "../tiles.cuh"

namespace wkv7 {

using namespace tiles;

constexpr float DECAY_BOUND = 0.60653065971263342f;  // e^{-1/2}

__device__ inline void keep_lower(Sum& c, bool diagonal, const Thread& at) {
  FOR_ELEMENTS {
    const int above = 8 * half + 2 * at.q + e - (at.g + 8 * row);
    if (above > 0 || (above == 0 && !diagonal)) c[half][2 * row + e] = 0.f;
  }
}

__device__ inline float sigmoid(float w) { return fast_reciprocal(1.f + fast_exp2(-LOG2_E * w)); }

// The tiles of a chunk: r, k, a, b are scaled to R, K, A, B; w and v stay as they are.
struct Tiles {
  bf16 *R, *W, *K, *V, *A, *B, *DY;
  bool with_R = true;
};

// The sum over all rows up to each row, in place; always added in the same order.
__device__ inline void sum_down(Elements& x, const Thread& at) {
  for (int row = 0; row < 2; ++row)
    for (int i = 0; i < 4; ++i) {
      float& value = x[row][i / 2][i % 2];
      for (int by = 1; by < 8; by *= 2) {
        const float above = shuffle_up(value, 4 * by);
        if (at.g >= by) value += above;
      }
      if (row == 1) value += shuffle(x[0][i / 2][i % 2], 28 + at.q);
    }
}

// Of the warp's 16 channels: P_t, P_{t-1} and 1 / P_t, from their logarithms to the base 2.
template <int N>
struct Decays {
  Elements log_d, log_P;
  __device__ Decays(const bf16* w, const Thread& at, const float* w0 = nullptr) {  // of w + w0, w0 (N) if there is one
    Block x;
    load<N>(x, w, 0, 16 * at.warp, at);
    FOR_ELEMENTS {
      const float bias = w0 ? w0[16 * at.warp + 8 * half + 2 * at.q + e] : 0.f;
      log_d[row][half][e] = log_P[row][half][e] = -DECAY_BOUND * LOG2_E * sigmoid(element(x, row, half, e) + bias);
    }
    sum_down(log_P, at);
  }
  __device__ float P(int row, int half, int e) const { return fast_exp2(log_P[row][half][e]); }
  __device__ float before(int row, int half, int e) const { return fast_exp2(log_P[row][half][e] - log_d[row][half][e]); }
  __device__ float inverse(int row, int half, int e) const { return fast_exp2(-log_P[row][half][e]); }
};

template <int N, class Factor>
__device__ inline void scale(bf16* tile, Factor by, const Thread& at) {  // the warp's 16 channels, in place
  Block x;
  load<N>(x, tile, 0, 16 * at.warp, at);
  for (int i = 0; i < 4; ++i)
    x[i] = pack_bf16(low_bf16(x[i]) * by(i % 2, i / 2, 0), high_bf16(x[i]) * by(i % 2, i / 2, 1));
  sync_warp();  // all have read
  store<N>(tile, 0, 16 * at.warp, x, at);
}

// Scales the warp's channels of a chunk, R where it is there; P_C for the whole block.
template <int N>
__device__ inline void scale(const Tiles& tile, const Decays<N>& decays, float* P_end, const Thread& at) {
  const auto P = [&](int row, int half, int e) { return decays.P(row, half, e); };
  const auto before = [&](int row, int half, int e) { return decays.before(row, half, e); };
  const auto inverse = [&](int row, int half, int e) { return decays.inverse(row, half, e); };
  scale<N>(tile.A, before, at);
  scale<N>(tile.K, inverse, at);
  scale<N>(tile.B, inverse, at);
  if (tile.with_R) scale<N>(tile.R, P, at);
  if (at.g == 7)
    for (int i = 0; i < 4; ++i) P_end[16 * at.warp + 8 * (i / 2) + 2 * at.q + i % 2] = decays.P(1, i / 2, i % 2);
}

enum { M, AK, RB, RK, M_REST, MATRICES };  // the matrices of a chunk; M + M_REST is M to 16 bits

// M = (1 - L)^{-1} for a strictly lower triangular L, by forward substitution: lanes j and j + 16 find column j, one of
// them writes what bf16 holds of it, the other the rest.
__device__ inline void invert(bf16 (*matrix)[C * C], const float* L, const Thread& at) {
  const int j = at.lane % C;
  const bool rest = at.lane >= C;
  bf16* to = matrix[rest ? M_REST : M];
  float x[C];
#pragma unroll
  for (int i = 0; i < C; ++i) {
    x[i] = i == j ? 1.f : 0.f;
#pragma unroll
    for (int s = 0; s < i; s += 4) {
      const float4 l = *reinterpret_cast<const float4*>(L + i * C + s);
      x[i] += l.x * x[s];
      if (s + 1 < i) x[i] += l.y * x[s + 1];
      if (s + 2 < i) x[i] += l.z * x[s + 2];
      if (s + 3 < i) x[i] += l.w * x[s + 3];
    }
    const bf16 first = to_bf16(x[i]);
    to[offset<C>(i, j)] = rest ? to_bf16(x[i] - to_float(first)) : first;
  }
}

// M, AK, RB, RK into `matrix`, one by each of the first four warps (without R: two). `room`: C x C floats.
template <int N>
__device__ inline void pair_matrices(bf16 (*matrix)[C * C], float* room, const Tiles& tile, const Thread& at) {
  if (at.warp >= (tile.with_R ? 4 : 2)) return;
  const bf16 *later = at.warp < RB ? tile.A : tile.R, *earlier = at.warp % 2 ? tile.K : tile.B;
  Sum c = {};
#pragma unroll 4
  for (int j = 0; j < N; j += 16) {
    Block x, y;
    load<N>(x, later, 0, j, at);
    load<N>(y, earlier, 0, j, at);
    add_product(c, x, y);
  }
  keep_lower(c, at.warp >= RB, at);
  if (at.warp == M) {
    FOR_ELEMENTS room[(at.g + 8 * row) * C + 8 * half + 2 * at.q + e] = c[half][2 * row + e];
    sync_warp();
    invert(matrix, room, at);
  } else {
    Block x;
    to_block(x, c);
    store<C>(matrix[at.warp], 0, 0, x, at);
  }
}

// u = z M^T, or z M. Where keys repeat, U is the small difference of large terms: z and M are taken to 16 bits.
template <bool TRANSPOSE>
__device__ inline void solve(Block& u, const Sum& z, const bf16 (*matrix)[C * C], const Thread& at) {
  Block first, rest, x;
  to_block(first, z);
  Sum c;
  FOR_ELEMENTS c[half][2 * row + e] = z[half][2 * row + e] - element(first, row, half, e);
  to_block(rest, c);
  TRANSPOSE ? load<C>(x, matrix[M], 0, 0, at) : load_transpose<C>(x, matrix[M], 0, 0, at);
  FOR_ELEMENTS c[half][2 * row + e] = 0.f;
  add_product(c, rest, x);
  add_product(c, first, x);
  TRANSPOSE ? load<C>(x, matrix[M_REST], 0, 0, at) : load_transpose<C>(x, matrix[M_REST], 0, 0, at);
  add_product(c, first, x);
  to_block(u, c);
}

// What the state S at the chunk's start gives: Z^T += S A^T and, if asked for, Y += R S^T.
template <int N>
__device__ inline void read_state(Sum& Z, Sum* Y, const Sum (&S)[N / 16], const Tiles& tile, const Thread& at) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    Block s, x;
    to_block(s, S[j]);
    load<N>(x, tile.A, 0, 16 * j, at);
    add_product(Z, s, x);
    if (Y) {
      load<N>(x, tile.R, 0, 16 * j, at);
      add_product(*Y, x, s);
    }
  }
}

// Completes Z^T and Y, if there is one, and takes S to the chunk's end.
template <int N>
__device__ inline void finish_chunk(Sum (&S)[N / 16], Sum& Z, Sum* Y, const Tiles& tile, const bf16 (*matrix)[C * C],
                                    const float* P_end, const Thread& at) {
  Block v, u, x;
  load_transpose<N>(v, tile.V, 0, 16 * at.warp, at);
  load<C>(x, matrix[AK], 0, 0, at);
  add_product(Z, v, x);
  solve<true>(u, Z, matrix, at);
  if (Y) {
    load<C>(x, matrix[RK], 0, 0, at);
    add_product(*Y, x, v);
    load<C>(x, matrix[RB], 0, 0, at);
    add_product(*Y, x, u);
  }
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    load_transpose<N>(x, tile.K, 0, 16 * j, at);
    add_product(S[j], v, x);
    load_transpose<N>(x, tile.B, 0, 16 * j, at);
    add_product(S[j], u, x);
    scale_columns(S[j], P_end + 16 * j, at);
  }
}

}  // namespace wkv7
