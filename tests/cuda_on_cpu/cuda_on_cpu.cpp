// A machine with CUDA's semantics on one thread of a CPU, for tests of the kernels of cuda/ (see cuda_runtime.h).
//
// Modelled: a block's threads are fibers. Each runs until it must wait for others, at a barrier or a warp collective;
// then another goes on, in an order chosen with cuda_on_cpu_schedule. Lanes of a warp are not in lock-step.
//   barriers     sync_block waits for all threads of the block; sync_warp and the collectives for the 32 of a warp
//   collectives  a lane hands over what it has, for load_tiles what is in shared memory then, when it arrives
//   copies       copy_async lands when its thread waits for its group, or at once, or anywhere in between
//   shared       as large as was asked for, full of NaN at first; an allocation of its own, for AddressSanitizer
//   errors       threads that wait for ever, lanes of one warp in different collectives, operands misaligned or not in
//                shared memory, copies never waited for, writes just beyond shared memory: the launch fails, and
//                cudaGetErrorString names the block and the threads
//   races        the result differs between schedules, if a switch at barriers and collectives can show the race; all
//                of those that the inputs lead to are found by the build with CUDA_ON_CPU_RACES, see races.h
// Not modelled: weak memory (a write is seen at once), registers, launch bounds and occupancy, caches, bank conflicts,
// streams (a launch returns when it is done), how tensor cores round (see multiply_add), atomics, whatever came with
// sm_90. Time here says nothing about a GPU.
#include "cuda_runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#ifdef CUDA_ON_CPU_RACES
#define RACES 1
#include <dlfcn.h>

#include <array>
#include <unordered_map>
#else
#define RACES 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#define ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN 0
#endif
#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#define UCONTEXT 1
#include <ucontext.h>
#else
#define UCONTEXT 0
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr unsigned WARP = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 512 << 10, PAGE = 64 << 10, GUARD = ASAN ? 0 : 256;
constexpr size_t SHARED_UNASKED = 48 << 10, SHARED_MAX = 227 << 10;  // bytes a block may have: without and with asking
constexpr unsigned char POISON = 0xff;                               // NaN in bf16 and fp32

// Context switch ------------------------------------------------------------------------------------------------------

struct Context {
#if UCONTEXT
  ucontext_t at;
#else
  void* at = nullptr;  // stack pointer; the registers that a function must keep are on the stack
#endif
  void *bottom = nullptr, *fake = nullptr;  // for AddressSanitizer
  size_t size = 0;
};

#if !UCONTEXT
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

Context host;  // the thread that launches

