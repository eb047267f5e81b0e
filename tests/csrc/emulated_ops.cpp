// The CUDA entries as ops of the CPU, torch.ops.manualbp_emulated: the same sources, their kernels run by
// cuda_emulation.h, their products by torch's CPU library. tests/emulation.py defines the ops, builds and loads this.
// Blocks of rows are small, so that a test reaches the code that adds gradients over blocks.

#define MBP_EMULATED 1
#define MBP_BLOCK_BYTES 4096
#define MBP_BLOCK_MIN_ROWS 64

#include "cuda_emulation.h"

#include "../../csrc/cuda/accumulate.cu"
#include "../../csrc/cuda/bias_relu.cu"
#include "../../csrc/cuda/loss.cu"
#include "../../csrc/cuda/relu_backward.cu"

#include "../../csrc/cuda/linear_relu.cpp"
#include "../../csrc/cuda/mlp.cpp"
#include "../../csrc/cuda/mlp_loss.cpp"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(manualbp_emulated, CPU, m) {
  m.impl("linear_relu", TORCH_BOX(&manualbp::cuda::linear_relu));
  m.impl("linear_relu_backward", TORCH_BOX(&manualbp::cuda::linear_relu_backward));
  m.impl("mlp", TORCH_BOX(&manualbp::cuda::mlp));
  m.impl("mlp_backward", TORCH_BOX(&manualbp::cuda::mlp_backward));
  m.impl("mlp_loss", TORCH_BOX(&manualbp::cuda::mlp_loss));
}
