// The upper limit for the benchmark: the floating-point operations per second of one thread that executes only fused
// multiply-adds in registers (float32, two operations each).
//
// training_step.py compiles this file at run time and calls it from as many threads as the benchmark uses. Each
// instruction set has its own function, so that ordinary compiler flags suffice.

#include <chrono>

namespace {

// volatile hides the operands and that all chains are equal; else the compiler would compute one chain and copy it.
volatile float factor = 0.999f, addend = 0.001f, initial = 0.0f;
volatile float sink;

// There are 12 independent chains: a fused multiply-add takes 4 cycles and two start per cycle, so at least 8 must be
// in flight to keep both units busy, and 12 accumulators + 2 operands fit in the 16 registers of AVX2.
// x -> 0.999 x + 0.001 tends to 1, so values become neither infinite nor denormal.
#define DEFINE_CHAINS(name, target, bytes)                                    \
  target float name(long iterations) {                                        \
    typedef float vec __attribute__((vector_size(bytes)));                    \
    const vec zero{}, b = zero + factor, c = zero + addend;                   \
    vec x0 = zero + initial, x1 = zero + initial, x2 = zero + initial;        \
    vec x3 = zero + initial, x4 = zero + initial, x5 = zero + initial;        \
    vec x6 = zero + initial, x7 = zero + initial, x8 = zero + initial;        \
    vec x9 = zero + initial, x10 = zero + initial, x11 = zero + initial;      \
    for (long i = 0; i < iterations; ++i) {                                   \
      x0 = x0 * b + c, x1 = x1 * b + c, x2 = x2 * b + c, x3 = x3 * b + c;     \
      x4 = x4 * b + c, x5 = x5 * b + c, x6 = x6 * b + c, x7 = x7 * b + c;     \
      x8 = x8 * b + c, x9 = x9 * b + c, x10 = x10 * b + c, x11 = x11 * b + c; \
    }                                                                         \
    return (x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8 + x9 + x10 + x11)[0];  \
  }

DEFINE_CHAINS(chains_default, , 16)
#if defined(__x86_64__)
DEFINE_CHAINS(chains_avx2, __attribute__((target("avx2,fma"))), 32)
DEFINE_CHAINS(chains_avx512, __attribute__((target("avx512f"))), 64)
#endif

// The instruction sets for which csrc/cpu/kernels has kernels.
const struct Level {
  const char* name;
  float (*chains)(long);
  long lanes;
  bool (*supported)();
} kLevels[] = {
    {"default", chains_default, 4, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", chains_avx2, 8, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", chains_avx512, 16, [] { return bool(__builtin_cpu_supports("avx512f")); }},
#endif
};
constexpr int kLevelCount = sizeof kLevels / sizeof *kLevels;

double gflops(float (*chains)(long), long lanes, double seconds) {
  using clock = std::chrono::steady_clock;
  const long iterations = 100000;
  const auto start = clock::now();
  double rounds = 0, elapsed = 0;
  do {
    sink = chains(iterations);
    rounds += 1;
    elapsed = std::chrono::duration<double>(clock::now() - start).count();
  } while (elapsed < seconds);
  return rounds * static_cast<double>(iterations * 12 * lanes * 2) / elapsed * 1e-9;
}

}  // namespace

// The name of a level, counted from 0; nullptr after the last one.
extern "C" const char* fma_peak_level(int level) { return level < kLevelCount ? kLevels[level].name : nullptr; }

// GFLOP/s of the calling thread at a level, measured for `seconds`; 0 if the CPU does not support it.
extern "C" double fma_peak_gflops(int level, double seconds) {
  const Level& l = kLevels[level];
  return l.supported() ? gflops(l.chains, l.lanes, seconds) : 0;
}
