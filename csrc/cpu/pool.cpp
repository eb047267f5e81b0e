#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>

#include "tensor.h"

namespace manualbp {

namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kLeast = 4 << 20;  // bytes of what is worth keeping

#if defined(__linux__) && defined(MADV_FREE)
// Whether the system gives huge pages to those who ask for them.
bool has_huge_pages() {
  std::string modes;
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::getline(file, modes);
  return modes.find("[always]") != std::string::npos || modes.find("[madvise]") != std::string::npos;
}
#endif

// Offers the memory of an idle block to the system, which takes it when memory runs short, and only then; writing to
// the block makes what is left of it ours again. In huge pages, 64 MiB take 0.05 ms, where touching them anew takes 7
// ms or more. In pages of 4 KiB they take 3 to 6 ms, so those are not offered.
void offer([[maybe_unused]] const Pool::Block& block) {
#if defined(__linux__) && defined(MADV_FREE)
  static const bool pays = has_huge_pages();
  if (pays) advise(block.data, block.bytes, MADV_FREE);
#endif
}

// glibc's malloc maps blocks above a threshold anew each time, and returns what is free at the end of its heap beyond
// twice that. The threshold rises to the size of the largest mapped block that was freed, up to 32 MiB, but blocks of
// the pool are not freed. So free another one, which was never touched. Without this, torch's own temporaries in a
// tcnn64 step (4 MiB each) caused 1000 to 2000 page faults a step; with it, none.
void raise_thresholds([[maybe_unused]] int64_t bytes) {
#if defined(__GLIBC__)
  constexpr int64_t kMost = 31 << 20;
  void* volatile block = std::malloc(size_t(std::min(bytes, kMost)));  // volatile: or the compiler removes both calls
  std::free(block);
#endif
}

// Makes a tensor of memory that a deleter takes back. torch has it since 2.11, and the binary targets 2.10.
using FromBlob = int32_t (*)(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset,
                             int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* out,
                             int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                             void (*deleter)(void* data, void* context), void* context);

}  // namespace

Pool& Pool::global() {
  static Pool* const pool = [] {
    const auto lock = [] {
      global().clear();
      global().mutex_.lock();
    };
    const auto unlock = [] { global().mutex_.unlock(); };
    pthread_atfork(lock, unlock, unlock);
    return new Pool;
  }();
  return *pool;
}

Pool::Block* Pool::take(int64_t bytes) {
  {
    Blocks freed;  // after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    free_old(freed);
    roll();
    if (auto block = reuse(bytes, freed)) {
      count(*block, bytes);
      return block.release();
    }
  }
  Tensor memory = empty({bytes + kAlign}, aoti_torch_dtype_uint8());
  raise_thresholds(bytes);
  char* const data = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(memory.mutable_data_ptr()), kAlign));
  std::unique_ptr<Block> block(new Block{std::move(memory), data, bytes, bytes});
  const std::lock_guard<std::mutex> lock(mutex_);
  count(*block, bytes);
  return block.release();
}

void Pool::give(Block* given) {
  std::unique_ptr<Block> block(given);
  offer(*block);
  block->idle_since = clock_();
  const std::lock_guard<std::mutex> lock(mutex_);
  in_use_ -= block->bytes;
  asked_ -= block->asked;
  try {
    idle_.push_back(std::move(block));
    idle_bytes_ += idle_.back()->bytes;
  } catch (const std::bad_alloc&) {  // a deleter must not throw: the block is freed instead
  }
}

int64_t Pool::clear() {
  Blocks freed;
  const std::lock_guard<std::mutex> lock(mutex_);
  freed.swap(idle_);
  most_ = most_before_ = asked_;
  return idle_bytes_.exchange(0);
}

void Pool::free_old() {
  if (idle_bytes() == 0) return;
  Blocks freed;
  const std::lock_guard<std::mutex> lock(mutex_);
  free_old(freed);
}

// An idle block for these bytes, or none if a new one is to be made.
std::unique_ptr<Pool::Block> Pool::reuse(int64_t bytes, Blocks& freed) {
  if (auto block = smallest(bytes, kSlack * double(bytes))) return block;
  const double limit = kSlack * double(std::max({most_, most_before_, asked_ + bytes}));
  const auto exceeds = [&](int64_t more) { return double(in_use_ + idle_bytes() + more) > limit; };
  while (exceeds(0) && !idle_.empty()) free_oldest(freed);
  if (!exceeds(bytes)) return nullptr;
  if (auto block = smallest(bytes, limit)) return block;
  while (exceeds(bytes) && !idle_.empty()) free_oldest(freed);
  return nullptr;
}

std::unique_ptr<Pool::Block> Pool::smallest(int64_t least, double most) {
  auto best = idle_.end();
  for (auto block = idle_.begin(); block != idle_.end(); ++block) {
    const int64_t bytes = (*block)->bytes;
    if (bytes < least || double(bytes) > most) continue;
    if (best == idle_.end() || bytes < (*best)->bytes) best = block;
  }
  return best == idle_.end() ? nullptr : remove(best);
}

std::unique_ptr<Pool::Block> Pool::remove(Blocks::iterator block) {
  std::unique_ptr<Block> removed = std::move(*block);
  idle_.erase(block);
  idle_bytes_ -= removed->bytes;
  return removed;
}

void Pool::free_oldest(Blocks& freed) { freed.push_back(remove(idle_.begin())); }

void Pool::free_old(Blocks& freed) {
  const Time oldest = clock_() - std::chrono::seconds(kIdleSeconds);
  while (!idle_.empty() && idle_.front()->idle_since < oldest) free_oldest(freed);
}

// Begins the next kIdleSeconds, when it is time.
void Pool::roll() {
  const Time now = clock_();
  const auto window = std::chrono::seconds(kIdleSeconds);
  if (now - start_ <= window) return;
  most_before_ = now - start_ <= 2 * window ? most_ : asked_;
  most_ = asked_;
  start_ = now;
}

// A block comes into use.
void Pool::count(Block& block, int64_t bytes) {
  block.asked = bytes;
  in_use_ += block.bytes;
  asked_ += bytes;
  most_ = std::max(most_, asked_);
}

Tensor pooled(const std::vector<int64_t>& sizes, int32_t dtype) {
  static const auto from_blob = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  const auto strides = contiguous_strides(sizes);
  const int64_t bytes = sizes.empty() ? 0 : strides[0] * sizes[0] * item_size(dtype);
  if (!from_blob || bytes < kLeast) {
    Pool::global().free_old();
    return empty(sizes, dtype);
  }
  Pool::Block* const block = Pool::global().take(bytes);
  const auto give = [](void*, void* context) { Pool::global().give(static_cast<Pool::Block*>(context)); };
  AtenTensorHandle handle;
  if (from_blob(block->data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype,
                aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give, block) != 0) {
    give(nullptr, block);
    raise_libtorch_error("torch_from_blob");
  }
  return Tensor(handle);
}

void empty_cache() { Pool::global().clear(); }

int64_t cache_size() { return Pool::global().idle_bytes(); }

}  // namespace manualbp
