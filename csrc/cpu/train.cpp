// train on the CPU: whole training steps, one mini-batch after another, without leaving this file. A step is
//
//   the rows of the batch -> forward, loss, backward (LossPass in backward.h) -> clip (optional) -> update (update.h)
//
// Memory is allocated before the first step, and once more for a last batch of fewer rows. Each step has the bits that
// its parts have as single calls.
//
// A step of a small network is 3 us of arithmetic. To pass the states of its optimizer to an op takes 10 us, and to
// prepare the step as long. So the op `keep` takes the states once, and a Training stays for the next call if nothing has
// moved in memory.

#include <pthread.h>

#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "autocast.h"
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

// The gradients of one step, in one block of memory. T: the type of the computation; P: of the parameters.
template <typename T, typename P>
struct StepGradients {
  // trained: the parameters that `needs` asks for; biases: which layers have one.
  StepGradients(const std::vector<Tensor>& trained, const std::vector<bool>& biases, const std::vector<bool>& needs,
                int32_t dtype) {
    constexpr int64_t kAlign = 64 / int64_t(sizeof(P));
    int64_t size = 0;
    for (const Tensor& parameter : trained) {
      sizes.push_back(parameter.numel());
      offsets.push_back(size);
      size += round_up(sizes.back(), kAlign);
    }
    memory = empty({size}, dtype);
    size_t next = 0;
    for (size_t k = 0; k < biases.size(); ++k) {
      pointers.omega.push_back(result_in<T>(needs[2 * k] ? at(next++) : nullptr));
      pointers.beta.push_back(result_in<T>(needs[2 * k + 1] && biases[k] ? at(next++) : nullptr));
    }
  }
  P* at(size_t i) const { return data<P>(memory) + offsets[i]; }

  std::vector<int64_t> sizes, offsets;  // in the order of layers, each weight before its bias
  Tensor memory;
  Gradients<T> pointers;
};

