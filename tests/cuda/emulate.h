// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: every thread of a block is a fiber, blocks run one after the other.
//
// launch.cuh includes it under PYVSEG_EMULATE, after the CUDA toolkit's own headers, which a plain compiler can read too.
// A missing barrier shows: from one barrier to the next each warp runs alone, as far ahead of the others as a GPU might let
// it, and the order of warps and of lanes ascends and descends by turns. Errors:
// threads that wait at different barriers, or for a lane that never comes; more threads or shared memory than every
// supported GPU has. Dynamic shared memory starts as NaN in each block and ends where the launch said (AddressSanitizer sees it).
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace pyvseg::emulate {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10, kMostShared = 99 << 10;
constexpr unsigned kMostThreads = 1024;

// Lanes of a warp that meet in one intrinsic: each leaves a value, all read those of the others.
struct Meeting {
  unsigned mask = 0, arrived = 0, readers = 0;
  const char* what = nullptr;
  bool complete = false;
  unsigned char values[kLanes][16];
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;  // those that have not been read by all
  unsigned alive = 0;
};

enum class State { kReady, kBarrier, kMeeting, kDone };

struct Fiber {
  ucontext_t origin;
  void* jump[5];
  unsigned char* stack = nullptr;
  bool started = false;
  State state = State::kDone;
  uint3 index{};
  unsigned lane = 0;
  Warp* warp = nullptr;
  const Meeting* waits_for = nullptr;
  const char* where = nullptr;  // the barrier it stands at
  int votes = 0;                // of __syncthreads_count and its kin
};

struct Block {
  uint3 index{};
  dim3 size, grid;
  void* shared = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::vector<Warp> warps;
  const char* failure = nullptr;
  int votes = 0;  // at the last barrier: threads whose predicate held
  unsigned alive = 0;
};

inline Block block;
inline Fiber* self = nullptr;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline void* scheduler[5];

// The compiler's own jumps: no system call, and no sanitizer takes them for an unwinding of the stack.
__attribute__((noinline)) inline void jump(void** to) { __builtin_longjmp(to, 1); }

#if defined(__SANITIZE_ADDRESS__)
inline void* scheduler_fake = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;
#endif

__attribute__((noinline)) inline void to_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
#endif
  if (!__builtin_setjmp(self->jump)) jump(scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

// A fiber runs one kernel thread after the other and is never left.
inline void live() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  for (;;) {
    (*block.kernel)();
    self->state = State::kDone;
    to_scheduler();
  }
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
  self = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber->stack, kStack);
#endif
  if (!__builtin_setjmp(scheduler)) {
    if (fiber->started) jump(fiber->jump);
    fiber->started = true;
    getcontext(&fiber->origin);
    fiber->origin.uc_stack.ss_sp = fiber->stack;
    fiber->origin.uc_stack.ss_size = kStack;
    fiber->origin.uc_link = nullptr;
    makecontext(&fiber->origin, live, 0);
    setcontext(&fiber->origin);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

// Ends the kernel with an error.
[[noreturn]] inline void fail(const char* what) {
  block.failure = what;
  for (;;) to_scheduler();
}

inline void try_complete(Meeting& meeting, const Warp& warp) {
  if ((meeting.arrived & warp.alive) != (meeting.mask & warp.alive) || !meeting.arrived) return;
  meeting.complete = true;
  meeting.readers = unsigned(__builtin_popcount(meeting.arrived));
}

// Leaves `value` with the lanes of `mask` and waits for them; `read(values, arrived)` then sees what they all left.
template <typename T, typename Read>
auto meet(const char* what, unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= 16, "at most 16 bytes");
  if (!(mask >> self->lane & 1)) fail("a warp intrinsic's mask lacks the lane that calls it");
  Warp& warp = *self->warp;
  Meeting* meeting = nullptr;
  for (auto& each : warp.meetings)
    if (!each->complete && each->mask == mask && each->what == what && !(each->arrived >> self->lane & 1)) meeting = each.get();
  if (!meeting) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    meeting = warp.meetings.back().get();
    meeting->mask = mask;
    meeting->what = what;
    std::memset(meeting->values, 0xff, sizeof meeting->values);
  }
  std::memcpy(meeting->values[self->lane], &value, sizeof value);
  meeting->arrived |= 1u << self->lane;
  try_complete(*meeting, warp);
  while (!meeting->complete) {
    self->state = State::kMeeting;
    self->waits_for = meeting;
    self->where = meeting->what;
    to_scheduler();
  }
  auto result = read(meeting->values, meeting->arrived);
  if (--meeting->readers == 0)
    for (size_t i = 0; i < warp.meetings.size(); ++i)
      if (warp.meetings[i].get() == meeting) {
        warp.meetings.erase(warp.meetings.begin() + i);
        break;
      }
  return result;
}

