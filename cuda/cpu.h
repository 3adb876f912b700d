// What the CPU kernels of WKV-6 and WKV-7 share: vectors, exp, scratch memory, tiles of the state, checks, threads.
//
// Work     one (sequence, head) at a time on each thread of torch's own pool. Nothing is shared: the results do not
//          depend on the number of threads.
// Tensors  (B, T, H, N), fp32, contiguous; N is a template parameter, one of 16, 32, 64, 96, 128, 192.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------------------------
// Vectors

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;  // 32, else 16
#else
constexpr bool MANY_REGISTERS = false;
#endif
constexpr int CHUNK = 16;  // tokens whose states a backward holds at once
constexpr int ROWS = 4;    // values in a tile of the state

typedef float Vec __attribute__((vector_size(W * sizeof(float))));
typedef float VecMemory __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(W * sizeof(float))));

inline Vec load(const float* p) { return *reinterpret_cast<const VecMemory*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecMemory*>(p) = x; }

// Vectors handled together: enough independent sums to hide the FMA latency, few enough to stay in registers.
template <int N>
constexpr int WIDTH = (N % (2 * W) == 0 && MANY_REGISTERS) ? 2 : 1;
template <int N>
constexpr int VALUES = N % (4 * W) == 0 && MANY_REGISTERS ? 4 : N % (2 * W) == 0 ? 2 : 1;

// ROWS x K vectors of a matrix with rows of N floats.
template <int K>
inline void load_tile(Vec (&S)[ROWS][K], const float* from, int N) {
  for (int i = 0; i < ROWS; i++)
    for (int m = 0; m < K; m++) S[i][m] = load(from + i * N + m * W);
}

template <int K>
inline void store_tile(const Vec (&S)[ROWS][K], float* to, int N) {
  for (int i = 0; i < ROWS; i++)
    for (int m = 0; m < K; m++) store(to + i * N + m * W, S[i][m]);
}

// exp(x), x cut to [-87, 87]; as 2^n e^f with |f| <= ln(2) / 2. A NaN fails both comparisons and so reaches the
// result.
inline Vec exp_vec(Vec x) {
  const Vec low = Vec{} - 87.f, high = Vec{} + 87.f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float round = 12582912.f;  // 1.5 * 2^23: a sum with it has the rounded integer in its low bits
  const Vec shifted = x * 1.44269504f + round;
  const Vec n = shifted - round;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec e = f * (1.f / 5040) + 1.f / 720;
  e = e * f + 1.f / 120;
  e = e * f + 1.f / 24;
  e = e * f + 1.f / 6;
  e = e * f + 0.5f;
  e = e * f + 1.f;
  e = e * f + 1.f;
  const VecBits scale = ((VecBits)shifted - (0x4B400000u - 127u)) << 23;  // 2^n
  return e * (Vec)scale;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// The rows of a head lie H N floats apart, too far for the hardware to guess the next one.
template <int N>
inline void prefetch(int64_t at, std::initializer_list<const float*> tensors) {
  for (const float* x : tensors)
    for (int j = 0; j < N; j += 16) __builtin_prefetch(x + at + j);
}

struct Scratch {
  float* data;
  explicit Scratch(int64_t n) : data(static_cast<float*>(::operator new(n * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
};

// ---------------------------------------------------------------------------------------------------------------------
// Tensors and threads

struct Shape {
  int64_t B, T, H, N, stride;
  int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
  int64_t offset(int64_t item) const { return (item / H) * T * stride + (item % H) * N; }  // of (sequence, head)
};

inline void check_one(const char* operation, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(), operation,
                  ": the CPU kernel takes contiguous float32 tensors on the CPU");
}

inline Shape check(const char* operation, std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  for (const Tensor* x : tensors) {
    check_one(operation, *x);
    STD_TORCH_CHECK(x->dim() == 4, operation, ": expected tensors of shape (B, T, H, N), got ", x->dim(), " dimensions");
    for (int i = 0; i < 4; i++) STD_TORCH_CHECK(x->size(i) == first.size(i), operation, ": the tensors differ in shape");
  }
  return {first.size(0), first.size(1), first.size(2), first.size(3), first.size(2) * first.size(3)};
}

template <class F>
void for_head_size(const char* operation, int64_t N, const F& f) {
  switch (N) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 64: return f(std::integral_constant<int, 64>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
    case 192: return f(std::integral_constant<int, 192>());
  }
  STD_TORCH_CHECK(false, operation, ": head size ", N, " is not one of 16, 32, 64, 96, 128, 192");
}

// f(N, item, offset, scratch) for every (sequence, head); N as a compile-time constant.
template <class F>
void for_heads(const char* operation, const Shape& s, int64_t scratch_size, const F& f) {
  for_head_size(operation, s.N, [&](auto n) {
    torch::stable::parallel_for(0, s.B * s.H, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_size);
      for (int64_t item = begin; item < end; item++) f(n, item, s.offset(item), scratch.data);
    });
  });
}

}  // namespace
