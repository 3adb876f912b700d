// Stands in for the CUDA runtime's header: with it g++ compiles the kernels of cuda/ for a CPU, so that tests need no
// GPU:   g++ -std=c++20 -O2 -x c++ -I tests/cuda_on_cpu -I cuda kernel.cu tests/cuda_on_cpu/cuda_on_cpu.cpp
// Only what the kernels use is here: 1-D grids and blocks, dynamic shared memory, and below, in cuda_on_cpu, what the
// portable bodies of cuda/primitives.cuh are made of. What is modelled, and what not: cuda_on_cpu.cpp.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
#pragma GCC visibility push(hidden)  // several libraries of one process each have their own machine
extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);  // what happened in the latest launch that failed

namespace cuda_on_cpu {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(void*), void* arguments);

// Ends the block; the launch fails with this message (as printf), the block's and the thread's number before it.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

void sync_block();
void sync_warp();
unsigned char* shared_memory();
void check_shared(const char* what, const void* address, size_t size);  // in the block's shared memory, aligned to size
void copy_begin(void* shared, const void* global);
void copy_commit();
void copy_wait(int pending);

void* const* arrive(const char* what, void* mine);
void leave();

// All 32 lanes of a warp meet in a collective called `what`, each with an object of its own. The last to arrive does
// the work: all(lane), where lane(i) is the object of lane i. It orders no memory accesses.
template <class Lane, class All>
inline void warp_exchange(const char* what, Lane& mine, All all) {
  if (void* const* lanes = arrive(what, &mine)) {
    all([lanes](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); });
    leave();
  }
}

struct Row {  // what a lane brings to load_tiles: 8 numbers of shared memory, read when it arrives
  uint16_t x[8];
  uint32_t tile[4];
  Row(const char* what, const void* row) {
    check_shared(what, row, sizeof x);
    __builtin_memcpy(x, row, sizeof x);
  }
};

inline float shuffle(const char* what, float x, int argument, int from) {  // x of lane `from`
  if (argument < 0 || argument > 31) fail("%s: %d is not in 0 .. 31", what, argument);
  struct Lane {
    float x, result;
    int from;
  } mine{x, 0, from};
  warp_exchange(what, mine, [](auto lane) {
    for (int i = 0; i < 32; ++i) lane(i).result = lane(lane(i).from).x;
  });
  return mine.result;
}

}  // namespace cuda_on_cpu
#pragma GCC visibility pop

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cuda_on_cpu::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return cuda_on_cpu::launch(*config, reinterpret_cast<const void*>(kernel),
                             [](void* call) { (*static_cast<decltype(thread)*>(call))(); }, &thread);
}
