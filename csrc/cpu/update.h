// The update of all parameters of an optimizer, torch's SGD or Adam (AdamW is Adam with decoupled weight decay), for
// the op `update` and for those that train: built from tensors once, then a step is
//
//   updater.set_gradient(i, data);   // of each parameter, wherever it lies this time
//   updater.next_step();             // counts the step and computes its scalars
//   updater.run();                   // or, in a parallel region of the caller: run(begin, end) over tasks()
//
// Parameter, gradient and states of the same strides are runs of numbers in the same order, so that shapes do not
// matter. The work is cut into chunks of kChunk numbers, one or more short parameters each; how it is cut never changes
// a result.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../checks.h"
#include "isa.h"

namespace manualbp {

// Names the options of a parameter group, in their order in the argument `options`.
struct SgdOption {
  enum { lr, momentum, dampening, weight_decay, nesterov, maximize, count };
};
struct AdamOption {
  enum { lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, count };
};

// The shape and strides of a tensor, which must outlive it: each call of torch's C interface takes time.
struct Layout {
  explicit Layout(const Tensor& t) : dtype(dtype_of(t)) {
    const auto& all_sizes = t.sizes();
    const auto& all_strides = t.strides();
    dim = int64_t(all_sizes.size());
    sizes = all_sizes.data();
    strides = all_strides.data();
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
    return count;
  }
  bool same_shape(const Layout& other) const { return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes); }

  // Whether the elements of two tensors of the same shape are stored in the same order, in the same dtype.
  bool same_order(const Layout& other) const {
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] > 1 && strides[d] != other.strides[d]) return false;
    }
    return dtype == other.dtype;
  }

  // Whether the elements have addresses of their own and leave none out: some order of the dimensions is contiguous.
  bool is_dense() const {
    int64_t step = 1, d = dim;
    for (; d > 0 && (sizes[d - 1] == 1 || strides[d - 1] == step); --d) step *= sizes[d - 1];
    if (d == 0 || numel() == 0) return true;
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
    for (d = 0; d < dim; ++d) {
      if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
    }
    std::sort(dims.begin(), dims.end());
    step = 1;
    for (const auto& [stride, size] : dims) {
      if (stride != step) return false;
      step *= size;
    }
    return true;
  }

  int32_t dtype;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

