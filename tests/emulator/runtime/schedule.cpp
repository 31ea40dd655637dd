// Every CUDA thread is a fibre: it runs until it must wait, then another one is drawn by the seed.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "async.h"
#include "memory.h"

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define OWN_SWITCH 1
#else
#define OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace emulator {

Launch launch;
Fibre* current;
u8* arena;
std::vector<Block> blocks;
u64 progress;
u64 spins;
u64 library;

namespace {

std::vector<Fibre> fibres;
std::vector<u32> warps_ready;  // indices into all_warps, of those with a fibre that can run
std::vector<Warp*> all_warps;
std::vector<Fibre*> lagging;  // who could run but lag
u32 warp_now;
u64 random_state;
u32 live_threads;
std::string fault;
bool failed;
struct Failed {};
int (*same_site_in_python)(Pc, Pc);
struct {
  bool open;
  Pc a, b;
  bool answer;
} question;  // of same_site

// ---- switching

#if OWN_SWITCH
void* main_context;
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, . - emulator_switch
)");
extern "C" void emulator_switch(void** save, void* load);
inline void switch_stacks(void** save, void* load) { emulator_switch(save, load); }

void prepare(Fibre& f, u8* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 3;  // the entry expects an address to return to
  top[-1] = reinterpret_cast<void*>(entry);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  f.stack_pointer = top - 7;
}
#else
std::vector<ucontext_t> contexts;  // of the fibres, and the last one of main
void* main_context;
inline void switch_stacks(void** save, void* load) { swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load)); }
void prepare(Fibre& f, u8* stack, void (*entry)()) {
  contexts.resize(kMaxThreads + 1);
  main_context = &contexts[kMaxThreads];
  ucontext_t& c = contexts[f.id];
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = kStack;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
  f.stack_pointer = &c;
}
#endif

Fibre* next_laggard() {
  if (lagging.empty()) return nullptr;
  std::swap(lagging[random_number() % lagging.size()], lagging.back());
  Fibre* f = lagging.back();
  lagging.pop_back();
  return f;
}

void enqueue(Fibre* f) {
  Warp& w = f->block->warps[f->warp];
  if (w.ready.empty()) {
    warps_ready.push_back(f->block->rank * static_cast<u32>(f->block->warps.size()) + f->warp);
  }
  w.ready.push_back(f);
}

// Whom the seed draws, and how much around.
void choose_laggards() {
  lagging.clear();
  const Lag lag = static_cast<Lag>(launch.lag % kAllBut);
  if (lag == kNobody) return;
  const Block& block = blocks[random_number() % blocks.size()];
  u32 first = random_number() % static_cast<u32>(block.fibres.size());
  if (random_number() % 2 == 0) first %= 128;  // warps that serve others are few, and the first ones
  const Fibre& drawn = *block.fibres[first];
  for (Fibre& f : fibres) {
    const bool with = lag == kLanes || f.block == drawn.block, together = with && (lag == kBlock || f.warp / 4 == drawn.warp / 4);
    f.lags = lag == kLane    ? &f == &drawn
             : lag == kLanes ? f.lane == drawn.lane
             : lag == kWarp  ? together && f.warp == drawn.warp
             : lag == kBlock ? with
                             : together;
    f.lags ^= launch.lag >= kAllBut;
  }
}

// With even seeds operations land when not even the laggards can go on, with odd ones before they do.
Fibre* next_fibre() {
  if (warps_ready.empty()) return launch.seed % 2 == 0 ? next_laggard() : nullptr;
  // Mostly the same warp goes on, which is quicker and no less adversarial: lanes of a warp differ by order too.
  if (all_warps[warp_now]->ready.empty() || random_number() % 32 == 0) {
    warp_now = warps_ready[random_number() % warps_ready.size()];
  }
  auto& ready = all_warps[warp_now]->ready;
  std::swap(ready[random_number() % ready.size()], ready.back());
  Fibre* f = ready.back();
  ready.pop_back();
  if (ready.empty()) {
    for (u32& w : warps_ready) {
      if (w == warp_now) {
        w = warps_ready.back();
        warps_ready.pop_back();
        break;
      }
    }
  }
  return f;
}