void switch_to(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
#if ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake, to.bottom, to.size);
#endif
#if UCONTEXT
  swapcontext(&from.at, &to.at);
#else
  cuda_on_cpu_switch(&from.at, to.at);
#endif
#if ASAN
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

void prepare(Context& fiber, unsigned char* stack, size_t size, void (*entry)()) {
  fiber.bottom = stack, fiber.size = size, fiber.fake = nullptr;
#if ASAN
  __asan_unpoison_memory_region(stack, size);  // a block that failed leaves frames behind
#endif
#if UCONTEXT
  getcontext(&fiber.at);
  fiber.at.uc_stack.ss_sp = stack, fiber.at.uc_stack.ss_size = size, fiber.at.uc_link = nullptr;
  makecontext(&fiber.at, entry, 0);
#else
  auto top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.at = top;
#endif
}

// The machine ---------------------------------------------------------------------------------------------------------

enum State { READY, AT_BARRIER, AT_COLLECTIVE, ENDED };

struct Copy {
  void* shared;
  const void* global;
  int64_t group;
  const void* code;  // that began it
};

struct Fiber {
  Context context;
  State state;
  const char* what;  // the collective it waits in
  std::vector<Copy> copies;
  int64_t group;  // copies begun now belong to it
};

struct Warp {
  uint32_t ready, inside;  // lanes that can run, that wait in the collective `what`
  const char* what;
  void* operands[WARP];
  unsigned barriers;  // passed so far
};

struct Stacks {  // kept from launch to launch, a page without access below each
  unsigned char* memory;
  Stacks() {
    memory = static_cast<unsigned char*>(mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) perror("cuda_on_cpu: no memory for stacks"), abort();
    for (unsigned i = 0; i < MAX_THREADS; ++i) mprotect(memory + i * STACK, PAGE, PROT_NONE);
  }
  ~Stacks() { munmap(memory, STACK * MAX_THREADS); }
};

struct Machine {
  int order = 0, copies = 0;  // see cuda_on_cpu_schedule
  uint64_t seed = 0, random = 1;
  Fiber fibers[MAX_THREADS];
  Warp warps[MAX_THREADS / WARP];
  uint32_t ready;  // warps with a lane that can run
  unsigned threads, current, at_barrier, ended, sticky;
  unsigned block, barriers;  // how many blocks have begun, and of the one that runs the barriers passed so far
  bool running = false;      // a thread of a block, not the host
  unsigned char *shared, *stacks;
  size_t shared_size;
  void (*thread)(void*);
  void* arguments;
  bool failed;
  std::string message = "no error", pending_message;
  cudaError_t last = cudaSuccess;
  std::map<const void*, size_t> allowed;  // dynamic shared memory, by kernel
  std::mutex mutex;
};

Machine m;

uint32_t draw() {  // xorshift64*
  m.random ^= m.random >> 12, m.random ^= m.random << 25, m.random ^= m.random >> 27;
  return static_cast<uint32_t>((m.random * 0x2545f4914f6cdd1dull) >> 32);
}

int pick(uint32_t among) {  // one of the bits set
  if (m.order == 0) return std::countr_zero(among);
  if (m.order == 1) return 31 - std::countl_zero(among);
  int by = draw() % 32;
  return (std::countr_zero(std::rotr(among, by)) + by) % 32;
}

void make_ready(unsigned warp, uint32_t lanes) {
  m.warps[warp].ready |= lanes;
  m.ready |= 1u << warp;
}

std::string list(State state, const char* what = nullptr) {  // "0-31, 40"; empty if there are none
  std::string text;
  auto is = [&](unsigned i) {
    const Fiber& fiber = m.fibers[i];
    return fiber.state == state && (!what || !strcmp(fiber.what, what));
  };
  for (unsigned i = 0, j; i < m.threads; i = j + 1) {
    for (j = i; j < m.threads && is(j); ++j) {}
    if (j == i) continue;
    text += (text.empty() ? "" : ", ") + std::to_string(i) + (j - 1 > i ? "-" + std::to_string(j - 1) : "");
  }
  return text;
}

std::string everybody() {  // where the threads of the block are
  std::string text;
  auto add = [&](const std::string& threads, const std::string& what) {
    if (!threads.empty()) text += (text.empty() ? "threads " : "; threads ") + threads + " " + what;
  };
  add(list(AT_BARRIER), "wait at sync_block");
  std::vector<std::string> seen;
  for (unsigned i = 0; i < m.threads; ++i) {
    if (m.fibers[i].state != AT_COLLECTIVE || std::count(seen.begin(), seen.end(), m.fibers[i].what)) continue;
    seen.emplace_back(m.fibers[i].what);
    add(list(AT_COLLECTIVE, m.fibers[i].what), "wait in " + seen.back());
  }
  add(list(ENDED), "have ended");
  return text;
}

[[noreturn]] void give_up(const std::string& message) {
  m.pending_message = "block " + std::to_string(blockIdx.x) + ": " + message;
  m.failed = true;
  switch_to(m.fibers[m.current].context, host, true);
  __builtin_unreachable();
}

#if RACES
#include "races.h"
#endif

void land(Copy& copy) {
#if RACES
  watch_copy(copy, false);
#endif
  memcpy(copy.shared, copy.global, 16);
}

void land_some(Fiber& fiber) {  // groups in order, the copies of a group in any
  while (!fiber.copies.empty() && draw() % 4 == 0) {
    size_t of_group = 1;
    while (of_group < fiber.copies.size() && fiber.copies[of_group].group == fiber.copies[0].group) ++of_group;
    auto at = fiber.copies.begin() + draw() % of_group;
    land(*at);
    fiber.copies.erase(at);
  }
}

// To another thread that can run; if there is none the block is done, or stuck.
void yield(bool for_good = false) {
  if (!m.ready) {
    if (m.ended == m.threads) switch_to(m.fibers[m.current].context, host, true);
    give_up("some threads wait for others that never come: " + everybody());
  }
  unsigned warp = m.current / WARP;
  if (m.order != 2 || !(m.ready >> warp & 1) || draw() % m.sticky == 0) warp = pick(m.ready);
  unsigned lane = pick(m.warps[warp].ready);
  m.warps[warp].ready &= ~(1u << lane);
  if (!m.warps[warp].ready) m.ready &= ~(1u << warp);
  Context& from = m.fibers[m.current].context;
  unsigned self = m.current, next = warp * WARP + lane;
  m.current = threadIdx.x = next;
  if (next != self) switch_to(from, m.fibers[next].context, for_good);
  if (m.copies == 2) land_some(m.fibers[m.current]);
}

void run_thread() {
#if ASAN
  __sanitizer_finish_switch_fiber(nullptr, host.bottom ? nullptr : const_cast<const void**>(&host.bottom),
                                  host.bottom ? nullptr : &host.size);
#endif
  m.thread(m.arguments);
  Fiber& self = m.fibers[m.current];
  if (!self.copies.empty()) fail("ended with %zu copies that it did not wait for", self.copies.size());
  self.state = ENDED;
  ++m.ended;
  yield(true);
  __builtin_unreachable();
}

bool run_block() {
  unsigned char* memory = nullptr;
  if (posix_memalign(reinterpret_cast<void**>(&memory), 128, std::max<size_t>(m.shared_size + 2 * GUARD, 1))) abort();
  memset(memory, POISON, m.shared_size + 2 * GUARD);
  m.shared = memory + GUARD;
  m.ready = 0, m.at_barrier = m.ended = m.barriers = 0, m.failed = false, ++m.block;
  m.sticky = 1 + draw() % 16;  // how long a warp runs while others could
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.state = READY, fiber.copies.clear(), fiber.group = 0;
    // Stack tops at different places of their pages, or they would all want the same lines of the cache.
    prepare(fiber.context, m.stacks + i * STACK + PAGE, STACK - PAGE - i % WARP * 192, run_thread);
    if (i % WARP == 0) m.warps[i / WARP] = Warp{};
    make_ready(i / WARP, 1u << i % WARP);
  }
  unsigned warp = pick(m.ready), lane = pick(m.warps[warp].ready);
  m.warps[warp].ready &= ~(1u << lane);
  if (!m.warps[warp].ready) m.ready &= ~(1u << warp);
  m.current = threadIdx.x = warp * WARP + lane;
#if RACES
  watch_block();
#endif
  m.running = true;
  switch_to(host, m.fibers[m.current].context);
  m.running = false;
  for (size_t i = 0; i < GUARD && !m.failed; ++i) {
    long beyond = memory[GUARD - 1 - i] != POISON ? -1 - long(i)
                  : m.shared[m.shared_size + i] != POISON ? long(m.shared_size + i) : 0;
    if (!beyond) continue;
    m.failed = true;
    m.pending_message = "block " + std::to_string(blockIdx.x) + ": byte " + std::to_string(beyond) +
                        " of shared memory was written, which has " + std::to_string(m.shared_size);
  }
  free(memory);
  return !m.failed;
}

