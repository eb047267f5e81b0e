// All kernels, for the target region and namespace of one level. The order matters: each file uses those above it.

#include "vec-inl.h"

#include "gemm-inl.h"

#ifdef MBP_BFLOAT16_PAIRS
#include "gemm_pairs-inl.h"
#endif

#ifndef MBP_PRODUCTS_OF
#include "relu_backward-inl.h"

#include "dropout-inl.h"

#include "reduce-inl.h"

#include "loss-inl.h"

#include "flow-inl.h"

#include "update-inl.h"
#endif

#include "table-inl.h"
