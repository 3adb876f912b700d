// The chunked form of WKV-7, the parts that the fast and the fused kernel share. A block works on one head of one
// sequence, with a warp for every 16 of the N channels, through chunks of C = 16 tokens. In a chunk, with S the state
// at its start (row = value, column = key), P_t the product of the decays up to token t and P = P_C
// (kernels of this kind: RWKV-7 paper, arXiv 2503.14456; the WY form of Yang et al., arXiv 2406.06484):
//     R = r P_t    A = a P_{t-1}    K = k / P_t    B = b / P_t
//     AB = stril(A B^T)   AK = stril(A K^T)   RK = tril(R K^T)   RB = tril(R B^T)   M = (1 - AB)^{-1}
//     Z = A S^T + AK V    U = M Z    Y = R S^T + RK V + RB U    S <- (S + V^T K + U^T B) diag(P)
// All decays lie in (0.545, 1), so P_16 > e^{-9.8} and neither P nor 1/P leaves the range of bf16.
// Threads  Lane (g, q) = (lane / 4, lane % 4) of warp i holds, of a 16 x 16 result, rows g and g + 8, columns 2q, 2q+1,
//          2q+8, 2q+9. Of S and its gradient a warp has the 16 rows (values) 16i.., of what is C x N the columns 16i...
// Products are all C += X Y^T of 16 x 16 blocks, X and Y in the registers of the A operand (`Block`). A result, rounded,
//          is such an operand again: S, Z, U and their gradients go from product to product without shared memory.
// Numerics bf16 operands, fp32 sums; S, its gradient, decays, the inverse (by substitution: the powers of AB grow like
//          binomials where keys repeat, and bf16 products of them are wrong) and the gradient of the decay in fp32.
#pragma once

#include "../primitives.cuh"

namespace wkv7 {

constexpr int C = 16;      // tokens in a chunk
constexpr int GROUP = 64;  // tokens between two states that the forward keeps

constexpr float DECAY_BOUND = 0.60653065971263342f;  // e^{-1/2}
constexpr float LOG2_E = 1.44269504088896341f;

using Block = uint32_t[4];      // 16 x 16, bf16: rows g, g+8 of columns 2q, 2q+1, then of columns 2q+8, 2q+9
using Sum = float[2][4];        // 16 x 16, fp32: columns 0..7, then 8..15; in each rows g, g, g+8, g+8
using Elements = float[2][2][2];  // of a 16 x 16 result this lane's: [row g or g+8][columns 0..7 or 8..15][2q or 2q+1]

struct Thread {
  int warp, lane, g, q;
  __device__ Thread() : warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4) {}
};

// Where row, column of a matrix in shared memory lies, in bf16. Segments of 8 are permuted in each row, so that the 8
// rows of a tile lie in different banks. `block`, a multiple of 16, is the part of the column that is known when compiled
// or the same in all lanes: the rest is computed once for all blocks of a row.
template <int COLUMNS>
__device__ inline int offset(int row, int column, int block = 0) {
  return (row * COLUMNS + (column ^ ((COLUMNS == 16 ? row / 4 % 2 : row % 8) * 8))) ^ block;
}

__device__ inline uint32_t& pair_at(bf16* p) { return *reinterpret_cast<uint32_t*>(p); }
__device__ inline const uint32_t& pair_at(const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); }

// The block at (row, column) of matrix X, or of its transpose: then (row, column) are still those in X.
template <int COLUMNS>
__device__ inline void load(Block& x, const bf16* X, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_tiles(x, X + row * COLUMNS + offset<COLUMNS>(lane % 16, lane / 16 * 8, column));
}

template <int COLUMNS>
__device__ inline void load_transpose(Block& x, const bf16* X, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_tiles_transposed(x, X + row * COLUMNS + offset<COLUMNS>(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8, column));
}

