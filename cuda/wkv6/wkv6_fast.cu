// WKV-6 on tensor cores, forward and backward (--fast_cuda), in chunks of C = 16 tokens. Per sequence and head, state S
// (row = value, column = key), d = exp(-exp(w)):
//     y_t = S_{t-1} r_t + (sum_n r_n u_n k_n) v_t     S_t = S_{t-1} diag(d_t) + v_t k_t^T
// In a chunk, with S the state at its start, G the gradient of the state at its end, P the product of its decays and
// between(s, t) the product of those after s and before t (Gated Linear Attention, arXiv 2312.06635, has the chunks):
//     R_t = r_t between(start, t)    K_s = k_s between(s, end)    A_ts = sum_n r_t k_s between(s, t), s < t; A_tt the bonus
//     Y  = R S^T + A V               S <- S diag(P) + V^T K
//     dV = K G^T + A^T dY            G <- G diag(P) + dY^T R      dA = tril(dY V^T)      dR = dY S      dK = V G
// w has no bounds, so no product of decays may be divided by another, and a difference of sums of their logarithms loses
// digits. Two tokens s < t lie in the two halves of exactly one aligned block of 2, 4, 8 or 16 tokens: between(s, t) is
// the product after s in its half times the product before t in its own. Both are at most 1 and products of at most 7
// decays: from r of the right and k of the left halves times these, one matrix X for each size of block ("level"), X X^T
// has all of A whose pairs the level's blocks part, and dX = (dA + dA^T of these pairs) X. In blocks of 2 nothing lies
// between: these pairs and the bonus are fp32 sums of products, without tensor cores.
// Tensors  wkv6.h.
// Threads  tiles.cuh. One block a head, N / 16 warps; the next chunk is copied meanwhile. Scaled tiles are N x C, row =
//          channel, so that a lane has 2 channels of 4 tokens, 2q, 2q+1, 2q+8, 2q+9: products along the tokens are 2
//          shuffles each. A warp scales its own 16 channels; of the gradients of r, k, w it has the same.
//   forward   2 barriers a chunk: tiles are there | scaled. A is ready for A V at the next chunk's first.
//   backward  from the last group of 64 tokens to the first: its states forwards from the kept one, into shared memory
//             (3 chunks, 2 barriers each), then its chunks backwards: tiles | scaled | A and dA are there.
// Numerics bf16 operands, fp32 sums; S, G, decays, the gradient of log d (a sum in which nothing cancels) and du in fp32.
// Limits   N 64 (sm_80 and newer) or 128 (223 KB of shared memory a block: sm_90, sm_100); T a multiple of 16.
// Cost     5 tensors forward, 9 backward, 9/4 for the recomputed states, the kept states each time (N / 64 of a tensor).
//          At B 64, T 1024, H 12, N 64 (a tensor is 101 MB, 23 us at 4.3 TB/s): 0.14 and 0.29 ms, the memory bound.
//          Products 2 (2 N + 5 C) N flops a token forward, 2 (6 N + 10 C) N backward: 0.04 and 0.1 ms at 400 TFLOP/s.
#include "../launch.cuh"
#include "../tiles.cuh"
#include "wkv6.h"

