// WKV-6 on a CPU, forward and backward. Per sequence and head, state S (row = value, column = key), S_0 = 0:
//     y_t = S_{t-1} r_t + (sum_n r_n u_n k_n) v_t     S_t = S_{t-1} diag(d_t) + v_t k_t^T     d = exp(-exp(w))
// Tensors  r, k, v, w, y and the gradients are (B, T, H, N), u and du (H, N), fp32, contiguous.
// Threads  one (sequence, head) at a time (cpu.h). du is summed over the sequences at the end, in their order.
// Vectors  no sum over the state runs across the lanes of a vector.
//   forward       S_T[key][value], lanes = values: one pass over the keys adds to y_t and updates S.
//   backward (1)  G_T[key][value], lanes = values, G_t = gradient of S_t from later tokens: one such pass gives dv_t.
//   backward (2)  S and G[value][key], lanes = keys: dr, dk, dw. The elements of the state do not depend on each other:
//                 a tile stays in registers for 16 tokens, forwards for S, back for G.
//   The backward finds the states at the chunk starts with one more sweep of (2) over S: 2 of its 12 FMA.
// Numerics fp32 throughout; d is 0 below e^-87. Nothing is divided by d. dw is the sum over values of G_t * S_{t-1}, times
//          d exp(w): nothing cancels. NaN and Inf are passed on.
// Limits   N in {16, 32, 64, 96, 128, 192}; any B, T, H, w. Scratch: (T/16 + 2) N^2 + 3 T N floats a thread.
// Cost     per token and head 3 N^2 FMA forward, 12 N^2 backward; memory traffic of 5 and 9 tensors of (B, T, H, N).
//          Bound: the FMA rate, 2 vectors per cycle and core, if the next rows are prefetched.
#include "../cpu.h"

namespace {

// d = exp(-e), 0 where it is below e^-87, from e = exp(w).
inline Vec decay(Vec e) {
  const Vec d = exp_vec(-e), zero = {};
  return e > 87.f ? zero : d;
}

inline float sum_of(Vec x) {
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
}

// sum_n r_n u_n k_n of one token
template <int N>
inline float bonus(const float* r, const float* u, const float* k) {
  Vec sum = {};
  for (int j = 0; j < N; j += W) sum += load(r + j) * load(u + j) * load(k + j);
  return sum_of(sum);
}

template <int N>
inline float dot(const float* x, const float* y) {
  Vec sum = {};
  for (int j = 0; j < N; j += W) sum += load(x + j) * load(y + j);
  return sum_of(sum);
}

template <int N>
void forward_head(const float* r, const float* k, const float* v, const float* w, const float* u, float* y, int64_t T,
                  int64_t stride) {
  constexpr int V = VALUES<N>, BLOCKS = N / (V * W);
  static_assert(BLOCKS * V * W == N);
  alignas(64) Vec S[BLOCKS][N][V] = {};
  alignas(64) float d[CHUNK][N];
  float ruk[CHUNK];
  for (int64_t start = 0; start < T; start += CHUNK) {
    const int64_t end = std::min(start + CHUNK, T);
    for (int64_t t = start; t < end; t++) {
      const int64_t token = t * stride;
      for (int j = 0; j < N; j += W) store(&d[t - start][j], decay(exp_vec(load(w + token + j))));
      ruk[t - start] = bonus<N>(r + token, u, k + token);
    }
    for (int block = 0; block < BLOCKS; block++) {
      Vec(*state)[V] = S[block];
      for (int64_t t = start; t < end; t++) {
        const int64_t token = t * stride, here = token + block * V * W;
        const float *dt = d[t - start], *rt = r + token, *kt = k + token;
        if (block == 0 && t + CHUNK < T) prefetch<N>(token + CHUNK * stride, {r, k, v, w, y});
        Vec vt[V], sum[V];
        for (int m = 0; m < V; m++) {
          vt[m] = load(v + here + m * W);
          sum[m] = vt[m] * ruk[t - start];
        }
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
          const float dj = dt[j], kj = kt[j], rj = rt[j];
          for (int m = 0; m < V; m++) {
            const Vec s = state[j][m];
            sum[m] += s * rj;
            state[j][m] = s * dj + vt[m] * kj;
          }
        }
        for (int m = 0; m < V; m++) store(y + here + m * W, sum[m]);
      }
    }
  }
}

// ROWS x K vectors of S[value][key], one token: S diag(d) + v k^T.
template <int K>
inline void step(Vec (&S)[ROWS][K], const float* d, const float* k, const float* v) {
  for (int m = 0; m < K; m++) {
    const Vec dm = load(d + m * W), km = load(k + m * W);
    for (int p = 0; p < ROWS; p++) S[p][m] = S[p][m] * dm + km * v[p];
  }
}

