// Small kernels for tests/test_cuda_on_cpu.py: each primitive of primitives.cuh by itself, one kernel without a race
// that uses them together, and kernels with a fault planted. All are kernel(in, out, n); `run` starts one by its name.
#include "primitives.cuh"

#include <cstring>

namespace {

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }
template <class T>
__device__ inline T* as(void* p) { return static_cast<T*>(p); }
template <class T>
__device__ inline const T* as(const void* p) { return static_cast<const T*>(p); }

// The primitives ------------------------------------------------------------------------------------------------------

__global__ void pack(const void* in, void* out, int) {  // 2 floats -> their pair, to_bf16 of both, both read back
  int i = global_thread();
  float lo = as<float2>(in)[i].x, hi = as<float2>(in)[i].y;
  uint32_t pair = pack_bf16(lo, hi);
  as<uint4>(out)[i] = make_uint4(pair, to_bf16(lo).bits | static_cast<uint32_t>(to_bf16(hi).bits) << 16,
                                 __float_as_uint(low_bf16(pair)), __float_as_uint(high_bf16(pair)));
}

__global__ void approximate(const void* in, void* out, int) {  // x -> 2^x, 1/x
  int i = global_thread();
  as<float2>(out)[i] = make_float2(fast_exp2(as<float>(in)[i]), fast_reciprocal(as<float>(in)[i]));
}

__global__ void where(const void*, void* out, int) {
  as<uint4>(out)[global_thread()] = make_uint4(threadIdx.x, blockIdx.x, blockDim.x, gridDim.x);
}

__global__ void order(const void*, void* out, int) {  // which thread ran when; a plain counter will do here
  int* count = as<int>(out);
  count[1 + (*count)++] = global_thread();
}

__global__ void first_bytes(const void*, void* out, int n) {  // what shared memory holds at first
  for (int i = thread(); i < n; i += static_cast<int>(blockDim.x)) as<unsigned char>(out)[i] = shared_memory()[i];
}

__global__ void shuffles(const void* in, void* out, int) {  // (x, mask, by, from) -> four shuffles
  const float* x = as<float>(in) + thread() * 4;
  int mask = static_cast<int>(x[1]), by = static_cast<int>(x[2]), from = static_cast<int>(x[3]);
  float a = shuffle_xor(x[0], mask), b = shuffle_up(x[0], by), c = shuffle_down(x[0], by), d = shuffle(x[0], from);
  as<float4>(out)[thread()] = make_float4(a, b, c, d);
}

__global__ void multiply(const void* in, void* out, int) {  // per lane 4 registers of A, 2 of B, 2 of nothing, 4 of C
  const uint32_t* x = as<uint32_t>(in) + thread() * 12;
  const uint32_t a[4] = {x[0], x[1], x[2], x[3]};
  float c[4];
  for (int j = 0; j < 4; ++j) c[j] = __uint_as_float(x[8 + j]);
  multiply_add(c, a, x[4], x[5]);
  as<float4>(out)[thread()] = make_float4(c[0], c[1], c[2], c[3]);
}

__global__ void tiles(const void* in, void* out, int) {  // 32 byte offsets, then 2048 bytes: those are shared memory
  auto s = shared_memory();
  for (int i = thread(); i < 512; i += 32) as<uint32_t>(s)[i] = as<uint32_t>(in)[32 + i];
  sync_warp();
  uint32_t plain[4], transposed[4];
  load_tiles(plain, s + as<int>(in)[thread()]);
  load_tiles_transposed(transposed, s + as<int>(in)[thread()]);
  as<uint4>(out)[thread() * 2] = make_uint4(plain[0], plain[1], plain[2], plain[3]);
  as<uint4>(out)[thread() * 2 + 1] = make_uint4(transposed[0], transposed[1], transposed[2], transposed[3]);
}

// Copies of 16 bytes in groups {0, 1} {2} {3}, and copy 4 in none. out[when][copy]: is it there, after the call, when
// 2, then 1, then 0 groups may be pending, and after the group of copy 4 too.
__global__ void groups(const void* in, void* out, int) {
  auto s = shared_memory();
  auto look = [&](int when) {
    for (int i = 0; i < 5; ++i) as<int>(out)[when * 5 + i] = as<int>(s + 16 * i)[3] == as<int>(in)[4 * i + 3];
  };
  copy_async(s, in);
  copy_async(s + 16, as<char>(in) + 16);
  copy_commit();
  copy_async(s + 32, as<char>(in) + 32);
  copy_commit();
  copy_async(s + 48, as<char>(in) + 48);
  copy_commit();
  copy_async(s + 64, as<char>(in) + 64);
  look(0);
  copy_wait<2>();
  look(1);
  copy_wait<1>();
  look(2);
  copy_wait<0>();
  look(3);
  copy_commit();
  copy_wait<0>();
  look(4);
}

