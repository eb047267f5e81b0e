// The op `update` on the CPU: one step of an optimizer, for all parameters (Updater in update.h).

#include "ops.h"
#include "update.h"

namespace manualbp {

bool update(std::vector<Tensor> parameters, std::vector<Tensor> gradients, StringHandle rule,
            std::vector<Tensor> states, std::vector<double> options, std::vector<int64_t> groups,
            std::vector<bool> fresh) {
  const char* op = "update";
  Updater updater(op, take_text(rule), parameters, states, options, groups, fresh);
  MBP_CHECK(gradients.size() == parameters.size(), op, ": `gradients` must have one item per parameter (",
            parameters.size(), "), got ", gradients.size());
  bool fits = updater.fits();
  for (size_t i = 0; i < gradients.size(); ++i) {
    fits = updater.set_gradient(int64_t(i), gradients[i]) && fits;
  }
  if (!fits) return false;
  updater.next_step();
  updater.run();
  return true;
}

bool update_elsewhere(std::vector<Tensor>, std::vector<Tensor>, StringHandle rule, std::vector<Tensor>,
                      std::vector<double>, std::vector<int64_t>, std::vector<bool>) {
  take_text(rule);
  return false;
}

}  // namespace manualbp
