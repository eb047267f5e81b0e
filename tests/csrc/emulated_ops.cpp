// The CUDA entries as CPU ops, torch.ops.manualbp_emulated: the same sources, with kernels run by cuda_emulation.h and
// products computed by torch's CPU library. tests/emulation.py defines the ops, and builds and loads this file.

#define MBP_EMULATED 1
// Small blocks of rows let a test reach the code that adds gradients over blocks.
#define MBP_BLOCK_BYTES 0
#define MBP_BLOCK_MIN_ROWS rows_of_a_block()

#include "cuda_emulation.h"

static int64_t rows_of_a_block() {
  const char* rows = std::getenv("MANUALBP_EMULATED_ROWS");
  return rows ? std::atoll(rows) : 1 << 20;
}

#include "../../csrc/cuda/accumulate.cu"
#include "../../csrc/cuda/bias_relu.cu"
#include "../../csrc/cuda/loss.cu"
#include "../../csrc/cuda/narrow.cu"
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

// The names of the kernels launched since the last call, one per line.
extern "C" const char* manualbp_emulated_launches() {
  static std::string names;
  names.clear();
  for (const std::string& name : emulation::launches()) names += name + "\n";
  emulation::launches().clear();
  return names.c_str();
}
