// WKV-7 on tensor cores, forward and backward (--fast_cuda). Equations, layout and numerics: chunk.cuh,
// chunk_backward.cuh. Tensors: wkv7.h.
// Threads  One block a head, N / 16 warps, through chunks of 16 tokens; the next one is copied meanwhile.
//   forward   3 barriers a chunk: tiles are there | scaled in place | matrices are there.
//   backward  from the last group of 64 tokens to the first: its states forwards from the kept one, into shared memory
//             (3 chunks, 3 barriers each), then its chunks backwards: tiles | scaled | matrices | values done | matrices'
//             gradients.
// Limits   N 64 (sm_80 and newer) or 128 (227 KB of shared memory a block: sm_90, sm_100); T a multiple of 16.
// Cost     7 tensors forward, 13 backward, and the kept states each time (N / 64 of a tensor): the memory bound.
//          Products 2 (4 N + 8 C) N flops a token forward, 2 (13 N + 28 C) N backward, recomputed states included.
//          Blocks a multiprocessor, by registers and shared memory (sm_90): N 64 6 forward, 3 backward; N 128 2 and 1.
#include "../launch.cuh"
#include "chunk_backward.cuh"
#include "wkv7.h"

namespace wkv7 {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int FORWARD_BLOCKS = 5, BACKWARD_BLOCKS = 2;  // 164 KB of shared memory
#else
constexpr int FORWARD_BLOCKS = 6, BACKWARD_BLOCKS = 3;
#endif

struct Inputs {
  const bf16* x[7];  // r w k v a b dy
  int T, H;
};

template <int N>
struct ForwardMemory {
  bf16 tile[2][6][C * N];
  bf16 matrix[MATRICES][C * C];
  float room[C * C];
  float P_end[N];
};

template <int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? FORWARD_BLOCKS : 2)
    forward(const __grid_constant__ Inputs in, const float* s0, bf16* y, bf16* kept, float* sT) {
  auto& shared = *reinterpret_cast<ForwardMemory<N>*>(shared_memory());
  const int head = blockIdx.x, chunks = in.T / C, groups = (chunks + GROUP / C - 1) / (GROUP / C);
  const int stride = in.H * N;  // from token to token
  const int64_t start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  Sum S[N / 16];
  start_state<N>(S, s0, head);
  fetch<N>(shared.tile[0], in.x, 6, 0, start, stride);
  copy_commit();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Thread at;
    copy_wait<0>();
    sync_block();  // the tiles are there, and nobody needs those of the chunk before any more
    if (chunk % (GROUP / C) == 0) write_state<N>(kept, int64_t{head} * groups + chunk / (GROUP / C), S);
    if (chunk + 1 < chunks) fetch<N>(shared.tile[(chunk + 1) % 2], in.x, 6, chunk + 1, start, stride);
    copy_commit();
    auto& x = shared.tile[chunk % 2];
    const Tiles tile = {x[0], x[1], x[2], x[3], x[4], x[5]};
    scale<N>(tile, Decays<N>(tile.W, at), shared.P_end, at);
    sync_block();
    pair_matrices<N>(shared.matrix, shared.room, tile, at);
    Sum Z = {}, Y = {};
    read_state<N>(Z, &Y, S, tile, at);
    sync_block();
    finish_chunk<N>(S, Z, &Y, tile, shared.matrix, shared.P_end, at);
    Block out;
    to_block(out, Y);
    write(y + start + int64_t{chunk * C} * stride, stride, out, Thread());
  }
  write_state<N>(sT, head, S);
}

template <int N>
struct BackwardMemory : Backward<N> {
  bf16 tile[2][7][C * N];
};

