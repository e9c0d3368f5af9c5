// What launches one step, for the operators (cell.cpp) and for calls past torch's dispatcher (cell_direct.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cell.h"

namespace seqattn {

// Which gradients backward makes, in the order of its results.
struct StepGradients {
  bool input, h, c, weights;
};

// Values that packed weights of these sizes hold.
int64_t step_packed_size(int64_t cell, const Sizes& sizes);

// The problem's sizes and inputs are checked and set; these make the results, as cell_fwd and cell_bwd list them, and
// scratch memory, and run the kernels.
template <class T>
std::vector<torch::stable::Tensor> launch_step(int64_t cell, StepProblem<T> p, bool save);
template <class T>
std::vector<torch::stable::Tensor> launch_step_backward(int64_t cell, StepProblem<T> p, StepGradients wanted);

extern template std::vector<torch::stable::Tensor> launch_step(int64_t, StepProblem<float>, bool);
extern template std::vector<torch::stable::Tensor> launch_step(int64_t, StepProblem<double>, bool);
extern template std::vector<torch::stable::Tensor> launch_step_backward(int64_t, StepProblem<float>, StepGradients);
extern template std::vector<torch::stable::Tensor> launch_step_backward(int64_t, StepProblem<double>, StepGradients);

}  // namespace seqattn