inline int barrier(const char* where, bool vote = false) {
  self->state = State::kBarrier;
  self->where = where;
  self->votes = vote;
  to_scheduler();
  return block.votes;
}

inline std::string describe(unsigned threads) {
  if (block.failure) return std::string("emulated kernel: ") + block.failure;
  const auto number = [](unsigned n) { return std::to_string(n); };
  std::string text = "emulated kernel: block (" + number(block.index.x) + ", " + number(block.index.y) + ", " +
                     number(block.index.z) + ") cannot go on;";
  const char* before = nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = *fibers[i];
    const char* where = fiber.state == State::kDone ? "its end" : fiber.where;
    if (where != before) text += " threads from " + number(i) + " wait at " + where + ";";
    before = where;
  }
  return text;
}

// Lets all threads go on from a barrier that every living one has reached.
inline bool release_barrier(unsigned threads) {
  const char* where = nullptr;
  int votes = 0;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == State::kDone) continue;
    if (fiber.state != State::kBarrier || (where && where != fiber.where)) return false;
    where = fiber.where;
    votes += fiber.votes;
  }
  block.votes = votes;
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i]->state == State::kBarrier) fibers[i]->state = State::kReady;
  return true;
}

// Runs a warp's lanes, in ascending and descending order by turns, until none can go on.
inline void run_warp(unsigned first, unsigned lanes, bool descending) {
  for (bool moved = true; moved; descending = !descending) {
    moved = false;
    for (unsigned step = 0; step < lanes; ++step) {
      Fiber& fiber = *fibers[first + (descending ? lanes - 1 - step : step)];
      if (fiber.state != State::kReady && !(fiber.state == State::kMeeting && fiber.waits_for->complete)) continue;
      moved = true;
      fiber.state = State::kReady;
      resume(&fiber);
      if (block.failure) return;
      if (fiber.state != State::kDone) continue;
      --block.alive;
      fiber.warp->alive &= ~(1u << fiber.lane);
      for (auto& meeting : fiber.warp->meetings)
        if (!meeting->complete) try_complete(*meeting, *fiber.warp);
    }
  }
}

inline void run_block(unsigned threads, bool descending) {
  const unsigned warps = (threads + kLanes - 1) / kLanes;
  block.failure = nullptr;
  block.warps.clear();
  block.warps.resize(warps);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::kReady;
    fiber.index = {i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y)};
    fiber.lane = i % kLanes;
    fiber.warp = &block.warps[i / kLanes];
    fiber.warp->alive |= 1u << fiber.lane;
  }
  for (block.alive = threads; block.alive; descending = !descending) {
    for (unsigned w = 0; w < warps && !block.failure; ++w) {
      const unsigned first = (descending ? warps - 1 - w : w) * kLanes;
      run_warp(first, threads - first < kLanes ? threads - first : kLanes, descending);
    }
    if (!block.failure && (!block.alive || release_barrier(threads))) continue;
    const std::string text = describe(threads);
    for (auto& fiber : fibers) fiber->started = fiber->started && fiber->state == State::kDone;
    throw std::runtime_error(text);
  }
}

inline void* shared_memory() { return block.shared; }

inline void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  if (!grid.x || !grid.y || !grid.z) return;
  if (!threads || threads > kMostThreads || size.z > 64) throw std::runtime_error("emulated kernel: too few or many threads in a block");
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulated kernel: grid too large");
  if (shared_bytes > kMostShared) throw std::runtime_error("emulated kernel: more shared memory than sm_86 has");
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulated kernel: no memory for stacks");
    fibers.back()->stack = static_cast<unsigned char*>(stack);
  }
  block.size = size;
  block.grid = grid;
  block.kernel = &kernel;
  bool descending = true;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x, descending = !descending) {
        const std::unique_ptr<void, decltype(&std::free)> shared(std::malloc(shared_bytes), &std::free);
        if (shared_bytes) std::memset(shared.get(), 0xff, shared_bytes);
        block.shared = shared.get();
        block.index = {x, y, z};
        run_block(unsigned(threads), descending);
      }
}

}  // namespace pyvseg::emulate

#include "intrinsics.h"
