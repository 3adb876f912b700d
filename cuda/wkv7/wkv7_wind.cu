// The time mixing of RWKV-7 around WKV-7 in one operator (--wind_cuda), forward and backward. Per token and head, with a
// the logit of the in-context learning rate and g the gate; w0, a0, k_k, k_a, r_k, ln_w, ln_b are (H, N):
//     d = exp(-e^{-1/2} sigmoid(w + w0))   alpha = sigmoid(a + a0)   kappa = k k_k / |k k_k|   k' = k (1 + (alpha - 1) k_a)
//     y = WKV-7(r, d, k', v, -kappa, kappa alpha)      n = (y - mean y) / sqrt(var y + 64e-5)
//     out = (n ln_w + ln_b + (sum of r k' r_k) v) g
// Tensors  r, w, k, v, a, g, out and gradients (B, T, H, N) bf16; parameters (7, H, N) fp32 in the order above, their
//          gradients (B, H, 7, N) fp32, one block's part each, to be summed over B. kept as in wkv7_fast.cu.
// Threads  as in wkv7_fast.cu. What a token's channels have in common (|k k_k|, the mean, ...) the warps hand each other
//          through shared memory, with a barrier: 5 a chunk forward, 9 backward (5 for a chunk whose state is only found).
// Numerics as in chunk.cuh; all else in fp32: kappa, k', y and dy are rounded to bf16 only as operands of products.
// Limits   N = 64, sm_80 and newer; T a multiple of 16; starts from the zero state.
// Cost     7 tensors forward, 13 backward and the kept states, as the bare WKV. Done apart, these steps read and write 13
//          tensors more forward and 30 backward. Blocks a multiprocessor: 4 forward, 2 backward.
#include "../launch.cuh"
#include "chunk_backward.cuh"
#include "wkv7.h"

