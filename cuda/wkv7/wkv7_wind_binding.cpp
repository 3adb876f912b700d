// Makes the fused time mixing (wkv7_wind.cu) known to torch:
//     wkv7::wind_forward(r, w, k, v, a, g, parameters) -> (out, kept)
//     wkv7::wind_backward(r, w, k, v, a, g, parameters, kept, dout) -> (dr, dw, dk, dv, da, dg, d_parameters)
// r .. g, out: (B, T, H, 64) bf16; parameters (7, H, 64) fp32; kept (B, H, ceil(T/64), 64, 64) bf16; d_parameters
// (B, H, 7, 64) fp32, still to be summed over B.
#include "wkv7.h"

#define OPERATOR "wkv7"
#include "../binding.h"

namespace {

struct Call : Sizes {
  explicit Call(std::initializer_list<const Tensor*> tensors, const Tensor& parameters) : Sizes(**tensors.begin()) {
    const Tensor& r = **tensors.begin();
    STD_TORCH_CHECK(r.scalar_type() == ScalarType::BFloat16, "wkv7: kernel wind takes bf16");
    const char* names[] = {"r", "w", "k", "v", "a", "g", "dout"};
    for (int i = 0; const Tensor* x : tensors) check(*x, r, ScalarType::BFloat16, tokens(), names[i++]);
    check(parameters, r, ScalarType::Float, {7, H, N}, "parameters");
  }
  std::vector<int64_t> kept_shape() const { return {B, H, (T + 63) / 64, N, N}; }
};

std::tuple<Tensor, Tensor> forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters) {
  const Call c({&r, &w, &k, &v, &a, &g}, parameters);
  const Place place(r);
  Tensor out = torch::stable::empty_like(r), kept = empty(r, c.kept_shape(), ScalarType::BFloat16);
  must_be_null(wkv7_wind_forward(c.B, c.T, c.H, c.N, r.data_ptr(), w.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(),
                                 g.data_ptr(), static_cast<const float*>(parameters.data_ptr()), out.data_ptr(),
                                 kept.data_ptr(), place.stream()),
               "forward");
  return {out, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters, Tensor kept, Tensor dout) {
  const Call c({&r, &w, &k, &v, &a, &g, &dout}, parameters);
  check(kept, r, ScalarType::BFloat16, c.kept_shape(), "kept");
  const Place place(r);
  Tensor d[6], d_parameters = empty(r, {c.B, c.H, 7, c.N}, ScalarType::Float);
  for (Tensor& x : d) x = torch::stable::empty_like(r);
  must_be_null(wkv7_wind_backward(c.B, c.T, c.H, c.N, r.data_ptr(), w.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(),
                                  g.data_ptr(), static_cast<const float*>(parameters.data_ptr()), kept.data_ptr(),
                                  dout.data_ptr(), d[0].data_ptr(), d[1].data_ptr(), d[2].data_ptr(), d[3].data_ptr(),
                                  d[4].data_ptr(), d[5].data_ptr(), static_cast<float*>(d_parameters.data_ptr()),
                                  place.stream()),
               "backward");
  return {d[0], d[1], d[2], d[3], d[4], d[5], d_parameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wkv7, m) {
  m.def("wind_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters)"
        " -> (Tensor out, Tensor kept)");
  m.def("wind_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters, Tensor kept,"
        " Tensor dout) -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor dg, Tensor d_parameters)");
}

STABLE_TORCH_LIBRARY_IMPL(wkv7, DEVICE, m) {
  m.impl("wind_forward", TORCH_BOX(&forward));
  m.impl("wind_backward", TORCH_BOX(&backward));
}