template <int COLUMNS>
__device__ inline void store(bf16* X, int row, int column, const Block& x, const Thread& at) {
  for (int i = 0; i < 4; ++i)
    pair_at(X + (row + i % 2 * 8) * COLUMNS + (offset<COLUMNS>(at.g, 2 * at.q, column) ^ (i / 2 * 8))) = x[i];
}

__device__ inline void add_product(Sum& c, const Block& x, const Block& y) {  // c += x y^T
  multiply_add(c[0], x, y[0], y[2]);
  multiply_add(c[1], x, y[1], y[3]);
}

__device__ inline void to_block(Block& x, const Sum& c) {
  for (int i = 0; i < 4; ++i) x[i] = pack_bf16(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// Element by element: the lane's row, half and e as in Elements.
#define FOR_ELEMENTS \
  for (int row = 0; row < 2; ++row) \
    for (int half = 0; half < 2; ++half) \
      for (int e = 0; e < 2; ++e)

__device__ inline float element(const Block& x, int row, int half, int e) {
  const uint32_t pair = x[row + 2 * half];
  return e ? high_bf16(pair) : low_bf16(pair);
}

__device__ inline void scale_columns(Sum& c, const float* by, const Thread& at) {
  FOR_ELEMENTS c[half][2 * row + e] *= by[8 * half + 2 * at.q + e];
}

__device__ inline void keep_lower(Sum& c, bool diagonal, const Thread& at) {
  FOR_ELEMENTS {
    const int above = 8 * half + 2 * at.q + e - (at.g + 8 * row);
    if (above > 0 || (above == 0 && !diagonal)) c[half][2 * row + e] = 0.f;
  }
}

__device__ inline float sigmoid(float w) { return fast_reciprocal(1.f + fast_exp2(-LOG2_E * w)); }

// Tiles are C x N matrices in shared memory, where row = token. The block copies one with one 16-byte piece a thread.
template <int N>
__device__ inline void copy_tile(bf16* tile, const bf16* global, int64_t token_stride) {
  const int row = threadIdx.x / (N / 8), column = threadIdx.x % (N / 8) * 8;
  copy_async(tile + offset<N>(row, column), global + row * token_stride + column);
}

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

// Of the warp's 16 channels: P_t, P_{t-1} and 1 / P_t, and P_C for the whole block.
template <int N>
struct Decays {
  Elements P, before, inverse;
  __device__ Decays(const bf16* w, float* P_end, const Thread& at) {
    Block pre;
    load<N>(pre, w, 0, 16 * at.warp);
    Elements log_d, log_P;  // to the base 2
    FOR_ELEMENTS {
      log_d[row][half][e] = -DECAY_BOUND * LOG2_E * sigmoid(element(pre, row, half, e));
      log_P[row][half][e] = log_d[row][half][e];
    }
    sum_down(log_P, at);
    FOR_ELEMENTS {
      P[row][half][e] = fast_exp2(log_P[row][half][e]);
      inverse[row][half][e] = fast_exp2(-log_P[row][half][e]);
      before[row][half][e] = fast_exp2(log_P[row][half][e] - log_d[row][half][e]);
      if (row == 1 && at.g == 7) P_end[16 * at.warp + 8 * half + 2 * at.q + e] = P[row][half][e];
    }
  }
};

template <int N>
__device__ inline void scale(bf16* tile, const Elements& by, const Thread& at) {  // the warp's 16 channels, in place
  Block x;
  load<N>(x, tile, 0, 16 * at.warp);
  for (int i = 0; i < 4; ++i)
    x[i] = pack_bf16(low_bf16(x[i]) * by[i % 2][i / 2][0], high_bf16(x[i]) * by[i % 2][i / 2][1]);
  sync_warp();  // all have read
  store<N>(tile, 0, 16 * at.warp, x, at);
}

enum { M, AK, RB, RK, M_REST, MATRICES };  // the matrices of a chunk; M + M_REST is M to 16 bits

// M = (1 - L)^{-1} for a strictly lower triangular L, by forward substitution: lane j finds column j.
__device__ inline void invert(bf16 (*matrix)[C * C], const float* L, const Thread& at) {
  const int j = at.lane % C;
  float x[C];
#pragma unroll
  for (int i = 0; i < C; ++i) {
    x[i] = i == j ? 1.f : 0.f;
#pragma unroll
    for (int s = 0; s < i; ++s) x[i] += L[i * C + s] * x[s];
    if (at.lane < C) {
      const bf16 first = to_bf16(x[i]);
      matrix[M][offset<C>(i, j)] = first;
      matrix[M_REST][offset<C>(i, j)] = to_bf16(x[i] - to_float(first));
    }
  }
}

// M, AK, RB, RK into `matrix`, one by each of the first four warps (without r: the first two). `room`: C x C floats.
template <int N, bool WITH_R>
__device__ inline void pair_matrices(bf16 (*matrix)[C * C], float* room, const bf16* R, const bf16* A, const bf16* K,
                                     const bf16* B, const Thread& at) {
  if (at.warp >= (WITH_R ? 4 : 2)) return;
  const bf16 *later = at.warp < RB ? A : R, *earlier = at.warp % 2 ? K : B;
  Sum c = {};
#pragma unroll
  for (int j = 0; j < N; j += 16) {
    Block x, y;
    load<N>(x, later, 0, j);
    load<N>(y, earlier, 0, j);
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

// What the state S at the chunk's start gives to Z^T and Y.
template <int N, bool WITH_Y>
__device__ inline void read_state(Sum& Z, Sum& Y, const Sum (&S)[N / 16], const bf16* R, const bf16* A) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    Block s, x;
    to_block(s, S[j]);
    load<N>(x, A, 0, 16 * j);
    add_product(Z, s, x);
    if (WITH_Y) {
      load<N>(x, R, 0, 16 * j);
      add_product(Y, x, s);
    }
  }
}

// u = z M^T, or z M. Where keys repeat, U is the small difference of large terms: z and M are taken to 16 bits.
template <bool TRANSPOSE>
__device__ inline void solve(Block& u, const Sum& z, const bf16 (*matrix)[C * C]) {
  Block first, rest, x;
  to_block(first, z);
  Sum c;
  FOR_ELEMENTS c[half][2 * row + e] = z[half][2 * row + e] - element(first, row, half, e);
  to_block(rest, c);
  TRANSPOSE ? load<C>(x, matrix[M], 0, 0) : load_transpose<C>(x, matrix[M], 0, 0);
  FOR_ELEMENTS c[half][2 * row + e] = 0.f;
  add_product(c, rest, x);
  add_product(c, first, x);
  TRANSPOSE ? load<C>(x, matrix[M_REST], 0, 0) : load_transpose<C>(x, matrix[M_REST], 0, 0);
  add_product(c, first, x);
  to_block(u, c);
}

// Completes Z^T and Y, and takes S to the chunk's end.
template <int N, bool WITH_Y>
__device__ inline void finish_chunk(Sum (&S)[N / 16], Sum& Z, Sum& Y, const bf16* K, const bf16* V, const bf16* B,
                                    const bf16 (*matrix)[C * C], const float* P_end, const Thread& at) {
  Block v, u, x;
  load_transpose<N>(v, V, 0, 16 * at.warp);
  load<C>(x, matrix[AK], 0, 0);
  add_product(Z, v, x);
  solve<true>(u, Z, matrix);
  if (WITH_Y) {
    load<C>(x, matrix[RK], 0, 0);
    add_product(Y, x, v);
    load<C>(x, matrix[RB], 0, 0);
    add_product(Y, x, u);
  }
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    load_transpose<N>(x, K, 0, 16 * j);
    add_product(S[j], v, x);
    load_transpose<N>(x, B, 0, 16 * j);
    add_product(S[j], u, x);
    scale_columns(S[j], P_end + 16 * j, at);
  }
}

}  // namespace wkv7