namespace wkv7 {
namespace {

constexpr int N = 64, WARPS = N / 16;
constexpr float NORM_EPS = 64e-5f, KAPPA_EPS = 1e-12f;

enum { W0, A0, K_K, K_A, R_K, LN_W, LN_B, PARAMETERS };
enum { R, W, K, V, A, GATE, DOUT };  // tiles as they come

struct Inputs {
  const bf16* x[7];  // r w k v a g dout
  const float* parameter;
  int T, H;
};

// Of up to 3 quantities, what each warp's channels contribute to each token.
using Shares = float[3][WARPS][C];

template <int COUNT>
__device__ inline void hand_in(Shares& shares, float (&x)[COUNT][2], const Thread& at) {
  for (int i = 0; i < COUNT; ++i)
    for (int row = 0; row < 2; ++row) {
      for (int by = 1; by < 4; by *= 2) x[i][row] += shuffle_xor(x[i][row], by);
      if (at.q == 0) shares[i][at.warp][at.g + 8 * row] = x[i][row];
    }
}

__device__ inline float total(const Shares& shares, int i, int row, const Thread& at) {  // after a barrier
  float sum = 0.f;
  for (int warp = 0; warp < WARPS; ++warp) sum += shares[i][warp][at.g + 8 * row];
  return sum;
}

struct Parameters {
  float x[PARAMETERS][N];
  __device__ float operator()(int i, int half, int e, const Thread& at) const {
    return x[i][16 * at.warp + 8 * half + 2 * at.q + e];
  }
};

__device__ inline void read_parameters(Parameters& to, const Inputs& in) {  // a barrier must follow
  for (int i = thread_index(); i < PARAMETERS * N; i += 2 * N)
    to.x[i / N][i % N] = in.parameter[(i / N * in.H + blockIdx.x % in.H) * N + i % N];
}

// What WKV-7 takes, of one element, and 1 - alpha. `scale` is 1 / |k k_k|.
struct Element {
  float alpha, rest, kappa, key;
  __device__ Element(const Parameters& p, float k, float a, float scale, int half, int e, const Thread& at) {
    const float x = fminf(fast_exp2(-LOG2_E * (a + p(A0, half, e, at))), 1e30f);
    alpha = fast_reciprocal(1.f + x);
    rest = x * alpha;
    kappa = k * p(K_K, half, e, at) * scale;
    key = k * (1.f - rest * p(K_A, half, e, at));
  }
};

// |k k_k|^2 and, if there is an r, the bonus, sum of r k' r_k.
template <bool WITH_R>
__device__ inline void hand_in_sums(Shares& shares, bf16 (*raw)[C * N], const Parameters& p, const Thread& at) {
  Block r = {}, k, a;
  if (WITH_R) load<N>(r, raw[R], 0, 16 * at.warp, at);
  load<N>(k, raw[K], 0, 16 * at.warp, at);
  load<N>(a, raw[A], 0, 16 * at.warp, at);
  float sums[2][2] = {};
  FOR_ELEMENTS {
    const Element x(p, element(k, row, half, e), element(a, row, half, e), 1.f, half, e, at);
    sums[0][row] += x.kappa * x.kappa;
    sums[1][row] += element(r, row, half, e) * x.key * p(R_K, half, e, at);
  }
  hand_in(shares, sums, at);
}

__device__ inline float kappa_scale(const Shares& sums, int row, const Thread& at) {
  return fminf(rsqrtf(total(sums, 0, row, at)), 1.f / KAPPA_EPS);
}

// The scaled tiles of WKV-7 from those that came; they may be the same, B's that of w.
__device__ inline void scale(const Tiles& tile, bf16 (*raw)[C * N], const Parameters& p, const Shares& sums,
                             const Decays<N>& decays, float* P_end, const Thread& at) {
  Block r, k, a, x;
  if (tile.with_R) load<N>(r, raw[R], 0, 16 * at.warp, at);
  load<N>(k, raw[K], 0, 16 * at.warp, at);
  load<N>(a, raw[A], 0, 16 * at.warp, at);
  sync_warp();  // all have read, w by `decays`
  const float by[2] = {kappa_scale(sums, 0, at), kappa_scale(sums, 1, at)};
  const auto put = [&](bf16* to, auto value) {
    Elements scaled;
    FOR_ELEMENTS scaled[row][half][e] =
        value(Element(p, element(k, row, half, e), element(a, row, half, e), by[row], half, e, at), row, half, e);
    to_block(x, scaled);
    store<N>(to, 0, 16 * at.warp, x, at);
  };
  put(tile.A, [&](const Element& own, int row, int half, int e) { return -own.kappa * decays.before(row, half, e); });
  put(tile.B, [&](const Element& own, int row, int half, int e) {
    return own.kappa * own.alpha * decays.inverse(row, half, e);
  });
  put(tile.K, [&](const Element& own, int row, int half, int e) { return own.key * decays.inverse(row, half, e); });
  if (tile.with_R)
    put(tile.R, [&](const Element&, int row, int half, int e) { return element(r, row, half, e) * decays.P(row, half, e); });
  if (at.g == 7)
    for (int i = 0; i < 4; ++i) P_end[16 * at.warp + 8 * (i / 2) + 2 * at.q + i % 2] = decays.P(1, i / 2, i % 2);
}

// Mean and sum of squared deviations of Y over the warp's channels; then mean and 1 / sd over all.
__device__ inline void hand_in_moments(Shares& shares, const Sum& Y, const Thread& at) {
  for (int row = 0; row < 2; ++row) {
    float mean = 0.f, deviation = 0.f;
    for (int i = 0; i < 4; ++i) mean += Y[i / 2][2 * row + i % 2];
    for (int by = 1; by < 4; by *= 2) mean += shuffle_xor(mean, by);
    mean /= 16;
    for (int i = 0; i < 4; ++i) deviation += (Y[i / 2][2 * row + i % 2] - mean) * (Y[i / 2][2 * row + i % 2] - mean);
    for (int by = 1; by < 4; by *= 2) deviation += shuffle_xor(deviation, by);
    if (at.q == 0) shares[0][at.warp][at.g + 8 * row] = mean, shares[1][at.warp][at.g + 8 * row] = deviation;
  }
}

struct Moments {
  float mean[2], inverse[2];
  __device__ Moments(const Shares& shares, const Thread& at) {
    for (int row = 0; row < 2; ++row) {
      mean[row] = total(shares, 0, row, at) / WARPS;
      float square = total(shares, 1, row, at);
      for (int warp = 0; warp < WARPS; ++warp) {
        const float apart = shares[0][warp][at.g + 8 * row] - mean[row];
        square += 16 * apart * apart;
      }
      inverse[row] = rsqrtf(square / N + NORM_EPS);
    }
  }
};

struct ForwardMemory {
  bf16 tile[2][6][C * N];
  bf16 matrix[MATRICES][C * C];
  float room[C * C];
  float P_end[N];
  Shares sums, moments;
  Parameters parameters;
};

__global__ void __launch_bounds__(2 * N, 4) forward(const __grid_constant__ Inputs in, bf16* out, bf16* kept) {
  auto& shared = *reinterpret_cast<ForwardMemory*>(shared_memory());
  const int head = blockIdx.x, chunks = in.T / C, groups = (chunks + GROUP / C - 1) / (GROUP / C);
  const int stride = in.H * N;  // from token to token
  const int64_t start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  Sum S[N / 16] = {};
  read_parameters(shared.parameters, in);
  fetch<N>(shared.tile[0], in.x, 6, 0, start, stride);
  copy_commit();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Thread at;
    const Parameters& p = shared.parameters;
    copy_wait<0>();
    sync_block();
    if (chunk + 1 < chunks) fetch<N>(shared.tile[(chunk + 1) % 2], in.x, 6, chunk + 1, start, stride);
    copy_commit();
    if (chunk % (GROUP / C) == 0) write_state<N>(kept, int64_t{head} * groups + chunk / (GROUP / C), S);
    auto& raw = shared.tile[chunk % 2];
    const Tiles tile = {raw[R], nullptr, raw[K], raw[V], raw[A], raw[W]};
    hand_in_sums<true>(shared.sums, raw, p, at);
    sync_block();
    scale(tile, raw, p, shared.sums, Decays<N>(raw[W], at, p.x[W0]), shared.P_end, at);
    sync_block();
    pair_matrices<N>(shared.matrix, shared.room, tile, at);
    Sum Z = {}, Y = {};
    read_state<N>(Z, &Y, S, tile, at);
    sync_block();
    finish_chunk<N>(S, Z, &Y, tile, shared.matrix, shared.P_end, at);
    hand_in_moments(shared.moments, Y, at);
    sync_block();
    const Moments moments(shared.moments, at);
    Block v, g, x;
    load<N>(v, raw[V], 0, 16 * at.warp, at);
    load<N>(g, raw[GATE], 0, 16 * at.warp, at);
    const float bonus[2] = {total(shared.sums, 1, 0, at), total(shared.sums, 1, 1, at)};
    FOR_ELEMENTS {
      float& y = Y[half][2 * row + e];
      y = (y - moments.mean[row]) * moments.inverse[row] * p(LN_W, half, e, at) + p(LN_B, half, e, at);
      y = (y + bonus[row] * element(v, row, half, e)) * element(g, row, half, e);
    }
    to_block(x, Y);
    write(out + start + int64_t{chunk * C} * stride, stride, x, at);
  }
}

struct BackwardMemory : Backward<N> {
  bf16 tile[2][7][C * N];  // as they come, but dout becomes dy
  bf16 scaled[4][C * N];
  Shares sums, moments, gradients, kappa;
  Parameters parameters;
};

__global__ void __launch_bounds__(2 * N, 2)
    backward(const __grid_constant__ Inputs in, const bf16* kept, bf16* dr, bf16* dw, bf16* dk, bf16* dv, bf16* da, bf16* dg,
             float* d_parameters) {
  auto& shared = *reinterpret_cast<BackwardMemory*>(shared_memory());
  const int head = blockIdx.x, stride = in.H * N;
  const int64_t start = (int64_t{head / in.H} * in.T * in.H + head % in.H) * N;
  const Order order(in.T);
  auto fetch = [&](int group, int step, int stage) {
    constexpr unsigned SKIP = 1 << R | 1 << GATE | 1 << DOUT;
    fetch_step<N>(shared.tile[stage], shared.state, in.x, SKIP, kept, order, group, step, start, stride);
  };
  Sum G[N / 16] = {};
  float parts[PARAMETERS][2][2] = {};  // of the parameters' gradients: the lane's rows, in its columns
  const Parameters& p = shared.parameters;
  read_parameters(shared.parameters, in);
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
      auto& raw = shared.tile[stage];
      const Tiles tile = {nullptr, nullptr, shared.scaled[0], raw[V], shared.scaled[1], shared.scaled[2], nullptr, false};
      if (step == 0) load_state<N>(S, shared.state[slot(group, 0)], at);
      hand_in_sums<false>(shared.sums, raw, p, at);
      sync_block();
      scale(tile, raw, p, shared.sums, Decays<N>(raw[W], at, p.x[W0]), shared.P_end, at);
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
      auto& raw = shared.tile[stage];
      const Tiles tile = {shared.scaled[3], nullptr, shared.scaled[0], raw[V], shared.scaled[1], shared.scaled[2], raw[DOUT]};
      const bf16* state = shared.state[slot(group, i)];
      Block x;
      auto put = [&](bf16* tensor, const auto& values) {
        to_block(x, values);
        write(tensor + start + int64_t{(group * (GROUP / C) + i) * C} * stride, stride, x, Thread());
      };
      hand_in_sums<true>(shared.sums, raw, p, at);
      sync_block();
      const Decays<N> decays(raw[W], at, p.x[W0]);
      scale(tile, raw, p, shared.sums, decays, shared.P_end, at);
      sync_block();
      pair_matrices<N>(shared.matrix, shared.room(), tile, at);
      Sum Z = {}, Y = {}, dU = {}, dV = {};
      read_states<N>(Z, dU, dV, &Y, G, shared, state, tile, at);
      sync_block();
      finish_U<N>(Z, &Y, shared, tile, at);
      hand_in_moments(shared.moments, Y, at);
      sync_block();

      // Gate, bonus and norm: from dout to dy.
      const Moments moments(shared.moments, at);
      Elements dn;  // of the normalised y; Y becomes that y
      float sums[3][2] = {};  // of dn, dn n and the bonus
      {
        const float bonus[2] = {total(shared.sums, 1, 0, at), total(shared.sums, 1, 1, at)};
        Block v, g, dout;
        Elements d_gate;
        load<N>(v, raw[V], 0, 16 * at.warp, at);
        load<N>(g, raw[GATE], 0, 16 * at.warp, at);
        load<N>(dout, raw[DOUT], 0, 16 * at.warp, at);
        FOR_ELEMENTS {
          float& y = Y[half][2 * row + e];
          const float own = element(v, row, half, e), change = element(dout, row, half, e);
          const float d = change * element(g, row, half, e);
          y = (y - moments.mean[row]) * moments.inverse[row];
          d_gate[row][half][e] = change * (y * p(LN_W, half, e, at) + p(LN_B, half, e, at) + bonus[row] * own);
          parts[LN_W][half][e] += d * y;
          parts[LN_B][half][e] += d;
          dn[row][half][e] = d * p(LN_W, half, e, at);
          dV[half][2 * row + e] += bonus[row] * d;
          sums[0][row] += dn[row][half][e];
          sums[1][row] += dn[row][half][e] * y;
          sums[2][row] += d * own;
        }
        put(dg, d_gate);
      }
      hand_in(shared.gradients, sums, at);
      sync_block();
      FOR_ELEMENTS dn[row][half][e] =
          moments.inverse[row] * (dn[row][half][e] - total(shared.gradients, 0, row, at) / N -
                                  Y[half][2 * row + e] * total(shared.gradients, 1, row, at) / N);
      to_block(x, dn);
      store<N>(raw[DOUT], 0, 16 * at.warp, x, at);
      sync_warp();
      finish_values<N>(dU, dV, G, shared, tile, at);
      put(dv, dV);
      sync_block();

      // From what WKV-7 takes to what came.
      Sum dR = {}, dK = {}, dA = {}, dB = {};
      Elements d_log;
      keys<N>(dR, dK, dA, dB, d_log, decays, shared, state, tile);
      Block r, k, a, w;
      load<N>(w, raw[W], 0, 16 * at.warp, at);
      FOR_ELEMENTS {
        d_log[row][half][e] = decay_gradient(d_log[row][half][e], element(w, row, half, e) + p(W0, half, e, at));
        parts[W0][half][e] += d_log[row][half][e];
      }
      put(dw, d_log);
      load<N>(r, raw[R], 0, 16 * at.warp, at);
      load<N>(k, raw[K], 0, 16 * at.warp, at);
      load<N>(a, raw[A], 0, 16 * at.warp, at);
      const float by[2] = {kappa_scale(shared.sums, 0, at), kappa_scale(shared.sums, 1, at)};
      const float d_bonus[2] = {total(shared.gradients, 2, 0, at), total(shared.gradients, 2, 1, at)};
      float along[1][2] = {};  // kappa d_kappa
      FOR_ELEMENTS {
        const Element own(p, element(k, row, half, e), element(a, row, half, e), by[row], half, e, at);
        float &to_r = dR[half][2 * row + e], &to_key = dK[half][2 * row + e];
        float &to_a = dA[half][2 * row + e], &to_b = dB[half][2 * row + e];
        const float r_own = element(r, row, half, e), k_own = element(k, row, half, e);
        to_r += d_bonus[row] * own.key * p(R_K, half, e, at);
        to_key += d_bonus[row] * r_own * p(R_K, half, e, at);
        parts[R_K][half][e] += d_bonus[row] * r_own * own.key;
        const float d_alpha = to_b * own.kappa + to_key * k_own * p(K_A, half, e, at);
        to_a = to_b * own.alpha - to_a;  // d_kappa
        to_b = d_alpha * own.alpha * own.rest;
        parts[A0][half][e] += to_b;
        parts[K_A][half][e] -= to_key * k_own * own.rest;
        to_key *= 1.f - own.rest * p(K_A, half, e, at);
        along[0][row] += own.kappa * to_a;
      }
      put(dr, dR);
      put(da, dB);
      hand_in(shared.kappa, along, at);
      sync_block();
      FOR_ELEMENTS {
        const float k_own = element(k, row, half, e), kappa = k_own * p(K_K, half, e, at) * by[row];
        const float d = (dA[half][2 * row + e] - kappa * total(shared.kappa, 0, row, at)) * by[row];  // of k k_k
        parts[K_K][half][e] += d * k_own;
        dK[half][2 * row + e] += d * p(K_K, half, e, at);
      }
      put(dk, dK);
    }
  }

  const Thread at;
  for (int i = 0; i < PARAMETERS; ++i)
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < 2; ++e) {
        for (int step = 4; step < 32; step *= 2) parts[i][half][e] += shuffle_xor(parts[i][half][e], step);
        if (at.g == 0)
          d_parameters[(int64_t{head} * PARAMETERS + i) * N + 16 * at.warp + 8 * half + 2 * at.q + e] = parts[i][half][e];
      }
}

}  // namespace
}  // namespace wkv7

const char* wkv7_wind_forward(WKV7_WIND_FORWARD) {
  using namespace wkv7;
  if (const char* why = refuse(B, T, H, N, {64})) return why;
  const Inputs inputs = {{input(r), input(w), input(k), input(v), input(a), input(g), nullptr}, parameters, int(T), int(H)};
  return launch(forward, B * H, 128, sizeof(ForwardMemory), stream, inputs, output(out), output(kept));
}

const char* wkv7_wind_backward(WKV7_WIND_BACKWARD) {
  using namespace wkv7;
  if (const char* why = refuse(B, T, H, N, {64})) return why;
  const Inputs inputs = {{input(r), input(w), input(k), input(v), input(a), input(g), input(dout)}, parameters, int(T), int(H)};
  return launch(backward, B * H, 128, sizeof(BackwardMemory), stream, inputs, input(kept), output(dr), output(dw), output(dk), output(dv),
                output(da), output(dg), d_parameters);
}
