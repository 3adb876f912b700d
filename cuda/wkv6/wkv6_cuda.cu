// WKV-6 on a GPU, exact: token by token in fp32. Per sequence and head, state S (row = value, column = key):
//     y_t = S_{t-1} r_t + (sum_n r_n u_n k_n) v_t     S_t = S_{t-1} diag(d_t) + v_t k_t^T     d = exp(-exp(w))
// and with G_t = dL/dS_t, which comes from later tokens only, and q_t = dy_t v_t:
//     dv_t = G_t k_t + (sum_n r_n u_n k_n) dy_t       G_{t-1} = G_t diag(d_t) + dy_t r_t^T
//     dr = S_{t-1}^T dy + u k q     dk = G^T v + u r q     dd = sum over values of G_t * S_{t-1}     du = sum of r k q
// Tensors  see wkv6.h; bf16 or fp32. kept: S before every 32 tokens.
// Threads  y and dv are one scan, `scan`, forwards over r, k, v or backwards over k, r, dy: a block a (sequence, head),
//          layout of exact.cuh, no barrier from token to token. The rest, `gradients`, is apart in its columns: a block
//          takes a Panel of them, LANES lanes share 4 rows, a thread has 4 columns, one barrier in 4 tokens. So the
//          backward goes through the sequence twice.
// Numerics fp32 throughout. w has no bounds: S is never stepped back. Of 32 tokens `gradients` first finds S before
//          every 8, then, from the last 8 to the first, S before each of the 8, in registers, with G, token by token:
//          dd is the sum over values itself, not a difference of prefix sums. Every sum has a fixed order; no atomics.
// Limits   N in {32, 64, 96, 128, 192}.
// Cost     per token and head 3 N^2 FMA forward, 3 N^2 + 8.3 N^2 backward; memory traffic of 5 + N / 16 bf16 tensors
//          forward, 11 + N / 8 backward. B 64, T 1024, H 12, N 64 on an H200, computed: FMA 0.33 and 1.2 ms, traffic
//          0.21 and 0.4; all instructions, counted in PTX, 0.5 and 2.1 ms at one a cycle and scheduler: the bound.
#include "../exact.cuh"
#include "../launch.cuh"
#include "wkv6.h"

#ifndef HEAD_SIZES  // given, it compiles faster
#define HEAD_SIZES 32, 64, 96, 128, 192
#endif

