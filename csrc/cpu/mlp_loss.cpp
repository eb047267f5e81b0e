// mlp_loss on the CPU: forward, loss and backward in one pass over blocks of rows (LossPass in backward.h).
// The activations of a block are overwritten by the next one, so memory does not grow with the batch.

#include "loss.h"
#include "mlp.h"
#include "ops.h"

namespace manualbp {

std::vector<Tensor> mlp_loss(Tensor input, Tensor target, std::vector<Tensor> weights,
                             std::vector<std::optional<Tensor>> biases, StringHandle loss_name, bool mean,
                             int64_t ignore_index, double label_smoothing, std::vector<bool> needs, bool flat) {
  const char* op = "mlp_loss";
  const LossOptions options{parse_loss(op, take_text(loss_name)), mean, ignore_index, label_smoothing};
  check_network(op, input, weights, biases);
  const int64_t cols = weights.back().size(0);
  check_loss(op, input, target, cols, options.kind, label_smoothing);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep_input, keep_target;
    const auto h = as_matrix<T>(input, keep_input);
    BatchLoss<T> loss(op, options, as_target<T>(target, options.kind, keep_target), h.rows, cols);
    std::vector<Tensor> results{empty({}, dtype_of(input))};
    const auto grads = allocate_gradients<T>(op, input, weights, needs, flat, results);
    loss.terms.gradient = results.size() > 1;
    auto net = network<T>(h.rows, weights, biases, /*final_relu=*/false);
    loss.store(LossPass<T>(net, kernels<T>().loss(options.kind), grads).run(h, loss.terms), data<T>(results[0]));
    return results;
  });
}

}  // namespace manualbp
