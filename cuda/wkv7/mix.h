// The time mixing around WKV-7 on a CPU, in one pass over a head's tokens before heads.h and one after it. a is the
// logit of the in-context learning rate, g the gate; the parameters w0 a0 k_k k_a r_k ln_w ln_b are (7, H, N):
//     alpha = sigmoid(a + a0)     kappa = k k_k / |k k_k|     k' = k (1 + (alpha - 1) k_a)
//     y = wkv7(r, w + w0, k', v, -kappa, kappa alpha)     z = (y - mean) / sqrt(var + 64e-5)
//     out = ((z ln_w + ln_b) + (sum_n r k' r_k) v) g
// Kept     u and y, (2, B H, T, N). The rest is computed again: it costs less than its memory.
// Numerics fp32; sums over N in the order of the lanes, the same at every call.
// Cost     beside WKV-7's: an exp and about 30 operations a channel forward, 80 backward. Memory traffic of 9 and 15
//          tensors of (B, T, H, N); torch's steps one by one read and write each of theirs.
#pragma once

#include <cmath>

#include "heads.h"

namespace {

enum Parameter { W0, A0, K_K, K_A, R_K, LN_W, LN_B };
constexpr float LN_EPS = 64e-5f;

template <int N>
inline float sum_lanes(const Vec (&x)[N / W]) {
  Vec all = x[0];
  for (int m = 1; m < N / W; m++) all += x[m];
  float sum = 0;
  for (int i = 0; i < W; i++) sum += all[i];
  return sum;
}

// What WKV-7 takes, (T, N) each, and what the backward wants besides.
template <int N>
struct Head {
  float *r, *w, *k, *v, *a, *b, *alpha, *inverse;  // inverse (T): 1 / |k k_k|

