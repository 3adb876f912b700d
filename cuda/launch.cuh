// What the launchers under cuda/ share. All return null, or what was wrong.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// Starts a kernel and does not wait for it.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t stream,
                   const Arguments&... given) {
  const cudaLaunchConfig_t config = {dim3(static_cast<unsigned>(blocks)), dim3(threads), size_t(shared), stream, nullptr, 0};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaErrorInvalidValue) {
    cudaGetLastError();
    return "this GPU has too little shared memory a block for this head size";
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, given...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // else the next launch of anybody would report it again
  return cudaGetErrorString(error);
}

// f(an integral_constant) for the one of N, MORE ... that is `given`.
template <int N, int... MORE, class F>
const char* for_head_size(int64_t given, const F& f) {
  if (given == N) return f(std::integral_constant<int, N>());
  if constexpr (sizeof...(MORE) > 0) return for_head_size<MORE...>(given, f);
  return "not one of this kernel's head sizes";
}
