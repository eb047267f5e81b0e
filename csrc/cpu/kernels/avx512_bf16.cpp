// Products of bfloat16 for AVX-512 with AVX512_BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later): two terms per lane
// (gemm_pairs-inl.h). isa.cpp makes the level of these and of the kernels in avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include "params.h"
#include "target.h"

#define MBP_VECTOR_BYTES 64
#define MBP_VECTOR_REGISTERS 32
#define MBP_BFLOAT16_PAIRS
#define MBP_PRODUCTS_OF bfloat16

MBP_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace manualbp {
namespace avx512_bf16 {
#include "kernels-inl.h"
}  // namespace avx512_bf16
}  // namespace manualbp
MBP_TARGET_END
#endif  // x86-64
