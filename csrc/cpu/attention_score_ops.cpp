// Scores by themselves on the CPU, with or without a term of features: work sharing, registration. The arithmetic is in
// attention_kernels.cpp and attention_location_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_location_kernels.h"
#include "attention_products.h"

namespace seqattn {
namespace {

#define SEQATTN_COUNT(Score) +1
constexpr int64_t kScoreCount = 0 SEQATTN_SCORES(SEQATTN_COUNT);
#undef SEQATTN_COUNT

void check_kind(int64_t kind) {
  if (kind < 0 || kind >= kScoreCount) fail("kind: expected a number of the registry of scores, got ", kind);
}

// Features and their weights, checked against the problem they belong to.
template <class T>
struct Location {
  LocationArgs<T> args{};
  Tensor features, weight;
  bool per_query;

  Location(const AttentionArgs<T>& score, const Tensor& features_, const Tensor& weight_)
      : features(dense(features_)), weight(dense(weight_)), per_query(features_.dim() == 4) {
    check_tensor("feature_weight", weight, kScalarType<T>, {-1, score.A});
    const int64_t F = weight.size(0);
    if (per_query) {
      check_tensor("features", features, kScalarType<T>, {score.B, score.T_, score.S, F});
    } else {
      check_tensor("features", features, kScalarType<T>, {score.B, score.S, F});
    }
    args.B = score.B;
    args.T_ = score.T_;
    args.S = score.S;
    args.A = score.A;
    args.F = F;
    args.heads = score.heads;
    args.query = score.query;
    args.keys = score.keys;
    args.features = data_of<T>(features);
    args.per_query = per_query;
    args.weight = data_of<T>(weight);
    args.weight_stride = score.A;
    args.lengths = score.lengths;
  }

