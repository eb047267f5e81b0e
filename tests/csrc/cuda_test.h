// Shared by the tests of the CUDA kernels: buffers, numbers and a comparison. Each test is a program that prints how
// many cases passed, or the first failure, with exit status 1. tests/test_cuda_kernels.py builds and runs them.
#pragma once

#include <sys/mman.h>

#define MBP_EMULATED 1
#include "cuda_emulation.h"

#include "../../csrc/cuda/kernels/device.cuh"
#include "../../csrc/cuda/kernels.h"

namespace manualbp::cuda {

template <typename T>
constexpr const char* kTypeName = "?";
template <>
constexpr const char* kTypeName<float> = "float32";
template <>
constexpr const char* kTypeName<double> = "float64";
template <>
constexpr const char* kTypeName<float16> = "float16";
template <>
constexpr const char* kTypeName<bfloat16> = "bfloat16";

// Half a unit in the last place, relative to the number.
template <typename T>
constexpr double kRounding = 0x1p-24;
template <>
constexpr double kRounding<double> = 0x1p-53;
template <>
constexpr double kRounding<float16> = 0x1p-11;
template <>
constexpr double kRounding<bfloat16> = 0x1p-8;

// The rounding of the sums of T.
template <typename T>
constexpr double kSumRounding = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;

// Device memory: a heap block of exactly this size, so that AddressSanitizer detects accesses outside; filled with NaN.
// It starts `skip` numbers after an address of 16-byte alignment.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t skip = 0)
      : size_(size), skip_(skip), memory_(new unsigned char[size_t(size + skip) * sizeof(T)]) {
    std::memset(memory_.get(), 0xff, size_t(size + skip) * sizeof(T));
  }
  T* data() { return reinterpret_cast<T*>(memory_.get()) + skip_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return size_; }
  double at(int64_t i) { return double(widen(data()[i])); }
  void set(int64_t i, double value) { data()[i] = narrow<T>(accumulator_t<T>(value)); }
  std::vector<double> values() {
    std::vector<double> all;
    for (int64_t i = 0; i < size_; ++i) all.push_back(at(i));
    return all;
  }

 private:
  int64_t size_, skip_;
  std::unique_ptr<unsigned char[]> memory_;
};

// Device memory of more elements than 32 bits can count: zeros, of which only touched pages use memory.
template <typename T>
class Reserved {
 public:
  explicit Reserved(int64_t size) : bytes_(size_t(size) * sizeof(T)), size_(size) {
    void* const memory =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cannot reserve address space");
    madvise(memory, bytes_, MADV_NOHUGEPAGE);  // a touched page takes 4 KiB, not 2 MiB
    data_ = static_cast<T*>(memory);
  }
  Reserved(const Reserved&) = delete;
  ~Reserved() { munmap(data_, bytes_); }
  T* data() { return data_; }
  int64_t size() const { return size_; }
  double at(int64_t i) { return double(widen(data_[i])); }
  void set(int64_t i, double value) { data_[i] = narrow<T>(accumulator_t<T>(value)); }

 private:
  size_t bytes_;
  int64_t size_;
  T* data_;
};

// Runs `launch` with only block (x, y) of each grid.
template <typename Launch>
void run_block(int64_t x, int64_t y, const Launch& launch) {
  emulation::only_block() = dim3(unsigned(x), unsigned(y), 0);
  launch();
  emulation::only_block().reset();
}

// Generates the same numbers in every run.
class Random {
 public:
  double uniform() {  // in [-1, 1)
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return double(int64_t(state_ >> 11)) * 0x1p-52 - 1.0;
  }
  int64_t below(int64_t n) { return int64_t((uniform() + 1) / 2 * double(n)); }
  int64_t integer() { return below(5) - 2; }  // -2 ... 2, whose sums are exact in every type

 private:
  uint64_t state_ = 88172645463325252ull;
};

inline std::string& this_case() {
  static std::string description;
  return description;
}
inline int& cases() {
  static int count = 0;
  return count;
}
template <typename... Parts>
void begin_case(const Parts&... parts) {
  std::string text;
  ((text +=
    [](const auto& part) {
      if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
        return std::to_string(part);
      } else {
        return std::string(part);
      }
    }(parts) +
    " "),
   ...);
  this_case() = text;
  ++cases();
}

// Expects got = want within `tolerance`, where NaN equals NaN and infinity equals infinity.
inline void expect(const char* what, int64_t i, double got, double want, double tolerance = 0) {
  const bool same = std::isnan(want)   ? std::isnan(got)
                    : std::isinf(want) ? got == want
                                       : std::fabs(got - want) <= tolerance;
  if (same) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%lld] is %.17g, expected %.17g within %.3g", what, (long long)i, got, want,
                tolerance);
  throw std::runtime_error(text);
}

using Sizes = std::vector<int64_t>;

template <typename Test>
int run_tests(const Test& test) {
  try {
    test();
  } catch (const std::exception& error) {
    std::printf("FAILED: %s: %s\n", this_case().c_str(), error.what());
    return 1;
  }
  std::printf("%d cases passed\n", cases());
  return 0;
}

// Calls f(zero, true), all cases, for each type with shuffled threads, and f(zero, false), a few cases, in two other
// orders; then once(), which is slow. ThreadSanitizer is slow and independent of the order: a few cases in one order.
template <typename... Types, typename F, typename Once>
int run_tests(const F& f, const Once& once) {
  return run_tests([&] {
    const auto in_order = [&](emulation::Schedule schedule, bool thorough) {
      emulation::schedule() = schedule;
      (f(Types{}, thorough), ...);
    };
#if !defined(__SANITIZE_THREAD__)
    in_order(emulation::Schedule::shuffled, true);
    in_order(emulation::Schedule::descending, false);
#endif
    in_order(emulation::Schedule::ascending, false);
#if !defined(__SANITIZE_THREAD__)
    once();
#endif
  });
}

}  // namespace manualbp::cuda
