// Kernels for AVX2 with FMA and F16C (Haswell and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "params.h"
#include "target.h"

#define MBP_LEVEL "avx2"
#define MBP_VECTOR_BYTES 32
#define MBP_VECTOR_REGISTERS 16

MBP_TARGET_BEGIN("avx2,fma,f16c")
namespace manualbp {
namespace avx2 {
#include "kernels-inl.h"
}  // namespace avx2
}  // namespace manualbp
MBP_TARGET_END
#endif  // x86-64