namespace wkv6 {

using namespace tiles;

namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int FORWARD_BLOCKS = 5, BACKWARD_BLOCKS = 2;  // 164 KB of shared memory
#else
constexpr int FORWARD_BLOCKS = 6, BACKWARD_BLOCKS = 3;
#endif
constexpr int LEVELS = 3;  // blocks of 4, 8, 16 tokens, halves of 2, 4, 8

struct Inputs {
  const bf16* x[5];  // r k v w dy
  const float* u;
  int T, H;
};

struct Tiles {
  const bf16 *R, *K, *V, *W, *DY;  // as they come: row = token
};

template <int N>
struct Scaled {  // N x C, row = channel
  bf16 level[LEVELS][N * C], R[N * C], K[N * C];
  bf16 A[C * C];  // row = the later token
  float P[N], u[N];
  float bonus[N / 16][C], before[N / 16][C / 2];  // each warp's part of A's diagonal, and left of it in odd rows
};

// exp(w), finite where w is not NaN: times a decay of 0 it must be 0.
__device__ inline float rate(float w) {
  const float x = fast_exp2(LOG2_E * w);
  return x > 1e30f ? 1e30f : x;
}

__device__ inline float decay(float w) { return fast_exp2(-LOG2_E * rate(w)); }

// Whether a token with this half of the chunk is in the right half of its block of this level.
__device__ inline bool is_right(int level, int half, const Thread& at) {
  return level == 2 ? half : at.q >> level & 1;
}

// Of one of the lane's channels the products of the decays before and after each of its tokens, [half][e], in the token's
// aligned block of 2 tokens, then 4, 8, 16.
struct Products {
  float before[2][2], after[2][2], block[2];
  __device__ Products(const Block& w, int row) {
    for (int half = 0; half < 2; ++half) {
      before[half][0] = after[half][1] = 1.f;
      before[half][1] = decay(element(w, row, half, 0));
      after[half][0] = decay(element(w, row, half, 1));
      block[half] = after[half][0] * before[half][1];
    }
  }
  __device__ void next(int level, const Thread& at) {  // from the halves of this level's blocks to all of them
    float other[2];
    for (int half = 0; half < 2; ++half) other[half] = level == 2 ? block[!half] : shuffle_xor(block[half], 1 << level);
    for (int half = 0; half < 2; ++half) {
      const bool right = is_right(level, half, at);
      for (int e = 0; e < 2; ++e) before[half][e] *= right ? other[half] : 1.f, after[half][e] *= right ? 1.f : other[half];
      block[half] *= other[half];
    }
  }
};
// x of one row of the lane's channels, scaled.
__device__ inline void put_scaled(bf16* to, uint32_t low, uint32_t high, int row, const float (&by)[2][2], const Thread& at) {
  to += (16 * at.warp + 8 * row) * C;
  const int own = offset<C>(at.g, 2 * at.q);
  pair_at(to + own) = pack_bf16(low_bf16(low) * by[0][0], high_bf16(low) * by[0][1]);
  pair_at(to + (own ^ 8)) = pack_bf16(low_bf16(high) * by[1][0], high_bf16(high) * by[1][1]);
}

// K and P of the warp's channels: all that the state asks for.
template <int N>
__device__ inline void scale_keys(Scaled<N>& to, const Block& k, const Block& w, const Thread& at) {
  for (int row = 0; row < 2; ++row) {
    Products by(w, row);
    for (int level = 0; level < LEVELS; ++level) by.next(level, at);
    put_scaled(to.K, k[row], k[row + 2], row, by.after, at);
    if (at.q == 0) to.P[16 * at.warp + at.g + 8 * row] = by.block[0];
  }
}

template <int N>
__device__ inline void scale(Scaled<N>& to, const Tiles& tile, const Thread& at) {
  Block r, k, w;
  load_transpose<N>(r, tile.R, 0, 16 * at.warp, at);
  load_transpose<N>(k, tile.K, 0, 16 * at.warp, at);
  {
    float x[2] = {};  // of each half
    for (int row = 0; row < 2; ++row)
      for (int half = 0; half < 2; ++half) x[half] += element(r, row, half, 1) * element(k, row, half, 0);
    const float before = sum<16, 4>(x);
    if (at.g % 4 == 0) to.before[at.warp][at.g + at.q] = before;
  }
  {
    float x[4] = {};  // of token e of each half
    for (int row = 0; row < 2; ++row) {
      const float u = to.u[16 * at.warp + at.g + 8 * row];
      for (int i = 0; i < 4; ++i) x[i] += u * element(r, row, i / 2, i % 2) * element(k, row, i / 2, i % 2);
    }
    const float bonus = sum<16, 4>(x);
    if (at.g % 2 == 0) to.bonus[at.warp][2 * at.g + at.q] = bonus;
  }
  load_transpose<N>(w, tile.W, 0, 16 * at.warp, at);
  for (int row = 0; row < 2; ++row) {
    Products by(w, row);
    for (int level = 0; level < LEVELS; ++level) {
      float own[2][2];
      uint32_t x[2];
      for (int half = 0; half < 2; ++half) {
        const bool right = is_right(level, half, at);
        x[half] = right ? r[row + 2 * half] : k[row + 2 * half];
        for (int e = 0; e < 2; ++e) own[half][e] = right ? by.before[half][e] : by.after[half][e];
      }
      put_scaled(to.level[level], x[0], x[1], row, own, at);
      by.next(level, at);
    }
    put_scaled(to.R, r[row], r[row + 2], row, by.before, at);
    put_scaled(to.K, k[row], k[row + 2], row, by.after, at);
    if (at.q == 0) to.P[16 * at.warp + at.g + 8 * row] = by.block[0];
  }
}

// Whether the tokens of pair i of a Block, row and column, lie in the two halves of a block of this level.
__device__ inline bool parted(int level, int i, const Thread& at) {
  return ((at.g + i % 2 * 8) ^ (2 * at.q + i / 2 * 8)) >> (level + 1) == 1;
}

// A, by the first four warps. Above its diagonal it is zero from the start.
template <int N>
__device__ inline void pairs(Scaled<N>& scaled, const Thread& at) {
  if (at.warp < LEVELS) {
    Sum c = {};
    Block x;
#pragma unroll 2
    for (int j = 0; j < N; j += 16) {
      load_transpose<C>(x, scaled.level[at.warp], j, 0, at);
      add_product(c, x, x);
    }
    to_block(x, c);
    for (int i = 0; i < 4; ++i) {
      const int t = at.g + i % 2 * 8, s = 2 * at.q + i / 2 * 8;
      if (t > s && parted(at.warp, i, at)) pair_at(scaled.A + offset<C>(t, s)) = x[i];
    }
  } else if (at.warp == LEVELS && at.lane < C) {
    const int t = at.lane, pair = t / 8 * 4 + t % 8 / 2;
    float bonus = 0.f, before = 0.f;
    for (int warp = 0; warp < N / 16; ++warp) {
      bonus += scaled.bonus[warp][pair + (t / 8 + t % 2) * 4];  // [half][e][q]
      before += scaled.before[warp][pair];
    }
    pair_at(scaled.A + offset<C>(t, t & ~1)) = t % 2 ? pack_bf16(before, bonus) : pack_bf16(bonus, 0.f);
  }
}

template <int N>
__device__ inline void begin(Scaled<N>& scaled, const float* u, int head) {  // a barrier must follow
  const int thread = thread_index();
  if (thread < N) scaled.u[thread] = u[head * N + thread];
  if (thread < C * C / 2) pair_at(scaled.A + 2 * thread) = 0;
}

// S to the chunk's end. v: the warp's values, times tokens.
template <int N>
__device__ inline void step(Sum& S, const Block& v, const Scaled<N>& scaled, int j, const Thread& at) {
  Block x;
  scale_columns(S, scaled.P + 16 * j, at);
  load<C>(x, scaled.K, 16 * j, 0, at);
  add_product(S, v, x);
}

template <int N>
struct ForwardMemory {
  bf16 tile[2][4][C * N];
  Scaled<N> scaled;
};

template <int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? FORWARD_BLOCKS : 2)
    forward(const __grid_constant__ Inputs in, const float* s0, bf16* y, bf16* kept, float* sT) {
  auto& shared = *reinterpret_cast<ForwardMemory<N>*>(shared_memory());
  auto& scaled = shared.scaled;
  const int head = blockIdx.x, chunks = in.T / C, groups = (chunks + GROUP / C - 1) / (GROUP / C);
  const int stride = in.H * N;  // from token to token
  const int64_t start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  auto fetch = [&](int chunk) {
    const int thread = thread_index();
    const int64_t from = start + int64_t{chunk * C} * stride + piece<N>(stride, thread);
    if (chunk < chunks)
#pragma unroll 1
      for (int i = 0; i < 4; ++i) copy_tile<N>(shared.tile[chunk % 2][i], in.x[i] + from, thread);
    copy_commit();
  };

  Sum S[N / 16], Y = {};
  Block v = {};
  auto finish = [&](int chunk) {  // a barrier after its pairs()
    const Thread at;
    Block x;
    load<C>(x, scaled.A, 0, 0, at);
    add_product(Y, x, v);
    to_block(x, Y);
    write(y + start + int64_t{chunk * C} * stride, stride, x, at);
  };
  start_state<N>(S, s0, head);
  begin<N>(scaled, in.u, head % in.H);
  fetch(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Thread at;
    copy_wait<0>();
    sync_block();  // the tiles are there, and nobody needs those of the chunk before any more
    fetch(chunk + 1);
    if (chunk > 0) finish(chunk - 1);
    if (chunk % (GROUP / C) == 0) write_state<N>(kept, int64_t{head} * groups + chunk / (GROUP / C), S);
    auto& x = shared.tile[chunk % 2];
    const Tiles tile = {x[0], x[1], x[2], x[3], nullptr};
    scale<N>(scaled, tile, at);
    sync_block();
    pairs<N>(scaled, Thread());
    const Thread now;
    load_transpose<N>(v, tile.V, 0, 16 * now.warp, now);
    FOR_ELEMENTS Y[half][2 * row + e] = 0.f;
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      Block s, r;
      to_block(s, S[j]);
      load_transpose<C>(r, scaled.R, 16 * j, 0, now);
      add_product(Y, r, s);
      step<N>(S[j], v, scaled, j, now);
    }
  }
  sync_block();
  finish(chunks - 1);
  write_state<N>(sT, head, S);
}

