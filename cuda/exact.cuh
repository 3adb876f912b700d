// What the exact kernels share: token by token in fp32, a state (N, N) in the registers of a block. Eight lanes share
// ROWS rows of it; lane c of them holds columns 32 m + 4 c .. + 3. So a number read from shared memory serves ROWS or 4
// FMA: with a thread a row it would serve one, and reading would set the pace.
#pragma once

#include "primitives.cuh"

namespace exact {

__device__ inline float number(bf16 x) { return to_float(x); }
__device__ inline float number(float x) { return x; }
__device__ inline void store(bf16* to, float x) { *to = to_bf16(x); }
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void load4(float* to, const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// `tokens` rows of WIDTH numbers, `stride` apart, from global memory, asynchronously.
template <int WIDTH, class E>
__device__ inline void fetch_rows(E* to, const E* from, int tokens, int64_t stride) {
  constexpr int PIECE = 16 / sizeof(E), PIECES = WIDTH / PIECE;
  for (int i = threadIdx.x; i < tokens * PIECES; i += blockDim.x)
    copy_async(to + i * PIECE, from + i / PIECES * stride + i % PIECES * PIECE);
}

// This thread's part of a state; `from` and `to` are its first number.
template <int N, int ROWS>
__device__ inline void load_state(float (&S)[ROWS][N / 8], const float* from) {
  for (int i = 0; i < ROWS * N / 8; i++) S[i / (N / 8)][i % (N / 8)] = 0;
  for (int i = 0; from && i < ROWS * N / 32; i++)
    load4(&S[i / (N / 32)][i % (N / 32) * 4], from + i / (N / 32) * N + i % (N / 32) * 32);
}

template <int N, int ROWS>
__device__ inline void store_state(float* to, const float (&S)[ROWS][N / 8]) {
  for (int p = 0; p < ROWS; p++)
    for (int j = 0; j < N / 8; j += 4)
      *reinterpret_cast<float4*>(to + p * N + 8 * j) = make_float4(S[p][j], S[p][j + 1], S[p][j + 2], S[p][j + 3]);
}

}  // namespace exact
