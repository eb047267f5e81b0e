// train on the CPU: whole training steps, one mini-batch after another, without leaving this file. A step is
//
//   the rows of the batch -> forward, loss, backward (LossPass in backward.h) -> clip (optional) -> update (update.h)
//
// Memory is allocated before the first step, and once more for a last batch of fewer rows. Each step has the bits that
// its parts have as single calls.

#include <chrono>
#include <optional>

#include "loss.h"
#include "mlp.h"
#include "ops.h"
#include "update.h"

namespace manualbp {

namespace {

// The rows of one mini-batch after another: views of the data or, if there is an order, copies of the rows it names.
template <typename T>
class Rows {
 public:
  Rows(Matrix<const T> all, const int64_t* order, int64_t batch) : all_(all), order_(order) {
    if (order) copies_.emplace(batch * all.cols);
  }

  // Raises an error unless rows [first, first + count) of the order are rows of the data.
  void check(const char* op, int64_t first, int64_t count) const {
    for (int64_t i = first; order_ && i < first + count; ++i) {
      MBP_CHECK(order_[i] >= 0 && order_[i] < all_.rows, op, ": `order` must hold rows of `input`, 0 to ",
                all_.rows - 1, ", got ", order_[i]);
    }
  }

  // Rows [first, first + count) of the order.
  Matrix<const T> batch(int64_t first, int64_t count, const Workers& workers) const {
    if (!order_) return rows_of(all_, first, count);
    const auto to = Matrix<const T>::contiguous(copies_->data, count, all_.cols);
    constexpr int64_t kShare = 64;
    // 16: a pass over memory costs about as much as 16 multiply-adds per element.
    workers.run(ceil_div(count, kShare), 16 * double(count * all_.cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kShare; i < std::min(end * kShare, count); ++i) copy_row(order_[first + i], i);
    });
    return to;
  }

 private:
  void copy_row(int64_t row, int64_t i) const {
    const T* const from = all_.data + row * all_.row_stride;
    T* const to = copies_->data + i * all_.cols;
    if (all_.col_stride == 1) {
      std::copy_n(from, all_.cols, to);
    } else {
      for (int64_t j = 0; j < all_.cols; ++j) to[j] = from[j * all_.col_stride];
    }
  }
  Matrix<const T> all_;
  const int64_t* order_;
  std::optional<Buffer<T>> copies_;
};

// The parameters that are trained, and their gradients of one step in one block of memory.
template <typename T>
struct StepGradients {
  StepGradients(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                const std::vector<bool>& needs) {
    constexpr int64_t kAlign = 64 / int64_t(sizeof(T));
    int64_t size = 0;
    const auto add = [&](const Tensor& parameter) {
      parameters.push_back(parameter);
      offsets.push_back(size);
      size += round_up(parameter.numel(), kAlign);
    };
    for (size_t k = 0; k < weights.size(); ++k) {
      if (needs[2 * k]) add(weights[k]);
      if (needs[2 * k + 1] && biases[k]) add(*biases[k]);
    }
    memory = empty({size}, dtype_of(weights[0]));
    size_t next = 0;
    for (size_t k = 0; k < weights.size(); ++k) {
      pointers.omega.push_back(needs[2 * k] ? at(next++) : nullptr);
      pointers.beta.push_back(needs[2 * k + 1] && biases[k] ? at(next++) : nullptr);
    }
  }
  T* at(size_t i) const { return data<T>(memory) + offsets[i]; }

  std::vector<Tensor> parameters;  // in the order of layers, each weight before its bias
  std::vector<int64_t> offsets;  // of their gradients
  Tensor memory;
  Gradients<T> pointers;
};

// The factor by which torch.nn.utils.clip_grad_norm_ multiplies the gradients, in the arithmetic of their dtype: the
// norm is torch's own, of the norms of all gradients.
template <typename T>
class Clip {
 public:
  Clip(const StepGradients<T>& grads, double max_norm) : max_norm_(max_norm) {
    const size_t count = grads.parameters.size();
    norms_ = empty({int64_t(count)}, dtype_of(grads.memory));
    for (size_t i = 0; i < count; ++i) {
      views_.push_back(seen_as(grads.memory, {grads.parameters[i].numel()}, {1}, grads.offsets[i]));
    }
  }
  double factor() const {
    T* const norms = data<T>(norms_);
    for (size_t i = 0; i < views_.size(); ++i) norms[i] = *data<T>(norm(views_[i]));
    const double total = value(*data<T>(norm(norms_)));
    const double factor = rounded(rounded(1 / rounded(total + double(A(1e-6)))) * double(A(max_norm_)));
    return factor > 1 ? 1 : factor;  // NaN stays
  }

