// Kernels for NEON on aarch64, which has 32 vector registers and instructions for half precision.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "params.h"

#define MBP_LEVEL "neon"
#define MBP_VECTOR_BYTES 16
#define MBP_VECTOR_REGISTERS 32

namespace manualbp {
namespace neon {
#include "kernels-inl.h"
}  // namespace neon
}  // namespace manualbp
#endif  // aarch64
