// Kernels for the baseline of the architecture (SSE2 on x86-64, NEON on aarch64), which runs on every machine.
// The level is called "default", as torch calls it (ATEN_CPU_CAPABILITY=default). That is a keyword of C++, so the
// namespace is `baseline`.
#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "params.h"

#define MBP_LEVEL "default"
#define MBP_VECTOR_BYTES 16
#define MBP_VECTOR_REGISTERS 16

namespace manualbp {
namespace baseline {
#include "kernels-inl.h"
}  // namespace baseline
}  // namespace manualbp