template <int N>
struct BackwardMemory {
  bf16 tile[2][5][C * N];
  Scaled<N> scaled;
  bf16 state[GROUP / C][N * N];  // at the chunks' starts; an odd group has its in reverse order
  bf16 G[N * N];
  bf16 dA[C * C];                   // + its transpose
  float d_bonus[C], d_before[C];    // of A's diagonal, and left of it in odd rows
};

// dA, by one warp.
template <int N>
__device__ inline void pair_gradients(BackwardMemory<N>& shared, const Tiles& tile, const Thread& at) {
  Sum lower = {}, upper = {};
  Block v, dy;
#pragma unroll 2
  for (int j = 0; j < N; j += 16) {
    load<N>(v, tile.V, 0, j, at);
    load<N>(dy, tile.DY, 0, j, at);
    add_product(lower, dy, v);
    add_product(upper, v, dy);
  }
  FOR_ELEMENTS {
    const int t = at.g + 8 * row, s = 8 * half + 2 * at.q + e;
    float& x = lower[half][2 * row + e];
    if (t == s) shared.d_bonus[t] = x;
    if (t == s + 1) shared.d_before[t] = x;
    if (t < s) x = upper[half][2 * row + e];
  }
  to_block(v, lower);
  store<C>(shared.dA, 0, 0, v, at);
}

