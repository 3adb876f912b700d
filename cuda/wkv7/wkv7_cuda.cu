// WKV-7 on a GPU, exact: token by token in fp32. Per sequence and head, state S (row = value, column = key):
//     u_t = S_{t-1} a_t     S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T     y_t = S_t r_t     d = exp(-e^{-1/2} sigmoid(w))
// and with G_t = dL/dS_t, which reaches token t as dS_t and leaves it as dS_{t-1}:
//     G_t = dS_t + dy_t r_t^T     dr = S_t^T dy   dk = G_t^T v   dv = G_t k   db = G_t^T u   du = G_t b   da = S_{t-1}^T du
//     dd = sum over values of G_t * S_{t-1}                           dS_{t-1} = G_t diag(d_t) + du_t a_t^T
// Tensors  see wkv7.h; bf16 or fp32. kept: S after every 16 tokens, and u.
// Threads  one block per (sequence, head), N threads forward, 2 N backward. Eight lanes share ROWS rows of S (and G) in their
//          registers, lane c of the eight holds columns 32 m + 4 c .. + 3: each number read from shared memory serves 4 or 8
//          FMA (one thread a row would read one for each, and shared memory would set the pace). Sums over the columns stay
//          within the eight lanes; sums over the rows go through shared memory, with one barrier a token.
// Numerics fp32 throughout. The backward finds S_{t-1} = (S_t - u b^T - v k^T) / d, at most 8 times in a row: it starts from
//          S kept after 16 tokens and, for the first 8, from S kept before them and stepped forwards 8 tokens. 8 divisions
//          by d > 0.545 enlarge an error at most 128 times (16: 16,000 times). Every sum has a fixed order, no atomics.
// Limits   N in {32, 64, 96, 128, 192}. N = 192 spills registers in the backward and wants an H100's shared memory.
// Cost     per token and head 5 N^2 FMA forward, 14.5 N^2 backward. B 64, T 1024, H 12, N 64 on an H200: at its fp32 rate 0.55
//          and 1.6 ms, with sums, loads and stores about 0.7 and 2.0; memory traffic of 17 and 23 bf16 tensors, 0.4 and 0.6 ms.
#include "../primitives.cuh"
#include "wkv7.h"

#include <type_traits>