  // Keys with the term of query `step` added, [B, S, A].
  void sum_keys(int64_t step, const Tensor& into, int threads) {
    args.sums = data_of<T>(into);
    args.step = step;
    Queue queue(args.B * args.row_blocks(), threads);
    run_gang(threads, [&](Gang&) {
      queue.drain([&](int64_t begin, int64_t end) { location_kernels<T>().sums(args, begin, end); });
    });
  }
};

// Scores of plain keys: pack them, then the kernel of additive attention, into rows padded to whole blocks.
template <class T>
void plain_scores(Problem<T>& problem, T* out) {
  AttentionArgs<T>& args = problem.args;
  problem.group_v();
  MaybeTensor ready;
  if (args.tiles() > 1) {
    ready = problem.empty({args.B, args.blocks(), packed_rows(args.A), kKeyBlock});
    pack_all(args, data_of<T>(*ready));
  }
  args.packed = ready ? data_of<T>(*ready) : nullptr;
  args.row = round_up(args.S, kKeyBlock);
  const bool direct = args.row == args.S;
  Scratch<T> padded(direct ? 0 : args.B * args.T_ * args.row);
  args.rows = direct ? out : padded.get();
  const int64_t items = args.B * args.tiles();
  const int threads = problem.threads(args.B * args.T_ * args.S * args.A);
  args.key_chunk = std::max<int64_t>(1, args.blocks() * items / (4 * threads));
  const int64_t each = round_up(forward_scratch(args), 64 / int64_t(sizeof(T)));
  Scratch<T> scratch(each * threads);
  Queue scores(items * ceil_div(args.blocks(), args.key_chunk), threads), rows(args.B * args.T_, threads);
  run_gang(threads, [&](Gang& gang) {
    scores.drain([&](int64_t begin, int64_t end) {
      attention_kernels<T>().scores(args, begin, end, scratch.get() + gang.rank * each);
    });
    gang.barrier();
    rows.drain([&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t length = args.length(row / args.T_);
        if (!direct) std::copy_n(args.rows + row * args.row, length, out + row * args.S);
        std::fill(out + row * args.S + length, out + (row + 1) * args.S, T(0));
      }
    });
  });
}

template <class T>
Tensor fwd(const Tensor& query, const Tensor& keys, const MaybeTensor& v, const MaybeTensor& features,
           const MaybeTensor& feature_weight, const MaybeTensor& lengths) {
  Problem<T> problem(query, keys, std::nullopt, v, lengths, std::nullopt);
  AttentionArgs<T>& args = problem.args;
  Tensor out = problem.empty({args.B, args.T_, args.S});
  if (!out.numel()) return out;
  if (!features) {
    plain_scores(problem, data_of<T>(out));
    return out;
  }
  Location<T> location(args, *features, *feature_weight);
  const int threads = problem.threads(args.B * args.T_ * args.S * args.A * 8);
  if (!location.per_query && args.T_ > 1) {
    // The term belongs to the keys.
    const Tensor sums = problem.empty({args.B, args.S, args.A});
    location.sum_keys(0, sums, threads);
    args.keys = data_of<T>(sums);
    plain_scores(problem, data_of<T>(out));
    return out;
  }
  problem.read_v(args.A);
  location.args.v = args.v;
  location.args.scores = data_of<T>(out);
  Queue queue(args.B * args.T_ * location.args.row_blocks(), threads);
  run_gang(threads, [&](Gang&) {
    queue.drain([&](int64_t begin, int64_t end) { location_kernels<T>().scores(location.args, begin, end, nullptr); });
  });
  return out;
}

template <class T>
void add_to(const Tensor& sum, const Tensor& term) {
  T* to = data_of<T>(sum);
  const T* from = data_of<T>(term);
  for (int64_t i = 0, n = sum.numel(); i < n; ++i) to[i] += from[i];
}

// Gradients of the features and their weights, from that of the sums.
template <class T>
void feature_gradients(const Location<T>& location, const Tensor& features, const Tensor& d_sums, Tensor* d_features,
                       Tensor* d_weight) {
  const auto& args = location.args;
  const int64_t rows = args.B * args.S;
  const Tensor by_row = torch::stable::reshape(d_sums, {1, rows, args.A}),
               flat = torch::stable::reshape(features, {1, rows, args.F}),
               weight = torch::stable::unsqueeze(location.weight, 0);
  *d_features = torch::stable::reshape(product(by_row, torch::stable::transpose(weight, 1, 2)), {rows, args.F});
  // A feature of a key that is hidden may be anything.
  const Tensor by_column = contained_product<T>(torch::stable::transpose(by_row, 1, 2), flat);
  *d_weight = torch::stable::contiguous(torch::stable::transpose(torch::stable::squeeze(by_column, 0), 0, 1));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients bwd(const Tensor& d_scores_, const Tensor& query, const Tensor& keys, const MaybeTensor& v,
              const MaybeTensor& features, const MaybeTensor& feature_weight, const MaybeTensor& lengths) {
  Problem<T> problem(query, keys, std::nullopt, v, lengths, std::nullopt);
  AttentionArgs<T>& args = problem.args;
  const int64_t B = args.B, T_ = args.T_, S = args.S, A = args.A;
  const Tensor d_scores = dense(d_scores_);
  check_tensor("d_scores", d_scores, kScalarType<T>, {B, T_, S});
  args.d_scores = data_of<T>(d_scores);
  Tensor d_query = problem.empty({B, T_, A}), d_keys = problem.empty({B, S, A}), d_v;
  Tensor d_features = problem.empty({0}), d_weight = problem.empty({0});
  const auto nothing_first = [](Gang&, Queue&) {};
  args.d_query = data_of<T>(d_query);
  args.d_keys = data_of<T>(d_keys);
  if (!features) {
    d_v = backward(problem, nothing_first);
  } else {
    Location<T> location(args, *features, *feature_weight);
    const int threads = problem.threads(B * S * A * 8);
    const Tensor sums = problem.empty({B, S, A});
    args.keys = data_of<T>(sums);
    if (!location.per_query || T_ == 1) {
      location.sum_keys(0, sums, threads);
      d_v = backward(problem, nothing_first);
      feature_gradients(location, location.features, d_keys, &d_features, &d_weight);
      d_features =
          torch::stable::reshape(d_features, location.per_query ? std::vector<int64_t>{B, 1, S, location.args.F}
                                                                : std::vector<int64_t>{B, S, location.args.F});
    } else {
      // A query at a time, so that no more than one term per key is ever there.
      const int64_t F = location.args.F;
      d_features = problem.empty({B, T_, S, F});
      const Tensor step_query = problem.empty({B, 1, A}), d_step = problem.empty({B, 1, A}),
                   d_sums = problem.empty({B, S, A}), step_features = problem.empty({B, S, F}),
                   d_step_scores = problem.empty({B, 1, S});
      std::fill_n(data_of<T>(d_keys), B * S * A, T(0));
      for (int64_t t = 0; t < T_; ++t) {
        location.sum_keys(t, sums, threads);
        for (int64_t b = 0; b < B; ++b) {
          const int64_t row = b * T_ + t;
          std::copy_n(data_of<T>(problem.query) + row * A, A, data_of<T>(step_query) + b * A);
          std::copy_n(data_of<T>(d_scores) + row * S, S, data_of<T>(d_step_scores) + b * S);
          std::copy_n(data_of<T>(location.features) + row * S * F, S * F, data_of<T>(step_features) + b * S * F);
        }
        Problem<T> step(step_query, sums, std::nullopt, v, lengths, std::nullopt);
        step.args.d_scores = data_of<T>(d_step_scores);
        step.args.d_query = data_of<T>(d_step);
        step.args.d_keys = data_of<T>(d_sums);
        const Tensor d_v_step = backward(step, nothing_first);
        Tensor d_features_step, d_weight_step;
        feature_gradients(location, step_features, d_sums, &d_features_step, &d_weight_step);
        add_to<T>(d_keys, d_sums);
        for (int64_t b = 0; b < B; ++b) {
          const int64_t row = b * T_ + t;
          std::copy_n(data_of<T>(d_step) + b * A, A, data_of<T>(d_query) + row * A);
          std::copy_n(data_of<T>(d_features_step) + b * S * F, S * F, data_of<T>(d_features) + row * S * F);
        }
        if (t == 0) {
          d_v = d_v_step;
          d_weight = d_weight_step;
        } else {
          add_to<T>(d_v, d_v_step);
          add_to<T>(d_weight, d_weight_step);
        }
      }
      if (!T_) {
        d_v = torch::stable::new_zeros(query, problem.v ? std::vector<int64_t>{A} : std::vector<int64_t>{0});
        d_weight = torch::stable::new_zeros(query, {F, A});
      }
    }
  }
  if (!v) d_v = problem.empty({0});
  return {d_query, d_keys, d_v, d_features, d_weight};
}

template <class T>
Tensor context(const Tensor& weights_, const Tensor& values_) {
  const Tensor weights = dense(weights_), values = dense(values_);
  AttentionArgs<T> args{};
  args.B = weights.size(0);
  args.T_ = weights.size(1);
  args.S = weights.size(2);
  args.D = values.size(2);
  args.values = data_of<T>(values);
  args.rows = data_of<T>(weights);
  args.row = args.S;
  args.by_weight = true;
  Tensor out = allocate(values, {args.B, args.T_, args.D});
  args.context = data_of<T>(out);
  if (!out.numel()) return out;
  const int64_t useful = args.B * args.T_ * args.S * args.D / kElementsPerThread + 1;
  const int threads = int(std::min<int64_t>(useful, torch::stable::get_num_threads()));
  const int64_t each = round_up(forward_scratch(args), 64 / int64_t(sizeof(T)));
  Scratch<T> scratch(each * threads);
  const int64_t tiles = args.B * args.tiles();
  args.context_chunk = tiles < 4 * threads ? kContextChunk : args.D;
  Queue queue(tiles * ceil_div(args.D, args.context_chunk), threads);
  run_gang(threads, [&](Gang& gang) {
    queue.drain([&](int64_t begin, int64_t end) {
      attention_kernels<T>().context(args, begin, end, scratch.get() + gang.rank * each);
    });
  });
  return out;
}

Tensor context_fwd_cpu(Tensor weights, Tensor values) {
  const ScalarType type = weights.scalar_type();
  if (weights.dim() != 3) fail("weights: expected [B, T, S], got ", shape_of(weights));
  if (values.dim() != 3 || values.size(0) != weights.size(0) || values.size(1) != weights.size(2)) {
    fail("values: expected [B, S, D] with B=", weights.size(0), ", S=", weights.size(2), ", got ", shape_of(values));
  }
  if (values.scalar_type() != type || !values.is_cpu()) {
    fail("values: expected a CPU tensor of the dtype of weights, got another one");
  }
  switch (type) {
    case ScalarType::Half:
      return contained_product<torch::headeronly::Half>(weights, values);
    case ScalarType::BFloat16:
      return contained_product<torch::headeronly::BFloat16>(weights, values);
    case ScalarType::Float:
    case ScalarType::Double:
      return by_type(weights, [&](auto zero) {
        using T = decltype(zero);
        // The kernel reads only what has weight, and weights row by row.
        return weights.is_contiguous() ? context<T>(weights, values) : contained_product<T>(weights, values);
      });
    default:
      fail("weights: expected float32, float64, bfloat16 or float16");
  }
}

Tensor scores_fwd_cpu(int64_t kind, Tensor query, Tensor keys, MaybeTensor v, MaybeTensor features,
                      MaybeTensor feature_weight, MaybeTensor lengths) {
  check_kind(kind);
  if (query.dim() != 3) fail("query: expected [B, T, A], got ", shape_of(query));
  if (features.has_value() != feature_weight.has_value())
    fail("features: expected them with feature_weight, or neither");
  return by_type(query,
                 [&](auto zero) { return fwd<decltype(zero)>(query, keys, v, features, feature_weight, lengths); });
}

Gradients scores_bwd_cpu(int64_t kind, Tensor d_scores, Tensor query, Tensor keys, MaybeTensor v, MaybeTensor features,
                         MaybeTensor feature_weight, MaybeTensor lengths) {
  check_kind(kind);
  if (query.dim() != 3) fail("query: expected [B, T, A], got ", shape_of(query));
  if (features.has_value() != feature_weight.has_value())
    fail("features: expected them with feature_weight, or neither");
  return by_type(query, [&](auto zero) {
    return bwd<decltype(zero)>(d_scores, query, keys, v, features, feature_weight, lengths);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("scores_fwd", TORCH_BOX(&scores_fwd_cpu));
  m.impl("scores_bwd", TORCH_BOX(&scores_bwd_cpu));
  m.impl("context_fwd", TORCH_BOX(&context_fwd_cpu));
}

}  // namespace seqattn