// Gradient of log d from what passes tokens: x of token (half, e) passed all tokens of its block before it (`before`: it
// is r's) or after it (k's). A token's share comes from the other one of its pair at once, from the other pair of its
// four, the other four of its eight and the other eight in `finish`.
struct Passed {
  Elements d_log;
  float pair[2][2], four[2][2], eight[2][2];  // what the own pair, four, eight sends
  __device__ void add(float x, bool before, int block, int row, int half, int e, const Thread& at) {
    if (block > 1) d_log[row][half][!e] += before == (e == 1) ? x : 0.f;
    if (block > 2) pair[row][half] += before == (at.q & 1) ? x : 0.f;
    if (block > 4) four[row][half] += before == (at.q >> 1) ? x : 0.f;
    if (block > 8) eight[row][half] += before == half ? x : 0.f;
  }
  __device__ void finish(const float (&all)[2]) {  // all: what passes the whole chunk
    for (int row = 0; row < 2; ++row) {
      for (int half = 0; half < 2; ++half) {
        four[row][half] += shuffle_xor(four[row][half], 1);
        eight[row][half] += shuffle_xor(eight[row][half], 1);
        eight[row][half] += shuffle_xor(eight[row][half], 2);
      }
      for (int half = 0; half < 2; ++half) {
        const float x = all[row] + eight[row][!half] + shuffle_xor(four[row][half], 2) + shuffle_xor(pair[row][half], 1);
        for (int e = 0; e < 2; ++e) d_log[row][half][e] += x;
      }
    }
  }
};

