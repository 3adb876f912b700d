// WKV-7 on a CPU: a head, forward and backward. Per sequence and head, state S (row = value, column = key), S_0 = 0:
//     u_t = S_{t-1} a_t     S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T     y_t = S_t r_t
//     d = exp(-e^{-1/2} sigmoid(w))
// Tensors  r, w, k, v, a, b, y, u and the gradients are (B, T, H, N), fp32, contiguous; u is kept for the backward.
// Threads  one (sequence, head) at a time (cpu.h).
// Vectors  no sum runs across the lanes of a vector.
//   forward       S_T[key][value], lanes = values: one pass over the keys updates S and adds to y_t and u_{t+1}.
//   backward (1)  G_T[key][value], lanes = values, G_t = dL/dS_t: one such pass gives dv_t and du_t.
//   backward (2)  S and G[value][key], lanes = keys: dr, dw, dk, da, db. With u and du known the elements of the state
//                 no longer depend on each other: a tile stays in registers for 16 tokens, forwards for S, back for G.
//   The backward finds the states at the chunk starts with one more sweep of (2) over S. That is 3 of its 19 FMA and
//   costs less than memory for them. Stepping S backwards from the end would divide by d and lose digits.
// Numerics fp32 throughout. dw is the sum over values of G_t * S_{t-1}: nothing cancels. NaN and Inf are passed on.
// Limits   N in {16, 32, 64, 96, 128, 192}; any B, T, H. Scratch: (T/16 + 2) N^2 + 3 T N floats a thread.
// Cost     per token and head 5 N^2 FMA forward, 19 N^2 backward; memory traffic of 8 and 14 tensors of (B, T, H, N).
//          Bound: the FMA rate, 2 vectors per cycle and core, if the next rows are prefetched.
#pragma once

#include "../cpu.h"

