// The pool of csrc/cpu/pool.h without torch (torch_stub/), which the sanitizers run: what it reuses, frees and keeps, and
// that no block is in use twice at a time.
//
//   pool ROUNDS    on several threads, ROUNDS times each

#include "../../csrc/cpu/pool.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <tuple>

using namespace manualbp;

namespace {

constexpr int64_t kMiB = 1 << 20;

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("pool: %s\n", what);
  std::exit(1);
}

Pool::Time now{std::chrono::hours(1)};
Pool::Time fake_clock() { return now; }

// Takes a block, gives it back, and returns its address.
void* use(Pool& pool, int64_t bytes) {
  Pool::Block* const block = pool.take(bytes);
  require(reinterpret_cast<intptr_t>(block->data) % 64 == 0, "alignment");
  require(block->bytes >= bytes, "size");
  std::memset(block->data, 1, size_t(bytes));  // for the address sanitizer
  void* const data = block->data;
  pool.give(block);
  return data;
}

void check_what_is_reused() {
  Pool pool(fake_clock);
  void* const first = use(pool, 10 * kMiB);
  require(pool.idle_bytes() == 10 * kMiB, "a block is kept");
  require(use(pool, 10 * kMiB) == first, "a block is reused");
  require(use(pool, 8 * kMiB) == first, "for somewhat less, too");

  Pool::Block* const large = pool.take(10 * kMiB);
  void* const small = use(pool, 9 * kMiB);
  pool.give(large);
  require(use(pool, 9 * kMiB) == small, "the smallest that fits is reused");
  require(pool.clear() == 19 * kMiB && pool.idle_bytes() == 0, "clear frees all");
  require(pool.clear() == 0, "and then nothing");
}

void check_what_is_freed() {
  Pool pool(fake_clock);
  use(pool, 20 * kMiB);
  void* const large = use(pool, 24 * kMiB);
  require(pool.idle_bytes() == 24 * kMiB, "a larger block takes the place of a smaller one");
  use(pool, 6 * kMiB);
  require(pool.idle_bytes() == 30 * kMiB, "a block is not reused for much less");
  require(use(pool, 8 * kMiB) == large && pool.idle_bytes() == 30 * kMiB, "unless another one would be too much");
  for (int64_t size = 25; size < 60; ++size) use(pool, size * kMiB);
  require(pool.idle_bytes() == 59 * kMiB, "growing sizes do not add up");
  std::mt19937 generator(0);
  for (int i = 0; i < 1000; ++i) {
    use(pool, int64_t(4 + generator() % 56) * kMiB);
    require(double(pool.idle_bytes()) <= kSlack * 59 * kMiB, "changing sizes do not add up");
  }

  // What is in use at one time is kept.
  pool.clear();
  const auto use_three = [&] {
    Pool::Block* const blocks[] = {pool.take(10 * kMiB), pool.take(21 * kMiB), pool.take(43 * kMiB)};
    for (Pool::Block* block : blocks) pool.give(block);
  };
  use_three();
  use_three();
  require(pool.idle_bytes() == (10 + 21 + 43) * kMiB, "three blocks are kept");
  use(pool, 90 * kMiB);
  require(pool.idle_bytes() == 90 * kMiB, "the oldest are freed");
  use_three();  // the 90 MiB serve as 21
  use_three();
  require(pool.idle_bytes() == (10 + 21 + 43) * kMiB, "a block that is too large is freed");
  now += std::chrono::seconds(2 * kIdleSeconds + 1);
  use(pool, 40 * kMiB);
  use(pool, 10 * kMiB);
  use(pool, 5 * kMiB);
  require(pool.idle_bytes() == (40 + 10) * kMiB, "what was in use long ago does not count");
  pool.clear();
  use(pool, 20 * kMiB);
  use(pool, 10 * kMiB);
  require(pool.idle_bytes() == 20 * kMiB, "nor what was in use before a call of clear");
}

void check_what_ages() {
  Pool pool(fake_clock);
  Pool::Block* const other = pool.take(6 * kMiB);
  use(pool, 16 * kMiB);
  now += std::chrono::seconds(kIdleSeconds - 1);
  pool.give(other);
  pool.free_old();
  require(pool.idle_bytes() == 22 * kMiB, "blocks are kept for a while");
  now += std::chrono::seconds(2);
  pool.free_old();
  require(pool.idle_bytes() == 6 * kMiB, "but not for ever");
  now += std::chrono::seconds(kIdleSeconds);
  use(pool, 5 * kMiB);
  require(pool.idle_bytes() == 5 * kMiB, "not even to be reused");
}

// Threads pass blocks to one another, as autograd's threads do. Each writes to all that it has and finds it unchanged.
void check_threads(int rounds) {
  Pool pool;
  std::mutex mutex;
  std::vector<std::pair<Pool::Block*, unsigned char>> shared;
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    for (int i = 0; i < rounds; ++i) {
      const int64_t bytes = int64_t(3 + random() % 6) * kMiB;
      Pool::Block* block = pool.take(bytes);
      auto mark = static_cast<unsigned char>(random());
      for (int64_t at = 0; at < bytes; at += 4096) block->data[at] = char(mark);
      if (random() % 9 == 0) pool.clear();
      {
        const std::lock_guard<std::mutex> lock(mutex);
        shared.push_back({block, mark});
        std::swap(shared.back(), shared[random() % shared.size()]);
        std::tie(block, mark) = shared.back();
        shared.pop_back();
      }
      require(block->data[0] == char(mark), "no block is in use twice");
      pool.give(block);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back(work, seed);
  for (auto& thread : threads) thread.join();
}

}  // namespace

int main(int count, char** arguments) {
  const char* rounds = count > 1 ? arguments[1] : "50";
  check_what_is_reused();
  check_what_is_freed();
  check_what_ages();
  check_threads(std::atoi(rounds));
  std::printf("pool: %s passed\n", rounds);
}
