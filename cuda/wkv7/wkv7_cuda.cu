// WKV-7 on a GPU, exact: token by token in fp32. Per sequence and head, state S (row = value, column = key):
//     u_t = S_{t-1} a_t     S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T     y_t = S_t r_t     d = exp(-e^{-1/2} sigmoid(w))
// and with G_t = dL/dS_t, which reaches token t as dS_t and leaves it as dS_{t-1} = G_t diag(d_t) + du_t a_t^T:
//     G_t = dS_t + dy_t r_t^T     dr = S_t^T dy   dk = G_t^T v   dv = G_t k   db = G_t^T u   du = G_t b   da = S_{t-1}^T du
//     dd = sum over values of G_t * S_{t-1}
// Tensors  see wkv7.h; bf16 or fp32. kept: S after every 16 tokens, and u.
// Threads  one block per (sequence, head), N threads forward, 2 N backward, S (and G) in their registers as in exact.cuh.
//          Sums over the columns stay within eight lanes; sums over the rows go through shared memory, with one barrier a
//          token.
// Numerics fp32 throughout. The backward finds S_{t-1} = (S_t - u b^T - v k^T) / d at most 8 times in a row: from S kept after
//          16 tokens and, for the first 8 of them, from S kept before and stepped 8 tokens on. 8 divisions by d > 0.545
//          enlarge an error at most 128 times (16: 16,000 times). Every sum has a fixed order; no atomics.
// Limits   N in {32, 64, 96, 128, 192}; the backward of 192 spills registers and wants a GPU's 179 KB of shared memory.
// Cost     per token and head 5 N^2 FMA forward, 14.5 N^2 backward; memory traffic of 17 and 23 bf16 tensors (N 64). B 64, T 1024,
//          H 12, N 64 on an H200, computed: FMA 0.55 and 1.6 ms, all instructions 0.8 and 2.6, traffic 0.4 and 0.6.
#include "../exact.cuh"
#include "../launch.cuh"
#include "wkv7.h"

#ifndef HEAD_SIZES  // given, it compiles faster
#define HEAD_SIZES 32, 64, 96, 128, 192
#endif

