// Which instruction-set level runs: detected once, forced with MANUALBP_ISA=default|avx2|avx512.
#pragma once

#include "kernels/params.h"

namespace manualbp {

// The level in use. Throws if MANUALBP_ISA names a level that is unknown or that this machine lacks.
const KernelTable& kernel_table();

// The kernels of a storage type at the level in use.
template <typename T>
const Kernels<T>& kernels();

}  // namespace manualbp