class Updater {
 public:
  // op: the name for messages. rule: "sgd" or "adam". groups: the index of each parameter's group. options: those of
  // each group one after another, SgdOption or AdamOption, flags as 0 or 1.
  // states, lists one after another:
  //   SGD   momentum_buffer of each parameter whose group has a momentum; fresh: for each of these, whether it holds
  //         nothing yet
  //   Adam  exp_avg, exp_avg_sq and step of each parameter, then max_exp_avg_sq of those whose group has amsgrad; fresh
  //         is empty
  // The memory of the tensors must outlive the Updater, and must not move; where gradients are tensors, so must the
  // parameters themselves.
  Updater(const char* op, const std::string& rule, const std::vector<Tensor>& parameters,
          const std::vector<Tensor>& states, const std::vector<double>& options, const std::vector<int64_t>& groups,
          const std::vector<bool>& fresh)
      : op_(op), adam_(rule == "adam"), options_(options) {
    MBP_CHECK(adam_ || rule == "sgd", op, ": `rule` must be sgd or adam, got ", rule);
    columns_ = adam_ ? int64_t(AdamOption::count) : int64_t(SgdOption::count);
    MBP_CHECK(options.size() % size_t(columns_) == 0, op, ": `options` must have ", columns_,
              " items for each group, got ", options.size());
    MBP_CHECK(groups.size() == parameters.size(), op, ": `groups` must have one item per parameter (",
              parameters.size(), "), got ", groups.size());
    const int64_t group_count = int64_t(options.size()) / columns_, count = int64_t(parameters.size());
    int64_t some = 0;  // parameters with a momentum buffer, or max_exp_avg_sq
    for (const int64_t group : groups) {
      MBP_CHECK(group >= 0 && group < group_count, op, ": `groups` must be between 0 and ", group_count - 1, ", got ",
                group);
      some += has_extra(group);
    }
    MBP_CHECK(int64_t(states.size()) == (adam_ ? 3 * count : 0) + some, op, ": `states` must have ",
              (adam_ ? 3 * count : 0) + some, " items, got ", states.size());
    MBP_CHECK(int64_t(fresh.size()) == (adam_ ? 0 : some), op, ": `fresh` must have ", adam_ ? 0 : some, " items, got ",
              fresh.size());
    items_.reserve(parameters.size());
    layouts_.reserve(parameters.size());
    scalars_.resize(parameters.size());
    int64_t extra = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Tensor& parameter = parameters[size_t(i)];
      const Layout& layout = layouts_.emplace_back(parameter);
      Item item{};
      item.group = groups[size_t(i)];
      item.size = layout.numel();
      fits_ = set_kernel(item, layout.dtype) && layout.is_dense() && fits_;
      item.update.parameter = memory(parameter, item.size, {"parameters", i});
      const auto state = [&](int64_t index) { return state_memory(states[size_t(index)], i, item.size, index); };
      if (adam_) {
        item.update.first = state(i);
        item.update.second = state(count + i);
        if (has_extra(item.group)) item.update.largest = state(3 * count + extra++);
        set_counter(item, states[size_t(2 * count + i)], {"states", 2 * count + i});
      } else if (has_extra(item.group)) {
        item.fresh = fresh[size_t(extra)];
        item.update.first = state(extra++);
      }
      total_ += item.size;
      items_.push_back(item);
    }
    if (!fits_) return;
    cut();
    apart_ = total_ < parallel() || are_apart();
  }

  // Whether the dtypes and layouts are those that the kernels take, and the counters and betas of Adam ordinary (else
  // Python would divide by zero, which is an error there). If not, only torch's own step may run.
  bool fits() const {
    return fits_ && (!adam_ || std::all_of(items_.begin(), items_.end(), [&](const Item& item) {
             const double steps = item.step32 ? double(*item.step32) : *item.step64;
             const double* o = options(item.group);
             return steps > -1 && o[AdamOption::beta1] >= 0 && o[AdamOption::beta1] < 1 && o[AdamOption::beta2] >= 0 &&
                    o[AdamOption::beta2] < 1;
           }));
  }

  // What clip_grad_norm_ multiplies gradients by; 1: nothing.
  void set_gradient_scale(double scale) { gradient_scale_ = scale; }

  // The gradient of parameter i, in its dtype and strides.
  void set_gradient(int64_t i, const void* gradient) { items_[size_t(i)].update.gradient = gradient; }

  // The same of a tensor; false if its dtype or strides are others, or if it is the parameter itself, which changes.
  bool set_gradient(int64_t i, const Tensor& gradient) {
    const Layout layout(gradient);
    const Item& item = items_[size_t(i)];
    check_shape(layout, gradient, {"gradients", i}, i);
    const void* data = gradient.const_data_ptr();
    check_memory(data, item.size, {"gradients", i});
    set_gradient(i, data);
    return layout.same_order(layouts_[size_t(i)]) && (data != item.update.parameter || item.size == 0);
  }

  // Adds 1 to the counters and computes the scalars of the step: once for parameters in a row of the same group and
  // count.
  void next_step() {
    double last_step = 0;
    for (size_t i = 0; i < items_.size(); ++i) {
      Item& item = items_[i];
      item.update.fresh = item.fresh;
      item.fresh = false;
      const double step = item.step32 ? double(*item.step32 += 1.0f) : item.step64 ? * item.step64 += 1.0 : 0.0;
      if (i > 0 && step == last_step && item.group == items_[i - 1].group) {
        item.scalars = items_[i - 1].scalars;
      } else {
        item.scalars = i;
        scalars_[i] = in_both_types(adam_ ? adam_scalars(item.group, step) : sgd_scalars(item.group));
        last_step = step;
      }
    }
  }

  // Updates all parameters, on torch's threads if that is worthwhile.
  void run() const {
    if (total_ < parallel() || !apart_) return run(0, tasks());
    torch::stable::parallel_for(0, tasks(), 1, [this](int64_t begin, int64_t end) { run(begin, end); });
  }

  // Updates a part of them: tasks begin ... end - 1.
  int64_t tasks() const { return int64_t(chunks_.size()) - 1; }
  void run(int64_t begin, int64_t end) const {
    Position at = chunks_[size_t(begin)];
    const Position stop = chunks_[size_t(end)];
    for (; at.item < stop.item; ++at.item, at.number = 0) update(items_[at.item], at.number, items_[at.item].size);
    if (at.number < stop.number) update(items_[at.item], at.number, stop.number);
  }

 private:
  static constexpr int64_t kChunk = 1 << 12;

  struct Item {
    Update update;
    UpdateKernel kernel;
    size_t scalars;  // index
    int64_t size, bytes, group;  // bytes of one number
    float* step32;  // the counter, float or double
    double* step64;
    bool fresh;  // in the next step
  };
  struct Position {
    size_t item;
    int64_t number;
  };

  // The numbers from which on a second thread is worthwhile: 16 us of work on one (Zen 3), since to start a parallel
  // region takes 2 to 5 us.
  int64_t parallel() const { return adam_ ? 1 << 15 : 1 << 17; }

  const double* options(int64_t group) const { return options_.data() + group * columns_; }

  // Whether the parameters of a group have a momentum buffer, or max_exp_avg_sq.
  bool has_extra(int64_t group) const {
    return options(group)[adam_ ? int(AdamOption::amsgrad) : int(SgdOption::momentum)] != 0;
  }

  void check_shape(const Layout& layout, const Tensor& t, Name name, int64_t parameter) const {
    const Layout& wanted = layouts_[size_t(parameter)];
    MBP_CHECK(layout.same_shape(wanted), op_, ": `", name, "` must have the shape of `", Name{"parameters", parameter},
              "` ", shape_text(std::vector<int64_t>(wanted.sizes, wanted.sizes + wanted.dim)), ", got ", shape_of(t));
  }
  void check_memory(const void* data, int64_t size, Name name) const {
    MBP_CHECK(data || size == 0, op_, ": `", name, "` has no memory: its storage was freed");
  }
  void* memory(const Tensor& t, int64_t size, Name name) const {
    void* data = t.mutable_data_ptr();
    check_memory(data, size, name);
    return data;
  }
  void* state_memory(const Tensor& t, int64_t parameter, int64_t size, int64_t index) {
    const Layout layout(t);
    check_shape(layout, t, {"states", index}, parameter);
    fits_ = layout.same_order(layouts_[size_t(parameter)]) && fits_;
    return memory(t, size, {"states", index});
  }

  static bool set_kernel(Item& item, int32_t dtype) {
    item.bytes = item_size(dtype);
    item.kernel = dtype == aoti_torch_dtype_float32()    ? kernels<float>().update
                  : dtype == aoti_torch_dtype_float64()  ? kernels<double>().update
                  : dtype == aoti_torch_dtype_bfloat16() ? kernels<bfloat16>().update
                  : dtype == aoti_torch_dtype_float16()  ? kernels<float16>().update
                                                         : nullptr;
    return item.kernel;
  }

  void set_counter(Item& item, const Tensor& step, Name name) {
    MBP_CHECK(step.numel() == 1, op_, ": `", name, "` must be a single number, got ", shape_of(step));
    void* data = memory(step, 1, name);
    if (dtype_of(step) == aoti_torch_dtype_float32()) {
      item.step32 = static_cast<float*>(data);
    } else if (dtype_of(step) == aoti_torch_dtype_float64()) {
      item.step64 = static_cast<double*>(data);
    } else {
      fits_ = false;
    }
  }

  UpdateScalars<double> sgd_scalars(int64_t group) const {
    const double* o = options(group);
    UpdateScalars<double> s{};
    s.gradient_scale = gradient_scale_;
    s.step_size = o[SgdOption::lr];
    s.momentum = o[SgdOption::momentum];
    s.gain = 1 - o[SgdOption::dampening];
    s.weight_decay = o[SgdOption::weight_decay];
    s.nesterov = o[SgdOption::nesterov] != 0;
    s.maximize = o[SgdOption::maximize] != 0;
    return s;
  }

  // As Python computes them: `**` is pow, also for the square root.
  UpdateScalars<double> adam_scalars(int64_t group, double step) const {
    const double* o = options(group);
    UpdateScalars<double> s{};
    s.gradient_scale = gradient_scale_;
    s.step_size = o[AdamOption::lr] / (1 - std::pow(o[AdamOption::beta1], step));
    s.weight1 = 1 - o[AdamOption::beta1];
    s.beta2 = o[AdamOption::beta2];
    s.weight2 = 1 - o[AdamOption::beta2];
    s.correction2 = std::pow(1 - std::pow(o[AdamOption::beta2], step), 0.5);
    s.eps = o[AdamOption::eps];
    if (o[AdamOption::decoupled] != 0) {
      s.shrink = 1 - o[AdamOption::lr] * o[AdamOption::weight_decay];
    } else {
      s.weight_decay = o[AdamOption::weight_decay];
    }
    s.maximize = o[AdamOption::maximize] != 0;
    return s;
  }

  // Cuts all numbers, one parameter after another, into chunks; chunks_ holds where each begins, and the end.
  void cut() {
    chunks_.push_back({0, 0});
    int64_t filled = 0;
    for (size_t i = 0; i < items_.size(); ++i) {
      for (int64_t number = 0; number < items_[i].size;) {
        const int64_t taken = std::min(kChunk - filled, items_[i].size - number);
        number += taken;
        filled += taken;
        if (filled < kChunk) continue;
        chunks_.push_back({i, number});
        filled = 0;
      }
    }
    if (filled > 0) chunks_.push_back({items_.size(), 0});
  }

  // Whether no two parameters share memory. If they do (torch lets a group contain a parameter twice, and warns), they
  // are updated one after another, as torch does.
  bool are_apart() const {
    std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
    for (const Item& item : items_) {
      const auto begin = reinterpret_cast<uintptr_t>(item.update.parameter);
      ranges.emplace_back(begin, begin + uintptr_t(item.size * item.bytes));
    }
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) {
      if (ranges[i].first < ranges[i - 1].second) return false;
    }
    return true;
  }

  void update(const Item& item, int64_t begin, int64_t end) const {
    if (begin < end) item.kernel(item.update, scalars_[item.scalars], begin, end);
  }

  const char* op_;
  bool adam_, fits_ = true, apart_ = true;
  int64_t columns_, total_ = 0;
  double gradient_scale_ = 1;
  std::vector<double> options_;
  std::vector<Item> items_;
  std::vector<Layout> layouts_;  // of the parameters
  std::vector<AllUpdateScalars> scalars_;
  std::vector<Position> chunks_;
};

}  // namespace manualbp
