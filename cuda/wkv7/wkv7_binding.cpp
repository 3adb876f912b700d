// Makes one CUDA kernel of WKV-7 known to torch: compiled with -DKERNEL=cuda or -DKERNEL=fast, it registers
//     wkv7::<kernel>_forward(r, w, k, v, a, b, s0?) -> (y, kept, sT)
//     wkv7::<kernel>_backward(r, w, k, v, a, b, s0?, kept, dy, dsT?) -> (dr, dw, dk, dv, da, db, ds0)
// Shapes and types are in wkv7.h; ds0 has no elements where there is no s0.
#include "wkv7.h"

#define OPERATOR "wkv7"
#include "../binding.h"

namespace {

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
constexpr Kernel IN_USE = JOIN(of_, KERNEL)();

struct Call : Sizes {
  bool fp32;

  explicit Call(std::initializer_list<const Tensor*> tensors) : Sizes(**tensors.begin()) {
    const Tensor& r = **tensors.begin();
    fp32 = r.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(fp32 ? IN_USE.forward_fp32 != nullptr : r.scalar_type() == ScalarType::BFloat16,
                    "wkv7: kernel " TEXT(KERNEL) " takes ", IN_USE.forward_fp32 ? "bf16 or fp32" : "bf16");
    const char* names[] = {"r", "w", "k", "v", "a", "b", "dy"};
    for (int i = 0; const Tensor* x : tensors) check(*x, r, r.scalar_type(), tokens(), names[i++]);
  }

  std::vector<int64_t> kept_shape() const {
    return {B, H, (T + IN_USE.kept_tokens - 1) / IN_USE.kept_tokens, N + IN_USE.kept_more, N};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b,
                                           std::optional<Tensor> s0) {
  const Call c({&r, &w, &k, &v, &a, &b});
  const float* start = optional_state(s0, r, "s0");
  const Place place(r);
  Tensor y = torch::stable::empty_like(r), kept = empty(r, c.kept_shape(), IN_USE.kept_type);
  Tensor sT = empty(r, c.states(), ScalarType::Float);
  must_be_null((c.fp32 ? IN_USE.forward_fp32 : IN_USE.forward)(
                   c.B, c.T, c.H, c.N, r.data_ptr(), w.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(), b.data_ptr(),
                   start, y.data_ptr(), kept.data_ptr(), static_cast<float*>(sT.data_ptr()), place.stream()),
               "forward");
  return {y, kept, sT};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, std::optional<Tensor> s0, Tensor kept, Tensor dy,
    std::optional<Tensor> dsT) {
  const Call c({&r, &w, &k, &v, &a, &b, &dy});
  const float *start = optional_state(s0, r, "s0"), *end = optional_state(dsT, r, "dsT");
  check(kept, r, IN_USE.kept_type, c.kept_shape(), "kept");
  const Place place(r);
  Tensor g[6], ds0 = s0 ? empty(r, c.states(), ScalarType::Float) : empty(r, {0}, ScalarType::Float);
  for (Tensor& x : g) x = torch::stable::empty_like(r);
  must_be_null((c.fp32 ? IN_USE.backward_fp32 : IN_USE.backward)(
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

STABLE_TORCH_LIBRARY_IMPL(wkv7, DEVICE, m) {
  m.impl(TEXT(KERNEL) "_forward", TORCH_BOX(&forward));
  m.impl(TEXT(KERNEL) "_backward", TORCH_BOX(&backward));
}
