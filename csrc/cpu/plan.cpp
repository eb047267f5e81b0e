// The op `plan`: how a Network would cut a batch, and what its passes would allocate (plan.h).

#include "network.h"
#include "ops.h"

namespace manualbp {

namespace {

template <typename T>
std::vector<int64_t> report(int64_t batch, const std::vector<int64_t>& widths, int64_t threads,
                            const std::vector<bool>& needs, bool store, int64_t recomputed) {
  const size_t count = widths.size() - 1;
  std::vector<Layer<T>> layers(count);
  for (size_t k = 0; k < count; ++k) {
    layers[k].omega = Matrix<const T>::contiguous(nullptr, widths[k + 1], widths[k]);
  }
  Plan<T> plan = plan_of(batch, layers, threads);
  for (size_t k = 0; k < count; ++k) {
    plan.layers[k].weight_gradient = needs[1 + k];
    plan.layers[k].bias_gradient = needs[1 + count + k];
  }
  const ForwardPlan forward = plan.forward(store);
  BackwardPlan backward = plan.backward(recomputed, needs[0]);
  plan.divide_into_waves(backward);
  return {int64_t(plan.way),   forward.rows,        backward.rows,       backward.chunk_rows,
          backward.slice_rows, plan.bytes(forward), plan.bytes(backward)};
}

}  // namespace

std::vector<int64_t> plan(int64_t batch, std::vector<int64_t> widths, int64_t item_size, int64_t threads,
                          std::vector<bool> needs, bool store, int64_t recomputed) {
  const char* op = "plan";
  const int64_t layers = int64_t(widths.size()) - 1;
  MBP_CHECK(layers >= 1, op, ": `widths` must have at least 2 items, got ", widths.size());
  MBP_CHECK(batch >= 0 && *std::min_element(widths.begin(), widths.end()) >= 0, op,
            ": `batch` and `widths` must not be negative, got ", batch, " and ", shape_text(widths));
  MBP_CHECK(threads >= 1, op, ": `threads` must be positive, got ", threads);
  MBP_CHECK(int64_t(needs.size()) == 1 + 2 * layers, op, ": `needs` must have 1 + 2 x ", layers, " items, got ",
            needs.size());
  MBP_CHECK(recomputed >= 0 && recomputed <= layers, op, ": `recomputed` must be between 0 and ", layers, ", got ",
            recomputed);
  if (item_size == 8) return report<double>(batch, widths, threads, needs, store, recomputed);
  if (item_size == 4) return report<float>(batch, widths, threads, needs, store, recomputed);
  MBP_CHECK(item_size == 2, op, ": `item_size` must be 8, 4 or 2, got ", item_size);
  return report<float16>(batch, widths, threads, needs, store, recomputed);
}

}  // namespace manualbp
