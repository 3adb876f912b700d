// The chunked form of WKV-6. Per sequence and head, state S (row = value, column = key), d = exp(-exp(w)):
//     y_t = S_{t-1} r_t + (sum_n r_n u_n k_n) v_t     S_t = S_{t-1} diag(d_t) + v_t k_t^T
// In a chunk of C = 16 tokens, with S the state at its start, G the gradient of the state at its end, P the product of
// its decays and between(s, t) the product of those after s and before t (chunks: Yang et al., arXiv 2312.06635):
//     R_t = r_t between(start, t)    K_s = k_s between(s, end)    A_ts = sum_n r_t k_s between(s, t), s < t; A_tt bonus
//     Y  = R S^T + A V               S <- S diag(P) + V^T K
//     dV = K G^T + A^T dY            G <- G diag(P) + dY^T R      dA = tril(dY V^T)      dR = dY S      dK = V G
// w has no bounds, so no product of decays may be divided by another, and differences of sums of their logarithms lose
// digits. But two tokens s < t lie in the two halves of exactly one aligned block of 2, 4, 8 or 16 tokens, and there
// between(s, t) is the product after s in the left half times the product before t in the right one. Both are at most
// 1 and products of at most 7 decays. From r of the right and k of the left halves times these, one matrix X for each
// size of block ("level"), X X^T has A's pairs that the level's blocks part, and dX = (dA + dA^T of these pairs) X. In
// blocks of 2 nothing lies between: these pairs, and the bonus, are fp32 sums without tensor cores.
// The gradient of log d_t collects x dx of all that passes token t: R of later tokens, K of earlier ones, X of those
// beyond it in its half of a block, and the column sums of S * G times P. No sum is taken from another.
// Threads  tiles.cuh. Scaled tiles are N x C, row = channel. So of a warp's 16 channels a lane has channels g and g + 8
//          of 4 tokens, 2q, 2q+1, 2q+8, 2q+9: of the 4 steps of a product along the tokens 2 are shuffles.
#pragma once

#include "../tiles.cuh"

namespace wkv6 {

using namespace tiles;

constexpr int LEVELS = 3;  // blocks of 4, 8, 16 tokens, halves of 2, 4, 8

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

// Of one of the lane's channels the products of the decays before and after each of its tokens, [half][e], in the
// token's aligned block of 2 tokens, then 4, 8, 16.
struct Products {
  float before[2][2], after[2][2], block[2];
  __device__ void begin(const Block& w, int row) {
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
      for (int e = 0; e < 2; ++e) {
        before[half][e] *= right ? other[half] : 1.f;
        after[half][e] *= right ? 1.f : other[half];
      }
      block[half] *= other[half];
    }
  }
};
// x of one row of the lane's channels, scaled.
__device__ inline void put_scaled(bf16* to, uint32_t low, uint32_t high, int row, const float (&by)[2][2],
                                  const Thread& at) {
  to += (16 * at.warp + 8 * row) * C;
  const int own = offset<C>(at.g, 2 * at.q);
  pair_at(to + own) = pack_bf16(low_bf16(low) * by[0][0], high_bf16(low) * by[0][1]);
  pair_at(to + (own ^ 8)) = pack_bf16(low_bf16(high) * by[1][0], high_bf16(high) * by[1][1]);
}

