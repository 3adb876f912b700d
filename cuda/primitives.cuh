// What the kernels ask of the machine, once: bf16, warps, tensor cores, asynchronous copies. Each primitive has a PTX
// body for nvcc and a portable one, in which the lanes of a warp hand each other their operands; it lets the tests run
// the same kernels on a CPU (tests/cuda_on_cpu). Needs sm_80. Layouts are those of the PTX manual, "mma.m16n8k16":
// with g = lane / 4 and q = lane % 4, two bf16 to a register, the lower index in the lower half,
//     A (16 x 16)  a[0]: row g,   columns 2q, 2q+1   a[1]: row g+8   a[2]: row g, columns 2q+8, 2q+9   a[3]: row g+8
//     B (16 x 8)   b0: rows 2q, 2q+1 of column g     b1: rows 2q+8, 2q+9
//     C (16 x 8)   c[0], c[1]: row g, columns 2q, 2q+1                 c[2], c[3]: row g+8        (fp32)
// So C of one product, rounded in pairs, is A of the next, or B if the next product wants it transposed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

struct bf16 {
  uint16_t bits;
};

// (lo, hi) rounded to nearest even.
__device__ inline uint32_t pack_bf16(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
#else
  auto round = [](float x) -> uint32_t {
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(hi) << 16 | round(lo);
#endif
}

__device__ inline float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline float to_float(bf16 x) { return low_bf16(x.bits); }
__device__ inline bf16 to_bf16(float x) { return bf16{static_cast<uint16_t>(pack_bf16(x, 0.f))}; }

// 2^x and 1/x to 2 ulp; results below 2^-126 become 0.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
#endif
}

__device__ inline float fast_reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  float y = 1 / x;
  return fabsf(y) < 0x1p-126f ? copysignf(0.f, y) : y;
#endif
}

// threadIdx.x, read anew: what is computed from it need not stay in registers all the way from its last use.
__device__ inline int thread_index() {
#ifdef __CUDACC__
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  __builtin_assume(i >= 0 && i < 1024);  // so that / and % are shifts and masks
  return i;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// Barriers, of the block and of the warp. Both order the memory accesses of their threads.
__device__ inline void sync_block() {
#ifdef __CUDACC__
  __syncthreads();
#else
  cuda_on_cpu::sync_block();
#endif
}

__device__ inline void sync_warp() {
#ifdef __CUDACC__
  __syncwarp();
#else
  cuda_on_cpu::sync_warp();
#endif
}

// x of the lane whose number differs in the bits of mask; of lane - by or lane + by (its own x beyond the ends).
__device__ inline float shuffle_xor(float x, int mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, x, mask);
#else
  return cuda_on_cpu::shuffle("shuffle_xor", x, mask, threadIdx.x % 32 ^ mask);
#endif
}

__device__ inline uint32_t shuffle_xor(uint32_t x, int mask) {
  return __float_as_uint(shuffle_xor(__uint_as_float(x), mask));
}

__device__ inline float shuffle_up(float x, int by) {
#ifdef __CUDACC__
  return __shfl_up_sync(0xffffffffu, x, by);
#else
  int lane = threadIdx.x % 32;
  return cuda_on_cpu::shuffle("shuffle_up", x, by, lane < by ? lane : lane - by);
#endif
}

__device__ inline float shuffle_down(float x, int by) {
#ifdef __CUDACC__
  return __shfl_down_sync(0xffffffffu, x, by);
#else
  int lane = threadIdx.x % 32;
  return cuda_on_cpu::shuffle("shuffle_down", x, by, lane + by > 31 ? lane : lane + by);
#endif
}

// x of the given lane, which may differ from lane to lane.
__device__ inline float shuffle(float x, int lane) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, x, lane);
#else
  return cuda_on_cpu::shuffle("shuffle", x, lane, lane);
#endif
}

// Sums each x[i] over the lanes that differ in bits FIRST .. LAST. A lane keeps one i: its bits from FIRST on, as many
// as needed.
template <int FIRST, int LAST, int COUNT>
__device__ inline float sum(float (&x)[COUNT]) {
#pragma unroll
  for (int bit = FIRST, half = COUNT / 2; bit >= LAST; bit /= 2, half /= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < half; i++) x[i] = (upper ? x[i + half] : x[i]) + shuffle_xor(upper ? x[i] : x[i + half], bit);
    if (half == 0) x[0] += shuffle_xor(x[0], bit);
  }
  return x[0];
}

// Start of the block's dynamic shared memory, aligned to 128 bytes.
__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return cuda_on_cpu::shared_memory();
#endif
}

// Four 8 x 8 tiles of bf16 from shared memory: lane i gives the address (16-byte aligned) of row i % 8 of tile i / 8.
// Register j: row g, columns 2q, 2q+1 of tile j; with _transposed rows 2q, 2q+1 of column g.
__device__ inline void load_tiles(uint32_t (&tile)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  cuda_on_cpu::Row mine("load_tiles", row);
  cuda_on_cpu::warp_exchange("load_tiles", mine, [](auto lane) {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 4; ++j) {
        const uint16_t* row = lane(8 * j + i / 4).x + i % 4 * 2;
        lane(i).tile[j] = row[0] | row[1] << 16;
      }
  });
  for (int j = 0; j < 4; ++j) tile[j] = mine.tile[j];
#endif
}

__device__ inline void load_tiles_transposed(uint32_t (&tile)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  cuda_on_cpu::Row mine("load_tiles_transposed", row);
  cuda_on_cpu::warp_exchange("load_tiles_transposed", mine, [](auto lane) {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 4; ++j) {
        int row = 8 * j + i % 4 * 2, column = i / 4;
        lane(i).tile[j] = lane(row).x[column] | lane(row + 1).x[column] << 16;
      }
  });
  for (int j = 0; j < 4; ++j) tile[j] = mine.tile[j];
#endif
}

// C += A B on the tensor cores: bf16 in, fp32 sums. The portable body adds the 16 products, which are exact, to C one
// by one and rounds to nearest; tensor cores add several at once and cut bits off.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct Lane {
    float c[4];
    uint32_t a[4], b[2];
  } mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  cuda_on_cpu::warp_exchange("multiply_add", mine, [](auto lane) {
    float A[16][16], B[16][8], C[16][8];
    for (int i = 0; i < 32; ++i)
      for (int j = 0, g = i / 4, q = i % 4; j < 4; ++j) {
        int row = g + j % 2 * 8, column = 2 * q + j / 2 * 8;
        A[row][column] = low_bf16(lane(i).a[j]), A[row][column + 1] = high_bf16(lane(i).a[j]);
        if (j < 2) B[2 * q + j * 8][g] = low_bf16(lane(i).b[j]), B[2 * q + j * 8 + 1][g] = high_bf16(lane(i).b[j]);
        C[g + j / 2 * 8][2 * q + j % 2] = lane(i).c[j];
      }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) C[row][column] += A[row][k] * B[k][column];
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 4; ++j) lane(i).c[j] = C[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
  });
  for (int j = 0; j < 4; ++j) c[j] = mine.c[j];
#endif
}

// 16 bytes from global to shared memory, both 16-byte aligned. They are there for this thread once copy_wait has let
// it pass, for the others after a barrier that follows. copy_commit closes a group; copy_wait<n> waits for all groups
// but the last n.
__device__ inline void copy_async(void* shared, const void* global) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
#else
  cuda_on_cpu::copy_begin(shared, global);
#endif
}

__device__ inline void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_cpu::copy_commit();
#endif
}

template <int PENDING>
__device__ inline void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
#else
  cuda_on_cpu::copy_wait(PENDING);
#endif
}
