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

#include <algorithm>
#include <initializer_list>

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
  __device__ Thread() : Thread(thread_index()) {}
  __device__ explicit Thread(int i) : warp(i / 32), lane(i % 32), g(lane / 4), q(lane % 4) {}
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
__device__ inline void load(Block& x, const bf16* X, int row, int column, const Thread& at) {
  load_tiles(x, X + row * COLUMNS + offset<COLUMNS>(at.lane % 16, at.lane / 16 * 8, column));
}

template <int COLUMNS>
__device__ inline void load_transpose(Block& x, const bf16* X, int row, int column, const Thread& at) {
  const int within = at.lane / 16 * 8 + at.lane % 8;
  load_tiles_transposed(x, X + row * COLUMNS + offset<COLUMNS>(within, at.lane / 8 % 2 * 8, column));
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

__device__ inline void to_block(Block& x, const Elements& c) {
  for (int i = 0; i < 4; ++i) x[i] = pack_bf16(c[i % 2][i / 2][0], c[i % 2][i / 2][1]);
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

__device__ inline void scale_columns(Sum& c, const volatile float* by, const Thread& at) {
  FOR_ELEMENTS c[half][2 * row + e] *= by[8 * half + 2 * at.q + e];
}

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
};

// Tiles are C x N matrices in shared memory, where row = token. The block copies one with one 16-byte piece a thread:
// from + offset of the chunk's first token + this thread's part.
template <int N>
__device__ inline int64_t piece(int stride, int thread) {
  return int64_t{thread / (N / 8)} * stride + thread % (N / 8) * 8;
}

template <int N>
__device__ inline void copy_tile(bf16* tile, const bf16* from, int thread) {
  copy_async(tile + offset<N>(thread / (N / 8), thread % (N / 8) * 8), from);
}

// Starts copying a chunk's tiles: the first `count` of the tensors x whose first number of this head is at `start`.
template <int N>
__device__ inline void fetch(bf16 (*tile)[C * N], const bf16* const (&x)[7], int count, int chunk, int64_t start, int stride,
                             unsigned skip = 0) {
  const int thread = thread_index();
  const int64_t from = start + int64_t{chunk * C} * stride + piece<N>(stride, thread);
#pragma unroll 1
  for (int i = 0; i < count; ++i)
    if (!(skip >> i & 1)) copy_tile<N>(tile[i], x[i] + from, thread);
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
  if (tile.R) scale<N>(tile.R, P, at);
  if (at.g == 7)
    for (int i = 0; i < 4; ++i) P_end[16 * at.warp + 8 * (i / 2) + 2 * at.q + i % 2] = decays.P(1, i / 2, i % 2);
}

enum { M, AK, RB, RK, M_REST, MATRICES };  // the matrices of a chunk; M + M_REST is M to 16 bits

// M = (1 - L)^{-1} for a strictly lower triangular L, by forward substitution: lane j finds column j.
__device__ inline void invert(bf16 (*matrix)[C * C], const volatile float* L, const Thread& at) {
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

// M, AK, RB, RK into `matrix`, one by each of the first four warps (without R: two). `room`: C x C floats.
template <int N>
__device__ inline void pair_matrices(bf16 (*matrix)[C * C], float* room, const Tiles& tile, const Thread& at) {
  if (at.warp >= (tile.R ? 4 : 2)) return;
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

// States in global memory, (N, N): `head` is the number of the state, `to` or `from` the first one.
template <int N>
__device__ inline void write_state(float* to, int64_t head, const Sum (&S)[N / 16]) {
  const Thread at;
  to += head * N * N + (16 * at.warp + at.g) * N + 2 * at.q;
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<float2*>(to + i % 2 * 8 * N + 16 * j + i / 2 * 8) =
          make_float2(S[j][i / 2][i % 2 * 2], S[j][i / 2][i % 2 * 2 + 1]);
}

template <int N>
__device__ inline void write_state(bf16* to, int64_t head, const Sum (&S)[N / 16]) {
  const Thread at;
  to += head * N * N + (16 * at.warp + at.g) * N + 2 * at.q;
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    Block s;
    to_block(s, S[j]);
    for (int i = 0; i < 4; ++i) pair_at(to + i % 2 * 8 * N + 16 * j + i / 2 * 8) = s[i];
  }
}

template <int N>
__device__ inline void start_state(Sum (&S)[N / 16], const float* from, int64_t head) {  // zeros if there is none
  const Thread at;
  const float* own = from + head * N * N + (16 * at.warp + at.g) * N + 2 * at.q;
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    FOR_ELEMENTS S[j][half][2 * row + e] = from ? own[8 * row * N + 16 * j + 8 * half + e] : 0.f;
}

// States in shared memory, (N, N) bf16; copy_state is asynchronous.
template <int N>
__device__ inline void copy_state(bf16* to, const bf16* from, int64_t head, int thread) {
#pragma unroll 1
  for (int i = thread * 8; i < N * N; i += 2 * N * 8) copy_async(to + offset<N>(i / N, i % N), from + head * N * N + i);
}

template <int N>
__device__ inline void store_state(bf16* to, const Sum (&S)[N / 16], const Thread& at) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    Block s;
    to_block(s, S[j]);
    store<N>(to, 16 * at.warp, 16 * j, s, at);
  }
}

template <int N>
__device__ inline void load_state(Sum (&S)[N / 16], const bf16* from, const Thread& at) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
    Block s;
    load<N>(s, from, 16 * at.warp, 16 * j, at);
    FOR_ELEMENTS S[j][half][2 * row + e] = element(s, row, half, e);
  }
}

// A C x N result in the registers of its warps, to the rows `stride` apart that begin at `to`.
__device__ inline void write(bf16* to, int stride, const Block& x, const Thread& at) {
  to += int64_t{at.g} * stride + 16 * at.warp + 2 * at.q;
  for (int i = 0; i < 4; ++i) pair_at(to + int64_t{i % 2 * 8} * stride + i / 2 * 8) = x[i];
}

// For the launchers: null, or why these sizes cannot be.
inline const char* refuse(int64_t B, int64_t T, int64_t H, int64_t N, std::initializer_list<int64_t> head_sizes) {
  if (std::find(head_sizes.begin(), head_sizes.end(), N) == head_sizes.end()) return "not one of this kernel's head sizes";
  if (T < C || T % C || T > INT32_MAX - GROUP) return "T must be a multiple of 16, above 0 and below 2^31";
  if (B < 1 || H < 1 || B > INT32_MAX / H || H * N > INT32_MAX) return "B H and H N must be above 0 and below 2^31";
  return nullptr;
}

inline const bf16* input(const void* x) { return static_cast<const bf16*>(x); }
inline bf16* output(void* x) { return static_cast<bf16*>(x); }

}  // namespace wkv7