// With dA and G in shared memory: the gradients of r, k and log d in the warp's channels, channel times token; adds to du.
template <int N>
__device__ inline void keys(Sum& dr, Sum& dk, Passed& passed, float (&du)[2],
                            const BackwardMemory<N>& shared, const bf16* state, const Tiles& tile) {
  const Thread at;
  const auto& scaled = shared.scaled;
  float all[2] = {0.f, 0.f};  // column sums of S * G
  Sum to_r = {}, to_k = {};  // of pairs
#pragma unroll 2
  for (int j = 0; j < N; j += 16) {
    Block s, g, x;
    load_transpose<N>(s, state, j, 16 * at.warp, at);
    load<N>(x, tile.DY, 0, j, at);
    add_product(dr, s, x);
    load_transpose<N>(g, shared.G, j, 16 * at.warp, at);
    load<N>(x, tile.V, 0, j, at);
    add_product(dk, g, x);
    for (int i = 0; i < 4; ++i) all[i % 2] += low_bf16(s[i]) * low_bf16(g[i]) + high_bf16(s[i]) * high_bf16(g[i]);
  }
  for (int row = 0; row < 2; ++row)
    for (int by = 1; by < 4; by *= 2) all[row] += shuffle_xor(all[row], by);
  Block r, k;
  load_transpose<N>(r, tile.R, 0, 16 * at.warp, at);
  load_transpose<N>(k, tile.K, 0, 16 * at.warp, at);
  {
    Block w;
    load_transpose<N>(w, tile.W, 0, 16 * at.warp, at);
    Products by[2] = {Products(w, 0), Products(w, 1)};
    for (int level = 0; level < LEVELS; ++level) {
      Block x, pairs;
      Sum c = {};
      load<C>(x, scaled.level[level], 16 * at.warp, 0, at);
      load<C>(pairs, shared.dA, 0, 0, at);
      for (int i = 0; i < 4; ++i) pairs[i] = parted(level, i, at) ? pairs[i] : 0;
      add_product(c, x, pairs);
      FOR_ELEMENTS {
        const bool right = is_right(level, half, at);
        const float to = c[half][2 * row + e] * (right ? by[row].before[half][e] : by[row].after[half][e]);
        to_r[half][2 * row + e] += right ? to : 0.f;
        to_k[half][2 * row + e] += right ? 0.f : to;
        const float own = right ? element(r, row, half, e) : element(k, row, half, e);
        passed.add(own * to, right, 2 << level, row, half, e, at);
      }
      for (int row = 0; row < 2; ++row) by[row].next(level, at);
    }
    for (int row = 0; row < 2; ++row) all[row] *= by[row].block[0];
    FOR_ELEMENTS {
      const float from_r = dr[half][2 * row + e] * by[row].before[half][e];
      const float from_k = dk[half][2 * row + e] * by[row].after[half][e];
      passed.add(element(r, row, half, e) * from_r, true, 16, row, half, e, at);
      passed.add(element(k, row, half, e) * from_k, false, 16, row, half, e, at);
      dr[half][2 * row + e] = from_r + to_r[half][2 * row + e];
      dk[half][2 * row + e] = from_k + to_k[half][2 * row + e];
    }
  }
  for (int half = 0; half < 2; ++half) {
    const int t = 8 * half + 2 * at.q;
    const float before = shared.d_before[t + 1];
    for (int row = 0; row < 2; ++row) {
      const float u = scaled.u[16 * at.warp + at.g + 8 * row];
      dr[half][2 * row + 1] += before * element(k, row, half, 0);
      dk[half][2 * row] += before * element(r, row, half, 1);
      for (int e = 0; e < 2; ++e) {
        const float to_r = shared.d_bonus[t + e] * element(k, row, half, e);
        dr[half][2 * row + e] += u * to_r;
        dk[half][2 * row + e] += u * shared.d_bonus[t + e] * element(r, row, half, e);
        du[row] += to_r * element(r, row, half, e);
      }
    }
  }
  passed.finish(all);
}

