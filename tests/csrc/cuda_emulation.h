// Runs CUDA kernels on the CPU, for tests: if included before a .cuh, a C++ compiler can build the same source.
//
// Blocks run in sequence. The threads of a block are fibers: each runs until it reaches a barrier or a warp exchange,
// then another one resumes. Errors that would depend on chance on a GPU become visible:
//   - The order of the threads can be selected (`schedule`); if results depend on it, a barrier is missing.
//   - Shared memory is new heap memory of exactly the given size, filled with NaN: AddressSanitizer detects accesses
//     outside, and the test detects uninitialised values.
//   - Under ThreadSanitizer, each fiber is a separate thread, ordered only by barriers, so it reports every pair of
//     conflicting accesses, in shared or global memory, within a block or between blocks.
//   - A barrier that only part of the block reaches, and an exchange that only part of the warp reaches, are errors.
// Time, caches, memory ordering between threads and asynchronous copies are not emulated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define MBP_NO_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define MBP_NO_TSAN
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr unsigned kWarp = 32;

// The order in which the threads of a block run.
enum class Schedule { ascending, descending, shuffled };
inline Schedule& schedule() {
  static Schedule value = Schedule::ascending;
  return value;
}

enum class State { ready, at_barrier, at_exchange, done };

constexpr size_t kStack = 64 << 10;

// Stacks, which the fibers of successive blocks reuse.
class Stacks {
 public:
  using Stack = std::unique_ptr<char[]>;
  static Stack take() {
    if (free_().empty()) return Stack(new char[kStack]);
    Stack stack = std::move(free_().back());
    free_().pop_back();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack.get(), kStack);  // frames that the last fiber did not leave
#endif
    return stack;
  }
  static void give(Stack stack) { free_().push_back(std::move(stack)); }

 private:
  static std::vector<Stack>& free_() {
    static thread_local std::vector<Stack> stacks;
    return stacks;
  }
};

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer's threads, which later launches reuse (a new one costs half a millisecond). Within a launch, each
// belongs to one CUDA thread, because races between two CUDA threads on one of them would not be detected.
inline std::vector<void*>& idle_tsan_threads() {
  static std::vector<void*> threads;
  return threads;
}
#endif

struct Fiber {
  ucontext_t context;
  Stacks::Stack stack;
  dim3 index;
  unsigned warp = 0, lane = 0;
  State state = State::ready;
  unsigned parity = 0;  // of the number of warp exchanges so far
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
  unsigned barriers = 0;  // so far
#endif
};

// The values that the lanes of a warp exchange. There are two sets of slots, so that a fast lane can begin the next
// exchange while a slow one still reads this one.
struct Warp {
  static constexpr unsigned kWords = 16;
  uint32_t slots[2][kWarp][kWords];
};

// A block while it runs.
class Block {
 public:
  Block(dim3 grid, dim3 block, dim3 index, unsigned char* shared)
      : grid_(grid),
        block_(block),
        index_(index),
        shared_(shared),
        fibers_(size_t(block.x) * block.y * block.z),
        warps_((fibers_.size() + kWarp - 1) / kWarp) {
    for (size_t t = 0; t < fibers_.size(); ++t) {
      Fiber& fiber = fibers_[t];
      fiber.index = dim3(unsigned(t) % block.x, unsigned(t) / block.x % block.y, unsigned(t) / (block.x * block.y));
      fiber.warp = unsigned(t) / kWarp;
      fiber.lane = unsigned(t) % kWarp;
    }
  }

  ~Block() {
    for (Fiber& fiber : fibers_) {
#if defined(__SANITIZE_THREAD__)
      if (fiber.tsan) idle_tsan_threads().push_back(fiber.tsan);
#endif
      if (fiber.stack) Stacks::give(std::move(fiber.stack));
    }
  }

