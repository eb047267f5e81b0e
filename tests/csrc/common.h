// Shared by the drivers: random numbers, the storage types as double, and memory of an exact size.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>

#include "../../csrc/cpu/isa.h"

using namespace manualbp;

namespace {

std::mt19937 generator(0);
int64_t below(int64_t n) { return int64_t(generator() % uint32_t(n)); }
bool chance(int percent) { return below(100) < percent; }

// Converts storage types to double and back, independently of the kernels' code.
double to_double(double v) { return v; }
double to_double(float v) { return v; }
double to_double(bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
double to_double(float16 v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  const double size = exponent == 0    ? std::ldexp(mantissa, -24)
                      : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                       : std::ldexp(1024 + mantissa, exponent - 25);
  return v.bits & 0x8000 ? -size : size;
}
// Rounds a number as storing it does (test_dtypes.py tests the rounding itself).
template <typename T>
T rounded(double v) {
  T out;
  kernels<T>().store(v, &out);
  return out;
}

template <typename T>
const char* name_of() {
  return std::is_same_v<T, double>     ? "float64"
         : std::is_same_v<T, float>    ? "float32"
         : std::is_same_v<T, bfloat16> ? "bfloat16"
                                       : "float16";
}

// Exactly n elements, at an address that is a multiple of `align`.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t n, size_t align = sizeof(void*)) : size(n) {
    void* memory = nullptr;
    if (posix_memalign(&memory, align, size_t(n) * sizeof(T)) != 0) std::abort();
    data = static_cast<T*>(memory);
  }
  Exact(const Exact&) = delete;
  ~Exact() { std::free(data); }
  void fill(int high) {
    for (int64_t i = 0; i < size; ++i) data[i] = rounded<T>(double(below(2 * high + 1) - high));
  }
  T* data;
  int64_t size;
};

}  // namespace
