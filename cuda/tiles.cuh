// What the chunked kernels are made of: 16 x 16 blocks in registers, products of them on tensor cores, matrices and
// states in shared and in global memory, the order of the chunks. A block works on one head of one sequence, with a
// warp for every 16 of the N channels, through chunks of C = 16 tokens.
// Threads  Lane (g, q) = (lane / 4, lane % 4) of warp i holds, of a 16 x 16 result, rows g and g + 8, columns 2q, 2q+1,
//          2q+8, 2q+9. Of a state (row = value, column = key) and its gradient a warp has the 16 rows 16i...
// Products are all C += X Y^T of 16 x 16 blocks, X and Y in the registers of the A operand (`Block`). A result,
//          rounded, is such an operand again.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "primitives.cuh"

namespace tiles {

constexpr int C = 16;      // tokens in a chunk
constexpr int GROUP = 64;  // tokens between two states that the forward keeps
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
// rows of a tile lie in different banks. `block`, a multiple of 16, is the part of the column that is known when
// compiled or the same in all lanes: the rest is computed once for all blocks of a row.
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

__device__ inline void scale_columns(Sum& c, const float* by, const Thread& at) {
  for (int half = 0; half < 2; ++half) {
    const float2 d = *reinterpret_cast<const float2*>(by + 8 * half + 2 * at.q);
    c[half][0] *= d.x, c[half][1] *= d.y, c[half][2] *= d.x, c[half][3] *= d.y;
  }
}

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

// Starts copying a chunk's tiles: the first `count` of the tensors x whose first number of this head is at `start`, but
// those in `skip`.
template <int N, int TENSORS>
__device__ inline void fetch(bf16 (*tile)[C * N], const bf16* const (&x)[TENSORS], int count, int chunk, int64_t start,
                             int stride, unsigned skip = 0) {
  const int thread = thread_index();
  const int64_t from = start + int64_t{chunk * C} * stride + piece<N>(stride, thread);
#pragma unroll 2
  for (int i = 0; i < count; ++i)
    if (!(skip >> i & 1)) copy_tile<N>(tile[i], x[i] + from, thread);
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
// Two lanes swap halves first, so that a lane writes 8 bytes and four lanes a whole sector of 32.
__device__ inline void write(bf16* to, int stride, const Block& x, const Thread& at) {
  const int odd = at.q % 2;
  to += int64_t{at.g} * stride + 16 * at.warp + 8 * odd + 2 * (at.q - odd);
  for (int row = 0; row < 2; ++row) {
    const uint32_t other = shuffle_xor(odd ? x[row] : x[row + 2], 1);
    const uint2 both = odd ? make_uint2(other, x[row + 2]) : make_uint2(x[row], other);
    *reinterpret_cast<uint2*>(to + int64_t{8 * row} * stride) = both;
  }
}

// The order of the chunks. A group of n chunks takes 2n - 1 steps: forwards through chunks 0 to n - 2, for the states,
// then backwards from chunk n - 1. After the last step comes the next group's first.
struct Order {
  int chunks, groups;
  __device__ explicit Order(int T) : chunks(T / C), groups((chunks + GROUP / C - 1) / (GROUP / C)) {}
  __device__ int size(int group) const { return group < groups - 1 ? GROUP / C : chunks - group * (GROUP / C); }
  __device__ int chunk(int n, int step) const { return step < n ? step : 2 * n - 2 - step; }
};

// Where the state at the start of chunk i of a group lies. The slot of a group's chunk 3 is free when the next group's
// first state is fetched, and is that group's slot of chunk 0.
__device__ inline int slot(int group, int i) { return group % 2 ? GROUP / C - 1 - i : i; }

// Starts copying what a step of a group needs; the states are found without the tensors in `skip`.
template <int N, int TENSORS>
__device__ inline void fetch_step(bf16 (*tile)[C * N], bf16 (*state)[N * N], const bf16* const (&x)[TENSORS],
                                  unsigned skip, const bf16* kept, const Order& order, int group, int step,
                                  int64_t start, int stride) {
  int n = order.size(group);
  if (step > 2 * n - 2) step = 0, n = GROUP / C, --group;
  if (group >= 0) {
    fetch<N>(tile, x, TENSORS, group * (GROUP / C) + order.chunk(n, step), start, stride, step < n - 1 ? skip : 0);
    if (step == 0)
      copy_state<N>(state[slot(group, 0)], kept, int64_t{blockIdx.x} * order.groups + group, thread_index());
  }
  copy_commit();
}

// For the launchers: null, or why these sizes cannot be.
inline const char* refuse(int64_t B, int64_t T, int64_t H, int64_t N, std::initializer_list<int64_t> head_sizes) {
  if (std::find(head_sizes.begin(), head_sizes.end(), N) == head_sizes.end())
    return "not one of this kernel's head sizes";
  if (T < C || T % C || T > INT32_MAX - GROUP) return "T must be a multiple of 16, above 0 and below 2^31";
  if (B < 1 || H < 1 || B > INT32_MAX / H || H * N > INT32_MAX) return "B H and H N must be above 0 and below 2^31";
  return nullptr;
}

inline const bf16* input(const void* x) { return static_cast<const bf16*>(x); }
inline bf16* output(void* x) { return static_cast<bf16*>(x); }

}  // namespace tiles
