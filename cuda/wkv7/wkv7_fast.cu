// WKV-7 on tensor cores, forward and backward (--fast_cuda). Equations and layout: chunk.cuh.
// Tensors  r, w, k, v, a, b, y, dy and the gradients are (B, T, H, N) bf16, contiguous; w is the decay before its
//          activation. s0, sT, dsT, ds0 are (B, H, N, N) fp32. kept: states at every 64th token, (B, H, ceil(T/64), N, N)
//          bf16.
// Threads  One block a head, N / 16 warps. Chunks of 16 tokens one after another, the next one being copied meanwhile.
//   forward   3 barriers a chunk: tiles are there | scaled in place | AB, AK, RK, RB, M are there.
//   backward  From the last group of 64 tokens to the first: its states forwards from the kept one (3 chunks, into
//             shared memory), then the chunks backwards, 5 barriers each:
//             G  <- G diag(P)
//             dU  = B G^T + RB^T dY          dZ = M^T dU          dV = K G^T + RK^T dY + AK^T dZ
//             dAB = stril(dZ U^T)  dAK = stril(dZ V^T)  dRK = tril(dY V^T)  dRB = tril(dY U^T)
//             dA  = dZ S + dAB B + dAK K     dR = dY S + dRK K + dRB B
//             dK  = V G + dAK^T A + dRK^T R  dB = U G + dAB^T A + dRB^T R
//             G  <- G + dY^T R + dZ^T A
//             A decay acts on all that passes it: on S on its way to the chunk's end (the column sums of S * G), on K
//             and B of earlier tokens on their way there, on R and A of later tokens coming from S, and on the pairs it
//             lies between. The pairs are summed as those that begin before t less those that end before t: both sums
//             are of the same products, so that they cancel to the last bits of fp32.
// Limits   N 64 (sm_80 and newer) or 128 (227 KB of shared memory a block: sm_90, sm_100); T a multiple of 16.
// Cost     7 tensors forward, 13 backward, and the kept states each time (N / 64 of a tensor): the memory bound. Products:
//          (8 N + 16 C) N flops a token forward, (26 N + 60 C) N backward, with the recomputed states.
#include "chunk.cuh"

