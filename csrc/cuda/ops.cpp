// Registers the CUDA entries of the ops that ../ops.cpp defines. They are in a separate shared object, _C_cuda, which
// is loaded after _C if torch has CUDA: it needs libtorch_cuda and the CUDA runtime, which a CPU-only torch does not
// have.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(manualbp, CUDA, m) {
  m.impl("linear_relu", TORCH_BOX(&manualbp::cuda::linear_relu));
  m.impl("linear_relu_backward", TORCH_BOX(&manualbp::cuda::linear_relu_backward));
  m.impl("mlp", TORCH_BOX(&manualbp::cuda::mlp));
  m.impl("mlp_backward", TORCH_BOX(&manualbp::cuda::mlp_backward));
  m.impl("mlp_loss", TORCH_BOX(&manualbp::cuda::mlp_loss));
}
