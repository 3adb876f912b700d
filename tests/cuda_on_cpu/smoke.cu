#include "primitives.cuh"
// out (threads) <- sums over the warp; C (16 x 8) <- A B for every warp
__global__ void smoke(const bf16* A, const bf16* B, float* C, float* out, int rounds) {
  auto s = reinterpret_cast<bf16*>(shared_memory());
  bf16 *sA = s, *sB = s + 256;
  int t = threadIdx.x, lane = t % 32;
  if (t < 32) copy_async(sA + t * 8, A + t * 8);
  else if (t < 48) copy_async(sB + (t - 32) * 8, B + (t - 32) * 8);
  copy_commit();
  copy_wait<0>();
  sync_block();
  float x = t;
  for (int m = 16; m; m /= 2) x += shuffle_xor(x, m);
  out[blockIdx.x * blockDim.x + t] = x;
  uint32_t a[4], b[4];
  load_tiles(a, sA + (lane % 16) * 16 + lane / 16 * 8);
  load_tiles_transposed(b, sB + (lane % 16) * 8);
  float c[4] = {};
  for (int i = 0; i < rounds; ++i) multiply_add(c, a, b[0], b[1]);
  for (int j = 0; j < 4; ++j) C[(blockIdx.x * blockDim.x / 32 + t / 32) * 128 + (lane / 4 + j / 2 * 8) * 8 + lane % 4 * 2 + j % 2] = c[j];
}
extern "C" const char* run_smoke(const void* A, const void* B, float* C, float* out, int blocks, int threads, int rounds, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = 768, config.stream = stream;
  cudaError_t error = cudaLaunchKernelEx(&config, smoke, static_cast<const bf16*>(A), static_cast<const bf16*>(B), C, out, rounds);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