cudaError_t refuse(cudaError_t error, const std::string& message) {
  m.message = message;
  return m.last = error;
}

}  // namespace

void fail(const char* format, ...) {
  char text[400];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  give_up("thread " + std::to_string(m.current) + ": " + text);
}

void sync_block() {
  m.fibers[m.current].state = AT_BARRIER;
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0, ++m.barriers;
    for (unsigned i = 0; i < m.threads; ++i) {
      m.fibers[i].state = READY;
      make_ready(i / WARP, 1u << i % WARP);
    }
  }
  yield();
}

void* const* arrive(const char* what, void* mine) {
  unsigned lane = m.current % WARP;
  Warp& warp = m.warps[m.current / WARP];
  if (!warp.inside) warp.what = what;
  if (warp.what != what && strcmp(warp.what, what))
    fail("in %s, while other lanes of its warp are in %s", what, warp.what);
  m.fibers[m.current].state = AT_COLLECTIVE, m.fibers[m.current].what = what;
  warp.operands[lane] = mine;
  warp.inside |= 1u << lane;
  if (warp.inside == ~0u) return warp.operands;
  yield();
  return nullptr;
}

void leave() {
  unsigned warp = m.current / WARP;
  m.warps[warp].inside = 0;
  for (unsigned i = 0; i < WARP; ++i) m.fibers[warp * WARP + i].state = READY;
  make_ready(warp, ~0u);
  yield();
}

void sync_warp() {
  if (!arrive("sync_warp", nullptr)) return;
  ++m.warps[m.current / WARP].barriers;
  leave();
}

unsigned char* shared_memory() { return m.shared; }

void check_shared(const char* what, const void* address, size_t size) {
  auto at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(m.shared);
  if (at % size)
    fail("%s: the address in shared memory (byte %ld) is not a multiple of %zu", what, long(at - begin), size);
  if (at < begin || at + size > begin + m.shared_size)
    fail("%s: byte %ld of shared memory, which has %zu", what, long(at - begin), m.shared_size);
}