// From the running fibre to the next, or to main when none can run.
void leave() {
  Fibre *from = current, *to = next_fibre();
  if (to == from) return;
  current = to;
  switch_stacks(&from->stack_pointer, to != nullptr ? to->stack_pointer : main_context);
}

constexpr u64 kCanary = 0x57ac4057ac4057ac;
u64& canary(u32 id) { return *reinterpret_cast<u64*>(arena + kShared + kStack * id); }

void run_thread() {
  launch.call(launch.params);
  Fibre* f = current;
  if (canary(f->id) != kCanary) fail_here(0, "the fibre's stack of 64 KiB is too small for this kernel");
  land_at_exit(f);
  f->exited = true;
  spins = 0;
  --f->block->live;
  --live_threads;
  lane_exits(f);
  thread_exits(f);
  cluster_exits();
  leave();
}

// ---- a cluster from its start to its end

void start_block(Block& b, u32 rank, u32 linear, Clock* nothing_seen) {
  const u32 threads = launch.block.x * launch.block.y * launch.block.z;
  b.rank = rank;
  b.linear = linear;
  b.index = {linear % launch.grid.x, linear / launch.grid.x % launch.grid.y, linear / launch.grid.x / launch.grid.y};
  b.shared = arena + u64{rank} * kWindow + kReserved;
  b.live = threads;
  b.fibres.clear();
  b.warps.assign((threads + 31) / 32, Warp{});
  for (Warp& w : b.warps) w.registers = launch.registers;
  for (u32 t = 0; t < threads; ++t) {
    Fibre& f = fibres[rank * threads + t];
    f = Fibre{};
    f.block = &b;
    f.thread = t;
    f.id = rank * threads + t;
    f.lane = t % 32;
    f.warp = t / 32;
    f.own = 1;
    Clocks::share(f.clock = nothing_seen);
    prepare(f, arena + kShared + kStack * f.id, run_thread);
    canary(f.id) = kCanary;
    b.fibres.push_back(&f);
    Warp& w = b.warps[f.warp];
    w.existing |= 1u << f.lane;
    w.fibres[f.lane] = &f;
  }
  start_barriers(b);
}

std::string stuck() {
  // Threads that wait for the same thing at the same place are told of together.
  std::map<std::string, std::vector<const Fibre*>> groups;
  for (const Block& b : blocks) {
    for (const Fibre* f : b.fibres) {
      std::string what = "have exited";
      if (!f->exited) {
        what = std::string("wait in ") + (f->waits_for != nullptr ? f->waits_for : "nothing");
        what += waiting_detail(*f) + " at " + site(f->waits_at);
      }
      if (blocks.size() > 1) what = format("of block %u of the cluster ", b.rank) + what;
      groups[what].push_back(f);
    }
  }
  std::string text = "deadlock, no thread can go on:";
  for (const auto& [what, members] : groups) {
    text += "\n  threads ";
    for (size_t i = 0; i < members.size();) {
      size_t j = i;
      while (j + 1 < members.size() && members[j + 1]->thread == members[j]->thread + 1) ++j;
      text += format(i == j ? "%s%u" : "%s%u-%u", i == 0 ? "" : ", ", members[i]->thread, members[j]->thread);
      i = j + 1;
    }
    text += " " + what;
  }
  return text;
}

