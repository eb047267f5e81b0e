// The launches of the CUDA kernels, which the entries call. Each function launches on a stream and returns at once; it
// launches nothing if there is no work, and throws if CUDA refuses the launch. The .cu files define them and choose
// grid and block sizes.
#pragma once

#include "kernels/params.h"

namespace manualbp::cuda {

using Stream = void*;  // cudaStream_t

template <typename T>
void bias_relu(const BiasRelu<T>& p, Stream stream);

// The number of slices of rows in which the column sums of a (rows, cols) matrix are made. The caller allocates
// ReluBackward::partial accordingly.
template <typename T>
int64_t relu_backward_slices(int64_t rows, int64_t cols);
template <typename T>
void relu_backward(const ReluBackward<T>& p, Stream stream);

template <typename T>
void reduce(const Reduce<T>& p, Stream stream);

template <typename T>
void accumulate(const Accumulate<T>& p, Stream stream);

// How many items of `sums` the loss of a (rows, cols) matrix fills.
int64_t loss_blocks(LossKind kind, int64_t rows, int64_t cols);
template <typename T>
void loss(LossKind kind, const Loss<T>& p, Stream stream);
void count_classes(const CountClasses& p, Stream stream);
template <typename T>
void loss_total(const LossTotal<T>& p, Stream stream);

// The narrow kernels, for float32, float16 and bfloat16.
template <typename T>
constexpr bool kHasNarrow = sizeof(T) < 8;
// The blocks of a launch, which are the rows of NarrowBackward::dbeta.
template <typename T>
int64_t narrow_blocks(int64_t rows);
template <typename T>
void narrow_forward(const NarrowForward<T>& p, Stream stream);
template <typename T>
void narrow_backward(const NarrowBackward<T>& p, Stream stream);
template <typename T>
void narrow_biases(const NarrowBiases<T>& p, Stream stream);

}  // namespace manualbp::cuda
