// Makes WKV-7 on a CPU known to torch, alone (heads.h) and with the time mixing around it (mix.h):
//     wkv7::cpu_forward(r, w, k, v, a, b) -> (y, u)
//     wkv7::cpu_backward(r, w, k, v, a, b, u, dy) -> (dr, dw, dk, dv, da, db)
//     wkv7::mix_forward(r, w, k, v, a, g, parameters) -> (out, kept)
//     wkv7::mix_backward(r, w, k, v, a, g, parameters, kept, dout) -> (dr, dw, dk, dv, da, dg, d_parameters)
// r .. g, y, out and u are (B, T, H, N), parameters (7, H, N), kept (2, B H, T, N), all fp32; d_parameters (B, H, 7, N)
// is still to be summed over B.
#include "mix.h"

namespace {

std::tuple<Tensor, Tensor> forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b) {
  const Shape s = check("wkv7", {&r, &w, &k, &v, &a, &b});
  Tensor y = torch::stable::empty_like(r), u = torch::stable::empty_like(r);
  const float *pr = r.const_data_ptr<float>(), *pw = w.const_data_ptr<float>(), *pk = k.const_data_ptr<float>();
  const float *pv = v.const_data_ptr<float>(), *pa = a.const_data_ptr<float>(), *pb = b.const_data_ptr<float>();
  float *py = y.mutable_data_ptr<float>(), *pu = u.mutable_data_ptr<float>();
  for_heads("wkv7", s, 0, [&](auto n, int64_t, int64_t o, float*) {
    forward_head<n>(pr + o, pw + o, pk + o, pv + o, pa + o, pb + o, py + o, pu + o, s.T, s.stride);
  });
  return {y, u};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor u, Tensor dy) {
  const Shape s = check("wkv7", {&r, &w, &k, &v, &a, &b, &u, &dy});
  Tensor grads[6];
  for (Tensor& x : grads) x = torch::stable::empty_like(r);
  const float *pr = r.const_data_ptr<float>(), *pw = w.const_data_ptr<float>(), *pk = k.const_data_ptr<float>();
  const float *pv = v.const_data_ptr<float>(), *pa = a.const_data_ptr<float>(), *pb = b.const_data_ptr<float>();
  const float *pu = u.const_data_ptr<float>(), *pdy = dy.const_data_ptr<float>();
  float* g[6];
  for (int i = 0; i < 6; i++) g[i] = grads[i].mutable_data_ptr<float>();
  const int64_t scratch_size = (s.chunks() + 2) * s.N * s.N + (3 * s.T + 2) * s.N;
  for_heads("wkv7", s, scratch_size, [&](auto n, int64_t, int64_t o, float* scratch) {
    backward_head<n>(pr + o, pw + o, pk + o, pv + o, pa + o, pb + o, pu + o, pdy + o, g[0] + o, g[1] + o, g[2] + o,
                     g[3] + o, g[4] + o, g[5] + o, s.T, s.stride, scratch);
  });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

void check_parameters(const Tensor& parameters, const Shape& s) {
  check_one("wkv7", parameters);
  STD_TORCH_CHECK(parameters.dim() == 3 && parameters.size(0) == 7 && parameters.size(1) == s.H &&
                      parameters.size(2) == s.N, "wkv7: parameters has the wrong shape");
}

// A head's pointers: of the tensors at an offset, of the parameters at its row.
template <size_t COUNT>
struct Pointers {
  const float* at[COUNT];
  Pointers(const float* const (&from)[COUNT], int64_t offset, int64_t step = 0) {
    for (size_t i = 0; i < COUNT; i++) at[i] = from[i] + offset + i * step;
  }
};

std::tuple<Tensor, Tensor> mix_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters) {
  const Shape s = check("wkv7", {&r, &w, &k, &v, &a, &g});
  check_parameters(parameters, s);
  Tensor out = torch::stable::empty_like(r);
  Tensor kept = torch::stable::new_empty(r, {2, s.B * s.H, s.T, s.N});
  const float* in[6];
  for (int i = 0; const Tensor* x : {&r, &w, &k, &v, &a, &g}) in[i++] = x->const_data_ptr<float>();
  const float* p[7];
  std::fill(p, p + 7, parameters.const_data_ptr<float>());
  float *to = out.mutable_data_ptr<float>(), *u = kept.mutable_data_ptr<float>();
  for_heads("wkv7", s, 8 * s.T * s.N, [&](auto n, int64_t item, int64_t o, float* scratch) {
    const Pointers<6> tensors(in, o);
    const Pointers<7> row(p, item % s.H * s.N, s.H * s.N);
    const int64_t at = item * s.T * s.N;
    mix_forward_head<n>(tensors.at, row.at, to + o, u + at, u + s.B * s.H * s.T * s.N + at, s.T, s.stride, scratch);
  });
  return {out, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mix_backward(
    Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters, Tensor kept, Tensor dout) {
  const Shape s = check("wkv7", {&r, &w, &k, &v, &a, &g, &dout});
  check_parameters(parameters, s);
  check_one("wkv7", kept);
  STD_TORCH_CHECK(kept.numel() == 2 * r.numel(), "wkv7: kept has the wrong shape");
  Tensor d[6], d_parameters = torch::stable::new_empty(r, {s.B, s.H, 7, s.N});
  const float* in[6];
  for (int i = 0; const Tensor* x : {&r, &w, &k, &v, &a, &g}) in[i++] = x->const_data_ptr<float>();
  const float *p[7], *u = kept.const_data_ptr<float>(), *given = dout.const_data_ptr<float>();
  std::fill(p, p + 7, parameters.const_data_ptr<float>());
  float *grad[6], *dp = d_parameters.mutable_data_ptr<float>();
  for (int i = 0; i < 6; i++) {
    d[i] = torch::stable::empty_like(r);
    grad[i] = d[i].mutable_data_ptr<float>();
  }
  const int64_t own_scratch = (8 + 9) * s.T * s.N, scratch_size = (s.chunks() + 2) * s.N * s.N + (3 * s.T + 2) * s.N;
  for_heads("wkv7", s, own_scratch + scratch_size, [&](auto n, int64_t item, int64_t o, float* scratch) {
    const Pointers<6> tensors(in, o);
    const Pointers<7> row(p, item % s.H * s.N, s.H * s.N);
    float* const to[6] = {grad[0] + o, grad[1] + o, grad[2] + o, grad[3] + o, grad[4] + o, grad[5] + o};
    const int64_t at = item * s.T * s.N;
    mix_backward_head<n>(tensors.at, row.at, u + at, u + s.B * s.H * s.T * s.N + at, given + o, to, dp + item * 7 * s.N,
                         s.T, s.stride, scratch);
  });
  return {d[0], d[1], d[2], d[3], d[4], d[5], d_parameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wkv7, m) {
  m.def("cpu_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b) -> (Tensor y, Tensor u)");
  m.def("cpu_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor u, Tensor dy)"
        " -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db)");
  m.def("mix_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters)"
        " -> (Tensor out, Tensor kept)");
  m.def("mix_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor g, Tensor parameters, Tensor kept,"
        " Tensor dout) -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor dg, Tensor d_parameters)");
}

STABLE_TORCH_LIBRARY_IMPL(wkv7, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&forward));
  m.impl("cpu_backward", TORCH_BOX(&backward));
  m.impl("mix_forward", TORCH_BOX(&mix_forward));
  m.impl("mix_backward", TORCH_BOX(&mix_backward));
}
