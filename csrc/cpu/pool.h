// Memory that stays: stored activations are kept after their use, because the next training step needs as many.
//
// A page of memory that is new to the process costs a page fault, and malloc returns blocks of more than 32 MiB to the
// system as soon as they are freed. The activations are the largest tensors of a step, and only our own code sees them.
// Everything else comes from torch's allocator: outputs and gradients, because users may resize their storage, which
// memory of the pool does not allow; and workspaces, which are so small that malloc keeps them.
//
//   kept      until clear(), or until free_old() finds that a block has been idle for kIdleSeconds
//   reused    the smallest idle block that is at least as large as asked for, and at most kSlack times as large
//   bounded   a new block is made only if all blocks together then have at most kSlack times the bytes that were asked
//             for at one time in the last 10 to 20 seconds. Otherwise any block is reused that is large enough; if there
//             is none, the oldest idle blocks are freed.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "../tensor.h"

namespace manualbp {

constexpr int64_t kIdleSeconds = 10;
constexpr double kSlack = 1.25;

class Pool {
 public:
  using Time = std::chrono::steady_clock::time_point;

  struct Block {
    Tensor memory;  // uint8, from torch's allocator, which reports it when memory runs out
    char* data;  // aligned to a cache line
    int64_t bytes;
    int64_t asked;  // bytes, by the last take()
    Time idle_since{};
  };

  // clock: tests replace it.
  explicit Pool(Time (*clock)() = std::chrono::steady_clock::now) : clock_(clock) {}

  // The pool of this process. It is never destroyed, since tensors may outlive all static objects. A fork clears it;
  // else, the process that writes to an idle block first would copy its pages, and the other one would keep them.
  static Pool& global();

  // A block of at least this many bytes.
  Block* take(int64_t bytes);

  // Takes a block back, on any thread.
  void give(Block* block);

  // Frees all idle blocks, and forgets how much was in use; returns their bytes.
  int64_t clear();

  // Frees the blocks that have been idle for too long.
  void free_old();

  // Bytes of the idle blocks.
  int64_t idle_bytes() const { return idle_bytes_.load(std::memory_order_relaxed); }

 private:
  using Blocks = std::vector<std::unique_ptr<Block>>;
  std::unique_ptr<Block> reuse(int64_t bytes, Blocks& freed);
  std::unique_ptr<Block> smallest(int64_t least, double most);
  std::unique_ptr<Block> remove(Blocks::iterator block);
  void free_oldest(Blocks& freed);
  void free_old(Blocks& freed);
  void roll();
  void count(Block& block, int64_t bytes);

  Time (*clock_)();
  std::mutex mutex_;  // of what follows. Memory is neither allocated from torch nor returned to it while it is held.
  Blocks idle_;  // in the order in which they became idle
  std::atomic<int64_t> idle_bytes_{0};
  int64_t in_use_ = 0;  // bytes of all other blocks
  int64_t asked_ = 0;  // bytes that were asked for when those were taken
  int64_t most_ = 0, most_before_ = 0;  // of asked_, since start_ and in the kIdleSeconds before
  Time start_{};
};

// A new contiguous tensor, with memory from the pool if it is large. Its storage can then not be resized.
Tensor pooled(const std::vector<int64_t>& sizes, int32_t dtype);

// The ops.
void empty_cache();
int64_t cache_size();

}  // namespace manualbp
