// The launchers of WKV-7's CUDA kernels, plain C: no torch, no CUDA header. Each returns null, or what went wrong.
//
// Tensors  r w k v a b y dy and the gradients are (B, T, H, N), contiguous, 16-byte aligned, on the current device: bf16,
//          or fp32 for the launchers called _fp32_. T is a multiple of 16, above 0. Offsets are 64 bits wide.
//          States s0 sT dsT ds0 are (B, H, N, N), row = value, column = key, fp32. s0: null for zeros. dsT: null for
//          zeros (nothing depends on the final state). ds0: null if nobody wants it.
// kept     is what a forward leaves its backward, (B, H, T / tokens rounded up, N + more, N):
//            cuda, cuda_fp32   fp32, tokens 16, more 16: the state after the 16 tokens (N rows), then their u (16 rows)
//            fast              bf16, tokens 64, more 0:  the state before the 64 tokens
// stream   null is the default stream. A launcher does not wait for the kernel; only its launch is checked.
// N        cuda, cuda_fp32: 32, 64, 96, 128, 192.   fast: 64, 128.
#pragma once

#include <cstdint>

extern "C" {

typedef struct CUstream_st* cudaStream_t;

#define WKV7_INPUTS                                                                                                       \
  int64_t B, int64_t T, int64_t H, int64_t N, const void *r, const void *w, const void *k, const void *v, const void *a, \
      const void *b, const float *s0
#define WKV7_FORWARD WKV7_INPUTS, void *y, void *kept, float *sT, cudaStream_t stream
#define WKV7_BACKWARD                                                                                                   \
  WKV7_INPUTS, const void *kept, const void *dy, const float *dsT, void *dr, void *dw, void *dk, void *dv, void *da,   \
      void *db, float *ds0, cudaStream_t stream

typedef const char* wkv7_forward(WKV7_FORWARD);
typedef const char* wkv7_backward(WKV7_BACKWARD);
wkv7_forward wkv7_cuda_forward, wkv7_cuda_fp32_forward, wkv7_fast_forward;
wkv7_backward wkv7_cuda_backward, wkv7_cuda_fp32_backward, wkv7_fast_backward;

}  // extern "C"
