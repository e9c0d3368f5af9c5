// What launchers of attention over a linear layer share: checks, memory, the number of threads.
#pragma once

#include "attention_linear_args.h"
#include "attention_problem.h"
#include "workspace.h"

namespace seqattn {

// Multiply-adds a thread should have before another is called in.
inline constexpr int64_t kLinearPerThread = 1 << 20;

// Parts of one workspace, each on a cache line.
template <class T>
class Parts {
 public:
  // Returns where a part of n elements begins once `place` has told where the workspace lies.
  void add(T** part, int64_t n) {
    requests_.push_back({part, size_});
    size_ += round_up(n, 64 / int64_t(sizeof(T)));
  }
  void place() {
    T* memory = static_cast<T*>(workspace(size_t(size_) * sizeof(T)));
    for (const auto& [part, at] : requests_) *part = memory + at;
  }

 private:
  std::vector<std::pair<T**, int64_t>> requests_;
  int64_t size_ = 0;
};

// input [B, S, K], weight [N, K], bias [N].
template <class T>
struct LinearProblem {
  Tensor input, weight;
  MaybeTensor bias;
  LinearArgs<T> args{};

  LinearProblem(const Tensor& input_, const Tensor& weight_, const MaybeTensor& bias_)
      : input(dense(input_)), weight(dense(weight_)) {
    check_tensor("input", input, kScalarType<T>, {-1, -1, -1});
    args.B = input.size(0);
    args.S = input.size(1);
    args.K = input.size(2);
    check_tensor("weight", weight, kScalarType<T>, {-1, args.K});
    args.N = weight.size(0);
    if (bias_) {
      bias = dense(*bias_);
      check_tensor("bias", *bias, kScalarType<T>, {args.N});
      args.bias = data_of<T>(*bias);
    }
    args.input = data_of<T>(input);
    args.weight = data_of<T>(weight);
  }

  int threads(int products) const {
    // tanh and its like take as long as some dozens of multiply-adds.
    const int64_t useful = products * args.B * args.S * args.N * (args.K + 32) / kLinearPerThread + 1;
    return int(std::min<int64_t>(useful, torch::stable::get_num_threads()));
  }
  static int64_t panels(int64_t columns, int width) { return ceil_div(columns, int64_t(width)); }

  // The gradients to be made, d_input an empty tensor where it isn't wanted.
  Tensor d_input, d_weight, d_bias;
  void make_gradients(bool need_input, int64_t more_sums) {
    d_input = allocate(input, need_input ? std::vector<int64_t>{args.B, args.S, args.K} : std::vector<int64_t>{0});
    d_weight = allocate(input, {args.N, args.K});
    d_bias = allocate(input, {bias ? args.N : 0});
    args.d_input = need_input ? data_of<T>(d_input) : nullptr;
    args.d_weight = data_of<T>(d_weight);
    args.d_bias = bias ? data_of<T>(d_bias) : nullptr;
    args.groups = args.most_groups();
    args.part = round_up(args.N * args.input_width() + args.width() + more_sums, kLinearPad);
  }
};

}  // namespace seqattn
