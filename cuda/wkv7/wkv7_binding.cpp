// Makes one CUDA kernel of WKV-7 known to torch: compiled with -DKERNEL=cuda or -DKERNEL=fast, it registers
//     wkv7::<kernel>_forward(r, w, k, v, a, b, s0?) -> (y, kept, sT)
//     wkv7::<kernel>_backward(r, w, k, v, a, b, s0?, kept, dy, dsT?) -> (dr, dw, dk, dv, da, db, ds0)
// Shapes and types are in wkv7.h; ds0 has no elements where there is no s0. Torch's stable C++ API only, so that it
// compiles without torch's CUDA headers and serves several versions of torch. -DCUDA_ON_CPU registers for the CPU the
// kernels that the tests compile for it (tests/cuda_on_cpu).
#include "wkv7.h"

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#ifndef CUDA_ON_CPU
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define PASTE(a, b, c) a##b##c
#define JOIN(a, b, c) PASTE(a, b, c)
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Kernel {
  int64_t kept_tokens, kept_more;
  ScalarType kept_type;
  wkv7_forward* forward;
  wkv7_backward* backward;
  wkv7_forward* forward_fp32;  // null: takes no fp32
  wkv7_backward* backward_fp32;
};

[[maybe_unused]] constexpr Kernel of_cuda() {
  return {16, 16, ScalarType::Float, wkv7_cuda_forward, wkv7_cuda_backward, wkv7_cuda_fp32_forward, wkv7_cuda_fp32_backward};
}
[[maybe_unused]] constexpr Kernel of_fast() {
  return {64, 0, ScalarType::BFloat16, wkv7_fast_forward, wkv7_fast_backward, nullptr, nullptr};
}
constexpr Kernel KERNEL_IN_USE = JOIN(of_, KERNEL, )();

// Where the kernel is to run, for as long as this lives.
class Place {
#ifdef CUDA_ON_CPU
 public:
  explicit Place(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  torch::stable::accelerator::DeviceGuard guard;
  int32_t device;

 public:
  explicit Place(const Tensor& x) : guard(x.get_device_index()), device(x.get_device_index()) {}
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
  }
#endif
};

void check_memory(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.get_device_index() == like.get_device_index() && x.is_cuda() == like.is_cuda(), "wkv7: ", name,
                  " is on another device than r");
  STD_TORCH_CHECK(x.is_contiguous(), "wkv7: ", name, " must be contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, "wkv7: ", name, " must lie at a multiple of 16 bytes");
}

void check_shape(const Tensor& x, std::initializer_list<int64_t> shape, const char* name) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (int i = 0; same && i < x.dim(); i++) same = x.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(same, "wkv7: ", name, " has the wrong shape: r is (B, T, H, N), so are w k v a b y dy; states (B, H, N, N)");
}

struct Call {
  const Tensor& r;
  int64_t B, T, H, N;
  bool fp32;

  Call(std::initializer_list<const Tensor*> tensors) : r(**tensors.begin()) {
    STD_TORCH_CHECK(r.dim() == 4 && r.numel() > 0, "wkv7: r must be (B, T, H, N), none of them 0; it has ", r.dim(), " dimensions");
    B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
    fp32 = r.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(fp32 ? KERNEL_IN_USE.forward_fp32 != nullptr : r.scalar_type() == ScalarType::BFloat16,
                    "wkv7: kernel " TEXT(KERNEL) " takes ", KERNEL_IN_USE.forward_fp32 ? "bf16 or fp32" : "bf16");
    STD_TORCH_CHECK(T % 16 == 0, "wkv7: T ", T, " is not a multiple of 16 (wkv7() in train_rwkv7.py pads)");
    const char* names[] = {"r", "w", "k", "v", "a", "b", "dy"};
    int i = 0;
    for (const Tensor* x : tensors) {
      STD_TORCH_CHECK(x->scalar_type() == r.scalar_type(), "wkv7: ", names[i], " is of another type than r");
      check_shape(*x, {B, T, H, N}, names[i]);
      check_memory(*x, r, names[i++]);
    }
  }