// All of it together, and without a race: per block n matrices (16 x 16 bf16), copied two steps ahead into three
// buffers; each of 4 warps multiplies the running product of its own, rounded, by the matrix and scales it to sum 1 in
// absolute values. `missing` leaves out what a race needs to be left out.
enum Missing { NOTHING, WAIT, BARRIER, LAST_BARRIER, WARP_BARRIER };

template <int MISSING>
__global__ void chain(const void* in, void* out, int n) {
  auto s = shared_memory();
  int lane = thread() % 32, warp = thread() / 32;
  bf16* own = as<bf16>(s + 3 * 512 + warp * 512);
  auto fetch = [&](int step) {
    if (step < n && thread() < 32)
      copy_async(s + step % 3 * 512 + lane * 16, as<char>(in) + (blockIdx.x * n + step) * 512 + lane * 16);
    copy_commit();
  };
  for (int i = lane; i < 256; i += 32) own[i] = to_bf16(i % 17 == 0 ? 1.f / static_cast<float>(warp + 1) : 0.f);
  sync_warp();
  fetch(0);
  fetch(1);
  for (int step = 0; step < n; ++step) {
    if (MISSING != WAIT) copy_wait<1>();
    if (MISSING != BARRIER && (MISSING != LAST_BARRIER || step < n - 1)) sync_block();
    fetch(step + 2);
    uint32_t a[4], b[4];
    int row = lane % 16 * 16 + lane / 16 * 8;
    load_tiles(a, own + row);
    load_tiles_transposed(b, as<bf16>(s + step % 3 * 512) + row);
    float c[2][4] = {};
    multiply_add(c[0], a, b[0], b[1]);
    multiply_add(c[1], a, b[2], b[3]);
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += fabsf(c[i / 4][i % 4]);
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    sync_warp();
    for (int i = 0; i < 8; i += 2)
      as<uint32_t>(own)[((lane / 4 + i % 4 / 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2) / 2] =
          pack_bf16(c[i / 4][i % 4] / sum, c[i / 4][i % 4 + 1] / sum);
    if (MISSING != WARP_BARRIER) sync_warp();
  }
  copy_wait<0>();
  for (int i = lane; i < 128; i += 32)
    as<uint32_t>(out)[(blockIdx.x * blockDim.x / 32 + warp) * 128 + i] = as<uint32_t>(own)[i];
}

// Faults --------------------------------------------------------------------------------------------------------------

template <int SYNC>  // 0 none, 1 of the warp, 2 of the block
__global__ void neighbour(const void* in, void* out, int) {  // out_i = in_{i + 1}
  float* s = as<float>(shared_memory());
  s[thread()] = as<float>(in)[thread()];
  if (SYNC == 1) sync_warp();
  if (SYNC == 2) sync_block();
  as<float>(out)[thread()] = s[(threadIdx.x + 1) % blockDim.x];
}

__global__ void other_warp(const void* in, void* out, int) {  // a barrier of one warp, for what passes between two
  float* s = as<float>(shared_memory());
  if (thread() < 32) {
    s[thread()] = as<float>(in)[thread()];
  } else {
    sync_warp();
    as<float>(out)[thread()] = s[thread() - 32];
  }
}

__global__ void overwrite(const void* in, void* out, int) {  // no barrier between the reading and the next writing
  float* s = as<float>(shared_memory());
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s[thread()] = as<float>(in)[thread()] + static_cast<float>(i);
    sync_block();
    sum += s[(threadIdx.x + 33) % blockDim.x];
  }
  as<float>(out)[thread()] = sum;
}

__global__ void shuffle_for_barrier(const void* in, void* out, int) {  // a shuffle orders no memory
  float* s = as<float>(shared_memory());
  s[thread()] = as<float>(in)[thread()];
  float x = shuffle_xor(1.f, 1);
  as<float>(out)[thread()] = s[thread() ^ 1] * x;
}

template <bool BARRIER>
__global__ void others_copy(const void* in, void* out, int) {  // waits for its own copy, reads its neighbour's
  auto s = shared_memory();
  copy_async(s + 16 * thread(), as<char>(in) + 16 * thread());
  copy_commit();
  copy_wait<0>();
  if (BARRIER) sync_block();
  as<float4>(out)[thread()] = as<float4>(s)[thread() ^ 1];
}

