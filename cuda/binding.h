// What the torch bindings of the CUDA kernels share. Torch's stable C++ API only, so that they compile without torch's
// CUDA headers and serve several versions of torch. A binding defines OPERATOR ("wkv7") before it includes this, and is
// compiled with -DKERNEL=<name>, once for each kernel it binds; -DCUDA_ON_CPU registers for the CPU the kernels that the
// tests compile for it (tests/cuda_on_cpu).
#pragma once

#ifndef CUDA_ON_CPU
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#define DEVICE CUDA
#else
#define DEVICE CPU
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#define PASTE(a, b) a##b
#define JOIN(a, b) PASTE(a, b)
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// x must be as the launchers take it: of this type and shape, contiguous, aligned, where r is.
inline void check(const Tensor& x, const Tensor& r, ScalarType type, const std::vector<int64_t>& shape, const char* name) {
  if (type == ScalarType::Float)
    STD_TORCH_CHECK(x.scalar_type() == type, OPERATOR ": ", name, " must be fp32");
  STD_TORCH_CHECK(x.scalar_type() == type, OPERATOR ": ", name, " is of another type than it must be");
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(i) == shape[i];
  STD_TORCH_CHECK(same, OPERATOR ": ", name, " has the wrong shape");
  STD_TORCH_CHECK(x.get_device_index() == r.get_device_index() && x.is_cuda() == r.is_cuda(), OPERATOR ": ", name,
                  " is on another device than r");
  STD_TORCH_CHECK(x.is_contiguous(), OPERATOR ": ", name, " must be contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, OPERATOR ": ", name,
                  " must lie at a multiple of 16 bytes");
}

// The sizes of r, which must be (B, T, H, N), and what has them.
struct Sizes {
  int64_t B, T, H, N;
  explicit Sizes(const Tensor& r) {
    STD_TORCH_CHECK(r.dim() == 4 && r.numel() > 0, OPERATOR ": r must be (B, T, H, N), none of them 0; it has ", r.dim(),
                    " dimensions");
    B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
    STD_TORCH_CHECK(T % 16 == 0, OPERATOR ": T ", T, " is not a multiple of 16 (" OPERATOR "() in the training script pads)");
  }
  std::vector<int64_t> tokens() const { return {B, T, H, N}; }
  std::vector<int64_t> states() const { return {B, H, N, N}; }
};

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

inline const float* optional_state(const std::optional<Tensor>& x, const Tensor& r, const char* name) {
  if (!x) return nullptr;
  check(*x, r, ScalarType::Float, Sizes(r).states(), name);
  return static_cast<const float*>(x->data_ptr());
}

// After a launcher: null, or what went wrong.
inline void must_be_null(const char* error, const char* way) {
  STD_TORCH_CHECK(error == nullptr, OPERATOR ": " TEXT(KERNEL) " ", way, ": ", error);
}

}  // namespace