 private:
  using A = accumulator_t<T>;
  static Tensor norm(const Tensor& t) {
    AtenTensorHandle self;
    MBP_TORCH(aoti_torch_new_tensor_handle(t.get(), &self));
    StableIValue stack[] = {torch::stable::detail::from(self), torch::stable::detail::from(std::nullopt),
                            torch::stable::detail::from(std::nullopt), torch::stable::detail::from(false),
                            torch::stable::detail::from(std::nullopt)};
    MBP_TORCH(torch_call_dispatcher("aten::linalg_norm", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  static double value(T x) { return kernels<T>().moments(&x, nullptr, nullptr, 1).sum; }
  static double rounded(double x) {
    T out;
    kernels<T>().store(x, &out);
    return value(out);
  }
  double max_norm_;
  Tensor norms_;
  std::vector<Tensor> views_;
};

// Training steps of a network on the rows of one data set.
template <typename T>
class Training {
 public:
  Training(const char* op, Matrix<const T> input, const Target<T>& target, const int64_t* order, int64_t batch,
           const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
           const LossOptions& loss, const StepGradients<T>& grads, Updater& updater, const std::optional<Clip<T>>& clip)
      : op_(op),
        weights_(weights),
        biases_(biases),
        loss_(loss),
        grads_(grads),
        updater_(updater),
        clip_(clip),
        input_(input, order, batch),
        values_(target.values, order, batch),
        classes_(target.classes, order, batch) {}

  // One step on rows [first, first + count); writes the loss of before the update.
  void step(int64_t first, int64_t count, T* loss) {
    input_.check(op_, first, count);
    Pass& pass = pass_of(count);
    const Workers& workers = pass.loss.workers();
    const auto h = input_.batch(first, count, workers);
    Target<T> target{};
    if (has_class_target(loss_.kind)) {
      target.classes = classes_.batch(first, count, workers);
    } else {
      target.values = values_.batch(first, count, workers);
    }
    BatchLoss<T> batch(op_, loss_, target, count, pass.net.plan.top);
    batch.terms.gradient = true;
    batch.store(pass.loss.run(h, batch.terms), loss);
    if (clip_) updater_.set_gradient_scale(clip_->factor());
    updater_.next_step();
    updater_.run();
  }

 private:
  // The passes for batches of one size: all batches but the last have the same.
  struct Pass {
    Pass(int64_t rows, const Training& t)
        : rows(rows),
          net(network<T>(rows, t.weights_, t.biases_, /*final_relu=*/false)),
          loss(net, kernels<T>().loss(t.loss_.kind), t.grads_.pointers) {}
    int64_t rows;
    Network<T> net;
    LossPass<T> loss;
  };
  Pass& pass_of(int64_t rows) {
    if (!pass_ || pass_->rows != rows) pass_.emplace(rows, *this);
    return *pass_;
  }

  const char* op_;
  const std::vector<Tensor>& weights_;
  const std::vector<std::optional<Tensor>>& biases_;
  const LossOptions& loss_;
  const StepGradients<T>& grads_;
  Updater& updater_;
  const std::optional<Clip<T>>& clip_;
  Rows<T> input_, values_;
  Rows<int64_t> classes_;
  std::optional<Pass> pass_;
};

void check_order(const char* op, const Tensor& order) {
  MBP_CHECK(dtype_of(order) == aoti_torch_dtype_int64() && order.dim() == 1 && order.is_contiguous(), op,
            ": `order` must be a contiguous int64 tensor of one dimension, got ", dtype_name(dtype_of(order)), " ",
            shape_of(order));
}

}  // namespace

int64_t train(Tensor input, Tensor target, std::optional<Tensor> order, int64_t batch_size, std::vector<Tensor> weights,
              std::vector<std::optional<Tensor>> biases, StringHandle loss_name, bool mean, int64_t ignore_index,
              double label_smoothing, std::vector<bool> needs, StringHandle rule, std::vector<Tensor> states,
              std::vector<double> options, std::vector<int64_t> groups, std::vector<bool> fresh,
              std::optional<double> max_grad_norm, Tensor losses, double seconds) {
  const char* op = "train";
  const std::string rule_name = take_text(rule);
  const LossOptions loss{parse_loss(op, take_text(loss_name)), mean, ignore_index, label_smoothing};
  check_network(op, input, weights, biases);
  const int64_t cols = weights.back().size(0);
  check_loss(op, input, target, cols, loss.kind, label_smoothing);
  check_dtype(op, {"losses"}, losses, input);
  MBP_CHECK(losses.is_contiguous(), op, ": `losses` must be contiguous, got ", shape_of(losses));
  MBP_CHECK(batch_size >= 1, op, ": `batch_size` must be positive, got ", batch_size);
  MBP_CHECK(needs.size() == 2 * weights.size(), op, ": `needs` must have 2 x ", weights.size(), " items, got ",
            needs.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    if (!weights[k].is_contiguous() || (biases[k] && !biases[k]->is_contiguous())) return -1;
  }
  return dispatch(op, input, [&](auto zero) -> int64_t {
    using T = decltype(zero);
    Tensor keep_input, keep_target;
    const auto h = as_matrix<T>(input, keep_input);
    if (order) check_order(op, *order);
    const int64_t rows = order ? order->numel() : h.rows, steps = losses.numel();
    MBP_CHECK(steps <= (rows ? (rows - 1) / batch_size : 0) + 1, op, ": `losses` has ", steps, " items, but ", rows,
              " rows make fewer batches of ", batch_size);
    const StepGradients<T> grads(weights, biases, needs);
    Updater updater(op, rule_name, grads.parameters, states, options, groups, fresh);
    if (!updater.fits()) return -1;
    for (size_t i = 0; i < grads.parameters.size(); ++i) updater.set_gradient(int64_t(i), grads.at(i));
    std::optional<Clip<T>> clip;
    if (max_grad_norm) clip.emplace(grads, *max_grad_norm);
    Training<T> training(op, h, as_target<T>(target, loss.kind, keep_target),
                         order ? const_data<int64_t>(*order) : nullptr, std::min(batch_size, rows), weights, biases,
                         loss, grads, updater, clip);
    T* const values = const_cast<T*>(const_data<T>(losses));
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    int64_t step = 0;
    while (step < steps) {
      const int64_t first = step * batch_size;
      try {
        training.step(first, std::min(batch_size, rows - first), values + step);
      } catch (...) {  // a row or a class out of bounds: nothing of this step has been done
        if (step == 0) throw;
        break;  // the next call will begin with the step that fails
      }
      ++step;
      if (step < steps && std::chrono::steady_clock::now() >= deadline) break;
    }
    return step;
  });
}

}  // namespace manualbp