template <int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? BACKWARD_BLOCKS : 1)
    backward(const __grid_constant__ Inputs in, const bf16* kept, const float* dsT, bf16* dr, bf16* dk, bf16* dv,
             bf16* dw, float* du, float* ds0) {
  auto& shared = *reinterpret_cast<BackwardMemory<N>*>(shared_memory());
  auto& scaled = shared.scaled;
  const int head = blockIdx.x, stride = in.H * N;
  const int64_t start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  const Order order(in.T);

  auto fetch = [&](int group, int step, int stage) {
    int n = order.size(group);
    if (step > 2 * n - 2) step = 0, n = GROUP / C, --group;
    if (group >= 0) {
      const int thread = thread_index(), chunk = group * (GROUP / C) + order.chunk(n, step);
      const int64_t from = start + int64_t{chunk * C} * stride + piece<N>(stride, thread);
#pragma unroll 1
      for (int i = 0; i < 5; ++i)
        if (step >= n - 1 || (i != 0 && i != 4))  // the states do without r and dy
          copy_tile<N>(shared.tile[stage][i], in.x[i] + from, thread);
      if (step == 0) copy_state<N>(shared.state[slot(group, 0)], kept, int64_t{head} * order.groups + group, thread);
    }
    copy_commit();
  };

  Sum G[N / 16];
  float du_own[2] = {0.f, 0.f};
  start_state<N>(G, dsT, head);
  begin<N>(scaled, in.u, head % in.H);
  int stage = 0;
  fetch(order.groups - 1, 0, stage);
  for (int group = order.groups - 1; group >= 0; --group) {
    const int n = order.size(group);
    Sum S[N / 16];
    for (int i = 0; i < n - 1; ++i, stage ^= 1) {
      const Thread at;
      copy_wait<0>();
      sync_block();
      fetch(group, i + 1, stage ^ 1);
      auto& x = shared.tile[stage];
      if (i == 0) load_state<N>(S, shared.state[slot(group, 0)], at);
      Block k, v, w;
      load_transpose<N>(k, x[1], 0, 16 * at.warp, at);
      load_transpose<N>(v, x[2], 0, 16 * at.warp, at);
      load_transpose<N>(w, x[3], 0, 16 * at.warp, at);
      scale_keys<N>(scaled, k, w, at);
      sync_block();
#pragma unroll
      for (int j = 0; j < N / 16; ++j) step<N>(S[j], v, scaled, j, at);
      store_state<N>(shared.state[slot(group, i + 1)], S, at);
    }
    for (int i = n - 1; i >= 0; --i, stage ^= 1) {
      const Thread at;
      copy_wait<0>();
      sync_block();
      fetch(group, 2 * n - 1 - i, stage ^ 1);
      auto& x = shared.tile[stage];
      const Tiles tile = {x[0], x[1], x[2], x[3], x[4]};
      auto put = [&](bf16* tensor, const Block& values, const Thread& at) {
        write(tensor + start + int64_t{(group * (GROUP / C) + i) * C} * stride, stride, values, at);
      };
      scale<N>(scaled, tile, at);
      sync_block();
      pairs<N>(scaled, at);
      if (at.warp == LEVELS) pair_gradients<N>(shared, tile, at);
      Block dy, values;
      Sum dV = {};
      load_transpose<N>(dy, tile.DY, 0, 16 * at.warp, at);
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        Block g;
        to_block(g, G[j]);
        store<N>(shared.G, 16 * at.warp, 16 * j, g, at);
        load_transpose<C>(values, scaled.K, 16 * j, 0, at);
        add_product(dV, values, g);
        scale_columns(G[j], scaled.P + 16 * j, at);
        load<C>(values, scaled.R, 16 * j, 0, at);
        add_product(G[j], dy, values);
      }
      sync_block();
      load_transpose<C>(values, scaled.A, 0, 0, at);
      add_product(dV, values, dy);
      to_block(values, dV);
      put(dv, values, at);
      Sum dR = {}, dK = {};
      Passed passed = {};
      keys<N>(dR, dK, passed, du_own, shared, shared.state[slot(group, i)], tile);
      const Thread now;
      Block w;
      load_transpose<N>(w, tile.W, 0, 16 * now.warp, now);
      FOR_ELEMENTS passed.d_log[row][half][e] *= -rate(element(w, row, half, e));
      sync_warp();  // what is now overwritten, the warp's channels of what nobody else reads any more, was read
      to_block(values, dR);
      store<C>(scaled.level[0], 16 * now.warp, 0, values, now);
      to_block(values, dK);
      store<C>(scaled.level[1], 16 * now.warp, 0, values, now);
      to_block(values, passed.d_log);
      store<C>(scaled.level[2], 16 * now.warp, 0, values, now);
      sync_warp();
      load_transpose<C>(values, scaled.level[0], 16 * now.warp, 0, now);
      put(dr, values, now);
      load_transpose<C>(values, scaled.level[1], 16 * now.warp, 0, now);
      put(dk, values, now);
      load_transpose<C>(values, scaled.level[2], 16 * now.warp, 0, now);
      put(dw, values, now);
    }
  }
  const Thread at;
  for (int row = 0; row < 2; ++row) {
    for (int by = 1; by < 4; by *= 2) du_own[row] += shuffle_xor(du_own[row], by);
    if (at.q == 0) du[int64_t{head} * N + 16 * at.warp + at.g + 8 * row] = du_own[row];
  }
  if (ds0) write_state<N>(ds0, head, G);
}

}  // namespace
}  // namespace wkv6

const char* wkv6_fast_forward(WKV6_FORWARD) {
  using namespace wkv6;
  const Inputs inputs = {{input(r), input(k), input(v), input(w), nullptr}, u, static_cast<int>(T), static_cast<int>(H)};
  if (const char* why = refuse(B, T, H, N, {64, 128})) return why;
  return for_head_size<64, 128>(N, [&](auto n) {
    return launch(forward<n>, B * H, 2 * n, sizeof(ForwardMemory<n>), stream, inputs, s0, output(y), output(kept), sT);
  });
}

const char* wkv6_fast_backward(WKV6_BACKWARD) {
  using namespace wkv6;
  const Inputs inputs = {{input(r), input(k), input(v), input(w), input(dy)}, u, static_cast<int>(T), static_cast<int>(H)};
  if (const char* why = refuse(B, T, H, N, {64, 128})) return why;
  return for_head_size<64, 128>(N, [&](auto n) {
    return launch(backward<n>, B * H, 2 * n, sizeof(BackwardMemory<n>), stream, inputs, input(kept), dsT, output(dr),
                  output(dk), output(dv), output(dw), du, ds0);
  });
}
