// The instruction-set level in use: the best that the machine has, or the one that MANUALBP_ISA names; chosen once.
#pragma once

#include <string>

#include "kernels/params.h"

namespace manualbp {

// The level in use. Throws if MANUALBP_ISA names a level that is unknown or that this machine lacks.
const KernelTable& kernel_table();

// Its name: the op `isa`.
std::string isa();

// The kernels of a storage type at the level in use.
template <typename T>
const Kernels<T>& kernels();

}  // namespace manualbp
