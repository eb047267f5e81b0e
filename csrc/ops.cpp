// All ops of the library, torch.ops.manualbp.*: the table of contents of this folder.
//
// The ops are private and have no derivative (torch_manualbp/autograd.py gives them one). Only the stable ABI of torch
// is used, so that one binary serves every Python and every torch >= 2.10.

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/pool.h"

STABLE_TORCH_LIBRARY(manualbp, m) {
  // relu(input weight^T + bias)
  m.def("linear_relu(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  // The gradients asked for by needs = [input, weight, bias], in this order.
  m.def(
      "linear_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output, bool[] needs)"
      " -> Tensor[]");
  // linear -> ReLU -> ... -> linear (-> ReLU if final_relu). hidden: h_1 ... h_{K-1} one after another in a flat
  // tensor, which is empty unless `store`.
  m.def(
      "mlp(Tensor input, Tensor[] weights, Tensor?[] biases, bool final_relu, bool store)"
      " -> (Tensor output, Tensor hidden)");
  // The gradients asked for by needs = [input, weights..., biases...], in this order. hidden: as mlp stored it, or
  // None: the activations are then recomputed, which needs the biases. output: that of an mlp with final_relu, else
  // None.
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor?[] biases, Tensor? hidden,"
      " Tensor? output, bool[] needs) -> Tensor[]");
  // The same with dropout after ReLUs, on the CPU: h' = m . a[f] with m in {0, c}. scales: c for each layer, 0 for none;
  // kept: where m is c, flat, for the layers with dropout. Backward needs the masks only to recompute activations.
  // (Separate ops, since two more arguments would cost each call of the others 0.5 us.)
  m.def(
      "mlp_dropout(Tensor input, Tensor[] weights, Tensor?[] biases, bool final_relu, bool store, Tensor? kept,"
      " float[] scales) -> (Tensor output, Tensor hidden)");
  m.def(
      "mlp_dropout_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor?[] biases, Tensor? hidden,"
      " Tensor? output, bool[] needs, Tensor? kept, float[] scales) -> Tensor[]");
  // The same under autocast, on the CPU: computed in dtype, bfloat16 or float16. Input and parameters are float32, or of
  // that dtype already; so are the results, but the gradients of the parameters are always float32, and that of the input
  // has its dtype.
  m.def(
      "mlp_autocast(Tensor input, Tensor[] weights, Tensor?[] biases, bool final_relu, bool store, Tensor? kept,"
      " float[] scales, ScalarType dtype) -> (Tensor output, Tensor hidden)");
  m.def(
      "mlp_autocast_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor?[] biases, Tensor? hidden,"
      " Tensor? output, bool[] needs, Tensor? kept, float[] scales) -> Tensor[]");
  m.def(
      "mlp_autocast_loss(Tensor input, Tensor target, Tensor[] weights, Tensor?[] biases, str loss, bool mean,"
      " int ignore_index, float label_smoothing, bool[] needs, bool flat, ScalarType dtype) -> Tensor[]");
  // For torch.func, on the CPU: E networks of the same widths. weights (E, D_out, D_in), biases (E, D_out), input
  // (E, ..., D_0); without these first dimensions, one network. Returns the output and, if `store`, h_1 ... h_{K-1},
  // each of its own shape. The numbers are those of E calls of mlp.
  m.def("mlp_stacked(Tensor input, Tensor[] weights, Tensor?[] biases, bool final_relu, bool store) -> Tensor[]");
  // The gradients asked for, as mlp_backward lists them, each with its first dimension E. hidden: as mlp_stacked returned
  // them, or empty: they are recomputed, which needs the biases.
  m.def(
      "mlp_stacked_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor?[] biases, Tensor[] hidden,"
      " Tensor? output, bool[] needs) -> Tensor[]");
  // mlp_backward, of which gradients will be taken: before the others in the list, df_0 ... df_{K-2} one after another
  // in a flat tensor, as `hidden` is; those below the lowest layer with a gradient asked for are not set.
  m.def(
      "mlp_backward_store(Tensor grad_output, Tensor input, Tensor[] weights, Tensor hidden, Tensor? output,"
      " bool[] needs, float[] scales=[]) -> Tensor[]");
  // mlp_backward in the backward pass of a gradient of a gradient, where h_1 ... h_{K-1} have gradients of their own,
  // flat as `hidden` is, which are added. Float64 and float32 only.
  m.def(
      "mlp_backward_further(Tensor grad_output, Tensor grad_hidden, Tensor input, Tensor[] weights, Tensor hidden,"
      " Tensor? output, bool[] needs, float[] scales=[]) -> Tensor[]");
  // The backward pass of mlp_backward: given the gradients by its results (grad_dinput, ..., or None), those asked for
  // by needs = [grad_output, input, hidden, weights...], in this order. df: as mlp_backward_store stored it. (Computing
  // it again made a step with a gradient penalty 2 to 13 % slower.)
  m.def(
      "mlp_double_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor hidden, Tensor? output,"
      " Tensor df, Tensor? grad_dinput, Tensor?[] grad_dweights, Tensor?[] grad_dbiases, bool[] needs,"
      " float[] scales=[]) -> Tensor[]");
  // The loss (a scalar) of an mlp's output and the gradients asked for, as mlp_backward lists them, in one pass.
  // loss: mse, cross_entropy or bce_with_logits; mean: divide by the number of terms; flat: the gradients of the
  // parameters are views of one buffer.
  m.def(
      "mlp_loss(Tensor input, Tensor target, Tensor[] weights, Tensor?[] biases, str loss, bool mean, int ignore_index,"
      " float label_smoothing, bool[] needs, bool flat) -> Tensor[]");
  // For GradientFlowMonitor, on the CPU: the output of a network. relus: the layers that a ReLU follows. Writes
  // f_0 ... f_{K-1}, flat, and h_1 ... h_{K-1} into memory of the same size. (The monitor passes the same memory every
  // time: mapping new pages took as long as both passes.)
  m.def(
      "flow_forward(Tensor input, Tensor[] weights, Tensor?[] biases, bool[] relus, Tensor(a!) f, Tensor(b!) h)"
      " -> Tensor");
  // For each layer, in float64 (7, K): the sums of squares of f_k, h_k and df_k, the numbers of units that are off and
  // on for all rows, the sum of Omega_k and of its squares. Writes, all flat: f, unless flow_forward has written it
  // (has_f); df; and a copy of the weights.
  m.def(
      "flow_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor?[] biases, bool[] relus, Tensor(a!) f,"
      " bool has_f, Tensor(b!) df, Tensor(c!) copies) -> Tensor");
  // The norm of the difference between each weight and its copy, float64 (K).
  m.def("flow_update(Tensor[] weights, Tensor copies) -> Tensor");
  // One step of an optimizer for all parameters, in place: torch's SGD (rule: sgd), or Adam and AdamW (adam). Returns
  // False, and changes nothing, if torch's own step must run. The options of each group and the lists of states are
  // described in cpu/update.h.
  m.def(
      "update(Tensor(a!)[] parameters, Tensor[] gradients, str rule, Tensor(b!)[] states, float[] options,"
      " int[] groups, bool[] fresh) -> bool");
  // Keeps what `train` needs of a network and of an optimizer beside the parameters: a handle, until `release`.
  // biases: of each layer, whether it has one; needs: which of weight 0, bias 0, weight 1, ... are trained; these are
  // the parameters of the arguments that follow, as for update. autocast: the dtype in which steps of float32 parameters
  // are computed; None: that of the parameters.
  m.def(
      "keep(bool[] biases, bool[] needs, str loss, bool mean, int ignore_index, float label_smoothing, str rule,"
      " Tensor(a!)[] states, float[] options, int[] groups, bool[] fresh, ScalarType? autocast=None) -> int");
  ;
  m.def("release(int handle) -> ()");
  // Training steps, as many as asked for or fewer once `seconds` have passed, on one batch of `batch_size` rows after
  // another (None: a single step on all rows), in the order given: loss and gradients (mlp_loss), clip_grad_norm_
  // unless max_grad_norm is None, and update, in place. parameters: weight 0, bias 0, weight 1, ...; options: None for
  // those that were kept. Returns the losses of all steps that were made, those before one that fails; without a
  // dimension if the step is single. Without a change: None, if dtypes or layouts are not for it, or an error, if the
  // first step fails.
  m.def(
      "train(int handle, Tensor input, Tensor target, Tensor? order, int? batch_size, int steps,"
      " Tensor(a!)[] parameters, float[]? options, float? max_grad_norm, float seconds) -> Tensor?");
  // How the batch of a network D_0 ... D_K = widths is cut: the way (0 tall, 1 short, 2 wide); rows of a block of the
  // forward pass, of a block, a chunk and a slice of the backward pass; bytes that the forward and the backward pass
  // allocate beside their results. store: the forward pass stores activations; needs: as for mlp_backward; recomputed:
  // the number of layers whose activations the backward pass computes (0 if they are stored, K with the loss, else
  // K-1).
  m.def("plan(int batch, int[] widths, int item_size, int threads, bool[] needs, bool store, int recomputed) -> int[]");
  // Frees the memory of stored activations that is kept for the next step. Its bytes.
  m.def("empty_cache() -> ()");
  m.def("cache_size() -> int");
  // The instruction-set level in use.
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(manualbp, CPU, m) {
  m.impl("linear_relu", TORCH_BOX(&manualbp::linear_relu));
  m.impl("linear_relu_backward", TORCH_BOX(&manualbp::linear_relu_backward));
  m.impl("mlp", TORCH_BOX(&manualbp::mlp));
  m.impl("mlp_backward", TORCH_BOX(&manualbp::mlp_backward));
  m.impl("mlp_dropout", TORCH_BOX(&manualbp::mlp_dropout));
  m.impl("mlp_dropout_backward", TORCH_BOX(&manualbp::mlp_dropout_backward));
  m.impl("mlp_autocast", TORCH_BOX(&manualbp::mlp_autocast));
  m.impl("mlp_autocast_backward", TORCH_BOX(&manualbp::mlp_autocast_backward));
  m.impl("mlp_autocast_loss", TORCH_BOX(&manualbp::mlp_autocast_loss));
  m.impl("mlp_stacked", TORCH_BOX(&manualbp::mlp_stacked));
  m.impl("mlp_stacked_backward", TORCH_BOX(&manualbp::mlp_stacked_backward));
  m.impl("mlp_backward_store", TORCH_BOX(&manualbp::mlp_backward_store));
  m.impl("mlp_backward_further", TORCH_BOX(&manualbp::mlp_backward_further));
  m.impl("mlp_double_backward", TORCH_BOX(&manualbp::mlp_double_backward));
  m.impl("mlp_loss", TORCH_BOX(&manualbp::mlp_loss));
  m.impl("flow_forward", TORCH_BOX(&manualbp::flow_forward));
  m.impl("flow_backward", TORCH_BOX(&manualbp::flow_backward));
  m.impl("flow_update", TORCH_BOX(&manualbp::flow_update));
  m.impl("update", TORCH_BOX(&manualbp::update));
  m.impl("train", TORCH_BOX(&manualbp::train));
}

STABLE_TORCH_LIBRARY_IMPL(manualbp, CompositeExplicitAutograd, m) {
  m.impl("update", TORCH_BOX(&manualbp::update_elsewhere));
  m.impl("keep", TORCH_BOX(&manualbp::keep));
  m.impl("release", TORCH_BOX(&manualbp::release));
  m.impl("plan", TORCH_BOX(&manualbp::plan));
  m.impl("empty_cache", TORCH_BOX(&manualbp::empty_cache));
  m.impl("cache_size", TORCH_BOX(&manualbp::cache_size));
  m.impl("isa", TORCH_BOX(&manualbp::isa));
}
