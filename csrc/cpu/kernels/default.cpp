// Kernels for the baseline of the target machine (SSE2 on x86-64, NEON on aarch64): always built.
// The same -inl.h files are compiled once per level; isa.cpp chooses at run time.
#include <cstdint>

#include "params.h"

#define MBP_LEVEL "default"
#define MBP_VECTOR_BYTES 16
#define MBP_VECTOR_REGISTERS 16

namespace manualbp {
namespace baseline {
#include "vec-inl.h"

#include "gemm-inl.h"

#include "relu_backward-inl.h"

#include "loss-inl.h"

#include "flow-inl.h"

#include "table-inl.h"
}  // namespace baseline
}  // namespace manualbp