template <int N>
void backward_head(const float* r, const float* k, const float* v, const float* w, const float* u, const float* dy,
                   float* dr, float* dk, float* dv, float* dw, float* du, int64_t T, int64_t stride, float* scratch) {
  constexpr int V = VALUES<N>, K = WIDTH<N>, KEYS = K * W;
  const int64_t chunks = (T + CHUNK - 1) / CHUNK;
  float *d = scratch, *slope = d + T * N, *ruk = slope + T * N;  // slope: dd/dw; ruk, q = dy v: one number a token
  float *q = ruk + T, *GT = q + T, *G = GT + N * N, *starts = G + N * N;  // starts: states (chunks, N, N)
  alignas(64) Vec held[CHUNK][ROWS][K];                                   // S_{t-1} of one tile

  for (int64_t t = 0; t < T; t++) {
    const int64_t token = t * stride;
    if (t + CHUNK < T) prefetch<N>(token + CHUNK * stride, {r, k, v, w, dy});
    for (int j = 0; j < N; j += W) {
      const Vec e = exp_vec(load(w + token + j)), dt = decay(e);
      store(d + t * N + j, dt);
      store(slope + t * N + j, -e * dt);
    }
    ruk[t] = bonus<N>(r + token, u, k + token);
    q[t] = dot<N>(v + token, dy + token);
  }
  std::fill(GT, GT + 2 * N * N, 0.f);
  std::fill(starts, starts + N * N, 0.f);

  for (int64_t c = 0; c + 1 < chunks; c++)
    for (int i = 0; i < N; i += ROWS)
      for (int j = 0; j < N; j += KEYS) {
        Vec S[ROWS][K];
        load_tile(S, starts + (c * N + i) * N + j, N);
        for (int64_t t = c * CHUNK; t < (c + 1) * CHUNK; t++)
          step(S, d + t * N + j, k + t * stride + j, v + t * stride + i);
        store_tile(S, starts + ((c + 1) * N + i) * N + j, N);
      }

  for (int64_t c = chunks - 1; c >= 0; c--) {
    const int64_t first = c * CHUNK, end = std::min(first + CHUNK, T);

    // (1) dv_t = G_t k_t + (sum r u k) dy_t, then G_{t-1} = G_t diag(d_t) + dy_t r_t^T
    for (int block = 0; block < N; block += V * W)
      for (int64_t t = end - 1; t >= first; t--) {
        const int64_t token = t * stride;
        const float *rt = r + token, *kt = k + token, *dt = d + t * N;
        if (block == 0 && t >= CHUNK) prefetch<N>(token - CHUNK * stride, {r, k, v, dy, dr, dk, dv, dw});
        float* g = GT + block * N;
        Vec dyt[V], sum[V];
        for (int m = 0; m < V; m++) {
          dyt[m] = load(dy + token + block + m * W);
          sum[m] = dyt[m] * ruk[t];
        }
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
          const float dj = dt[j], kj = kt[j], rj = rt[j];
          for (int m = 0; m < V; m++) {
            float* at = g + (j * V + m) * W;
            const Vec x = load(at);
            sum[m] += x * kj;
            store(at, x * dj + dyt[m] * rj);
          }
        }
        for (int m = 0; m < V; m++) store(dv + token + block + m * W, sum[m]);
      }

    // (2) dr_t = S_{t-1}^T dy_t,  dk_t = G_t^T v_t,  dd_t = sum over values of G_t * S_{t-1}, collected in dw;
    //     u adds q_t u * k_t to dr_t and q_t u * r_t to dk_t
    for (int64_t t = first; t < end; t++)
      for (int j = 0; j < N; j += W) {
        const int64_t at = t * stride + j;
        const Vec rt = load(r + at), kt = load(k + at), uq = load(u + j) * q[t];
        store(dr + at, uq * kt);
        store(dk + at, uq * rt);
        store(dw + at, Vec{});
      }
    for (int j = 0; j < N; j += KEYS)
      for (int i = 0; i < N; i += ROWS) {
        Vec tile[ROWS][K];
        load_tile(tile, starts + (c * N + i) * N + j, N);
        for (int64_t t = first; t < end; t++) {
          const int64_t token = t * stride;
          for (int m = 0; m < K; m++) {
            Vec sum = load(dr + token + j + m * W);
            for (int p = 0; p < ROWS; p++) {
              held[t - first][p][m] = tile[p][m];
              sum += tile[p][m] * dy[token + i + p];
            }
            store(dr + token + j + m * W, sum);
          }
          step(tile, d + t * N + j, k + token + j, v + token + i);
        }
        load_tile(tile, G + i * N + j, N);
        for (int64_t t = end - 1; t >= first; t--) {
          const int64_t token = t * stride, key = token + j;
          for (int m = 0; m < K; m++) {
            Vec to_dk = load(dk + key + m * W), to_dw = load(dw + key + m * W);
            for (int p = 0; p < ROWS; p++) {
              to_dk += tile[p][m] * v[token + i + p];
              to_dw += tile[p][m] * held[t - first][p][m];
            }
            store(dk + key + m * W, to_dk);
            store(dw + key + m * W, to_dw);
          }
          step(tile, d + t * N + j, r + key, dy + token + i);
        }
        store_tile(tile, G + i * N + j, N);
      }
    for (int j = 0; j < N; j += W) {
      Vec sum = {};  // of the chunk, then of all: fewer digits are lost
      for (int64_t t = first; t < end; t++) {
        const int64_t at = t * stride + j;
        sum += load(r + at) * load(k + at) * q[t];
        store(dw + at, load(dw + at) * load(slope + t * N + j));
      }
      store(du + j, load(du + j) + sum);
    }
  }
}

