// The launchers of WKV-6's CUDA kernels, plain C: no torch, no CUDA header. Each returns null, or what went wrong.
//
// Tensors  r k v w y dy and the gradients are (B, T, H, N), contiguous, 16-byte aligned, on the current device: bf16,
//          or fp32 for the launchers called _fp32_. T is a multiple of 16, above 0. Offsets are 64 bits wide. u is (H,
//          N), fp32; du (B, H, N), fp32, one sequence's part each, to be summed over B.
//          States s0 sT dsT ds0 are (B, H, N, N), row = value, column = key, fp32. s0: null for zeros. dsT: null for
//          zeros (nothing depends on the final state). ds0: null if nobody wants it.
// kept     is what a forward leaves its backward, (B, H, T / tokens rounded up, N, N): the state before each `tokens`.
//            cuda, cuda_fp32   fp32, tokens 32
//            fast              bf16, tokens 64
// stream   null is the default stream. A launcher does not wait for the kernel; only its launch is checked.
// N        cuda, cuda_fp32: 32, 64, 96, 128, 192.   fast: 64, 128.
#pragma once

#include <cstdint>

extern "C" {

typedef struct CUstream_st* cudaStream_t;

#define WKV6_INPUTS                                                                                            \
  int64_t B, int64_t T, int64_t H, int64_t N, const void *r, const void *k, const void *v, const void *w,      \
      const float *u, const float *s0
#define WKV6_FORWARD WKV6_INPUTS, void *y, void *kept, float *sT, cudaStream_t stream
#define WKV6_BACKWARD                                                                                                \
  WKV6_INPUTS, const void *kept, const void *dy, const float *dsT, void *dr, void *dk, void *dv, void *dw, float *du, \
      float *ds0, cudaStream_t stream

typedef const char* wkv6_forward(WKV6_FORWARD);
typedef const char* wkv6_backward(WKV6_BACKWARD);
wkv6_forward wkv6_cuda_forward, wkv6_cuda_fp32_forward, wkv6_fast_forward;
wkv6_backward wkv6_cuda_backward, wkv6_cuda_fp32_backward, wkv6_fast_backward;

}  // extern "C"
