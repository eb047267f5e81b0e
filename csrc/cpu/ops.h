// The CPU entries of the ops that ops.cpp registers, in linear_relu.cpp, mlp.cpp, mlp_autocast.cpp, mlp_double_backward.cpp,
// mlp_stacked.cpp, mlp_loss.cpp, flow.cpp, optimizer.cpp, train.cpp and plan.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace manualbp {

using torch::stable::Tensor;

Tensor linear_relu(Tensor input, Tensor weight, std::optional<Tensor> bias);

std::vector<Tensor> linear_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output,
                                         std::vector<bool> needs);

std::tuple<Tensor, Tensor> mlp(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                               bool final_relu, bool store);

std::vector<Tensor> mlp_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                 std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                 std::optional<Tensor> output, std::vector<bool> needs);

std::tuple<Tensor, Tensor> mlp_autocast(Tensor input, std::vector<Tensor> weights,
                                        std::vector<std::optional<Tensor>> biases, bool final_relu, bool store,
                                        std::optional<Tensor> kept, std::vector<double> scales,
                                        torch::headeronly::ScalarType to);

std::vector<Tensor> mlp_autocast_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                          std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                          std::optional<Tensor> output, std::vector<bool> needs,
                                          std::optional<Tensor> kept, std::vector<double> scales);

std::vector<Tensor> mlp_autocast_loss(Tensor input, Tensor target, std::vector<Tensor> weights,
                                      std::vector<std::optional<Tensor>> biases, StringHandle loss_name, bool mean,
                                      int64_t ignore_index, double label_smoothing, std::vector<bool> needs, bool flat,
                                      torch::headeronly::ScalarType to);

std::tuple<Tensor, Tensor> mlp_dropout(Tensor input, std::vector<Tensor> weights,
                                       std::vector<std::optional<Tensor>> biases, bool final_relu, bool store,
                                       std::optional<Tensor> kept, std::vector<double> scales);

std::vector<Tensor> mlp_dropout_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                         std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                         std::optional<Tensor> output, std::vector<bool> needs,
                                         std::optional<Tensor> kept, std::vector<double> scales);

std::vector<Tensor> mlp_stacked(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                                bool final_relu, bool store);

std::vector<Tensor> mlp_stacked_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                         std::vector<std::optional<Tensor>> biases, std::vector<Tensor> hidden,
                                         std::optional<Tensor> output, std::vector<bool> needs);

std::vector<Tensor> mlp_backward_store(Tensor grad_output, Tensor input, std::vector<Tensor> weights, Tensor hidden,
                                       std::optional<Tensor> output, std::vector<bool> needs,
                                       std::vector<double> scales);

std::vector<Tensor> mlp_backward_further(Tensor grad_output, Tensor grad_hidden, Tensor input,
                                         std::vector<Tensor> weights, Tensor hidden, std::optional<Tensor> output,
                                         std::vector<bool> needs, std::vector<double> scales);

std::vector<Tensor> mlp_double_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights, Tensor hidden,
                                        std::optional<Tensor> output, Tensor df, std::optional<Tensor> grad_dinput,
                                        std::vector<std::optional<Tensor>> grad_dweights,
                                        std::vector<std::optional<Tensor>> grad_dbiases, std::vector<bool> needs,
                                        std::vector<double> scales);

std::vector<Tensor> mlp_loss(Tensor input, Tensor target, std::vector<Tensor> weights,
                             std::vector<std::optional<Tensor>> biases, StringHandle loss_name, bool mean,
                             int64_t ignore_index, double label_smoothing, std::vector<bool> needs, bool flat);

Tensor flow_forward(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                    std::vector<bool> relus, Tensor f, Tensor h);

Tensor flow_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                     std::vector<std::optional<Tensor>> biases, std::vector<bool> relus, Tensor f, bool has_f,
                     Tensor df, Tensor copies);

Tensor flow_update(std::vector<Tensor> weights, Tensor copies);

bool update(std::vector<Tensor> parameters, std::vector<Tensor> gradients, StringHandle rule,
            std::vector<Tensor> states, std::vector<double> options, std::vector<int64_t> groups,
            std::vector<bool> fresh);

int64_t keep(std::vector<bool> biases, std::vector<bool> needs, StringHandle loss_name, bool mean, int64_t ignore_index,
             double label_smoothing, StringHandle rule, std::vector<Tensor> states, std::vector<double> options,
             std::vector<int64_t> groups, std::vector<bool> fresh,
             std::optional<torch::headeronly::ScalarType> autocast);

void release(int64_t handle);

std::optional<Tensor> train(int64_t handle, Tensor input, Tensor target, std::optional<Tensor> order,
                            std::optional<int64_t> batch_size, int64_t steps, std::vector<Tensor> parameters,
                            std::optional<std::vector<double>> other_options, std::optional<double> max_grad_norm,
                            double seconds);

// The same for tensors that are not dense tensors on the CPU: false, since the CPU's is the only one.
bool update_elsewhere(std::vector<Tensor> parameters, std::vector<Tensor> gradients, StringHandle rule,
                      std::vector<Tensor> states, std::vector<double> options, std::vector<int64_t> groups,
                      std::vector<bool> fresh);

std::vector<int64_t> plan(int64_t batch, std::vector<int64_t> widths, int64_t item_size, int64_t threads,
                          std::vector<bool> needs, bool store, int64_t recomputed);

}  // namespace manualbp