__global__ void early_read(const void* in, void* out, int) {
  auto s = shared_memory();
  copy_async(s + 16 * thread(), as<char>(in) + 16 * thread());
  copy_commit();
  as<float4>(out)[thread()] = as<float4>(s)[thread()];
  copy_wait<0>();
}

__global__ void one_place(const void*, void* out, int n) {  // blocks (n = 0) or threads write the same number
  if (n || !thread()) as<int>(out)[n ? blockIdx.x : 0] = 1;
}

__global__ void tell_blocks(const void*, void* out, int) {  // all read, all but the first write
  if (thread()) return;
  as<int>(out)[1 + blockIdx.x] = as<int>(out)[0];
  if (blockIdx.x) as<int>(out)[0] = 1;
}

__global__ void some_skip_barrier(const void*, void*, int n) {
  if (thread() < n) sync_block();
}

__global__ void some_skip_collective(const void*, void* out, int n) {
  if (thread() != n) as<float>(out)[thread()] = shuffle(1.f, 0);
}

__global__ void barrier_or_collective(const void*, void*, int n) {
  if (thread() % 32 < n) sync_block();
  else sync_warp();
}

__global__ void different_collectives(const void*, void* out, int n) {
  as<float>(out)[thread()] = thread() % 32 == n ? shuffle_up(1.f, 1) : shuffle_down(1.f, 1);
}

__global__ void unawaited(const void* in, void*, int) { copy_async(shared_memory() + thread() * 16, in); }

__global__ void copy_at(const void* in, void*, int n) {  // n: byte of shared memory, and of the source
  copy_async(shared_memory() + n, as<char>(in) + n);
  copy_commit();
  copy_wait<0>();
}

__global__ void copy_source_at(const void* in, void*, int n) {
  copy_async(shared_memory(), n < 0 ? shared_memory() + 16 : as<unsigned char>(in) + n);
  copy_commit();
  copy_wait<0>();
}

__global__ void tiles_at(const void*, void* out, int n) {
  uint32_t tile[4];
  load_tiles(tile, shared_memory() + n);
  as<uint32_t>(out)[thread()] = tile[0];
}

__global__ void write_at(const void*, void*, int n) { shared_memory()[n] = 0; }
__global__ void read_at(const void*, void* out, int n) { as<unsigned char>(out)[0] = shared_memory()[n]; }
__global__ void wide_read_at(const void* in, void* out, int n) { as<float>(out)[0] = as<float4>(as<char>(in) + n)->x; }

using Kernel = void (*)(const void*, void*, int);

Kernel find(const char* name) {
#define KERNEL(k) \
  if (!strcmp(name, #k)) return k;
  KERNEL(pack) KERNEL(approximate) KERNEL(where) KERNEL(order) KERNEL(first_bytes) KERNEL(shuffles) KERNEL(multiply)
  KERNEL(tiles) KERNEL(groups) KERNEL(chain<NOTHING>) KERNEL(chain<WAIT>) KERNEL(chain<BARRIER>)
  KERNEL(chain<LAST_BARRIER>) KERNEL(chain<WARP_BARRIER>) KERNEL(neighbour<0>) KERNEL(neighbour<1>)
  KERNEL(neighbour<2>) KERNEL(other_warp) KERNEL(overwrite) KERNEL(shuffle_for_barrier) KERNEL(others_copy<false>)
  KERNEL(others_copy<true>) KERNEL(early_read) KERNEL(one_place) KERNEL(tell_blocks) KERNEL(some_skip_barrier)
  KERNEL(some_skip_collective) KERNEL(barrier_or_collective) KERNEL(different_collectives) KERNEL(unawaited)
  KERNEL(copy_at) KERNEL(copy_source_at) KERNEL(tiles_at) KERNEL(write_at) KERNEL(read_at) KERNEL(wide_read_at)
  return nullptr;
}

}  // namespace

// allow: bytes of shared memory to ask for beforehand, -1 for not asking. Returns what went wrong, or null.
extern "C" const char* run(const char* name, int blocks, int threads, int shared, int allow, const void* in, void* out,
                           int n) {
  Kernel kernel = find(name);
  if (!kernel) return "no such kernel";
  cudaError_t error = cudaSuccess;
  if (allow >= 0) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allow);
  if (error != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared;
  error = cudaLaunchKernelEx(&config, kernel, in, out, n);
  cudaError_t last = cudaGetLastError();
  if (last != error) return "the launch and cudaGetLastError disagree";
  if (cudaGetLastError() != cudaSuccess) return "cudaGetLastError did not clear the error";
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