void run_cluster(u32 first) {
  const u32 threads = launch.block.x * launch.block.y * launch.block.z;
  clocks.reset(threads * launch.cluster + launch.engines);
  fibres.resize(threads * launch.cluster);
  blocks.assign(launch.cluster, Block{});
  reset_shared(launch.cluster, launch.shared_bytes);
  reset_async();
  all_warps.clear();
  warps_ready.clear();
  Clock* nothing_seen = clocks.zero();
  for (u32 rank = 0; rank < launch.cluster; ++rank) start_block(blocks[rank], rank, first + rank, nothing_seen);
  live_threads = threads * launch.cluster;
  for (Block& b : blocks) {
    for (Warp& w : b.warps) all_warps.push_back(&w);
  }
  warp_now = 0;
  choose_laggards();
  for (Fibre& f : fibres) make_ready(&f);
  while (live_threads > 0 && !failed) {
    if (question.open) {
      question.open = false;
      question.answer = same_site_in_python(question.a, question.b) != 0;
    } else {
      current = next_fibre();
    }
    if (current == nullptr) {
      if (land_something()) continue;
      current = next_laggard();
    }
    if (current == nullptr) {
      fail(block_name(blocks[0]) + ": " + stuck());
    }
    void* to = current->stack_pointer;
    switch_stacks(&main_context, to);
  }
}

template <class T>
T* reserve(size_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<T*>(p);
}

void reserve_memory() {
  arena = reserve<u8>(kArena + kWindow);
  arena += -reinterpret_cast<u64>(arena) % kWindow;
  cells.state = reserve<u8>(kShared);
  cells.writer = reserve<u32>(kShared);
  cells.writer_pc = reserve<Pc>(kShared);
  for (int k = 0; k < kReaders; ++k) {
    cells.reader[k] = reserve<u32>(kShared);
    cells.reader_pc[k] = reserve<Pc>(kShared);
  }
}

}  // namespace

u32 random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<u32>(random_state >> 24);
}

void make_ready(Fibre* f) {
  f->waits_for = nullptr;
  if (f->lags) {
    lagging.push_back(f);
  } else {
    enqueue(f);
  }
}

void wait(const char* what, Pc pc, u32 detail) {
  spins = 0;
  current->waits_for = what;
  current->waits_at = pc;
  current->waits_detail = detail;
  leave();
}

void yield() {
  make_ready(current);
  leave();
}

void end_lag() {
  for (Fibre* f : lagging) enqueue(f);
  lagging.clear();
}

void maybe_yield() {
  land_early();
  if (random_number() % 8 == 0) yield();
}

void fail(const std::string& message) {
  fault = message;
  failed = true;
  if (current == nullptr) throw Failed();
  switch_stacks(&current->stack_pointer, main_context);
  __builtin_unreachable();
}

std::string block_name(const Block& b) { return format("block (%u, %u, %u)", b.index.x, b.index.y, b.index.z); }

std::string name_of(const Fibre& f) {
  std::string name = format("thread %u (warp %u, lane %u)", f.thread, f.warp, f.lane);
  return launch.cluster > 1 ? name + format(" of block %u of the cluster", f.block->rank) : name;
}

void fail_here(Pc pc, const std::string& message) {
  fail(block_name(*current->block) + ", " + name_of(*current) + ": " + message + (pc ? "\n  at " + site(pc) : ""));
}

std::string site(Pc pc) { return format("{0x%x}", pc); }

std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

// Python answers on its own stack: the fibre's would be too small for it.
bool same_site(Pc a, Pc b) {
  if (a == b) return true;
  static std::map<std::pair<Pc, Pc>, bool> known;
  const auto found = known.find({a, b});
  if (found != known.end()) return found->second;
  question = {true, a, b, false};
  switch_stacks(&current->stack_pointer, main_context);
  return known[{a, b}] = known[{b, a}] = question.answer;
}

const char* run(const Launch& what, int (*ask)(Pc, Pc)) {
  if (arena == nullptr) reserve_memory();
  launch = what;
  same_site_in_python = ask;
  failed = false;
  fault.clear();
  ordered_after.clear();
  reset_atomics();
  const u32 count = launch.grid.x * launch.grid.y * launch.grid.z;
  for (u32 first = 0; first < count && !failed; first += launch.cluster) {
    random_state = (u64{launch.seed} << 32 | first) * 0x9e3779b97f4a7c15u | 1;
    for (int i = 0; i < 8; ++i) random_number();
    try {
      run_cluster(first);
    } catch (const Failed&) {
    }
  }
  return failed ? fault.c_str() : nullptr;
}

}  // namespace emulator