  // Runs `body` in every thread. Throws an error that a thread reported.
  template <typename Body>
  MBP_NO_TSAN void run(const Body& body) {
    current() = this;
    body_ = [](const void* b) { (*static_cast<const Body*>(b))(); };
    body_argument_ = &body;
#if defined(__SANITIZE_THREAD__)
    tsan_main_ = __tsan_get_current_fiber();
    __tsan_release(launch_token());
#endif
    for (Fiber& fiber : fibers_) start(fiber);
    std::vector<unsigned> order(fibers_.size());
    for (unsigned t = 0; t < order.size(); ++t) order[t] = t;
    uint32_t random = 12345;
    size_t alive = fibers_.size();
    while (alive > 0 && error_.empty()) {
      if (schedule() == Schedule::descending) std::reverse(order.begin(), order.end());
      if (schedule() == Schedule::shuffled) {
        for (size_t i = order.size(); i > 1; --i) {
          random = random * 1664525 + 1013904223;
          std::swap(order[i - 1], order[(random >> 8) % i]);
        }
      }
      bool progress = false;
      for (const unsigned t : order) {
        if (fibers_[t].state != State::ready || !error_.empty()) continue;
        progress = true;
        resume(fibers_[t]);
        if (fibers_[t].state == State::done) --alive;
      }
      if (schedule() == Schedule::descending) std::reverse(order.begin(), order.end());
      if (alive > 0 && error_.empty() && !progress) release_waiting();
    }
    current() = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  MBP_NO_TSAN dim3 grid_dim() const { return grid_; }
  MBP_NO_TSAN dim3 block_dim() const { return block_; }
  MBP_NO_TSAN dim3 block_index() const { return index_; }
  MBP_NO_TSAN dim3 thread_index() const { return running_->index; }
  MBP_NO_TSAN unsigned lane() const { return running_->lane; }
  MBP_NO_TSAN void* shared() { return shared_; }

  MBP_NO_TSAN void barrier() {
#if defined(__SANITIZE_THREAD__)
    // Alternates two tokens, since a thread may reach the next barrier before others have left this one.
    char* const token = &barrier_tokens_[running_->barriers++ % 2];
    __tsan_release(token);
#endif
    suspend(State::at_barrier);
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(token);
#endif
  }

  // Every lane of the warp passes `words` words, and can then read those of all lanes. `memory` also orders the memory
  // accesses of the lanes, as __syncwarp does and a shuffle does not.
  MBP_NO_TSAN const uint32_t (*exchange(const uint32_t* mine, unsigned words, bool memory)) [Warp::kWords] {
    Fiber& fiber = *running_;
    Warp& warp = warps_[fiber.warp];
    auto& slots = warp.slots[fiber.parity];
    [[maybe_unused]] void* const token = &slots[0][0];
    volatile uint32_t* slot = slots[fiber.lane];
    for (unsigned w = 0; w < words; ++w) slot[w] = mine[w];
    fiber.parity ^= 1;
#if defined(__SANITIZE_THREAD__)
    if (memory) __tsan_release(token);
#endif
    suspend(State::at_exchange);
#if defined(__SANITIZE_THREAD__)
    if (memory) __tsan_acquire(token);
#endif
    return slots;
  }

  // Ends the launch with an error; called by a thread.
  [[noreturn]] void fail(const char* message) {
    error_ = message;
    suspend(State::done);
    std::abort();  // never resumed
  }

  // Happens-before for ThreadSanitizer: the host precedes every thread of a launch, and these precede later host code.
  static void* launch_token() {
    static char token;
    return &token;
  }
  static void* done_token() {
    static char token;
    return &token;
  }

 private:
  MBP_NO_TSAN void start(Fiber& fiber) {
    fiber.stack = Stacks::take();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
#if defined(__SANITIZE_THREAD__)
    auto& idle = idle_tsan_threads();
    if (idle.empty()) {
      fiber.tsan = __tsan_create_fiber(0);
    } else {
      fiber.tsan = idle.back();
      idle.pop_back();
    }
#endif
  }

  static MBP_NO_TSAN void enter() {
    Block& block = *current();
    block.arrived(nullptr);
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(launch_token());
#endif
    try {
      block.body_(block.body_argument_);
    } catch (const std::exception& error) {
      block.error_ = error.what();
    }
#if defined(__SANITIZE_THREAD__)
    __tsan_release(done_token());
#endif
    block.suspend(State::done);
  }

  MBP_NO_TSAN void resume(Fiber& fiber) {
    running_ = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&main_fake_stack_, fiber.stack.get(), kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&main_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
#endif
    running_ = nullptr;
  }

  MBP_NO_TSAN void suspend(State state) {
    Fiber& fiber = *running_;
    fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fiber.fake_stack, main_stack_, main_stack_size_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(tsan_main_, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&fiber.context, &main_);
    arrived(&fiber);
  }

  MBP_NO_TSAN void arrived([[maybe_unused]] Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber ? fiber->fake_stack : nullptr, &main_stack_, &main_stack_size_);
#endif
  }

  // If no thread can run: releases complete warps that wait for an exchange, or the whole block waiting at a barrier.
  MBP_NO_TSAN void release_waiting() {
    bool released = false;
    for (size_t w = 0; w < warps_.size(); ++w) {
      const auto first = fibers_.begin() + w * kWarp;
      const auto last = fibers_.begin() + std::min(fibers_.size(), (w + 1) * kWarp);
      const auto waits = [](const Fiber& f) { return f.state == State::at_exchange; };
      if (std::none_of(first, last, waits)) continue;
      if (!std::all_of(first, last, waits)) {
        error_ = "only a part of the warp reached a warp exchange";
        return;
      }
      for (auto f = first; f != last; ++f) f->state = State::ready;
      released = true;
    }
    if (released) return;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::at_barrier) {
        error_ = "only a part of the block reached a barrier";
        return;
      }
    }
    for (Fiber& fiber : fibers_) fiber.state = State::ready;
  }

  const dim3 grid_, block_, index_;
  unsigned char* const shared_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Fiber* running_ = nullptr;
  ucontext_t main_;
  void (*body_)(const void*) = nullptr;
  const void* body_argument_ = nullptr;
  std::string error_;