// K and P of the warp's channels: all that the state asks for.
template <int N>
__device__ inline void scale_keys(Scaled<N>& to, const Block& k, const Block& w, const Thread& at) {
  for (int row = 0; row < 2; ++row) {
    Products by;
    by.begin(w, row);
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
  const Thread now;  // keeps fewer addresses alive
  for (int row = 0; row < 2; ++row) {
    Products by;
    by.begin(w, row);
    for (int level = 0; level < LEVELS; ++level) {
      float own[2][2];
      uint32_t x[2];
      for (int half = 0; half < 2; ++half) {
        const bool right = is_right(level, half, now);
        x[half] = right ? r[row + 2 * half] : k[row + 2 * half];
        for (int e = 0; e < 2; ++e) own[half][e] = right ? by.before[half][e] : by.after[half][e];
      }
      put_scaled(to.level[level], x[0], x[1], row, own, now);
      by.next(level, now);
    }
    put_scaled(to.R, r[row], r[row + 2], row, by.before, now);
    put_scaled(to.K, k[row], k[row + 2], row, by.after, now);
    if (now.q == 0) to.P[16 * now.warp + now.g + 8 * row] = by.block[0];
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

struct PairGradients {
  bf16 dA[C * C];             // + its transpose
  float bonus[C], before[C];  // dA's diagonal, and left of it in odd rows
};

// By one warp.
template <int N>
__device__ inline void pair_gradients(PairGradients& to, const Tiles& tile, const Thread& at) {
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
    if (t == s) to.bonus[t] = x;
    if (t == s + 1) to.before[t] = x;
    if (t < s) x = upper[half][2 * row + e];
  }
  to_block(v, lower);
  store<C>(to.dA, 0, 0, v, at);
}

// Gradient of log d from what passes tokens: of x of the lane's two tokens of a half, e = 0 and 1, each has passed all
// tokens of its block before it (`before`: x is r's) or after it (k's). A token's share comes from the other one of its
// pair at once, from the other pair of its four, the other four of its eight and the other eight in `finish`.
struct Passed {
  Elements d_log;
  float pair[2][2], four[2][2], eight[2][2];  // what the own pair, four, eight sends
  __device__ void add(const float (&x)[2], bool before, int block, int row, int half, const Thread& at) {
    d_log[row][half][0] += before ? x[1] : 0.f;
    d_log[row][half][1] += before ? 0.f : x[0];
    if (block > 2) pair[row][half] += before == (at.q & 1) ? x[0] + x[1] : 0.f;
    if (block > 4) four[row][half] += before == (at.q >> 1) ? x[0] + x[1] : 0.f;
  }
  __device__ void add_chunk(const float (&r)[2], const float (&k)[2], int row, int half, const Thread& at) {
    const float from_r = r[0] + r[1], from_k = k[0] + k[1];
    d_log[row][half][0] += r[1];
    d_log[row][half][1] += k[0];
    pair[row][half] += at.q & 1 ? from_r : from_k;
    four[row][half] += at.q >> 1 ? from_r : from_k;
    eight[row][half] = half ? from_r : from_k;
  }
  __device__ void finish(const float (&all)[2]) {  // all: what passes the whole chunk
    for (int row = 0; row < 2; ++row) {
      for (int half = 0; half < 2; ++half) {
        four[row][half] += shuffle_xor(four[row][half], 1);
        eight[row][half] += shuffle_xor(eight[row][half], 1);
        eight[row][half] += shuffle_xor(eight[row][half], 2);
      }
      for (int half = 0; half < 2; ++half) {
        float x = all[row] + eight[row][!half];
        x += shuffle_xor(four[row][half], 2) + shuffle_xor(pair[row][half], 1);
        for (int e = 0; e < 2; ++e) d_log[row][half][e] += x;
      }
    }
  }
};

// With dA and G in shared memory: the gradients of r, k and log d in the warp's channels, channel times token; adds to
// du.
template <int N>
__device__ inline void keys(Sum& dr, Sum& dk, Passed& passed, float (&du)[2], const Scaled<N>& scaled,
                            const PairGradients& d_pairs, const bf16* G, const bf16* state, const Tiles& tile) {
  Products by[2];
  {
    const Thread at;
    Block r, k, x, pairs;
    load_transpose<N>(x, tile.W, 0, 16 * at.warp, at);
    for (int row = 0; row < 2; ++row) by[row].begin(x, row);
    load_transpose<N>(r, tile.R, 0, 16 * at.warp, at);
    load_transpose<N>(k, tile.K, 0, 16 * at.warp, at);
    for (int half = 0; half < 2; ++half) {
      const int t = 8 * half + 2 * at.q;
      const float before = d_pairs.before[t + 1];
      for (int row = 0; row < 2; ++row) {
        const float u = scaled.u[16 * at.warp + at.g + 8 * row];
        for (int e = 0; e < 2; ++e) {
          const float bonus = d_pairs.bonus[t + e], own_r = element(r, row, half, e), own_k = element(k, row, half, e);
          dr[half][2 * row + e] = u * bonus * own_k + (e ? before * element(k, row, half, 0) : 0.f);
          dk[half][2 * row + e] = u * bonus * own_r + (e ? 0.f : before * element(r, row, half, 1));
          du[row] += bonus * own_r * own_k;
        }
      }
    }
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
      Sum c = {};
      load<C>(x, scaled.level[level], 16 * at.warp, 0, at);
      load<C>(pairs, d_pairs.dA, 0, 0, at);
      for (int i = 0; i < 4; ++i) pairs[i] = parted(level, i, at) ? pairs[i] : 0;
      add_product(c, x, pairs);
      for (int row = 0; row < 2; ++row)
        for (int half = 0; half < 2; ++half) {
          const bool right = is_right(level, half, at);
          float through[2];
          for (int e = 0; e < 2; ++e) {
            const float d = c[half][2 * row + e];
            through[e] = element(x, row, half, e) * d;
            dr[half][2 * row + e] += d * (right ? by[row].before[half][e] : 0.f);
            dk[half][2 * row + e] += d * (right ? 0.f : by[row].after[half][e]);
          }
          passed.add(through, right, 2 << level, row, half, at);
        }
      for (int row = 0; row < 2; ++row) by[row].next(level, at);
    }
  }
  const Thread at;
  float all[2] = {0.f, 0.f};  // column sums of S * G
  Sum dR = {}, dK = {};
#pragma unroll 1  // for registers
  for (int j = 0; j < N; j += 16) {
    Block s, g, x;
    load_transpose<N>(s, state, j, 16 * at.warp, at);
    load<N>(x, tile.DY, 0, j, at);
    add_product(dR, s, x);
    load_transpose<N>(g, G, j, 16 * at.warp, at);
    load<N>(x, tile.V, 0, j, at);
    add_product(dK, g, x);
    for (int i = 0; i < 4; ++i) all[i % 2] += low_bf16(s[i]) * low_bf16(g[i]) + high_bf16(s[i]) * high_bf16(g[i]);
  }
  Block r, k;
  load_transpose<N>(r, tile.R, 0, 16 * at.warp, at);
  load_transpose<N>(k, tile.K, 0, 16 * at.warp, at);
  for (int row = 0; row < 2; ++row)
    for (int half = 0; half < 2; ++half) {
      float from_r[2], from_k[2];
      for (int e = 0; e < 2; ++e) {
        const float to_r = dR[half][2 * row + e] * by[row].before[half][e];
        const float to_k = dK[half][2 * row + e] * by[row].after[half][e];
        dr[half][2 * row + e] += to_r;
        dk[half][2 * row + e] += to_k;
        from_r[e] = element(r, row, half, e) * to_r;
        from_k[e] = element(k, row, half, e) * to_k;
      }
      passed.add_chunk(from_r, from_k, row, half, at);
    }
  for (int row = 0; row < 2; ++row) {
    for (int lane = 1; lane < 4; lane *= 2) all[row] += shuffle_xor(all[row], lane);
    all[row] *= by[row].block[0];
  }
  passed.finish(all);
}

}  // namespace wkv6
