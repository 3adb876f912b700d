// Makes one CUDA kernel of WKV-6 known to torch: compiled with -DKERNEL=cuda or -DKERNEL=fast, it registers
//     wkv6::<kernel>_forward(r, k, v, w, u, s0?) -> (y, kept, sT)
//     wkv6::<kernel>_backward(r, k, v, w, u, s0?, kept, dy, dsT?) -> (dr, dk, dv, dw, du, ds0)
// Shapes and types are in wkv6.h, but du here is (H, N), the sum over B; ds0 has no elements where there is no s0.
#include "wkv6.h"

#define OPERATOR "wkv6"
#include "../binding.h"

namespace {

struct Kernel {
  int64_t kept_tokens;
  ScalarType kept_type;
  wkv6_forward* forward;
  wkv6_backward* backward;
  wkv6_forward* forward_fp32;  // null: takes no fp32
  wkv6_backward* backward_fp32;
};

[[maybe_unused]] constexpr Kernel of_cuda() {
  return {32, ScalarType::Float, wkv6_cuda_forward, wkv6_cuda_backward, wkv6_cuda_fp32_forward,
          wkv6_cuda_fp32_backward};
}
[[maybe_unused]] constexpr Kernel of_fast() {
  return {64, ScalarType::BFloat16, wkv6_fast_forward, wkv6_fast_backward, nullptr, nullptr};
}
constexpr Kernel IN_USE = JOIN(of_, KERNEL)();

struct Call : Sizes {
  bool fp32;
  const float* u;

  Call(const Tensor& u, std::initializer_list<const Tensor*> tensors) : Sizes(**tensors.begin()) {
    const Tensor& r = **tensors.begin();
    fp32 = r.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(fp32 ? IN_USE.forward_fp32 != nullptr : r.scalar_type() == ScalarType::BFloat16,
                    "wkv6: kernel " TEXT(KERNEL) " takes ", IN_USE.forward_fp32 ? "bf16 or fp32" : "bf16");
    const char* names[] = {"r", "k", "v", "w", "dy"};
    for (int i = 0; const Tensor* x : tensors) check(*x, r, r.scalar_type(), tokens(), names[i++]);
    check(u, r, ScalarType::Float, {H, N}, "u");
    this->u = static_cast<const float*>(u.data_ptr());
  }

  std::vector<int64_t> kept_shape() const { return {B, H, (T + IN_USE.kept_tokens - 1) / IN_USE.kept_tokens, N, N}; }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, std::optional<Tensor> s0) {
  const Call c(u, {&r, &k, &v, &w});
  const float* start = optional_state(s0, r, "s0");
  const Place place(r);
  Tensor y = torch::stable::empty_like(r), kept = empty(r, c.kept_shape(), IN_USE.kept_type);
  Tensor sT = empty(r, c.states(), ScalarType::Float);
  must_be_null((c.fp32 ? IN_USE.forward_fp32 : IN_USE.forward)(
                   c.B, c.T, c.H, c.N, r.data_ptr(), k.data_ptr(), v.data_ptr(), w.data_ptr(), c.u, start, y.data_ptr(),
                   kept.data_ptr(), static_cast<float*>(sT.data_ptr()), place.stream()),
               "forward");
  return {y, kept, sT};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u,
                                                                    std::optional<Tensor> s0, Tensor kept, Tensor dy,
                                                                    std::optional<Tensor> dsT) {
  const Call c(u, {&r, &k, &v, &w, &dy});
  const float *start = optional_state(s0, r, "s0"), *end = optional_state(dsT, r, "dsT");
  check(kept, r, IN_USE.kept_type, c.kept_shape(), "kept");
  const Place place(r);
  Tensor g[4], du = empty(r, {c.B, c.H, c.N}, ScalarType::Float);
  Tensor ds0 = s0 ? empty(r, c.states(), ScalarType::Float) : empty(r, {0}, ScalarType::Float);
  for (Tensor& x : g) x = torch::stable::empty_like(r);
  must_be_null((c.fp32 ? IN_USE.backward_fp32 : IN_USE.backward)(
                   c.B, c.T, c.H, c.N, r.data_ptr(), k.data_ptr(), v.data_ptr(), w.data_ptr(), c.u, start,
                   kept.data_ptr(), dy.data_ptr(), end, g[0].data_ptr(), g[1].data_ptr(), g[2].data_ptr(),
                   g[3].data_ptr(), static_cast<float*>(du.data_ptr()),
                   s0 ? static_cast<float*>(ds0.data_ptr()) : nullptr, place.stream()),
               "backward");
  const int64_t over[] = {0};
  return {g[0], g[1], g[2], g[3], torch::stable::sum(du, over), ds0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wkv6, m) {
  m.def(TEXT(KERNEL) "_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? s0)"
        " -> (Tensor y, Tensor kept, Tensor sT)");
  m.def(TEXT(KERNEL) "_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? s0, Tensor kept, Tensor dy,"
        " Tensor? dsT) -> (Tensor dr, Tensor dk, Tensor dv, Tensor dw, Tensor du, Tensor ds0)");
}

STABLE_TORCH_LIBRARY_IMPL(wkv6, DEVICE, m) {
  m.impl(TEXT(KERNEL) "_forward", TORCH_BOX(&forward));
  m.impl(TEXT(KERNEL) "_backward", TORCH_BOX(&backward));
}
