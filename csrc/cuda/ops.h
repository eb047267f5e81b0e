// The CUDA entries of the ops, as ops.cpp registers them: the arguments and results are those of cpu/ops.h.
#pragma once

#include "../cpu/ops.h"

namespace manualbp::cuda {

decltype(manualbp::linear_relu) linear_relu;
decltype(manualbp::linear_relu_backward) linear_relu_backward;
decltype(manualbp::mlp) mlp;
decltype(manualbp::mlp_backward) mlp_backward;
decltype(manualbp::mlp_loss) mlp_loss;

}  // namespace manualbp::cuda
