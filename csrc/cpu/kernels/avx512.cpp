// Kernels for AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4 and later).
// The same -inl.h files are compiled once per level; isa.cpp chooses at run time.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "params.h"

// No standard header may follow: a std function compiled here with these flags could be the one that the
// linker keeps for the whole program, and crash an older machine.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define MBP_LEVEL "avx512"
#define MBP_VECTOR_BYTES 64
#define MBP_VECTOR_REGISTERS 32

namespace manualbp {
namespace avx512 {
#include "vec-inl.h"

#include "gemm-inl.h"

#include "relu_backward-inl.h"

#include "loss-inl.h"

#include "flow-inl.h"

#include "table-inl.h"
}  // namespace avx512
}  // namespace manualbp

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