namespace wkv7 {
namespace {

enum { R, W, K, V, A, B, DY };

struct Tensors {
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
__global__ void __launch_bounds__(2 * N, N == 64 ? 6 : 2)
    forward(Tensors in, const float* s0, bf16* y, bf16* kept, float* sT) {
  auto& shared = *reinterpret_cast<ForwardMemory<N>*>(shared_memory());
  const Thread at;
  const int head = blockIdx.x, chunks = in.T / C, groups = (chunks + GROUP / C - 1) / (GROUP / C);
  const int64_t stride = int64_t{in.H} * N, start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  const int own = (16 * at.warp + at.g) * N + 2 * at.q;  // the lane's first element of a state

  Sum S[N / 16];
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    FOR_ELEMENTS S[j][half][2 * row + e] = s0 ? s0[int64_t{head} * N * N + own + 8 * row * N + 16 * j + 8 * half + e] : 0.f;

  auto fetch = [&](int chunk) {
    if (chunk < chunks)
      for (int i = 0; i < 6; ++i)
        copy_tile<N>(shared.tile[chunk % 2][i], in.x[i] + start + chunk * C * stride, stride);
    copy_commit();
  };
  fetch(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_wait<0>();
    sync_block();  // the tiles are there, and nobody needs those of the chunk before any more
    fetch(chunk + 1);
    if (chunk % (GROUP / C) == 0) {
      bf16* state = kept + (int64_t{head} * groups + chunk / (GROUP / C)) * N * N + own;
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        Block s;
        to_block(s, S[j]);
        for (int i = 0; i < 4; ++i) pair_at(state + i % 2 * 8 * N + 16 * j + i / 2 * 8) = s[i];
      }
    }
    auto& tile = shared.tile[chunk % 2];
    {
      const Decays<N> decays(tile[W], shared.P_end, at);
      scale<N>(tile[R], decays.P, at);
      scale<N>(tile[K], decays.inverse, at);
      scale<N>(tile[A], decays.before, at);
      scale<N>(tile[B], decays.inverse, at);
    }
    sync_block();
    pair_matrices<N, true>(shared.matrix, shared.room, tile[R], tile[A], tile[K], tile[B], at);
    Sum Z = {}, Y = {};
    read_state<N, true>(Z, Y, S, tile[R], tile[A]);
    sync_block();
    finish_chunk<N, true>(S, Z, Y, tile[K], tile[V], tile[B], shared.matrix, shared.P_end, at);
    bf16* out = y + start + (chunk * C + at.g) * stride + 16 * at.warp + 2 * at.q;
    Block x;
    to_block(x, Y);
    for (int i = 0; i < 4; ++i) pair_at(out + i % 2 * 8 * stride + i / 2 * 8) = x[i];
  }
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    FOR_ELEMENTS sT[int64_t{head} * N * N + own + 8 * row * N + 16 * j + 8 * half + e] = S[j][half][2 * row + e];
}

template <int N>
struct BackwardMemory {
  bf16 tile[2][7][C * N];
  bf16 state[GROUP / C][N * N];  // at the chunks' starts; an odd group has its in reverse order
  bf16 G[N * N];
  bf16 U[N * C], dZ[N * C];  // transposed: row = value
  bf16 matrix[MATRICES][C * C];     // the matrices, later their gradients
  float P_end[N];
};

template <int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? 3 : 1)
    backward(Tensors in, const bf16* kept, const float* dsT, bf16* dr, bf16* dw, bf16* dk, bf16* dv, bf16* da, bf16* db,
             float* ds0) {
  auto& shared = *reinterpret_cast<BackwardMemory<N>*>(shared_memory());
  const Thread at;
  const int head = blockIdx.x, chunks = in.T / C, groups = (chunks + GROUP / C - 1) / (GROUP / C);
  const int64_t stride = int64_t{in.H} * N, start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  const int own = (16 * at.warp + at.g) * N + 2 * at.q;

  auto chunks_in = [&](int group) { return group < groups - 1 ? GROUP / C : chunks - group * (GROUP / C); };

  Sum G[N / 16];  // gradient of the state at the chunk's end
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    FOR_ELEMENTS G[j][half][2 * row + e] = dsT ? dsT[int64_t{head} * N * N + own + 8 * row * N + 16 * j + 8 * half + e] : 0.f;

  // Copies what step `step` of a group of n chunks needs: steps 0 to n-2 go forwards through chunks 0 to n-2, steps n-1
  // to 2n-2 backwards from chunk n-1. The step after the last is the next group's first.
  auto fetch = [&](int group, int step, int stage) {
    int n = chunks_in(group);
    if (step > 2 * n - 2) step = 0, n = GROUP / C, --group;
    if (group >= 0) {
      const int chunk = group * (GROUP / C) + (step < n ? step : 2 * n - 2 - step);
      for (int i = 0; i < 7; ++i)
        if (step >= n - 1 || (i != R && i != DY))
          copy_tile<N>(shared.tile[stage][i], in.x[i] + start + chunk * C * stride, stride);
      if (step == 0)
        for (int i = threadIdx.x * 8; i < N * N; i += 2 * N * 8)
          copy_async(shared.state[group % 2 * (GROUP / C - 1)] + offset<N>(i / N, i % N),
                     kept + (int64_t{head} * groups + group) * N * N + i);
    }
    copy_commit();
  };
  int stage = 0;
  fetch(groups - 1, 0, stage);
  for (int group = groups - 1; group >= 0; --group) {
    const int n = chunks_in(group), flip = group % 2 * (GROUP / C - 1);
    Sum S[N / 16];
    for (int step = 0; step < n - 1; ++step, stage ^= 1) {
      copy_wait<0>();
      sync_block();
      fetch(group, step + 1, stage ^ 1);
      auto& tile = shared.tile[stage];
      if (step == 0)
#pragma unroll
        for (int j = 0; j < N / 16; ++j) {
          Block s;
          load<N>(s, shared.state[flip], 16 * at.warp, 16 * j);
          FOR_ELEMENTS S[j][half][2 * row + e] = element(s, row, half, e);
        }
      {
        const Decays<N> decays(tile[W], shared.P_end, at);
        scale<N>(tile[K], decays.inverse, at);
        scale<N>(tile[A], decays.before, at);
        scale<N>(tile[B], decays.inverse, at);
      }
      sync_block();
      pair_matrices<N, false>(shared.matrix, reinterpret_cast<float*>(shared.dZ), nullptr, tile[A], tile[K], tile[B], at);
      Sum Z = {}, none;
      read_state<N, false>(Z, none, S, nullptr, tile[A]);
      sync_block();
      finish_chunk<N, false>(S, Z, none, tile[K], tile[V], tile[B], shared.matrix, shared.P_end, at);
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        Block s;
        to_block(s, S[j]);
        store<N>(shared.state[(step + 1) ^ flip], 16 * at.warp, 16 * j, s, at);
      }
    }
    for (int chunk = n - 1; chunk >= 0; --chunk, stage ^= 1) {
      copy_wait<0>();
      sync_block();
      fetch(group, 2 * n - 1 - chunk, stage ^ 1);
      auto& tile = shared.tile[stage];
      const bf16* state = shared.state[chunk ^ flip];
      const Decays<N> decays(tile[W], shared.P_end, at);
      scale<N>(tile[R], decays.P, at);
      scale<N>(tile[K], decays.inverse, at);
      scale<N>(tile[A], decays.before, at);
      scale<N>(tile[B], decays.inverse, at);
      sync_block();

      pair_matrices<N, true>(shared.matrix, reinterpret_cast<float*>(shared.dZ), tile[R], tile[A], tile[K], tile[B], at);
      Sum Z = {}, dU = {}, dV = {};  // Z and dU transposed
      Block x, y;
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        load<N>(x, state, 16 * at.warp, 16 * j);
        load<N>(y, tile[A], 0, 16 * j);
        add_product(Z, x, y);
        scale_columns(G[j], shared.P_end + 16 * j, at);
        to_block(x, G[j]);
        store<N>(shared.G, 16 * at.warp, 16 * j, x, at);
        load<N>(y, tile[B], 0, 16 * j);
        add_product(dU, x, y);
        load<N>(y, tile[K], 0, 16 * j);
        add_product(dV, y, x);
      }
      sync_block();

      {  // values: dV, G, and U and dZ for all
        Block v, dy, dz;
        load_transpose<N>(v, tile[V], 0, 16 * at.warp);
        load_transpose<N>(dy, tile[DY], 0, 16 * at.warp);
        load<C>(x, shared.matrix[AK], 0, 0);
        add_product(Z, v, x);
        solve<true>(y, Z, shared.matrix);
        store<C>(shared.U, 16 * at.warp, 0, y, at);
        load_transpose<C>(x, shared.matrix[RB], 0, 0);
        add_product(dU, dy, x);
        solve<false>(dz, dU, shared.matrix);
        store<C>(shared.dZ, 16 * at.warp, 0, dz, at);
        load_transpose<C>(x, shared.matrix[RK], 0, 0);
        add_product(dV, x, dy);
        load_transpose<C>(x, shared.matrix[AK], 0, 0);
        add_product(dV, x, dz);
#pragma unroll
        for (int j = 0; j < N / 16; ++j) {
          load_transpose<N>(x, tile[R], 0, 16 * j);
          add_product(G[j], dy, x);
          load_transpose<N>(x, tile[A], 0, 16 * j);
          add_product(G[j], dz, x);
        }
      }
      const int64_t out = start + ((group * (GROUP / C) + chunk) * C + at.g) * stride + 16 * at.warp + 2 * at.q;
      auto write = [&](bf16* tensor, const Block& values) {
        for (int i = 0; i < 4; ++i) pair_at(tensor + out + i % 2 * 8 * stride + i / 2 * 8) = values[i];
      };
      to_block(x, dV);
      write(dv, x);
      sync_block();

      if (at.warp < 4) {  // the matrices' gradients
        Sum c = {};
#pragma unroll
        for (int j = 0; j < N; j += 16) {
          at.warp < RB ? load_transpose<C>(x, shared.dZ, j, 0) : load<N>(x, tile[DY], 0, j);
          at.warp % 2 ? load<N>(y, tile[V], 0, j) : load_transpose<C>(y, shared.U, j, 0);
          add_product(c, x, y);
        }
        keep_lower(c, at.warp >= RB, at);
        to_block(x, c);
        store<C>(shared.matrix[at.warp], 0, 0, x, at);
      }
      // keys
      Sum dA = {}, dR = {}, dK = {}, dB = {};
      float passed[2] = {0.f, 0.f};  // column sums of S * G, of columns g and g + 8
#pragma unroll
      for (int j = 0; j < N; j += 16) {
        Block s, g;
        load_transpose<N>(s, state, j, 16 * at.warp);
        load_transpose<N>(g, shared.G, j, 16 * at.warp);
        load_transpose<C>(x, shared.dZ, j, 0);
        add_product(dA, x, s);
        load<N>(x, tile[DY], 0, j);
        add_product(dR, x, s);
        load<N>(x, tile[V], 0, j);
        add_product(dK, x, g);
        load_transpose<C>(x, shared.U, j, 0);
        add_product(dB, x, g);
        for (int i = 0; i < 4; ++i)
          passed[i % 2] += low_bf16(s[i]) * low_bf16(g[i]) + high_bf16(s[i]) * high_bf16(g[i]);
      }
      for (int i = 0; i < 2; ++i)
        for (int by = 1; by < 4; by *= 2) passed[i] += shuffle_xor(passed[i], by);
      Block k, b, r, a;
      load<N>(k, tile[K], 0, 16 * at.warp);
      load<N>(b, tile[B], 0, 16 * at.warp);
      Elements ends;  // K dK + B dB where it concerns the state at the chunk's end
      FOR_ELEMENTS ends[row][half][e] = element(k, row, half, e) * dK[half][2 * row + e] +
                                        element(b, row, half, e) * dB[half][2 * row + e];
      sync_block();

      load_transpose<N>(k, tile[K], 0, 16 * at.warp);
      load_transpose<N>(b, tile[B], 0, 16 * at.warp);
      load_transpose<N>(r, tile[R], 0, 16 * at.warp);
      load_transpose<N>(a, tile[A], 0, 16 * at.warp);
      load<C>(x, shared.matrix[M], 0, 0);
      add_product(dA, x, b);
      load<C>(x, shared.matrix[AK], 0, 0);
      add_product(dA, x, k);
      load<C>(x, shared.matrix[RB], 0, 0);
      add_product(dR, x, b);
      load<C>(x, shared.matrix[RK], 0, 0);
      add_product(dR, x, k);
      load_transpose<C>(x, shared.matrix[M], 0, 0);
      add_product(dB, x, a);
      load_transpose<C>(x, shared.matrix[RB], 0, 0);
      add_product(dB, x, r);
      load_transpose<C>(x, shared.matrix[AK], 0, 0);
      add_product(dK, x, a);
      load_transpose<C>(x, shared.matrix[RK], 0, 0);
      add_product(dK, x, r);

      load<N>(k, tile[K], 0, 16 * at.warp);
      load<N>(b, tile[B], 0, 16 * at.warp);
      load<N>(r, tile[R], 0, 16 * at.warp);
      load<N>(a, tile[A], 0, 16 * at.warp);
      Elements change, sum, from_a;
      float later[2][2] = {};  // the sum over all rows of what acts on later tokens
      FOR_ELEMENTS {
        float &to_r = dR[half][2 * row + e], &to_a = dA[half][2 * row + e];
        float &to_k = dK[half][2 * row + e], &to_b = dB[half][2 * row + e];
        from_a[row][half][e] = element(a, row, half, e) * to_a;
        const float from = element(r, row, half, e) * to_r + from_a[row][half][e] + ends[row][half][e] -
                           (element(k, row, half, e) * to_k + element(b, row, half, e) * to_b);
        later[half][e] += from;
        sum[row][half][e] = change[row][half][e] = ends[row][half][e] - from;
        to_r *= decays.P[row][half][e];
        to_a *= decays.before[row][half][e];
        to_k *= decays.inverse[row][half][e];
        to_b *= decays.inverse[row][half][e];
      }
      to_block(r, dR);
      write(dr, r);
      to_block(k, dK);
      write(dk, k);
      to_block(a, dA);
      write(da, a);
      to_block(b, dB);
      write(db, b);
      sum_down(sum, at);
      for (int i = 0; i < 4; ++i)
        for (int by = 4; by < 32; by *= 2) later[i / 2][i % 2] += shuffle_xor(later[i / 2][i % 2], by);
      load<N>(x, tile[W], 0, 16 * at.warp);
      FOR_ELEMENTS {
        const float end = shuffle(passed[half], 4 * (2 * at.q + e));
        const float d_log = end + later[half][e] + sum[row][half][e] - change[row][half][e] - from_a[row][half][e];
        const float exp_w = fminf(fast_exp2(-LOG2_E * element(x, row, half, e)), 1e30f), s = fast_reciprocal(1.f + exp_w);
        sum[row][half][e] = -DECAY_BOUND * exp_w * s * s * d_log;
      }
      for (int i = 0; i < 4; ++i) x[i] = pack_bf16(sum[i % 2][i / 2][0], sum[i % 2][i / 2][1]);
      write(dw, x);
    }
  }
  if (ds0)