#if defined(__SANITIZE_ADDRESS__)
  void* main_fake_stack_ = nullptr;
  const void* main_stack_ = nullptr;
  size_t main_stack_size_ = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  char barrier_tokens_[2] = {};
  void* tsan_main_ = nullptr;
#endif
};

// The names of the kernels launched so far.
inline std::vector<std::string>& launches() {
  static std::vector<std::string> names;
  return names;
}

inline Block& here() { return *Block::current(); }

// The only block of each grid to run, for matrices on which all blocks would take hours; if empty, all blocks run.
inline std::optional<dim3>& only_block() {
  static std::optional<dim3> index;
  return index;
}

// Runs a kernel over a grid, one block at a time.
template <typename... Params, typename... Args>
void run(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u ||
      size_t(block.x) * block.y * block.z > 1024 || size_t(block.x) * block.y * block.z % kWarp != 0 ||
      shared_bytes > (227 << 10)) {
    throw std::runtime_error("invalid launch configuration");
  }
#if defined(__SANITIZE_THREAD__)
  const size_t kept = 1024 / (size_t(block.x) * block.y * block.z);  // a race between blocks needs two threads
#else
  const size_t kept = 0;
#endif
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<unsigned char[]>> memories;  // and two shared memories
  const auto body = [&] { kernel(Params(args)...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (const auto& only = only_block(); only && (only->x != x || only->y != y || only->z != z)) continue;
        if (blocks.size() > kept) blocks.clear();
        if (kept == 0) memories.clear();
        memories.emplace_back(new unsigned char[shared_bytes]);
        std::memset(memories.back().get(), 0xff, shared_bytes);
        blocks.push_back(std::make_unique<Block>(grid, block, dim3(x, y, z), memories.back().get()));
        blocks.back()->run(body);
      }
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(Block::done_token());
#endif
}

template <typename Value>
Value exchanged(Value value, unsigned source) {
  static_assert(sizeof(Value) % 4 == 0 && sizeof(Value) / 4 <= Warp::kWords, "whole words");
  uint32_t words[sizeof(Value) / 4];
  std::memcpy(words, &value, sizeof(Value));
  const auto slots = here().exchange(words, sizeof(Value) / 4, false);
  for (unsigned w = 0; w < sizeof(Value) / 4; ++w) words[w] = *const_cast<const volatile uint32_t*>(&slots[source][w]);
  std::memcpy(&value, words, sizeof(Value));
  return value;
}

// The registers of all lanes of the warp, for an instruction of the whole warp.
class WarpWords {
 public:
  MBP_NO_TSAN WarpWords(const uint32_t* mine, unsigned words) : slots_(here().exchange(mine, words, false)) {}
  MBP_NO_TSAN uint32_t at(int lane, int word) const { return slots_[lane][word]; }

 private:
  const uint32_t (*slots_)[Warp::kWords];
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// IEEE binary16, with conversion to float and back, rounding to nearest even.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return std::ldexp(float(mantissa), -24) * (sign ? -1.0f : 1.0f);
  return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return uint16_t(sign | 0x7fff);
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
  int exponent;
  std::frexp(magnitude, &exponent);
  const int last = std::max(exponent - 11, -24);  // the exponent of the last place
  const float places = std::nearbyint(std::ldexp(magnitude, -last));  // exact: at most 11 bits
  const float rounded = std::ldexp(places, last);
  if (rounded < std::ldexp(1.0f, -14)) return uint16_t(sign | uint16_t(std::ldexp(rounded, 24)));
  const uint32_t r = bits_of_float(rounded);
  return uint16_t(sign | ((r >> 23) - 112) << 10 | (r >> 13 & 1023));
}

}  // namespace emulation

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulation::here().thread_index())
#define blockIdx (::emulation::here().block_index())
#define blockDim (::emulation::here().block_dim())
#define gridDim (::emulation::here().grid_dim())

inline void __syncthreads() { emulation::here().barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  const uint32_t none = 0;
  emulation::here().exchange(&none, 1, true);
}
template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask) {
  if (mask != 0xffffffffu) emulation::here().fail("a shuffle of a part of the warp is not emulated");
  return emulation::exchanged(value, emulation::here().lane() ^ unsigned(lane_mask));
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
