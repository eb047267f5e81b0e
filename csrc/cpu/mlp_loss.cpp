// mlp_loss on the CPU: forward, loss and backward in one pass over blocks of rows (LossPass in backward.h).
// The activations of a block are overwritten by the next one, so memory does not grow with the batch.

#include "mlp.h"
#include "ops.h"

namespace manualbp {

namespace {

// Checks the classes of a cross entropy; returns how many rows are not ignored.
int64_t check_classes(const char* op, const int64_t* classes, int64_t stride, int64_t rows, int64_t cols,
                      int64_t ignore_index) {
  int64_t counted = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t c = classes[i * stride];
    if (c == ignore_index) continue;
    MBP_CHECK(c >= 0 && c < cols, op, ": `target` is out of bounds: class ", c, " at row ", i, ", but the output has ",
              cols, " classes");
    ++counted;
  }
  return counted;
}

}  // namespace

std::vector<Tensor> mlp_loss(Tensor input, Tensor target, std::vector<Tensor> weights,
                             std::vector<std::optional<Tensor>> biases, StringHandle loss_name, bool mean,
                             int64_t ignore_index, double label_smoothing, std::vector<bool> needs, bool flat) {
  const char* op = "mlp_loss";
  const LossKind kind = parse_loss(op, take_text(loss_name));
  check_network(op, input, weights, biases);
  const int64_t cols = weights.back().size(0);
  check_loss(op, input, target, cols, kind, label_smoothing);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep_input, keep_target;
    const auto h = as_matrix<T>(input, keep_input);
    Loss<T> terms{};
    terms.cols = cols;
    terms.ignore_index = ignore_index;
    terms.label_smoothing = label_smoothing;
    int64_t count = h.rows * cols;
    if (has_class_target(kind)) {
      terms.classes = const_data<int64_t>(target);
      terms.target_row = target.dim() ? target.stride(0) : 0;
      count = check_classes(op, terms.classes, terms.target_row, h.rows, cols, ignore_index);
    } else {
      const auto y = as_matrix<T>(target, keep_target);
      terms.target = y.data;
      terms.target_row = y.row_stride;
      terms.target_col = y.col_stride;
    }
    terms.scale = mean ? 1.0 / double(count) : 1.0;
    std::vector<Tensor> results{empty({}, dtype_of(input))};
    const auto grads = allocate_gradients<T>(op, input, weights, needs, flat, results);
    terms.gradient = results.size() > 1;
    const auto& kernel = kernels<T>();
    auto net = network<T>(h.rows, weights, biases, /*final_relu=*/false);
    const double sum = LossPass<T>(net, kernel.loss(kind), grads).run(h, terms);
    kernel.store(mean ? sum / double(count) : sum, data<T>(results[0]));
    return results;
  });
}

}  // namespace manualbp
