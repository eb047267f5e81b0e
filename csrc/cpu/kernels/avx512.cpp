// Kernels for AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "params.h"
#include "target.h"

#define MBP_LEVEL "avx512"
#define MBP_VECTOR_BYTES 64
#define MBP_VECTOR_REGISTERS 32

MBP_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace manualbp {
namespace avx512 {
#include "kernels-inl.h"
}  // namespace avx512
}  // namespace manualbp
MBP_TARGET_END
#endif  // x86-64