void copy_begin(void* shared, const void* global) {
  check_shared("copy_async", shared, 16);
  auto from = static_cast<const unsigned char*>(global);
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("copy_async: the address in global memory is not a multiple of 16");
  if (from >= m.shared && from < m.shared + m.shared_size) fail("copy_async: the source is in shared memory");
  Fiber& self = m.fibers[m.current];
  self.copies.push_back({shared, global, self.group, __builtin_return_address(0)});
#if RACES
  watch_copy(self.copies.back(), true);
#elif ASAN
  unsigned char probe[16];  // a source out of bounds is best found here, before it is waited for
  memcpy(probe, global, 16);
  asm volatile("" : : "r"(probe) : "memory");
#endif
  if (m.copies == 1) land(self.copies.back()), self.copies.pop_back();
  if (m.copies == 2) land_some(self);
}

void copy_commit() { ++m.fibers[m.current].group; }

void copy_wait(int pending) {
  Fiber& self = m.fibers[m.current];
  size_t n = 0;
  for (; n < self.copies.size() && self.copies[n].group < self.group - pending; ++n) land(self.copies[n]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + n);
  if (m.copies == 2) land_some(self);
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  std::lock_guard lock(m.mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > SHARED_MAX)
    return refuse(cudaErrorInvalidValue, "invalid argument: " + std::to_string(value) + " bytes of shared memory");
  m.allowed[kernel] = value;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(void*), void* arguments) {
  std::lock_guard lock(m.mutex);
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || !grid.x || grid.x > 0x7fffffff || !block.x ||
      block.x > MAX_THREADS)
    return refuse(cudaErrorInvalidConfiguration, "invalid configuration argument: " + std::to_string(grid.x) +
                  " blocks of " + std::to_string(block.x) + " threads");
  auto allowed = m.allowed.find(kernel);
  size_t most = std::max(SHARED_UNASKED, allowed == m.allowed.end() ? 0 : allowed->second);
  if (config.dynamicSmemBytes > most)
    return refuse(cudaErrorInvalidValue, "invalid argument: " + std::to_string(config.dynamicSmemBytes) +
                  " bytes of shared memory, more than cudaFuncSetAttribute allowed");
  static Stacks stacks;
  m.stacks = stacks.memory;
#if RACES
  watch_launch();
#endif
  gridDim = grid, blockDim = block;
  m.threads = block.x, m.shared_size = config.dynamicSmemBytes, m.thread = thread, m.arguments = arguments;
  m.block = 0;
  m.random = m.seed * 0x9e3779b97f4a7c15ull + 1;
  for (int i = 0; i < 8; ++i) draw();
  std::vector<unsigned> blocks(grid.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (m.order == 1) std::reverse(blocks.begin(), blocks.end());
  for (size_t i = blocks.size(); m.order == 2 && i > 1; --i) std::swap(blocks[i - 1], blocks[draw() % i]);
  host.bottom = nullptr;
  for (unsigned i : blocks) {
    blockIdx = {i, 0, 0};
    if (!run_block()) return refuse(cudaErrorLaunchFailure, m.pending_message);
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::m.last, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_on_cpu::m.message.c_str();
}

// How the launches that follow run. order, of threads and blocks: 0 forwards, 1 backwards, 2 at random, from `seed`.
// copies, cp.async's: land 0 when waited for, 1 at once, 2 at random in between.
extern "C" __attribute__((visibility("default"))) int64_t cuda_on_cpu_shared() {  // bytes a block had, the last launched
  return cuda_on_cpu::m.shared_size;
}

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_schedule(int order, uint64_t seed, int copies) {
  std::lock_guard lock(cuda_on_cpu::m.mutex);
  cuda_on_cpu::m.order = order, cuda_on_cpu::m.seed = seed, cuda_on_cpu::m.copies = RACES ? 0 : copies;
}

#if RACES  // what the compiler calls; a kernel with atomics would not link
#define HOOK(name, write, size, ...)                                                         \
  extern "C" __attribute__((visibility("hidden"))) void __tsan_##name(void* at __VA_ARGS__) { \
    cuda_on_cpu::watch(at, size, write, __builtin_return_address(0));                        \
  }
#define HOOKS(size)                                                     \
  HOOK(read##size, false, size) HOOK(unaligned_read##size, false, size) \
  HOOK(write##size, true, size) HOOK(unaligned_write##size, true, size)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
HOOK(read_range, false, size, , size_t size)
HOOK(write_range, true, size, , size_t size)
extern "C" __attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
extern "C" __attribute__((visibility("hidden"))) void __tsan_func_exit() {}
extern "C" __attribute__((visibility("hidden"))) void __tsan_init() {}
#endif