// The factor by which torch.nn.utils.clip_grad_norm_ multiplies the gradients, in the arithmetic of their dtype: the
// norm is torch's own, of the norms of all gradients.
template <typename T>
class Clip {
 public:
  template <typename Computed>
  Clip(const StepGradients<Computed, T>& grads, double max_norm) : max_norm_(max_norm) {
    const size_t count = grads.sizes.size();
    norms_ = empty({int64_t(count)}, dtype_of(grads.memory));
    for (size_t i = 0; i < count; ++i) views_.push_back(seen_as(grads.memory, {grads.sizes[i]}, {1}, grads.offsets[i]));
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

// The most bytes of a Training that stays for the next call. Making a larger one takes a small part of its step.
constexpr int64_t kMostKept = 1 << 20;

// All that a Training depends on beside what `keep` was given.
struct Seen {
  struct Memory {  // of a tensor of at most two dimensions: there is no Training of others
    const void* data;
    int64_t dtype, dim, sizes[2], strides[2];
  };
  Seen() = default;
  Seen(const Tensor& input, const std::vector<Tensor>& parameters, const std::vector<Tensor>& states,
       const std::vector<double>& options, std::optional<double> max_grad_norm)
      : numbers{double(dtype_of(input)), input.dim() ? double(input.size(input.dim() - 1)) : -1,
                double(torch::stable::get_num_threads()), double(max_grad_norm.has_value()),
                max_grad_norm.value_or(0)} {
    numbers.insert(numbers.end(), options.begin(), options.end());
    memory.reserve(parameters.size() + states.size());
    for (const auto* tensors : {&parameters, &states}) {
      for (const Tensor& t : *tensors) {
        const Layout layout(t);
        void* const data = t.mutable_data_ptr();  // mutable: torch then makes a lazy copy before we write
        Memory m{data, layout.dtype, layout.dim, {}, {}};
        for (int64_t d = 0; d < std::min<int64_t>(layout.dim, 2); ++d) {
          m.sizes[d] = layout.sizes[d];
          m.strides[d] = layout.strides[d];
        }
        memory.push_back(m);
      }
    }
  }
  bool operator==(const Seen& other) const {
    return numbers == other.numbers && memory.size() == other.memory.size() &&
           std::memcmp(memory.data(), other.memory.data(), memory.size() * sizeof(Memory)) == 0;
  }
  std::vector<double> numbers;
  std::vector<Memory> memory;
};

// What `keep` was given, and what `train` keeps from one call to the next.
struct Kept {
  std::vector<bool> biases, needs;
  int32_t autocast;  // the dtype in which steps are computed, or kNoAutocast: that of the parameters
  LossOptions loss;
  std::string rule;
  std::vector<Tensor> states;
  std::vector<double> options;
  std::vector<int64_t> groups;
  std::vector<bool> fresh;

  std::mutex busy;  // of what follows; it is never waited for, since a process may fork while it is held
  std::shared_ptr<void> training;
  Seen seen;  // what it was made for
};

// All that is kept in this process, each under a number. Like the pool, it is never destroyed, and works after a fork.
class AllKept {
 public:
  static AllKept& global() {
    static AllKept* const all = [] {
      const auto lock = [] { global().mutex_.lock(); };
      const auto unlock = [] { global().mutex_.unlock(); };
      pthread_atfork(lock, unlock, unlock);
      return new AllKept;
    }();
    return *all;
  }
  int64_t add(std::shared_ptr<Kept> kept) {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_.emplace(++last_, std::move(kept));
    return last_;
  }
  std::shared_ptr<Kept> find(const char* op, int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = all_.find(handle);
    MBP_CHECK(found != all_.end(), op, ": `handle` must be one that `keep` returned and `release` did not take, got ",
              handle);
    return found->second;
  }
  void remove(int64_t handle) {
    std::shared_ptr<Kept> removed;  // destroyed after the lock, since that of a tensor may wait for Python's
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = all_.find(handle);
    if (found == all_.end()) return;
    removed = std::move(found->second);
    all_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Kept>> all_;
  int64_t last_ = 0;
};

// The batches of one data set.
template <typename T>
struct Batches {
  Batches(Matrix<const T> input, const Target<T>& target, const int64_t* order, int64_t batch)
      : input(input, order, batch), values(target.values, order, batch), classes(target.classes, order, batch) {}
  Rows<T> input, values;
  Rows<int64_t> classes;
};

// Training steps of a network. It refers to the memory of the parameters and states, but to none of their tensors:
// torch counts the references to a parameter (swap_tensors, or `use_count` in Python). T: the type of the computation; P:
// of input, target, parameters and loss. If they differ, each step rounds the input and the parameters to T.
template <typename T, typename P>
class Training {
  static constexpr bool kMixed = !std::is_same_v<T, P>;

 public:
  Training(const char* op, const Kept& kept, const std::vector<Tensor>& weights,
           const std::vector<std::optional<Tensor>>& biases, const std::vector<Tensor>& trained,
           const std::vector<double>& options, std::optional<double> max_grad_norm)
      : op_(op),
        loss_(kept.loss),
        layers_(layers_of<P>(weights, biases)),
        low_(kMixed ? size_of(layers_) : 0),
        grads_(trained, kept.biases, kept.needs, dtype_of(weights[0])),
        updater_(op, kept.rule, trained, kept.states, options, kept.groups, kept.fresh) {
    for (size_t i = 0; i < trained.size(); ++i) updater_.set_gradient(int64_t(i), grads_.at(i));
    if (max_grad_norm) clip_.emplace(grads_, *max_grad_norm);
  }

  bool fits() const { return updater_.fits(); }
  int64_t bytes() const {
    const int64_t low = kMixed ? size_of(layers_) + (pass_ ? pass_->rows * layers_[0].d_in() : 0) : 0;
    return grads_.memory.numel() * int64_t(sizeof(P)) + low * int64_t(sizeof(T)) + (pass_ ? pass_->loss.bytes() : 0);
  }

  // One step on rows [first, first + count); writes the loss of before the update.
  void step(const Batches<P>& data, int64_t first, int64_t count, P* loss) {
    data.input.check(op_, first, count);
    Pass& pass = pass_of(count);
    const Workers& workers = pass.loss.workers();
    const auto h = data.input.batch(first, count, workers);
    Target<P> target{};
    if (has_class_target(loss_.kind)) {
      target.classes = data.classes.batch(first, count, workers);
    } else {
      target.values = data.values.batch(first, count, workers);
    }
    auto batch = BatchLoss<T>::against(op_, loss_, target, count, pass.net.plan.top);
    batch.terms.gradient = true;
    double sum;
    if constexpr (kMixed) {
      round_parameters(workers);
      sum = pass.loss.run(rounded<T>(h, pass.low_input.data, workers), batch.terms);
    } else {
      sum = pass.loss.run(h, batch.terms);
    }
    kernels<P>().store(batch.value(sum), loss);
    if (clip_) updater_.set_gradient_scale(clip_->factor());
    updater_.next_step();
    updater_.run();
  }

 private:
  // The passes for batches of one size: all batches but the last have the same.
  struct Pass {
    Pass(int64_t rows, const Training& t)
        : rows(rows),
          net(rows, t.computed_layers(), /*final_relu=*/false),
          loss(net, kernels<T>().loss(t.loss_.kind), t.grads_.pointers),
          low_input(kMixed ? rows * t.layers_[0].d_in() : 0) {}
    int64_t rows;
    Network<T> net;
    LossPass<T> loss;
    Buffer<T> low_input;
  };
  Pass& pass_of(int64_t rows) {
    if (!pass_ || pass_->rows != rows) pass_.emplace(rows, *this);
    return *pass_;
  }

  static int64_t size_of(const std::vector<Layer<P>>& layers) {
    int64_t size = 0;
    for (const auto& layer : layers) size += layer.d_out() * (layer.d_in() + 1);
    return size;
  }

  // The layers that the passes read: those of the parameters, or of their rounded copies, which lie one after another.
  std::vector<Layer<T>> computed_layers() const {
    if constexpr (kMixed) {
      std::vector<Layer<T>> layers(layers_.size());
      T* at = low_.data;
      for (size_t k = 0; k < layers.size(); ++k) {
        const int64_t d_out = layers_[k].d_out(), d_in = layers_[k].d_in();
        layers[k].omega = Matrix<const T>::contiguous(at, d_out, d_in);
        at += d_out * d_in;
        if (layers_[k].beta.data) layers[k].beta = {at, 1};
        at += d_out;
      }
      return layers;
    } else {
      return layers_;
    }
  }
  void round_parameters(const Workers& workers) const {
    T* at = low_.data;
    for (const auto& layer : layers_) {
      rounded<T>(Matrix<const P>::contiguous(layer.omega.data, layer.d_out(), layer.d_in()), at, workers);
      at += layer.d_out() * layer.d_in();
      if (layer.beta.data) rounded<T>(Matrix<const P>::contiguous(layer.beta.data, 1, layer.d_out()), at, workers);
      at += layer.d_out();
    }
  }

  const char* op_;
  LossOptions loss_;
  std::vector<Layer<P>> layers_;
  Buffer<T> low_;  // the rounded parameters
  StepGradients<T, P> grads_;
  Updater updater_;
  std::optional<Clip<P>> clip_;
  std::optional<Pass> pass_;
};

void check_order(const char* op, const Tensor& order) {
  MBP_CHECK(dtype_of(order) == aoti_torch_dtype_int64() && order.dim() == 1 && order.is_contiguous(), op,
            ": `order` must be a contiguous int64 tensor of one dimension, got ", dtype_name(dtype_of(order)), " ",
            shape_of(order));
}

}  // namespace

int64_t keep(std::vector<bool> biases, std::vector<bool> needs, StringHandle loss_name, bool mean, int64_t ignore_index,
             double label_smoothing, StringHandle rule, std::vector<Tensor> states, std::vector<double> options,
             std::vector<int64_t> groups, std::vector<bool> fresh,
             std::optional<torch::headeronly::ScalarType> autocast) {
  const char* op = "keep";
  const std::string rule_name = take_text(rule), loss = take_text(loss_name);
  MBP_CHECK(!biases.empty(), op, ": `biases` must hold at least one item");
  MBP_CHECK(needs.size() == 2 * biases.size(), op, ": `needs` must have 2 x ", biases.size(), " items, got ",
            needs.size());
  auto kept = std::make_shared<Kept>();
  kept->loss = {parse_loss(op, loss), mean, ignore_index, label_smoothing};
  kept->biases = std::move(biases);
  kept->needs = std::move(needs);
  kept->autocast = autocast ? half_of(op, *autocast) : kNoAutocast;
  kept->rule = rule_name;
  kept->states = std::move(states);
  kept->options = std::move(options);
  kept->groups = std::move(groups);
  kept->fresh = std::move(fresh);
  return AllKept::global().add(std::move(kept));
}

void release(int64_t handle) { AllKept::global().remove(handle); }

std::optional<Tensor> train(int64_t handle, Tensor input, Tensor target, std::optional<Tensor> order,
                            std::optional<int64_t> batch_size, int64_t steps, std::vector<Tensor> parameters,
                            std::optional<std::vector<double>> other_options, std::optional<double> max_grad_norm,
                            double seconds) {
  const char* op = "train";
  const std::shared_ptr<Kept> kept = AllKept::global().find(op, handle);
  const std::vector<double>& options = other_options ? *other_options : kept->options;
  const size_t layers = kept->biases.size();
  const size_t wanted = layers + size_t(std::count(kept->biases.begin(), kept->biases.end(), true));
  MBP_CHECK(parameters.size() == wanted, op, ": `parameters` must have ", wanted, " items, got ", parameters.size());
  MBP_CHECK(!batch_size || *batch_size >= 1, op, ": `batch_size` must be positive, got ", *batch_size);

  Seen seen(input, parameters, kept->states, options, max_grad_norm);
  // Another thread may be making steps: this call then makes a Training of its own.
  const std::unique_lock<std::mutex> lock(kept->busy, std::try_to_lock);
  const std::shared_ptr<void> known = lock && kept->seen == seen ? kept->training : nullptr;
  std::vector<Tensor> weights, trained;
  std::vector<std::optional<Tensor>> biases;
  if (!known) {
    auto take = [&, next = size_t(0)](size_t need) mutable -> const Tensor& {
      if (kept->needs[need]) trained.push_back(parameters[next]);
      return parameters[next++];
    };
    for (size_t k = 0; k < layers; ++k) {
      weights.push_back(take(2 * k));
      biases.push_back(kept->biases[k] ? std::optional<Tensor>(take(2 * k + 1)) : std::nullopt);
    }
    check_network(op, input, weights, biases);
    for (const Tensor& parameter : parameters) {
      if (!parameter.is_contiguous()) return std::nullopt;
    }
    for (const Tensor& state : kept->states) {  // the dispatcher has seen the other tensors only
      if (!state.is_cpu()) return std::nullopt;
    }
  }
  const Tensor& last = parameters[wanted - (kept->biases.back() ? 2 : 1)];
  check_loss(op, input, target, last.size(0), kept->loss.kind, kept->loss.label_smoothing);
  const auto steps_of = [&](auto computed, auto stored) -> std::optional<Tensor> {
    using T = decltype(computed);
    using P = decltype(stored);
    Tensor keep_input, keep_target;
    const auto h = as_matrix<P>(input, keep_input);
    if (order) check_order(op, *order);
    const int64_t rows = order ? order->numel() : h.rows, batch = std::min(batch_size.value_or(rows), rows);
    const int64_t most = (batch ? (rows - 1) / batch : 0) + 1;
    MBP_CHECK(steps >= 1 && steps <= most, op, ": `steps` must be between 1 and ", most, ", got ", steps);
    const auto network =
        known ? std::static_pointer_cast<Training<T, P>>(known)
              : std::make_shared<Training<T, P>>(op, *kept, weights, biases, trained, options, max_grad_norm);
    if (!network->fits()) return std::nullopt;
    const Batches<P> batches(h, as_target<P>(target, kept->loss.kind, keep_target),
                             order ? const_data<int64_t>(*order) : nullptr, batch);
    const Tensor losses = batch_size ? empty({steps}, dtype_of(input)) : empty({}, dtype_of(input));
    P* const values = data<P>(losses);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    int64_t step = 0;
    while (step < steps) {
      const int64_t first = step * batch;
      try {
        network->step(batches, first, std::min(batch, rows - first), values + step);
      } catch (...) {  // a row or a class out of bounds: nothing of this step has been done
        if (step == 0) throw;
        break;  // the next call will begin with the step that fails
      }
      ++step;
      if (step < steps && std::chrono::steady_clock::now() >= deadline) break;
    }
    if (lock) {
      std::fill(kept->fresh.begin(), kept->fresh.end(), false);
      kept->training = network->bytes() <= kMostKept ? network : nullptr;
      kept->seen = std::move(seen);
    }
    return step < steps ? seen_as(losses, {step}, {1}) : losses;
  };
  if (kept->autocast == kNoAutocast) return dispatch(op, input, [&](auto zero) { return steps_of(zero, zero); });
  MBP_CHECK(dtype_of(input) == aoti_torch_dtype_float32(), op, ": `input` must be float32, got ",
            dtype_name(dtype_of(input)));
  return kept->autocast == aoti_torch_dtype_bfloat16() ? steps_of(bfloat16{}, float{}) : steps_of(float16{}, float{});
}

}  // namespace manualbp