  Head(float* scratch, const float* const (&in)[6], const float* const (&p)[7], int64_t T, int64_t stride) {
    for (float** x : {&r, &w, &k, &v, &a, &b, &alpha, &inverse}) {
      *x = scratch;
      scratch += T * N;
    }
    for (int64_t t = 0; t < T; t++) {
      const int64_t from = t * stride, to = t * N;
      Vec scaled[N / W], square[N / W], rate[N / W];
      for (int m = 0, j = 0; m < N / W; m++, j += W) {
        rate[m] = 1.f / (1.f + exp_minus(load(in[4] + from + j) + load(p[A0] + j)));
        const Vec key = load(in[2] + from + j);
        scaled[m] = key * load(p[K_K] + j);
        square[m] = scaled[m] * scaled[m];
        store(r + to + j, load(in[0] + from + j));
        store(w + to + j, load(in[1] + from + j) + load(p[W0] + j));
        store(k + to + j, key * (1.f + (rate[m] - 1.f) * load(p[K_A] + j)));
        store(v + to + j, load(in[3] + from + j));
        store(alpha + to + j, rate[m]);
      }
      inverse[t] = 1.f / std::max(std::sqrt(sum_lanes<N>(square)), 1e-12f);
      for (int m = 0, j = 0; m < N / W; m++, j += W) {
        const Vec kappa = scaled[m] * inverse[t];
        store(a + to + j, -kappa);
        store(b + to + j, kappa * rate[m]);
      }
    }
  }
};

// z, in place of y, 1 / sqrt(var + eps) and sum_n r k' r_k of a token.
template <int N>
inline void after(const Head<N>& head, const float* y, const float* const (&p)[7], int64_t to, Vec (&z)[N / W],
                  float& rstd, float& bonus) {
  Vec product[N / W];
  for (int m = 0, j = 0; m < N / W; m++, j += W) {
    z[m] = load(y + to + j);
    product[m] = load(head.r + to + j) * load(head.k + to + j) * load(p[R_K] + j);
  }
  bonus = sum_lanes<N>(product);
  const float mean = sum_lanes<N>(z) * (1.f / N);
  for (int m = 0; m < N / W; m++) {
    z[m] -= mean;
    product[m] = z[m] * z[m];
  }
  rstd = 1.f / std::sqrt(sum_lanes<N>(product) * (1.f / N) + LN_EPS);
  for (int m = 0; m < N / W; m++) z[m] *= rstd;
}

template <int N>
void mix_forward_head(const float* const (&in)[6], const float* const (&p)[7], float* out, float* u, float* y, int64_t T,
                      int64_t stride, float* scratch) {
  const Head<N> head(scratch, in, p, T, stride);
  forward_head<N>(head.r, head.w, head.k, head.v, head.a, head.b, y, u, T, N);
  for (int64_t t = 0; t < T; t++) {
    const int64_t at = t * stride, to = t * N;
    Vec z[N / W];
    float rstd, bonus;
    after<N>(head, y, p, to, z, rstd, bonus);
    for (int m = 0, j = 0; m < N / W; m++, j += W)
      store(out + at + j, (z[m] * load(p[LN_W] + j) + load(p[LN_B] + j) + load(head.v + to + j) * bonus) *
                              load(in[5] + at + j));
  }
}

template <int N>
void mix_backward_head(const float* const (&in)[6], const float* const (&p)[7], const float* u, const float* y,
                       const float* dout, float* const (&grad)[6], float* dp, int64_t T, int64_t stride, float* scratch) {
  const Head<N> head(scratch, in, p, T, stride);
  scratch += 8 * T * N;
  float *dy, *dr, *dw, *dk, *dv, *da, *db, *bonus, *dbonus;
  for (float** x : {&dy, &dr, &dw, &dk, &dv, &da, &db, &bonus, &dbonus}) {
    *x = scratch;
    scratch += T * N;
  }
  Vec sums[7][N / W] = {};

  for (int64_t t = 0; t < T; t++) {  // to y, the norm's parameters and the gate
    const int64_t at = t * stride, to = t * N;
    Vec z[N / W], dz[N / W], d[N / W];
    float rstd;
    after<N>(head, y, p, to, z, rstd, bonus[t]);
    for (int m = 0, j = 0; m < N / W; m++, j += W) {
      const Vec value = load(head.v + to + j), given = load(dout + at + j);
      const Vec mixed = z[m] * load(p[LN_W] + j) + load(p[LN_B] + j) + value * bonus[t];
      store(grad[5] + at + j, given * mixed);
      d[m] = given * load(in[5] + at + j);
      sums[LN_W][m] += d[m] * z[m];
      sums[LN_B][m] += d[m];
      dz[m] = d[m] * load(p[LN_W] + j);
      d[m] *= value;
    }
    dbonus[t] = sum_lanes<N>(d);
    for (int m = 0; m < N / W; m++) d[m] = dz[m] * z[m];
    const float mean = sum_lanes<N>(dz) * (1.f / N), along = sum_lanes<N>(d) * (1.f / N);
    for (int m = 0, j = 0; m < N / W; m++, j += W) store(dy + to + j, (dz[m] - mean - z[m] * along) * rstd);
  }

  backward_head<N>(head.r, head.w, head.k, head.v, head.a, head.b, u, dy, dr, dw, dk, dv, da, db, T, N, scratch);

  for (int64_t t = 0; t < T; t++) {
    const int64_t at = t * stride, to = t * N;
    Vec dkappa[N / W], d[N / W], dkey[N / W];
    for (int m = 0, j = 0; m < N / W; m++, j += W) {
      const Vec r = load(head.r + to + j), k = load(head.k + to + j), rk = load(p[R_K] + j), k_a = load(p[K_A] + j);
      const Vec key = load(in[2] + at + j), alpha = load(head.alpha + to + j), kappa = -load(head.a + to + j);
      const Vec decay = load(dw + to + j), to_b = load(db + to + j), gate = load(dout + at + j) * load(in[5] + at + j);
      const Vec to_k = load(dk + to + j) + r * rk * dbonus[t];  // to k'
      const Vec to_alpha = (to_b * kappa + to_k * key * k_a) * alpha * (1.f - alpha);
      store(grad[0] + at + j, load(dr + to + j) + k * rk * dbonus[t]);
      store(grad[1] + at + j, decay);
      store(grad[3] + at + j, load(dv + to + j) + gate * bonus[t]);
      store(grad[4] + at + j, to_alpha);
      sums[R_K][m] += r * k * dbonus[t];
      sums[W0][m] += decay;
      sums[A0][m] += to_alpha;
      sums[K_A][m] += to_k * key * (alpha - 1.f);
      dkey[m] = to_k * (1.f + (alpha - 1.f) * k_a);
      dkappa[m] = alpha * to_b - load(da + to + j);
      d[m] = dkappa[m] * kappa;
    }
    // |k k_k| below 1e-12 is held there, and has no gradient
    const float along = head.inverse[t] < 1e12f ? sum_lanes<N>(d) : 0.f;
    for (int m = 0, j = 0; m < N / W; m++, j += W) {
      const Vec to_scaled = (dkappa[m] + load(head.a + to + j) * along) * head.inverse[t];
      sums[K_K][m] += to_scaled * load(in[2] + at + j);
      store(grad[2] + at + j, dkey[m] + to_scaled * load(p[K_K] + j));
    }
  }
  for (int i = 0; i < 7; i++)
    for (int m = 0; m < N / W; m++) store(dp + i * N + m * W, sums[i][m]);
}

}  // namespace
