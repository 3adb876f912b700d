// WKV-6 on tensor cores, forward and backward (--fast_cuda). Equations, layout: chunk.cuh. Tensors: wkv6.h.
// Threads  One block a head, N / 16 warps, through chunks of 16 tokens; the next one is copied meanwhile.
//   forward   2 barriers a chunk: tiles are there | scaled. A is ready for A V at the next chunk's first.
//   backward  from the last group of 64 tokens to the first: its states forwards from the kept one, into shared memory
//             (3 chunks, 2 barriers each), then its chunks backwards: tiles | scaled | A and dA are there.
// Numerics bf16 operands, fp32 sums; S, G, decays, the gradient of log d, the bonus and du in fp32.
// Limits   N 64 (sm_80 and newer) or 128 (223 KB of shared memory a block: sm_90, sm_100); T a multiple of 16.
// Cost     5 tensors forward, 9 backward, 9/4 for the states, the kept ones each time (N / 64 of a tensor): at B 64,
//          T 1024, H 12, N 64 on an H200 0.14 and 0.29 ms at 4.3 TB/s. Products 2 (2 N + 4 C) N flops a token forward,
//          2 (4.75 N + 9 C) N backward: 0.05 and 0.11 ms at 400 TFLOP/s. Instructions of a warp and chunk, counted in PTX
//          without moves: 900 forward, 2500 backward: 0.19 and 0.53 ms at one a cycle and scheduler, 1.755 GHz: the bound.
// Blocks   a multiprocessor, by registers and shared memory (sm_90): N 64 6 forward, 3 backward; N 128 2 and 1.
#include "../launch.cuh"
#include "chunk.cuh"
#include "wkv6.h"

namespace wkv6 {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int FORWARD_BLOCKS = 5, BACKWARD_BLOCKS = 2;  // 164 KB of shared memory
#else
constexpr int FORWARD_BLOCKS = 6, BACKWARD_BLOCKS = 3;
#endif

struct Inputs {
  const bf16* x[5];  // r k v w dy
  const float* u;
  int T, H;
};

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
  const auto stride = [&] { return in.H * N; };  // from token to token; a register less than a constant
  const int64_t start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  Sum S[N / 16], Y = {};
  Block v = {};
  auto finish = [&](int chunk) {  // a barrier after its pairs()
    const Thread at;
    Block x;
    load<C>(x, scaled.A, 0, 0, at);
    add_product(Y, x, v);
    to_block(x, Y);
    write(y + start + int64_t{chunk * C} * stride(), stride(), x, at);
  };
  start_state<N>(S, s0, head);
  begin<N>(scaled, in.u, head % in.H);
  fetch<N>(shared.tile[0], in.x, 4, 0, start, stride());
  copy_commit();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Thread at;
    copy_wait<0>();
    sync_block();  // the tiles are there, and nobody needs those of the chunk before any more
    if (chunk + 1 < chunks) fetch<N>(shared.tile[(chunk + 1) % 2], in.x, 4, chunk + 1, start, stride());
    copy_commit();
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
  PairGradients d_pairs;
};

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
    constexpr unsigned SKIP = 1 << 0 | 1 << 4;  // r and dy
    fetch_step<N>(shared.tile[stage], shared.state, in.x, SKIP, kept, order, group, step, start, stride);
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
      if (at.warp == LEVELS) pair_gradients<N>(shared.d_pairs, tile, at);
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
      Sum dR, dK;
      Passed passed = {};
      keys<N>(dR, dK, passed, du_own, scaled, shared.d_pairs, shared.G, shared.state[slot(group, i)], tile);
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
  const Inputs inputs = {{input(r), input(k), input(v), input(w), nullptr}, u, int(T), int(H)};
  if (const char* why = refuse(B, T, H, N, {64, 128})) return why;
  return for_head_size<64, 128>(N, [&](auto n) {
    return launch(forward<n>, B * H, 2 * n, sizeof(ForwardMemory<n>), stream, inputs, s0, output(y), output(kept), sT);
  });
}

const char* wkv6_fast_backward(WKV6_BACKWARD) {
  using namespace wkv6;
  const Inputs inputs = {{input(r), input(k), input(v), input(w), input(dy)}, u, int(T), int(H)};
  if (const char* why = refuse(B, T, H, N, {64, 128})) return why;
  return for_head_size<64, 128>(N, [&](auto n) {
    return launch(backward<n>, B * H, 2 * n, sizeof(BackwardMemory<n>), stream, inputs, input(kept), dsT, output(dr),
                  output(dk), output(dv), output(dw), du, ds0);
  });
}