#pragma unroll
    for (int j = 0; j < N / 16; ++j)
      FOR_ELEMENTS ds0[int64_t{head} * N * N + own + 8 * row * N + 16 * j + 8 * half + e] = G[j][half][2 * row + e];
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace wkv7

extern "C" const char* wkv7_fast_forward(int64_t B, int64_t T, int64_t H, int64_t N, const void* r, const void* w,
                                         const void* k, const void* v, const void* a, const void* b, const float* s0,
                                         void* y, void* kept, float* sT, cudaStream_t stream) {
  using namespace wkv7;
  const auto in = [](const void* x) { return static_cast<const bf16*>(x); };
  const auto out = [](void* x) { return static_cast<bf16*>(x); };
  const Tensors tensors = {{in(r), in(w), in(k), in(v), in(a), in(b), nullptr}, static_cast<int>(T), static_cast<int>(H)};
  if (N == 64)
    return launch(forward<64>, B * H, 128, sizeof(ForwardMemory<64>), stream, tensors, s0, out(y), out(kept), sT);
  if (N == 128)
    return launch(forward<128>, B * H, 256, sizeof(ForwardMemory<128>), stream, tensors, s0, out(y), out(kept), sT);
  return "the head size must be 64 or 128";
}

extern "C" const char* wkv7_fast_backward(int64_t B, int64_t T, int64_t H, int64_t N, const void* r, const void* w,
                                          const void* k, const void* v, const void* a, const void* b, const float* s0,
                                          const void* kept, const void* dy, const float* dsT, void* dr, void* dw,
                                          void* dk, void* dv, void* da, void* db, float* ds0, cudaStream_t stream) {
  using namespace wkv7;
  const auto in = [](const void* x) { return static_cast<const bf16*>(x); };
  const auto out = [](void* x) { return static_cast<bf16*>(x); };
  const Tensors tensors = {{in(r), in(w), in(k), in(v), in(a), in(b), in(dy)}, static_cast<int>(T), static_cast<int>(H)};
  if (N == 64)
    return launch(backward<64>, B * H, 128, sizeof(BackwardMemory<64>), stream, tensors, in(kept), dsT, out(dr), out(dw),
                  out(dk), out(dv), out(da), out(db), ds0);
  if (N == 128)
    return launch(backward<128>, B * H, 256, sizeof(BackwardMemory<128>), stream, tensors, in(kept), dsT, out(dr),
                  out(dw), out(dk), out(dv), out(da), out(db), ds0);
  return "the head size must be 64 or 128";
}
