// Starts a kernel of the launchers under cuda/: null, or what was wrong with the launch. It does not wait for the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t stream,
                   const Arguments&... given) {
  const cudaLaunchConfig_t config = {dim3(static_cast<unsigned>(blocks)), dim3(threads), size_t(shared), stream, nullptr, 0};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, given...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // else the next launch of anybody would report it again
  return cudaGetErrorString(error);
}