namespace {
using namespace exact;

constexpr int GROUP = 32;           // tokens between two kept states
constexpr int TILE = 8, PART = 8;   // tokens that scan has in shared memory, whose states gradients has in registers
constexpr float LARGEST_RATE = 200;  // exp(-200) is 0 in fp32

__device__ inline float rate(float w) {  // exp(w), finite where w is not NaN: times a decay of 0 it must be 0
  const float x = expf(w);
  return x > LARGEST_RATE ? LARGEST_RATE : x;
}

// Sums of x[t] y[t] z over N channels, one a token, by the warps of a block. z: null for ones.
template <int N, class E>
__device__ inline void dot(float* to, const E* x, const E* y, const float* z, int tokens) {
  for (int t = threadIdx.x / 32; t < tokens; t += blockDim.x / 32) {
    float total = 0;
    for (int i = t * N + threadIdx.x % 32; i < (t + 1) * N; i += 32)
      total += number(x[i]) * number(y[i]) * (z ? z[i - t * N] : 1);
    for (int lane = 16; lane > 0; lane /= 2) total += shuffle_xor(total, lane);
    if (threadIdx.x % 32 == 0) to[t] = total;
  }
}

template <class E>
struct Inputs { const E* x[4]; };  // r k v w; of a scan backwards k r dy w

template <int N>
constexpr int SCAN_ROWS = N > 128 ? 4 : 8;

template <int N, bool BACKWARDS, class E>
__global__ void __launch_bounds__(8 * N / SCAN_ROWS<N>, N <= 64 ? 384 / N : 1)
scan(int64_t T, int64_t H, Inputs<E> in, const float* u, const float* s0, E* y, float* kept, float* sT) {
  constexpr int ROWS = SCAN_ROWS<N>, ARRAY = TILE * N;
  float* const tile = reinterpret_cast<float*>(shared_memory());  // r k v d
  float* const bonus = tile + 4 * ARRAY;
  E* const raw = reinterpret_cast<E*>(bonus + TILE);  // r k v w of the next tile
  const int column = threadIdx.x % 8 * 4, first = threadIdx.x / 8 * ROWS, own = threadIdx.x * ROWS / 8;
  const int64_t stride = H * N, head = blockIdx.x / H * T * stride + blockIdx.x % H * N;
  const int64_t state = int64_t(blockIdx.x) * N * N + first * N + column, groups = (T + GROUP - 1) / GROUP;
  u += blockIdx.x % H * N;
  const auto fetch = [&](int64_t start) {
    if (start >= 0 && start < T)
      for (int x = 0; x < 4; x++) fetch_rows<N>(raw + x * ARRAY, in.x[x] + head + start * stride, TILE, stride);
    copy_commit();
  };
  float S[ROWS][N / 8];
  load_state<N>(S, s0 ? s0 + state : nullptr);
  fetch(BACKWARDS ? T - TILE : 0);
  for (int64_t done = 0; done < T; done += TILE) {
    const int64_t start = BACKWARDS ? T - TILE - done : done;
    copy_wait<0>();
    sync_block();
    for (int i = threadIdx.x; i < ARRAY; i += blockDim.x) {
      for (int x = 0; x < 3; x++) tile[x * ARRAY + i] = number(raw[x * ARRAY + i]);
      tile[3 * ARRAY + i] = expf(-rate(number(raw[3 * ARRAY + i])));
    }
    dot<N>(bonus, raw, raw + ARRAY, u, TILE);
    sync_block();
    fetch(BACKWARDS ? start - TILE : start + TILE);
    if (!BACKWARDS && start % GROUP == 0)
      store_state<N>(kept + (int64_t(blockIdx.x) * groups + start / GROUP) * N * N + first * N + column, S);
    for (int i = 0; i < TILE; i++) {
      const int t = BACKWARDS ? TILE - 1 - i : i;
      const float *rows = tile + 2 * ARRAY + t * N, *columns = tile + t * N + column;
      float v[ROWS], r[4], k[4], d[4], y_sum[ROWS] = {};
      for (int p = 0; p < ROWS; p += 4) load4(v + p, rows + first + p);
#pragma unroll
      for (int j = 0; j < N / 8; j += 4) {
        load4(r, columns + 8 * j), load4(k, columns + ARRAY + 8 * j), load4(d, columns + 3 * ARRAY + 8 * j);
        for (int p = 0; p < ROWS; p++)
          for (int q = 0; q < 4; q++) {
            y_sum[p] += S[p][j + q] * r[q];
            S[p][j + q] = S[p][j + q] * d[q] + v[p] * k[q];
          }
      }
      const float result = sum<4, 1>(y_sum) + bonus[t] * rows[own];
      if (ROWS == 8 || threadIdx.x % 2 == 0) store(y + head + (start + t) * stride + own, result);
    }
  }
  if (sT) store_state<N>(sT + state, S);
}

template <int N>
struct Panel {
  static constexpr int COLUMNS = N > 128 ? 16 : 32, LANES = COLUMNS / 4, ROWS = 4, THREADS = N / ROWS * LANES;
  static constexpr int WARPS = THREADS / 32, BLOCKS = N / COLUMNS;
};

template <int N, class E>
struct GradientMemory {
  static constexpr int COLUMNS = Panel<N>::COLUMNS;
  float column[4][GROUP * COLUMNS];  // r k d dd/dw
  float row[2][GROUP * N];           // v dy
  float q[GROUP];
  float state[GROUP / PART - 2][Panel<N>::ROWS][Panel<N>::THREADS][4];  // before the tokens 8 .. and 16 ..
  float partial[PART][3][Panel<N>::WARPS][COLUMNS];                     // of dr dk dd
  alignas(16) E raw_column[3][GROUP * COLUMNS];                         // r k w of the next group
  E raw_row[2][GROUP * N];
};

template <int N, class E>
__global__ void __launch_bounds__(Panel<N>::THREADS, N <= 64 ? 128 / N : 1)
gradients(int64_t T, int64_t H, Inputs<E> in, const E* dy, const float* u, const float* kept, const float* dsT, E* dr,
          E* dk, E* dw, float* du) {
  using P = Panel<N>;
  constexpr int COLUMNS = P::COLUMNS, ROWS = P::ROWS;
  auto& shared = *reinterpret_cast<GradientMemory<N, E>*>(shared_memory());
  const int64_t head = blockIdx.x / P::BLOCKS, left = blockIdx.x % P::BLOCKS * COLUMNS;
  const int64_t groups = (T + GROUP - 1) / GROUP;
  const int64_t stride = H * N, token = head / H * T * stride + head % H * N;
  const int lane = threadIdx.x % 32, column = threadIdx.x % P::LANES * 4, first = threadIdx.x / P::LANES * ROWS;
  const int64_t at = first * N + left + column;  // in a state
  const int own = threadIdx.x % COLUMNS;         // column of whose sums over rows this thread takes care
  const float u_own = u[head % H * N + left + own];
  float du_own = 0;
  const auto tokens = [&](int64_t group) { return int(T - group * GROUP < GROUP ? T - group * GROUP : GROUP); };
  const auto fetch = [&](int64_t group) {
    if (group >= 0) {
      const int64_t from = token + group * GROUP * stride;
      for (int x = 0; x < 3; x++)
        fetch_rows<COLUMNS>(shared.raw_column[x], in.x[x == 2 ? 3 : x] + from + left, tokens(group), stride);
      for (int x = 0; x < 2; x++) fetch_rows<N>(shared.raw_row[x], (x ? dy : in.x[2]) + from, tokens(group), stride);
    }
    copy_commit();
  };
  float G[ROWS][4] = {};
  for (int p = 0; dsT && p < ROWS; p++) load4(G[p], dsT + head * N * N + at + p * N);
  fetch(groups - 1);
  for (int64_t group = groups - 1; group >= 0; group--) {
    copy_wait<0>();
    sync_block();
    const int parts = tokens(group) / PART;
    for (int i = threadIdx.x; i < parts * PART * COLUMNS; i += P::THREADS) {
      for (int x = 0; x < 2; x++) shared.column[x][i] = number(shared.raw_column[x][i]);
      const float e = rate(number(shared.raw_column[2][i])), d = expf(-e);
      shared.column[2][i] = d, shared.column[3][i] = -e * d;
    }
    for (int i = threadIdx.x; i < parts * PART * N; i += P::THREADS)
      for (int x = 0; x < 2; x++) shared.row[x][i] = number(shared.raw_row[x][i]);
    dot<N>(shared.q, shared.raw_row[0], shared.raw_row[1], nullptr, parts * PART);
    sync_block();
    fetch(group - 1);

    float S[PART][ROWS][4], r[4], k[4], d[4], v[ROWS], y[ROWS];
    const auto step = [&](float (&to)[ROWS][4], const float (&from)[ROWS][4], int t) {
      load4(k, &shared.column[1][t * COLUMNS + column]), load4(d, &shared.column[2][t * COLUMNS + column]);
      load4(v, &shared.row[0][t * N + first]);
      for (int p = 0; p < ROWS; p++)
        for (int q = 0; q < 4; q++) to[p][q] = from[p][q] * d[q] + v[p] * k[q];
    };
    const auto kept_state = [&] {
      for (int p = 0; p < ROWS; p++) load4(S[0][p], kept + (head * groups + group) * N * N + at + p * N);
    };
    kept_state();
    for (int part = 0; part < parts - 1; part++) {
#pragma unroll 1
      for (int t = 0; t < PART; t++) step(S[0], S[0], part * PART + t);
      for (int p = 0; part < parts - 2 && p < ROWS; p++)
        *reinterpret_cast<float4*>(shared.state[part][p][threadIdx.x]) =
            make_float4(S[0][p][0], S[0][p][1], S[0][p][2], S[0][p][3]);
    }
#pragma unroll 1
    for (int part = parts - 1; part >= 0; part--) {
      if (part == 0) kept_state();
      for (int p = 0; part > 0 && part < parts - 1 && p < ROWS; p++)
        load4(S[0][p], shared.state[part - 1][p][threadIdx.x]);
#pragma unroll
      for (int t = 1; t < PART; t++) step(S[t], S[t - 1], part * PART + t - 1);
#pragma unroll
      for (int t = PART - 1; t >= 0; t--) {
        const int now = part * PART + t;
        float dr_sum[4] = {}, dk_sum[4] = {}, dd_sum[4] = {};
        load4(r, &shared.column[0][now * COLUMNS + column]), load4(d, &shared.column[2][now * COLUMNS + column]);
        load4(v, &shared.row[0][now * N + first]), load4(y, &shared.row[1][now * N + first]);
        for (int p = 0; p < ROWS; p++)
          for (int q = 0; q < 4; q++) {
            const float s = S[t][p][q], g = G[p][q];
            dr_sum[q] += s * y[p], dk_sum[q] += g * v[p], dd_sum[q] += g * s;
            G[p][q] = g * d[q] + y[p] * r[q];
          }
        const float sums[3] = {sum<16, P::LANES>(dr_sum), sum<16, P::LANES>(dk_sum), sum<16, P::LANES>(dd_sum)};
        for (int x = 0; x < 3; x++)
          if (P::LANES == 8 || lane % 8 < 4) shared.partial[t][x][threadIdx.x / 32][column + lane / 8] = sums[x];
      }
      sync_block();
      for (int t = threadIdx.x / COLUMNS; t < PART; t += P::THREADS / COLUMNS) {
        const int now = part * PART + t;
        const int at = now * COLUMNS + own;
        const float own_r = shared.column[0][at], own_k = shared.column[1][at], q = shared.q[now];
        float total[3] = {};
        for (int x = 0; x < 3; x++)
          for (int warp = 0; warp < P::WARPS; warp++) total[x] += shared.partial[t][x][warp][own];
        const int64_t to = token + (group * GROUP + now) * stride + left + own;
        store(dr + to, total[0] + u_own * own_k * q);
        store(dk + to, total[1] + u_own * own_r * q);
        store(dw + to, total[2] * shared.column[3][at]);
        du_own += own_r * own_k * q;
      }
      sync_block();
    }
  }
  float* const du_part = shared.row[0];
  du_part[threadIdx.x] = du_own;
  sync_block();
  for (int i = own + COLUMNS; threadIdx.x < COLUMNS && i < P::THREADS; i += COLUMNS) du_own += du_part[i];
  if (threadIdx.x < COLUMNS) du[head * N + left + own] = du_own;
}

const char* refuse(int64_t B, int64_t T, int64_t H) {
  const bool good = B > 0 && H > 0 && B <= INT32_MAX / 12 / H && T > 0 && T % 16 == 0;  // 12: most panels of a head
  return good ? nullptr : "T must be a multiple of 16, B H below 2^31 / 12";
}

template <int N, bool BACKWARDS, class E>
const char* start_scan(int64_t B, int64_t T, int64_t H, const void* r, const void* k, const void* v, const void* w,
                       const float* u, const float* s0, void* y, void* kept, float* sT, cudaStream_t stream) {
  constexpr int SHARED = TILE * (4 * N + 1) * sizeof(float) + 4 * TILE * N * sizeof(E);
  const Inputs<E> in = {{(const E*)r, (const E*)k, (const E*)v, (const E*)w}};
  return launch(scan<N, BACKWARDS, E>, B * H, 8 * N / SCAN_ROWS<N>, SHARED, stream, T, H, in, u, s0, (E*)y,
                (float*)kept, sT);
}

template <class E>
const char* start_forward(WKV6_FORWARD) {
  if (const char* why = refuse(B, T, H)) return why;
  return for_head_size<HEAD_SIZES>(N, [&](auto n) {
    return start_scan<n, false, E>(B, T, H, r, k, v, w, u, s0, y, kept, sT, stream);
  });
}

template <class E>
const char* start_backward(WKV6_BACKWARD) {
  if (const char* why = refuse(B, T, H)) return why;
  return for_head_size<HEAD_SIZES>(N, [&](auto n) {
    const char* error = start_scan<n, true, E>(B, T, H, k, r, dy, w, u, dsT, dv, nullptr, ds0, stream);
    const Inputs<E> in = {{(const E*)r, (const E*)k, (const E*)v, (const E*)w}};
    if (error) return error;
    return launch(gradients<n, E>, B * H * Panel<n>::BLOCKS, Panel<n>::THREADS, sizeof(GradientMemory<n, E>), stream, T,
                  H, in, (const E*)dy, u, (const float*)kept, dsT, (E*)dr, (E*)dk, (E*)dw, du);
  });
}

}  // namespace

const char* wkv6_cuda_forward(WKV6_FORWARD) {
  return start_forward<bf16>(B, T, H, N, r, k, v, w, u, s0, y, kept, sT, stream);
}
const char* wkv6_cuda_fp32_forward(WKV6_FORWARD) {
  return start_forward<float>(B, T, H, N, r, k, v, w, u, s0, y, kept, sT, stream);
}
const char* wkv6_cuda_backward(WKV6_BACKWARD) {
  return start_backward<bf16>(B, T, H, N, r, k, v, w, u, s0, kept, dy, dsT, dr, dk, dv, dw, du, ds0, stream);
}
const char* wkv6_cuda_fp32_backward(WKV6_BACKWARD) {
  return start_backward<float>(B, T, H, N, r, k, v, w, u, s0, kept, dy, dsT, dr, dk, dv, dw, du, ds0, stream);
}
