// Finds two threads that use one byte, at least one of them writing, with no barrier in between that orders them, in
// whatever order they ran. The compiler's -fsanitize=thread calls a function for every access to memory that others
// might see; cuda_on_cpu.cpp has its own in place of ThreadSanitizer's, which knows no blocks and warps.
//   ordered      accesses of one thread; of one block with a sync_block in between; of one warp with a sync_warp in
//                between. Shuffles, multiply_add and load_tiles order nothing, and nothing orders two blocks.
//   copies       copy_async writes from its call to the copy_wait that lets its thread pass; nobody may look until then
// Every byte that kernels load or store is watched, in shared and in global memory, but not the threads' own stacks,
// nor what a call of memcpy (of a size the compiler does not know) does.

struct Access {
  const void* code;
  unsigned block, thread;  // block: which of the launch, from 1 in the order they ran; 0: no access yet
  uint32_t barriers, warp_barriers;
};

struct Byte {
  Access write, read;       // the latest
  uint32_t warps, lanes;    // that read since the last barrier of the block; of its warp, if it is one
  bool other_blocks;        // some other block than the one of `read` has read it
  Access in_flight;         // the copy_async that fills it
};

std::vector<Byte> shared_bytes;
std::unordered_map<uintptr_t, std::array<Byte, 16>> global_bytes;

Byte& watched(const unsigned char* at) {
  if (at >= m.shared && at < m.shared + m.shared_size) return shared_bytes[at - m.shared];
  auto number = reinterpret_cast<uintptr_t>(at);
  return global_bytes[number / 16][number % 16];
}

bool ordered(const Access& before, const Access& now) {
  return before.block == now.block &&
         (before.thread == now.thread || before.barriers != now.barriers ||
          (before.thread / WARP == now.thread / WARP && before.warp_barriers != now.warp_barriers));
}

std::string place(const void* code) {  // file:line, or the address in the library
  Dl_info library;
  if (!dladdr(code, &library)) return "?";
  char text[600];
  long offset = static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase) - 1;
  snprintf(text, sizeof text, "addr2line -s -i -e '%s' %#lx 2>/dev/null", library.dli_fname, offset);
  std::string found;
  if (FILE* lines = popen(text, "r")) {
    while (fgets(text, sizeof text, lines)) {
      std::string line(text, strcspn(text, " \n"));
      if (line[0] != '?') found += (found.empty() ? "" : " in ") + line;
    }
    pclose(lines);
  }
  snprintf(text, sizeof text, "%#lx", offset);
  return found.empty() ? text : found;
}

[[noreturn]] void found_race(const unsigned char* at, const Access& now, bool write, const std::string& who,
                             const char* did, const Access& before, const char* missing) {
  bool shared = at >= m.shared && at < m.shared + m.shared_size;
  give_up("thread " + std::to_string(m.current) + (write ? " writes " : " reads ") +
          (shared ? "byte " + std::to_string(at - m.shared) + " of shared memory" : "global memory") + " (" +
          place(now.code) + ") that " + who + did + " (" + place(before.code) + ") " + missing);
}

std::string name(const Access& access) {
  return access.block == m.block ? "thread " + std::to_string(access.thread) : "another block";
}

constexpr const char *NO_BARRIER = "with no barrier in between", *NO_WAIT = "with a copy that was not waited for";

void watch(const void* address, size_t size, bool write, const void* code) {
  auto at = static_cast<const unsigned char*>(address);
  if (!m.running || (at >= m.stacks && at < m.stacks + STACK * MAX_THREADS)) return;
  unsigned warp = m.current / WARP, lane = 1u << m.current % WARP;
  const Access now{code, m.block, m.current, m.barriers, m.warps[warp].barriers};
  for (const unsigned char* end = at + size; at < end; ++at) {
    Byte& byte = watched(at);
    if (byte.in_flight.block) found_race(at, now, write, name(byte.in_flight), " fills", byte.in_flight, NO_WAIT);
    if (byte.write.block && !ordered(byte.write, now))
      found_race(at, now, write, name(byte.write), " wrote", byte.write, NO_BARRIER);
    bool same_block = byte.read.block == now.block, same_time = same_block && byte.read.barriers == now.barriers;
    unsigned warps = same_time ? byte.warps : 0;  // that read since the last barrier
    bool same_warp_time = warps == 1u << warp && byte.read.warp_barriers == now.warp_barriers;
    unsigned lanes = same_warp_time ? byte.lanes : 0;
    if (write) {
      std::string who = byte.other_blocks || (byte.read.block && !same_block) ? "another block"
                        : warps & ~(1u << warp) ? "warp " + std::to_string(std::countr_zero(warps & ~(1u << warp)))
                        : lanes & ~lane ? "thread " + std::to_string(warp * WARP + std::countr_zero(lanes & ~lane))
                                        : "";
      if (!who.empty()) found_race(at, now, write, who, " read", byte.read, NO_BARRIER);
      byte.write = now;
    } else {
      byte.other_blocks |= byte.read.block && !same_block;
      byte.warps = warps | 1u << warp;
      byte.lanes = lanes | lane;
      byte.read = now;
    }
  }
}

void watch_block() { shared_bytes.assign(m.shared_size, Byte{}); }
void watch_launch() { global_bytes.clear(); }

// From a copy's begin to its end nobody may use the bytes it fills.
void watch_copy(const Copy& copy, bool begins) {
  watch(copy.global, 16, false, copy.code);
  auto at = static_cast<const unsigned char*>(copy.shared);
  for (int i = 0; i < 16 && !begins; ++i) watched(at + i).in_flight = {};
  watch(at, 16, true, copy.code);
  for (int i = 0; i < 16 && begins; ++i) watched(at + i).in_flight = watched(at + i).write;
}