void check_u(const Tensor& u, const Shape& s) {
  check_one("wkv6", u);
  STD_TORCH_CHECK(u.dim() == 2 && u.size(0) == s.H && u.size(1) == s.N, "wkv6: expected u of shape (H, N)");
}

std::tuple<Tensor, Tensor> forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) {
  const Shape s = check("wkv6", {&r, &k, &v, &w});
  check_u(u, s);
  Tensor y = torch::stable::empty_like(r);
  const float *pr = r.const_data_ptr<float>(), *pk = k.const_data_ptr<float>(), *pv = v.const_data_ptr<float>();
  const float *pw = w.const_data_ptr<float>(), *pu = u.const_data_ptr<float>();
  float* py = y.mutable_data_ptr<float>();
  for_heads("wkv6", s, 0, [&](auto n, int64_t item, int64_t o, float*) {
    forward_head<n>(pr + o, pk + o, pv + o, pw + o, pu + item % s.H * n, py + o, s.T, s.stride);
  });
  return {y, torch::stable::new_empty(r, {0})};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The forward keeps nothing for it: one tensor without elements, where other kernels have one.
Gradients backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor, Tensor dy) {
  const Shape s = check("wkv6", {&r, &k, &v, &w, &dy});
  check_u(u, s);
  Tensor grads[4], du = torch::stable::empty_like(u);
  for (Tensor& x : grads) x = torch::stable::empty_like(r);
  const float *pr = r.const_data_ptr<float>(), *pk = k.const_data_ptr<float>(), *pv = v.const_data_ptr<float>();
  const float *pw = w.const_data_ptr<float>(), *pu = u.const_data_ptr<float>(), *pdy = dy.const_data_ptr<float>();
  float *g[4], *pdu = du.mutable_data_ptr<float>();
  for (int i = 0; i < 4; i++) g[i] = grads[i].mutable_data_ptr<float>();
  const Scratch parts(s.B * s.H * s.N);  // du of each sequence
  std::fill(parts.data, parts.data + s.B * s.H * s.N, 0.f);
  const int64_t scratch_size = (s.chunks() + 2) * s.N * s.N + 2 * s.T * (s.N + 1);
  for_heads("wkv6", s, scratch_size, [&](auto n, int64_t item, int64_t o, float* scratch) {
    backward_head<n>(pr + o, pk + o, pv + o, pw + o, pu + item % s.H * n, pdy + o, g[0] + o, g[1] + o, g[2] + o,
                     g[3] + o, parts.data + item * n, s.T, s.stride, scratch);
  });
  std::fill(pdu, pdu + s.H * s.N, 0.f);
  for (int64_t at = 0; at < s.B * s.H * s.N; at++) pdu[at % (s.H * s.N)] += parts.data[at];
  return {grads[0], grads[1], grads[2], grads[3], du};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wkv6, m) {
  m.def("cpu_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) -> (Tensor y, Tensor kept)");
  m.def("cpu_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor kept, Tensor dy)"
        " -> (Tensor dr, Tensor dk, Tensor dv, Tensor dw, Tensor du)");
}

STABLE_TORCH_LIBRARY_IMPL(wkv6, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&forward));
  m.impl("cpu_backward", TORCH_BOX(&backward));
}