namespace {
using namespace exact;

constexpr int TILE = 8, CHUNK = 16;  // tokens in shared memory at once, and between two kept states
constexpr float DECAY_BOUND = 0.60653065971263342f;  // e^{-1/2}

// One tile of `COUNT` tensors from global memory: rows of N numbers, `stride` apart.
template <int N, int COUNT, class E>
__device__ inline void fetch(E* to, const E* const (&from)[7], int64_t at, int64_t stride) {
  constexpr int PIECE = 16 / sizeof(E), PIECES = N / PIECE;
  for (int i = threadIdx.x; i < TILE * PIECES; i += blockDim.x)
#pragma unroll
    for (int x = 0; x < COUNT; x++)
      copy_async(to + x * TILE * N + i * PIECE, from[x] + at + i / PIECES * stride + i % PIECES * PIECE);
  copy_commit();
}

// Its numbers as fp32, of w the decay d. For the backward (u given) then u, 1/d and dd/dw, finite for every w.
template <int N, int COUNT, class E>
__device__ inline void unpack(float* to, const E* from, const float* u) {
  for (int i = threadIdx.x; i < TILE * N; i += blockDim.x) {
#pragma unroll
    for (int x = 0; x < COUNT; x++)
      if (x != 1) to[x * TILE * N + i] = number(from[x * TILE * N + i]);
    const float w = number(from[TILE * N + i]), e = expf(-fabsf(w)), s = 1 / (1 + e);
    const float d = to[TILE * N + i] = expf(-DECAY_BOUND * (w < 0 ? e * s : s));
    if (u) to[7 * TILE * N + i] = u[i], to[8 * TILE * N + i] = 1 / d, to[9 * TILE * N + i] = -DECAY_BOUND * (e * s * s) * d;
  }
}

// S_t from S_{t-1}; adds S_t r_t to y_sum where there is one. `rows` and `columns`: this thread's part of the token's numbers.
template <int N, int ROWS>
__device__ inline void step(float (&S)[ROWS][N / 8], const float (&u)[ROWS], const float* rows, const float* columns, float* y_sum) {
  float v[ROWS], r[4], d[4], k[4], b[4];
  for (int p = 0; p < ROWS; p += 4) load4(v + p, rows + 3 * TILE * N + p);
#pragma unroll
  for (int j = 0; j < N / 8; j += 4) {
    const float* from = columns + 8 * j;
    load4(r, from), load4(d, from + TILE * N), load4(k, from + 2 * TILE * N), load4(b, from + 5 * TILE * N);
    for (int p = 0; p < ROWS; p++)
      for (int q = 0; q < 4; q++) {
        S[p][j + q] = S[p][j + q] * d[q] + u[p] * b[q] + v[p] * k[q];
        if (y_sum) y_sum[p] += S[p][j + q] * r[q];
      }
  }
}

template <class E>
struct Inputs { const E* x[7]; };  // r w k v a b dy

template <int N, class E>
__global__ void __launch_bounds__(N, N <= 64 ? 384 / N : 1)
forward(int64_t T, int64_t H, Inputs<E> in, const float* s0, E* y, float* kept, float* sT) {
  constexpr int ROWS = 8, ARRAY = TILE * N;
  float* const tile = reinterpret_cast<float*>(shared_memory());  // r d k v a b
  E* const raw = reinterpret_cast<E*>(tile + 6 * ARRAY);          // r w k v a b of the next tile
  const int column = threadIdx.x % 8 * 4, first = threadIdx.x / 8 * ROWS, at = first * N + column;  // at: in a state
  const int64_t stride = H * N, head = blockIdx.x / H * T * stride + blockIdx.x % H * N, state = int64_t(blockIdx.x) * N * N + at;
  float* here = kept + blockIdx.x * (T / CHUNK) * (N + CHUNK) * N;
  float S[ROWS][N / 8];
  load_state<N>(S, s0 ? s0 + state : nullptr);
  fetch<N, 6>(raw, in.x, head, stride);
  for (int64_t start = 0; start < T; start += TILE) {
    copy_wait<0>();
    sync_block();
    unpack<N, 6>(tile, raw, nullptr);
    sync_block();
    if (start + TILE < T) fetch<N, 6>(raw, in.x, head + (start + TILE) * stride, stride);
    for (int t = 0; t < TILE; t++) {
      const float *rows = tile + t * N + first, *columns = tile + t * N + column;
      float u[ROWS] = {}, y_sum[ROWS] = {}, a[4];
      for (int j = 0; j < N / 8; j += 4) {
        load4(a, columns + 4 * ARRAY + 8 * j);
        for (int p = 0; p < ROWS; p++)
          for (int q = 0; q < 4; q++) u[p] += S[p][j + q] * a[q];
      }
      const float u_own = sum<4, 1>(u);
      here[(N + start % CHUNK + t) * N + threadIdx.x] = u_own;
      for (int p = 0; p < ROWS; p++) u[p] = shuffle(u_own, threadIdx.x % 32 / 8 * 8 + p);
      step<N>(S, u, rows, columns, y_sum);
      store(y + head + (start + t) * stride + threadIdx.x, sum<4, 1>(y_sum));
    }
    if (start % CHUNK) store_state<N>(here + at, S), here += (N + CHUNK) * N;
  }
  store_state<N>(sT + state, S);
}

template <int N, class E>
__global__ void __launch_bounds__(2 * N, N <= 64 ? 192 / N : 1)
backward(int64_t T, int64_t H, Inputs<E> in, const float* s0, const float* kept, const float* dsT, E* dr, E* dw, E* dk, E* dv,
         E* da, E* db, float* ds0) {
  constexpr int ROWS = 4, ARRAY = TILE * N, WARPS = N / 16, KEPT = (N + CHUNK) * N;
  float* const tile = reinterpret_cast<float*>(shared_memory());  // r d k v a b dy u 1/d dd/dw
  float* const partial = tile + 10 * ARRAY;                       // [t % 2][dr dw dk da db][warp][column]
  float* const raw_u = partial + 10 * WARPS * N;                  // of the tile before, which comes next
  E* const raw = reinterpret_cast<E*>(raw_u + ARRAY);             // r w k v a b dy, likewise
  const int column = threadIdx.x % 8 * 4, first = threadIdx.x / 8 * ROWS, at = first * N + column;  // at: in a state
  const int64_t stride = H * N, head = blockIdx.x / H * T * stride + blockIdx.x % H * N, state = int64_t(blockIdx.x) * N * N + at;
  const int lane = threadIdx.x % 32;
  kept += blockIdx.x * (T / CHUNK) * KEPT;
  const auto fetch_tile = [&](int64_t t) {
    fetch<N, 7>(raw, in.x, head + t * stride, stride);
    fetch<N, 1, float>(raw_u, {kept + t / CHUNK * KEPT + (N + t % CHUNK) * N}, 0, N);
  };
  float S[ROWS][N / 8], G[ROWS][N / 8];
  load_state<N>(G, dsT ? dsT + state : nullptr);
  fetch_tile(T - TILE);
  for (int64_t start = T - TILE; start >= 0; start -= TILE) {
    copy_wait<0>();
    sync_block();
    unpack<N, 7>(tile, raw, raw_u);
    sync_block();
    if (start > 0) fetch_tile(start - TILE);
    const bool late = start % CHUNK != 0;  // the chunk's second half, at whose end S was kept; the first half steps S on
    load_state<N>(S, start >= TILE ? kept + (start - TILE) / CHUNK * KEPT + at : s0 ? s0 + state : nullptr);
    for (int t = late ? TILE : 0; t < TILE; t++) {
      const float *rows = tile + t * N + first, *columns = tile + t * N + column;
      float u[ROWS];
      load4(u, rows + 7 * ARRAY), step<N>(S, u, rows, columns, nullptr);
    }
    for (int t = TILE - 1; t >= 0; t--) {
      const float *rows = tile + t * N + first, *columns = tile + t * N + column;
      float* const buffer = partial + t % 2 * 5 * WARPS * N;
      float* const mine = buffer + threadIdx.x / 32 * N + column + lane / 8;  // after sum<16, 8>
      float u[ROWS], v[ROWS], dy[ROWS], du[ROWS] = {}, dv_sum[ROWS] = {};
      load4(v, rows + 3 * ARRAY), load4(dy, rows + 6 * ARRAY), load4(u, rows + 7 * ARRAY);
#pragma unroll
      for (int j = 0; j < N / 8; j += 4) {
        float r[4], k[4], b[4], inverse[4], dr_sum[4] = {}, dd_sum[4] = {}, dk_sum[4] = {}, db_sum[4] = {};
        load4(r, columns + 8 * j), load4(k, columns + 2 * ARRAY + 8 * j), load4(b, columns + 5 * ARRAY + 8 * j);
        load4(inverse, columns + 8 * ARRAY + 8 * j);
        for (int p = 0; p < ROWS; p++)
          for (int q = 0; q < 4; q++) {
            float &s = S[p][j + q], &g = G[p][j + q];
            dr_sum[q] += s * dy[p], g += dy[p] * r[q];
            dk_sum[q] += g * v[p], db_sum[q] += g * u[p], dv_sum[p] += g * k[q], du[p] += g * b[q];
            s = (s - u[p] * b[q] - v[p] * k[q]) * inverse[q];
            dd_sum[q] += g * s;
          }
        mine[8 * j] = sum<16, 8>(dr_sum), mine[WARPS * N + 8 * j] = sum<16, 8>(dd_sum);
        mine[2 * WARPS * N + 8 * j] = sum<16, 8>(dk_sum), mine[4 * WARPS * N + 8 * j] = sum<16, 8>(db_sum);
      }
      const int64_t token = head + (start + t) * stride;
      const float dv_own = sum<4, 1>(dv_sum), du_own = sum<4, 1>(du);  // of row lane % 8 / 2
      if (lane % 2 == 0) store(dv + token + first + lane % 8 / 2, dv_own);
      for (int p = 0; p < ROWS; p++) du[p] = shuffle(du_own, lane / 8 * 8 + p * 2);
#pragma unroll
      for (int j = 0; j < N / 8; j += 4) {
        float d[4], a[4], da_sum[4] = {};
        load4(d, columns + ARRAY + 8 * j), load4(a, columns + 4 * ARRAY + 8 * j);
        for (int p = 0; p < ROWS; p++)
          for (int q = 0; q < 4; q++) {
            da_sum[q] += S[p][j + q] * du[p];
            G[p][j + q] = G[p][j + q] * d[q] + du[p] * a[q];
          }
        mine[3 * WARPS * N + 8 * j] = sum<16, 8>(da_sum);
      }
      sync_block();
      for (int x = threadIdx.x / N, j = threadIdx.x % N; x < 5; x += 2) {
        float total = 0;
        for (int warp = 0; warp < WARPS; warp++) total += buffer[(x * WARPS + warp) * N + j];
        store((x == 0 ? dr : x == 1 ? dw : x == 2 ? dk : x == 3 ? da : db) + token + j,
              x == 1 ? total * tile[9 * ARRAY + t * N + j] : total);
      }
    }
  }
  if (ds0) store_state<N>(ds0 + state, G);
}

}  // namespace