namespace {

constexpr float DECAY_BOUND = 0.60653065971263342f;  // e^{-1/2}

// e = exp(-w), from which sigmoid(w) = 1 / (1 + e) and 1 - sigmoid(w) = e / (1 + e).
inline Vec exp_minus(Vec w) { return exp_vec(-w); }

// exp(x) for x in [-e^{-1/2}, 0], as 1 + x q(x): the error stays below half an ulp where d is close to 1.
inline Vec exp_small(Vec x) {
  Vec q = x * (1.f / 362880) + 1.f / 40320;
  q = q * x + 1.f / 5040;
  q = q * x + 1.f / 720;
  q = q * x + 1.f / 120;
  q = q * x + 1.f / 24;
  q = q * x + 1.f / 6;
  q = q * x + 0.5f;
  q = q * x + 1.f;
  return q * x + 1.f;
}

template <int N>
void forward_head(const float* r, const float* w, const float* k, const float* v, const float* a, const float* b,
                  float* y, float* u, int64_t T, int64_t stride) {
  constexpr int V = VALUES<N>, BLOCKS = N / (V * W);
  static_assert(BLOCKS * V * W == N);
  alignas(64) Vec S[BLOCKS][N][V] = {};
  alignas(64) Vec u_next[BLOCKS][V] = {};
  alignas(64) float d[CHUNK][N];
  static const float zeros[N] = {};
  for (int64_t start = 0; start < T; start += CHUNK) {
    const int64_t end = std::min(start + CHUNK, T);
    for (int64_t t = start; t < end; t++)
      for (int j = 0; j < N; j += W)
        store(&d[t - start][j], exp_small(-DECAY_BOUND / (1.f + exp_minus(load(w + t * stride + j)))));
    for (int block = 0; block < BLOCKS; block++) {
      Vec(*state)[V] = S[block];
      for (int64_t t = start; t < end; t++) {
        const int64_t token = t * stride, here = token + block * V * W;
        const float *dt = d[t - start], *rt = r + token, *kt = k + token, *bt = b + token;
        const float* a_next = t + 1 < T ? a + token + stride : zeros;
        if (block == 0 && t + CHUNK < T) prefetch<N>(token + CHUNK * stride, {r, w, k, v, a, b, y, u});
        Vec ut[V], vt[V], y_sum[V] = {}, u_sum[V] = {};
        for (int m = 0; m < V; m++) {
          ut[m] = u_next[block][m];
          vt[m] = load(v + here + m * W);
          store(u + here + m * W, ut[m]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
          const float dj = dt[j], bj = bt[j], kj = kt[j], rj = rt[j], aj = a_next[j];
          for (int m = 0; m < V; m++) {
            const Vec s = state[j][m] * dj + ut[m] * bj + vt[m] * kj;
            state[j][m] = s;
            y_sum[m] += s * rj;
            u_sum[m] += s * aj;
          }
        }
        for (int m = 0; m < V; m++) {
          store(y + here + m * W, y_sum[m]);
          u_next[block][m] = u_sum[m];
        }
      }
    }
  }
}

// ROWS x K vectors of S[value][key], one token: S diag(d) + u b^T + v k^T.
template <int K>
inline void step(Vec (&S)[ROWS][K], const float* d, const float* b, const float* k, const float* u, const float* v) {
  Vec dm[K], bm[K], km[K];
  for (int m = 0; m < K; m++) dm[m] = load(d + m * W), bm[m] = load(b + m * W), km[m] = load(k + m * W);
  for (int p = 0; p < ROWS; p++) {
    const float up = u[p], vp = v[p];
    for (int m = 0; m < K; m++) S[p][m] = S[p][m] * dm[m] + bm[m] * up + km[m] * vp;
  }
}

template <int N>
void backward_head(const float* r, const float* w, const float* k, const float* v, const float* a, const float* b,
                   const float* u, const float* dy, float* dr, float* dw, float* dk, float* dv, float* da, float* db,
                   int64_t T, int64_t stride, float* scratch) {
  constexpr int V = VALUES<N>, K = WIDTH<N>, KEYS = K * W;
  const int64_t chunks = (T + CHUNK - 1) / CHUNK;
  // d and du have one row more than tokens: after the last token nothing decays and nothing arrives.
  float *d = scratch, *slope = d + (T + 1) * N, *du = slope + T * N;   // slope: dd/dw
  float *GT = du + (T + 1) * N, *G = GT + N * N, *starts = G + N * N;  // starts: states (chunks, N, N)
  static const float zeros[N] = {};
  alignas(64) Vec held[CHUNK][ROWS][K];  // S_{t-1} of one tile

  for (int64_t t = 0; t < T; t++)
    for (int j = 0; j < N; j += W) {
      if (j == 0 && t + CHUNK < T) prefetch<N>((t + CHUNK) * stride, {w, b, k, u, v});
      const Vec e = exp_minus(load(w + t * stride + j)), s = 1.f / (1.f + e);
      const Vec decay = exp_small(s * -DECAY_BOUND);
      store(d + t * N + j, decay);
      store(slope + t * N + j, s * (e * s) * decay * -DECAY_BOUND);
    }
  std::fill(d + T * N, d + (T + 1) * N, 1.f);
  std::fill(du + T * N, du + (T + 1) * N, 0.f);
  std::fill(GT, GT + 2 * N * N, 0.f);
  std::fill(starts, starts + N * N, 0.f);

  for (int64_t c = 0; c + 1 < chunks; c++)
    for (int i = 0; i < N; i += ROWS)
      for (int j = 0; j < N; j += KEYS) {
        Vec S[ROWS][K];
        load_tile(S, starts + (c * N + i) * N + j, N);
        for (int64_t t = c * CHUNK; t < (c + 1) * CHUNK; t++) {
          const int64_t token = t * stride;
          step(S, d + t * N + j, b + token + j, k + token + j, u + token + i, v + token + i);
        }
        store_tile(S, starts + ((c + 1) * N + i) * N + j, N);
      }

  for (int64_t c = chunks - 1; c >= 0; c--) {
    const int64_t first = c * CHUNK, end = std::min(first + CHUNK, T);

    // (1) G_t = G_{t+1} diag(d_{t+1}) + du_{t+1} a_{t+1}^T + dy_t r_t^T,  dv_t = G_t k_t,  du_t = G_t b_t
    for (int block = 0; block < N; block += V * W)
      for (int64_t t = end - 1; t >= first; t--) {
        const int64_t token = t * stride;
        const float *rt = r + token, *kt = k + token, *bt = b + token, *d_next = d + (t + 1) * N;
        const float* a_next = t + 1 < T ? a + token + stride : zeros;
        if (block == 0 && t >= CHUNK)
          prefetch<N>(token - CHUNK * stride, {r, k, v, a, b, u, dy, dr, dw, dk, dv, da, db});
        float* g = GT + block * N;
        Vec du_next[V], dyt[V], dv_sum[V] = {}, du_sum[V] = {};
        for (int m = 0; m < V; m++) {
          du_next[m] = load(du + (t + 1) * N + block + m * W);
          dyt[m] = load(dy + token + block + m * W);
        }
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
          const float dj = d_next[j], aj = a_next[j], rj = rt[j], kj = kt[j], bj = bt[j];
          for (int m = 0; m < V; m++) {
            float* at = g + (j * V + m) * W;
            const Vec x = load(at) * dj + du_next[m] * aj + dyt[m] * rj;
            store(at, x);
            dv_sum[m] += x * kj;
            du_sum[m] += x * bj;
          }
        }
        for (int m = 0; m < V; m++) {
          store(dv + token + block + m * W, dv_sum[m]);
          store(du + t * N + block + m * W, du_sum[m]);
        }
      }

    // (2) dr_t = S_t^T dy_t,  dk_t = G_t^T v_t,  db_t = G_t^T u_t,  da_t = S_{t-1}^T du_t,
    //     dd_t = sum over values of G_t * S_{t-1}, collected in dw
    for (int64_t t = first; t < end; t++)
      for (float* x : {dr, dw, dk, da, db}) std::fill(x + t * stride, x + t * stride + N, 0.f);
    for (int j = 0; j < N; j += KEYS)
      for (int i = 0; i < N; i += ROWS) {
        Vec tile[ROWS][K];
        load_tile(tile, starts + (c * N + i) * N + j, N);
        for (int64_t t = first; t < end; t++) {
          const int64_t token = t * stride;
          for (int p = 0; p < ROWS; p++)
            for (int m = 0; m < K; m++) held[t - first][p][m] = tile[p][m];
          step(tile, d + t * N + j, b + token + j, k + token + j, u + token + i, v + token + i);
          Vec sum[K];
          for (int m = 0; m < K; m++) sum[m] = load(dr + token + j + m * W);
          for (int p = 0; p < ROWS; p++) {
            const float dyp = dy[token + i + p];
            for (int m = 0; m < K; m++) sum[m] += tile[p][m] * dyp;
          }
          for (int m = 0; m < K; m++) store(dr + token + j + m * W, sum[m]);
        }
        load_tile(tile, G + i * N + j, N);
        for (int64_t t = end - 1; t >= first; t--) {
          const int64_t token = t * stride, key = token + j;
          const float *a_next = t + 1 < T ? a + key + stride : zeros, *du_t = du + t * N + i;
          step(tile, d + (t + 1) * N + j, a_next, r + key, du_t + N, dy + token + i);
          Vec sums[4][K];
          float* const to[4] = {dk + key, db + key, da + key, dw + key};
          for (int x = 0; x < 4; x++)
            for (int m = 0; m < K; m++) sums[x][m] = load(to[x] + m * W);
          for (int p = 0; p < ROWS; p++) {
            const float vp = v[token + i + p], up = u[token + i + p], dup = du_t[p];
            for (int m = 0; m < K; m++) {
              const Vec g = tile[p][m], s = held[t - first][p][m];
              sums[0][m] += g * vp;
              sums[1][m] += g * up;
              sums[2][m] += s * dup;
              sums[3][m] += s * g;
            }
          }
          for (int x = 0; x < 4; x++)
            for (int m = 0; m < K; m++) store(to[x] + m * W, sums[x][m]);
        }
        store_tile(tile, G + i * N + j, N);
      }
    for (int64_t t = first; t < end; t++)
      for (int j = 0; j < N; j += W) store(dw + t * stride + j, load(dw + t * stride + j) * load(slope + t * N + j));
  }
}

}  // namespace
