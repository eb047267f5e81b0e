// The parameter structs of the CUDA kernels, which see nothing else. Plain C++, for kernels, launches and entries.
// Sizes are named as in csrc/README.md; strides are in elements; pointers are device memory.
#pragma once

#include "../../types.h"

namespace manualbp::cuda {

// f <- a[f + beta], in place.
template <typename T>
struct BiasRelu {
  int64_t rows, cols;
  T* f;           // (rows, cols), contiguous
  const T* bias;  // (cols), contiguous; nullptr: none
};

// df = I[h > 0] . dh and, in the same pass, d(beta) = column sums of df.
template <typename T>
struct ReluBackward {
  int64_t rows, cols;
  const T* grad;  // dh (rows, cols), any strides
  int64_t grad_row, grad_col;
  const T* h;  // (rows, cols) contiguous; nullptr: no ReLU, only the sums
  T* out;      // df (rows, cols) contiguous, may be grad itself; nullptr: only the sums
  T* sum;      // d(beta) (cols); nullptr: only df
  int64_t slices;
  accumulator_t<T>* partial;  // (slices, cols), where there are several slices
};

// out = the sum of the slices of partial.
template <typename T>
struct Reduce {
  int64_t slices, cols;
  const accumulator_t<T>* partial;  // (slices, cols)
  T* out;                           // (cols)
};

// total (+)= term in the accumulator type; at the last term, out = total.
template <typename T>
struct Accumulate {
  int64_t size;
  const T* term;
  accumulator_t<T>* total;
  bool first;
  T* out;  // nullptr: not the last term
};

// A loss of f (rows, cols): each block writes its part of the value to `sums` and, if `gradient`, replaces f by df.
template <typename T>
struct Loss {
  int64_t rows, cols;
  T* f;                    // (rows, cols), contiguous
  const T* target;         // (rows, cols), contiguous; or nullptr
  const int64_t* classes;  // (rows), class_stride apart; or nullptr
  int64_t class_stride;
  int64_t ignore_index;
  double label_smoothing;
  double scale;                       // of the gradient
  const unsigned long long* counted;  // its divisor, the number of rows that are not ignored; nullptr: none
  bool gradient;
  double* sums;  // (blocks)
};

// counted += the number of classes that are not ignore_index.
struct CountClasses {
  int64_t rows, cols;
  const int64_t* classes;
  int64_t class_stride;
  int64_t ignore_index;
  unsigned long long* counted;
};

// out = the sum of sums, times scale, divided by *counted unless nullptr.
template <typename T>
struct LossTotal {
  int64_t size;
  const double* sums;
  double scale;
  const unsigned long long* counted;
  T* out;
};

// The limits of the narrow kernels, which compute a whole network.
constexpr int kNarrowLayers = 64, kNarrowWidth = 128;

// Layer k maps widths[k] to widths[k + 1] features.
template <typename T>
struct NarrowNetwork {
  int64_t rows;
  int layers;
  int widths[kNarrowLayers + 1];
  const T* omega[kNarrowLayers];  // (D_out, D_in), contiguous
};

template <typename T>
struct NarrowForward {
  NarrowNetwork<T> net;
  const T* beta[kNarrowLayers];  // (D_out), contiguous; nullptr: none
  bool final_relu;
  const T* input;  // (rows, D_0), rows input_row apart
  int64_t input_row;
  T* hidden;  // h_1 ... h_{K-1}, one after another, each (rows, D_k); nullptr: not wanted
  T* output;  // (rows, D_K), contiguous; nullptr: not wanted, and the last layer is not computed
};

template <typename T>
struct NarrowBackward {
  NarrowNetwork<T> net;
  int lowest;            // layers below it have nothing to learn
  const T* grad_output;  // (rows, D_K), rows grad_row apart
  int64_t grad_row;
  const T* hidden;              // as NarrowForward leaves it
  const T* output;              // (rows, D_K) contiguous, if a ReLU ended the network; else nullptr
  T* df;                        // df_lowest ... df_{K-1}, one after another, each (rows, D_{k+1})
  T* grad_input;                // (rows, D_0), contiguous; nullptr: not wanted
  accumulator_t<T>* dbeta;      // (blocks, sum of D_{k+1} from lowest on): column sums of each block; nullptr
  int64_t dbeta_row;            // that sum
};

// The bias gradients of all layers from the column sums that narrow_backward leaves: Reduce, cut into several outputs.
template <typename T>
struct NarrowBiases {
  int64_t slices;
  int layers;
  int ends[kNarrowLayers];  // layer k has the columns ends[k - 1] ... ends[k] - 1
  const accumulator_t<T>* partial;  // (slices, ends[layers - 1])
  T* out[kNarrowLayers];            // each (D_out); nullptr: not wanted
};

}  // namespace manualbp::cuda