#define LAUNCH(way, E, DY, THREADS, FLOATS, COUNT, ...)                                                                   \
  if (B < 1 || H < 1 || B * H > INT32_MAX || T < CHUNK || T % CHUNK) return "T must be a multiple of 16, B H below 2^31"; \
  const Inputs<E> in = {{(const E*)r, (const E*)w, (const E*)k, (const E*)v, (const E*)a, (const E*)b, (const E*)DY}};    \
  return for_head_size<HEAD_SIZES>(N, [&](auto n) {                                                             \
    constexpr int SHARED = (FLOATS) * n * sizeof(float) + COUNT * TILE * n * sizeof(E);                                   \
    return launch(way<n, E>, B * H, THREADS * n, SHARED, stream, T, H, in, s0, __VA_ARGS__);                              \
  });
#define LAUNCHERS(kernel, E)                                                                                              \
  const char* wkv7_##kernel##_forward(WKV7_FORWARD) {                                                                     \
    LAUNCH(forward, E, nullptr, 1, 6 * TILE, 6, (E*)y, (float*)kept, sT)                                                  \
  }                                                                                                                       \
  const char* wkv7_##kernel##_backward(WKV7_BACKWARD) {                                                                   \
    LAUNCH(backward, E, dy, 2, 11 * TILE + 10 * (n / 16), 7, (const float*)kept, dsT, (E*)dr, (E*)dw, (E*)dk, (E*)dv,     \
           (E*)da, (E*)db, ds0)                                                                                           \
  }
LAUNCHERS(cuda, bf16)
LAUNCHERS(cuda_fp32, float)