template <int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? BACKWARD_BLOCKS : 1)
    backward(const __grid_constant__ Inputs in, const bf16* kept, const float* dsT, bf16* dr, bf16* dw, bf16* dk, bf16* dv,
             bf16* da, bf16* db, float* ds0) {
  auto& shared = *reinterpret_cast<BackwardMemory<N>*>(shared_memory());
  const int head = blockIdx.x, stride = in.H * N;
  const int64_t start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  const Order order(in.T);

  auto fetch = [&](int group, int step, int stage) {
    constexpr unsigned SKIP = 1 << 0 | 1 << 6;  // r and dy
    fetch_step<N>(shared.tile[stage], shared.state, in.x, SKIP, kept, order, group, step, start, stride);
  };
  Sum G[N / 16];
  start_state<N>(G, dsT, head);
  int stage = 0;
  fetch(order.groups - 1, 0, stage);
  for (int group = order.groups - 1; group >= 0; --group) {
    const int n = order.size(group);
    Sum S[N / 16];
    for (int step = 0; step < n - 1; ++step, stage ^= 1) {
      const Thread at;
      copy_wait<0>();
      sync_block();
      fetch(group, step + 1, stage ^ 1);
      auto& x = shared.tile[stage];
      const Tiles tile = {nullptr, x[1], x[2], x[3], x[4], x[5], nullptr, false};
      if (step == 0) load_state<N>(S, shared.state[slot(group, 0)], at);
      scale<N>(tile, Decays<N>(tile.W, at), shared.P_end, at);
      sync_block();
      pair_matrices<N>(shared.matrix, shared.room(), tile, at);
      Sum Z = {};
      read_state<N>(Z, nullptr, S, tile, at);
      sync_block();
      finish_chunk<N>(S, Z, nullptr, tile, shared.matrix, shared.P_end, at);
      store_state<N>(shared.state[slot(group, step + 1)], S, at);
    }
    for (int i = n - 1; i >= 0; --i, stage ^= 1) {
      const Thread at;
      copy_wait<0>();
      sync_block();
      fetch(group, 2 * n - 1 - i, stage ^ 1);
      auto& x = shared.tile[stage];
      const Tiles tile = {x[0], x[1], x[2], x[3], x[4], x[5], x[6]};
      const bf16* state = shared.state[slot(group, i)];
      auto put = [&](bf16* tensor, const Block& values, const Thread& at) {
        write(tensor + start + int64_t{(group * (GROUP / C) + i) * C} * stride, stride, values, at);
      };
      const Decays<N> decays(tile.W, at);
      scale<N>(tile, decays, shared.P_end, at);
      sync_block();
      pair_matrices<N>(shared.matrix, shared.room(), tile, at);
      Sum Z = {}, dU = {}, dV = {};
      read_states<N>(Z, dU, dV, nullptr, G, shared, state, tile, at);
      sync_block();
      Block values;
      finish_U<N>(Z, nullptr, shared, tile, at);
      finish_values<N>(dU, dV, G, shared, tile, at);
      to_block(values, dV);
      put(dv, values, at);
      sync_block();
      Sum dR = {}, dK = {}, dA = {}, dB = {};
      Elements d_log;
      keys<N>(dR, dK, dA, dB, d_log, decays, shared, state, tile);
      const Thread now;
      to_block(values, dR);
      put(dr, values, now);
      to_block(values, dK);
      put(dk, values, now);
      to_block(values, dA);
      put(da, values, now);
      to_block(values, dB);
      put(db, values, now);
      Block w;
      load<N>(w, tile.W, 0, 16 * now.warp, now);
      FOR_ELEMENTS d_log[row][half][e] = decay_gradient(d_log[row][half][e], element(w, row, half, e));
      to_block(values, d_log);
      put(dw, values, now);
    }
  }
  if (ds0) write_state<N>(ds0, head, G);
}

}  // namespace
}  // namespace wkv7

const char* wkv7_fast_forward(WKV7_FORWARD) {
  using namespace wkv7;
  const Inputs inputs = {{input(r), input(w), input(k), input(v), input(a), input(b), nullptr}, int(T), int(H)};
  if (const char* why = refuse(B, T, H, N, {64, 128})) return why;
  if (N == 64)
    return launch(forward<64>, B * H, 128, sizeof(ForwardMemory<64>), stream, inputs, s0, output(y), output(kept), sT);
  return launch(forward<128>, B * H, 256, sizeof(ForwardMemory<128>), stream, inputs, s0, output(y), output(kept), sT);
}

const char* wkv7_fast_backward(WKV7_BACKWARD) {
  using namespace wkv7;
  const Inputs inputs = {{input(r), input(w), input(k), input(v), input(a), input(b), input(dy)}, int(T), int(H)};
  if (const char* why = refuse(B, T, H, N, {64, 128})) return why;
  if (N == 64)
    return launch(backward<64>, B * H, 128, sizeof(BackwardMemory<64>), stream, inputs, input(kept), dsT, output(dr), output(dw),
                  output(dk), output(dv), output(da), output(db), ds0);
  return launch(backward<128>, B * H, 256, sizeof(BackwardMemory<128>), stream, inputs, input(kept), dsT, output(dr), output(dw),
                output(dk), output(dv), output(da), output(db), ds0);
}