namespace {

constexpr int TILE = 8;    // tokens in shared memory at once
constexpr int CHUNK = 16;  // tokens between two kept states
constexpr float DECAY_BOUND = 0.60653065971263342f;  // e^{-1/2}

__device__ inline float number(bf16 x) { return to_float(x); }
__device__ inline float number(float x) { return x; }
__device__ inline void store(bf16* to, float x) { *to = to_bf16(x); }
__device__ inline void store(float* to, float x) { *to = x; }

__device__ inline void load4(float* to, const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// One tile of `COUNT` tensors from global memory: rows of N numbers, `stride` apart.
template <int N, int COUNT, class E>
__device__ inline void fetch(E* to, const E* const (&from)[7], int64_t at, int64_t stride) {
  constexpr int PIECE = 16 / sizeof(E), PIECES = N / PIECE;
  for (int i = threadIdx.x; i < TILE * PIECES; i += blockDim.x)
#pragma unroll
    for (int x = 0; x < COUNT; x++)
      copy_async(to + x * TILE * N + i * PIECE, from[x] + at + i / PIECES * stride + i % PIECES * PIECE);
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

// Sums each x[i] over the lanes that differ in the bits FIRST, FIRST / 2 .. LAST. Each lane keeps the sum of one i: its bits
// from FIRST on downwards, as many as it takes.
template <int FIRST, int LAST, int COUNT>
__device__ inline float sum(float (&x)[COUNT]) {
  if constexpr (FIRST < LAST) {
    return x[0];
  } else {
    constexpr int HALF = COUNT > 1 ? COUNT / 2 : 1;
    float half[HALF];
    const bool upper = threadIdx.x & FIRST;
    for (int i = 0; i < HALF; i++)
      half[i] = COUNT == 1 ? x[i] + shuffle_xor(x[i], FIRST)
                           : (upper ? x[i + COUNT / 2] : x[i]) + shuffle_xor(upper ? x[i] : x[i + COUNT / 2], FIRST);
    return sum<FIRST / 2, LAST>(half);
  }
}

// This thread's part of a state (N, N); `from` and `to` are its first number.
template <int N, int ROWS>
__device__ inline void load_state(float (&S)[ROWS][N / 8], const float* from) {
  for (int i = 0; i < ROWS * N / 8; i++) S[i / (N / 8)][i % (N / 8)] = 0;
  for (int i = 0; from && i < ROWS * N / 32; i++) load4(&S[i / (N / 32)][i % (N / 32) * 4], from + i / (N / 32) * N + i % (N / 32) * 32);
}

template <int N, int ROWS>
__device__ inline void store_state(float* to, const float (&S)[ROWS][N / 8]) {
  for (int p = 0; p < ROWS; p++)
    for (int j = 0; j < N / 8; j += 4)
      *reinterpret_cast<float4*>(to + p * N + 8 * j) = make_float4(S[p][j], S[p][j + 1], S[p][j + 2], S[p][j + 3]);
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
struct Inputs {
  const E* x[7];  // r w k v a b dy
};

template <int N, class E>
__global__ void __launch_bounds__(N) forward(int64_t T, int64_t H, Inputs<E> in, const float* s0, E* y, float* kept, float* sT) {
  constexpr int ROWS = 8, ARRAY = TILE * N;
  float* const tile = reinterpret_cast<float*>(shared_memory());  // r d k v a b
  E* const raw = reinterpret_cast<E*>(tile + 6 * ARRAY);          // r w k v a b of the next tile
  const int column = threadIdx.x % 8 * 4, first = threadIdx.x / 8 * ROWS, own = threadIdx.x;
  const int64_t stride = H * N, head = blockIdx.x / H * T * stride + blockIdx.x % H * N;
  const int64_t state = int64_t(blockIdx.x) * N * N + first * N + column;
  float* here = kept + blockIdx.x * (T / CHUNK) * (N + CHUNK) * N;
  float S[ROWS][N / 8];
  load_state<N>(S, s0 ? s0 + state : nullptr);
  fetch<N, 6>(raw, in.x, head, stride);
  copy_commit();
  for (int64_t start = 0; start < T; start += TILE) {
    copy_wait<0>();
    sync_block();
    unpack<N, 6>(tile, raw, nullptr);
    sync_block();
    if (start + TILE < T) fetch<N, 6>(raw, in.x, head + (start + TILE) * stride, stride);
    copy_commit();
    for (int t = 0; t < TILE; t++) {
      const float *rows = tile + t * N + first, *columns = tile + t * N + column;
      float u[ROWS] = {}, y_sum[ROWS] = {}, a[4];
#pragma unroll
      for (int j = 0; j < N / 8; j += 4) {
        load4(a, columns + 4 * ARRAY + 8 * j);
        for (int p = 0; p < ROWS; p++)
          for (int q = 0; q < 4; q++) u[p] += S[p][j + q] * a[q];
      }
      const float u_own = sum<4, 1>(u);
      here[(N + start % CHUNK + t) * N + own] = u_own;
      for (int p = 0; p < ROWS; p++) u[p] = shuffle(u_own, threadIdx.x % 32 / 8 * 8 + p);
      step<N>(S, u, rows, columns, y_sum);
      store(y + head + (start + t) * stride + own, sum<4, 1>(y_sum));
    }
    if ((start + TILE) % CHUNK == 0) {
      store_state<N>(here + first * N + column, S);
      here += (N + CHUNK) * N;
    }
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
  const int column = threadIdx.x % 8 * 4, first = threadIdx.x / 8 * ROWS, lane = threadIdx.x % 32;
  const int64_t stride = H * N, head = blockIdx.x / H * T * stride + blockIdx.x % H * N;
  const int64_t state = int64_t(blockIdx.x) * N * N + first * N + column;
  kept += blockIdx.x * (T / CHUNK) * KEPT;
  const auto fetch_tile = [&](int64_t t) {
    fetch<N, 7>(raw, in.x, head + t * stride, stride);
    fetch<N, 1, float>(raw_u, {kept + t / CHUNK * KEPT + (N + t % CHUNK) * N}, 0, N);
    copy_commit();
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
    const bool late = start % CHUNK != 0;  // the chunk's second half: S at its end was kept; else S at its start, step it
    const int64_t chunk = start / CHUNK - !late;
    load_state<N>(S, chunk >= 0 ? kept + chunk * KEPT + first * N + column : s0 ? s0 + state : nullptr);
    for (int t = late ? TILE : 0; t < TILE; t++) {
      const float *rows = tile + t * N + first, *columns = tile + t * N + column;
      float u[ROWS];
      load4(u, rows + 7 * ARRAY);
      step<N>(S, u, rows, columns, nullptr);
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
      const int j = threadIdx.x % N;
      for (int x = threadIdx.x / N; x < 5; x += 2) {
        float total = 0;
        for (int warp = 0; warp < WARPS; warp++) total += buffer[(x * WARPS + warp) * N + j];
        if (x == 1) total *= tile[9 * ARRAY + t * N + j];
        store((x == 0 ? dr : x == 1 ? dw : x == 2 ? dk : x == 3 ? da : db) + token + j, total);
      }
    }
  }
  if (ds0) store_state<N>(ds0 + state, G);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t stream, Arguments... given) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, given...);
  if (error != cudaSuccess) cudaGetLastError();  // else the next launch of anybody would report it again
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class F>
const char* for_head_size(int64_t B, int64_t T, int64_t H, int64_t N, const F& f) {
  if (B < 1 || H < 1 || T < CHUNK || T % CHUNK || B * H > INT32_MAX) return "T must be a multiple of 16, B H from 1 to 2^31 - 1";
  if (N == 32) return f(std::integral_constant<int, 32>());
  if (N == 64) return f(std::integral_constant<int, 64>());
  if (N == 96) return f(std::integral_constant<int, 96>());
  if (N == 128) return f(std::integral_constant<int, 128>());
  if (N == 192) return f(std::integral_constant<int, 192>());
  return "the head size must be 32, 64, 96, 128 or 192";
}

template <class E>
const char* run_forward(WKV7_FORWARD) {
  const Inputs<E> in = {{(const E*)r, (const E*)w, (const E*)k, (const E*)v, (const E*)a, (const E*)b, nullptr}};
  return for_head_size(B, T, H, N, [&](auto n) {
    constexpr int SHARED = 6 * TILE * n * (sizeof(float) + sizeof(E));
    return launch(forward<n, E>, B * H, n, SHARED, stream, T, H, in, s0, (E*)y, (float*)kept, sT);
  });
}

template <class E>
const char* run_backward(WKV7_BACKWARD) {
  const Inputs<E> in = {{(const E*)r, (const E*)w, (const E*)k, (const E*)v, (const E*)a, (const E*)b, (const E*)dy}};
  return for_head_size(B, T, H, N, [&](auto n) {
    constexpr int SHARED = (11 * TILE * n + 10 * (n / 16) * n) * sizeof(float) + 7 * TILE * n * sizeof(E);
    return launch(backward<n, E>, B * H, 2 * n, SHARED, stream, T, H, in, s0, (const float*)kept, dsT, (E*)dr, (E*)dw, (E*)dk,
                  (E*)dv, (E*)da, (E*)db, ds0);
  });
}

}  // namespace

#define GIVEN B, T, H, N, r, w, k, v, a, b, s0
#define GIVEN_BACKWARD GIVEN, kept, dy, dsT, dr, dw, dk, dv, da, db, ds0, stream
const char* wkv7_cuda_forward(WKV7_FORWARD) { return run_forward<bf16>(GIVEN, y, kept, sT, stream); }
const char* wkv7_cuda_backward(WKV7_BACKWARD) { return run_backward<bf16>(GIVEN_BACKWARD); }
const char* wkv7_cuda_fp32_forward(WKV7_FORWARD) { return run_forward<float>(GIVEN, y, kept, sT, stream); }
const char* wkv7_cuda_fp32_backward(WKV7_BACKWARD) { return run_backward<float>(GIVEN_BACKWARD); }
