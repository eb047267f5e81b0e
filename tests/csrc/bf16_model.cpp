// The level avx512_bf16 on any machine with AVX2: the same code, with a model in place of the instruction for pairs of
// bfloat16 (gemm_pairs-inl.h), and vectors of 64 bytes that the compiler splits (-Wno-psabi: none is passed
// between files). Only the drivers have this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../../csrc/cpu/kernels/params.h"
#include "../../csrc/cpu/kernels/target.h"

#define MBP_LEVEL "bf16_model"
#define MBP_VECTOR_BYTES 64
#define MBP_VECTOR_REGISTERS 32
#define MBP_BFLOAT16_PAIRS
#define MBP_MODEL

MBP_TARGET_BEGIN("avx2,fma,f16c")
namespace manualbp {
namespace bf16_model {
#include "../../csrc/cpu/kernels/kernels-inl.h"
}  // namespace bf16_model
}  // namespace manualbp
MBP_TARGET_END
#endif  // x86-64