  const float* state(const std::optional<Tensor>& x, const char* name) const {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, "wkv7: ", name, " must be fp32");
    check_shape(*x, {B, H, N, N}, name);
    check_memory(*x, r, name);
    return static_cast<const float*>(x->data_ptr());
  }

  Tensor empty(std::vector<int64_t> shape, ScalarType type) const { return torch::stable::new_empty(r, shape, type); }
  Tensor empty_state() const { return empty({B, H, N, N}, ScalarType::Float); }
  std::vector<int64_t> kept_shape() const {
    return {B, H, (T + KERNEL_IN_USE.kept_tokens - 1) / KERNEL_IN_USE.kept_tokens, N + KERNEL_IN_USE.kept_more, N};
  }
};

void must_be_null(const char* error, const char* way) {
  STD_TORCH_CHECK(error == nullptr, "wkv7: " TEXT(KERNEL) " ", way, ": ", error);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b,
                                           std::optional<Tensor> s0) {
  const Call c({&r, &w, &k, &v, &a, &b});
  const float* start = c.state(s0, "s0");
  const Place place(r);
  Tensor y = torch::stable::empty_like(r), kept = c.empty(c.kept_shape(), KERNEL_IN_USE.kept_type), sT = c.empty_state();
  must_be_null((c.fp32 ? KERNEL_IN_USE.forward_fp32 : KERNEL_IN_USE.forward)(
                   c.B, c.T, c.H, c.N, r.data_ptr(), w.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(), b.data_ptr(),
                   start, y.data_ptr(), kept.data_ptr(), static_cast<float*>(sT.data_ptr()), place.stream()),
               "forward");
  return {y, kept, sT};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, std::optional<Tensor> s0, Tensor kept, Tensor dy,
    std::optional<Tensor> dsT) {
  const Call c({&r, &w, &k, &v, &a, &b, &dy});
  const float *start = c.state(s0, "s0"), *end = c.state(dsT, "dsT");
  const auto shape = c.kept_shape();
  STD_TORCH_CHECK(kept.scalar_type() == KERNEL_IN_USE.kept_type, "wkv7: kept is of another type than the forward's");
  check_shape(kept, {shape[0], shape[1], shape[2], shape[3], shape[4]}, "kept");
  check_memory(kept, r, "kept");
  const Place place(r);
  Tensor g[6], ds0 = s0 ? c.empty_state() : c.empty({0}, ScalarType::Float);
  for (Tensor& x : g) x = torch::stable::empty_like(r);
  must_be_null((c.fp32 ? KERNEL_IN_USE.backward_fp32 : KERNEL_IN_USE.backward)(
                   c.B, c.T, c.H, c.N, r.data_ptr(), w.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(), b.data_ptr(),
                   start, kept.data_ptr(), dy.data_ptr(), end, g[0].data_ptr(), g[1].data_ptr(), g[2].data_ptr(),
                   g[3].data_ptr(), g[4].data_ptr(), g[5].data_ptr(), s0 ? static_cast<float*>(ds0.data_ptr()) : nullptr,
                   place.stream()),
               "backward");
  return {g[0], g[1], g[2], g[3], g[4], g[5], ds0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wkv7, m) {
  m.def(TEXT(KERNEL) "_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? s0)"
        " -> (Tensor y, Tensor kept, Tensor sT)");
  m.def(TEXT(KERNEL) "_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? s0, Tensor kept,"
        " Tensor dy, Tensor? dsT) -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor ds0)");
}

#ifdef CUDA_ON_CPU
STABLE_TORCH_LIBRARY_IMPL(wkv7, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(wkv7, CUDA, m) {
#endif
  m.impl(TEXT(KERNEL) "_forward", TORCH_BOX(&forward));
  m.impl(TEXT(KERNEL) "_backward", TORCH_BOX(&backward));
}
