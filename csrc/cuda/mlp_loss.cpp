// mlp_loss on CUDA: forward, loss and backward in blocks of rows (Network::loss_backward). The call does not wait for
// the device: as in torch's own kernels, a class out of bounds ends the kernel, and the next call that waits reports
// it.

#include "network.h"
#include "ops.h"

namespace manualbp::cuda {

std::vector<Tensor> mlp_loss(Tensor input, Tensor target, std::vector<Tensor> weights,
                             std::vector<std::optional<Tensor>> biases, StringHandle loss_name, bool mean,
                             int64_t ignore_index, double label_smoothing, std::vector<bool> needs, bool flat) {
  const char* op = "mlp_loss";
  const LossKind kind = parse_loss(op, take_text(loss_name));
  check_network(op, input, weights, biases);
  check_devices(op, input, weights, biases);
  const int64_t cols = weights.back().size(0);
  check_loss(op, input, target, cols, kind, label_smoothing);
  check_device(op, {"target"}, target, input);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(input);
    const Tensor h = as_rows(input);
    Loss<T> terms{};
    terms.cols = cols;
    terms.ignore_index = ignore_index;
    terms.label_smoothing = label_smoothing;
    terms.scale = 1;
    Tensor rows, counted;
    if (has_class_target(kind)) {
      terms.classes = const_data<int64_t>(target);
      terms.class_stride = target.dim() ? target.stride(0) : 0;
      if (mean) {
        counted = device.empty({1}, aoti_torch_dtype_int64());
        torch::stable::zero_(counted);
        const auto count = static_cast<unsigned long long*>(counted.mutable_data_ptr());
        CountClasses counting{};
        counting.rows = h.size(0);
        counting.cols = cols;
        counting.classes = terms.classes;
        counting.class_stride = terms.class_stride;
        counting.ignore_index = ignore_index;
        counting.counted = count;
        count_classes(counting, device.stream());
        terms.counted = count;
      }
    } else {
      rows = as_rows(target.is_contiguous() ? target : torch::stable::contiguous(target));
      if (mean) terms.scale = 1.0 / double(h.size(0) * cols);
    }
    std::vector<Tensor> results{device.empty({}, dtype_of(input))};
    const Gradients grads = allocate_gradients(op, device, input, weights, needs, flat, results);
    terms.gradient = results.size() > 1;
    Network<T>(device, h.size(0), weights, biases, /*final_relu=*/false)
        .loss_backward(h, kind, terms, rows.defined() ? &rows : nullptr, data<T>(results[0]), grads);
    return results;
  });
}

}  // namespace manualbp::cuda
