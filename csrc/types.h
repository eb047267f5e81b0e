// What every part shares, kernels included: storage types, kinds of loss, divisions of sizes.
//
// Kernels are compiled for several instruction sets, and for a GPU: no torch here, and no standard header but <cstdint>
// (csrc/README.md, "Instruction sets").
#pragma once

#include <cstdint>

namespace manualbp {

// Half precision is a bit pattern: it is widened to float on load, every sum is kept in float, and one rounding happens
// on store.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type in which sums of T are accumulated.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

enum class LossKind { mse, bce_with_logits, cross_entropy };

// Whether the target of a loss is one class index per row; otherwise it is a matrix like the output.
// Like every switch over LossKind, this one has no default: the compiler then warns about a kind that is missing.
constexpr bool has_class_target(LossKind kind) {
  switch (kind) {
    case LossKind::mse:
    case LossKind::bce_with_logits:
      return false;
    case LossKind::cross_entropy:
      return true;
  }
  __builtin_trap();
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t size, int64_t multiple) { return ceil_div(size, multiple) * multiple; }

}  // namespace manualbp
