// Additive attention on the CPU: work sharing, registration. The arithmetic is in attention_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_products.h"

namespace seqattn {
namespace {

template <class T>
Tensor pack(const Tensor& given) {
  const Tensor keys = dense(given);
  check_tensor("keys", keys, kScalarType<T>, {-1, -1, -1});
  AttentionArgs<T> args{};
  args.B = keys.size(0);
  args.S = keys.size(1);
  args.A = keys.size(2);
  args.keys = data_of<T>(keys);
  Tensor packed = allocate(keys, {args.B, args.blocks(), packed_rows(args.A), kKeyBlock});
  pack_all(args, data_of<T>(packed));
  return packed;
}

template <class T>
void forward(Problem<T>& problem) {
  AttentionArgs<T>& args = problem.args;
  const AttentionKernels<T>& kernel = attention_kernels<T>();
  const int64_t items = args.B * args.tiles();
  const int threads = problem.threads(args.B * args.T_ * args.S * (args.A + args.D));
  const int64_t each = round_up(forward_scratch(args), 64 / int64_t(sizeof(T)));
  Scratch<T> scratch(each * threads);
  if (threads > 1 && items < 4 * threads && items % threads) {
    // Too few tiles to share evenly: split each.
    args.row = round_up(args.S, kKeyBlock);
    Scratch<T> rows(args.B * args.T_ * args.row);
    args.rows = rows.get();
    args.context_chunk = kContextChunk;
    args.key_chunk = std::max<int64_t>(1, args.blocks() * items / (4 * threads));
    Queue scores(items * ceil_div(args.blocks(), args.key_chunk), threads), softmax(args.B * args.T_, threads),
        context(items * ceil_div(args.D, args.context_chunk), threads);
    run_gang(threads, [&](Gang& gang) {
      T* own = scratch.get() + gang.rank * each;
      scores.drain([&](int64_t begin, int64_t end) { kernel.scores(args, begin, end, own); });
      gang.barrier();
      softmax.drain([&](int64_t begin, int64_t end) { kernel.softmax(args, begin, end); });
      gang.barrier();
      context.drain([&](int64_t begin, int64_t end) { kernel.context(args, begin, end, own); });
    });
    return;
  }
  Queue tiles(items, threads);
  run_gang(threads, [&](Gang& gang) {
    T* own = scratch.get() + gang.rank * each;
    tiles.drain([&](int64_t begin, int64_t end) { kernel.forward(args, begin, end, own); });
  });
}

template <class T>
std::tuple<Tensor, Tensor> fwd(const Tensor& query, const Tensor& keys, const MaybeTensor& packed, const Tensor& values,
                               const Tensor& v, const MaybeTensor& lengths, const MaybeTensor& mask,
                               bool need_weights) {
  Problem<T> problem(query, keys, values, v, lengths, mask);
  AttentionArgs<T>& args = problem.args;
  problem.group_v();
  MaybeTensor ready = packed;
  if (packed) {
    check_tensor("packed", *packed, kScalarType<T>, {args.B, args.blocks(), packed_rows(args.A), kKeyBlock});
    if (!packed->is_contiguous()) fail("packed: expected a contiguous tensor, as prepare_keys returns it");
  } else if (args.tiles() > 1) {
    ready = problem.empty({args.B, args.blocks(), packed_rows(args.A), kKeyBlock});
    pack_all(args, data_of<T>(*ready));
  }
  args.packed = ready ? data_of<T>(*ready) : nullptr;
  Tensor context = problem.empty(problem.per_query(args.D));
  Tensor weights = problem.empty(need_weights ? problem.per_query(args.S) : std::vector<int64_t>{0});
  args.context = data_of<T>(context);
  args.weights = need_weights ? data_of<T>(weights) : nullptr;
  if (context.numel() || (need_weights && weights.numel())) forward(problem);
  return {context, weights};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& query, const Tensor& keys, const Tensor& values,
                                               const Tensor& v, const Tensor& weights_, const MaybeTensor& d_context,
                                               const MaybeTensor& d_weights, const MaybeTensor& lengths,
                                               const MaybeTensor& mask, bool need_values) {
  Problem<T> problem(query, keys, values, v, lengths, mask);
  AttentionArgs<T>& args = problem.args;
  const AttentionKernels<T>& kernel = attention_kernels<T>();
  const int64_t B = args.B, T_ = args.T_, S = args.S, A = args.A;
  const Tensor weights = dense(weights_);
  check_tensor("weights", weights, kScalarType<T>, problem.per_query(S));
  args.weights = data_of<T>(weights);

  Tensor d_values = problem.empty({0}), d_scores, from_weights;
  if (d_context) {
    check_tensor("d_context", dense(*d_context), kScalarType<T>, problem.per_query(args.D));
    const Tensor dc = problem.three(*d_context);
    d_scores = product(dc, torch::stable::transpose(*problem.values, 1, 2));
    if (need_values) {
      const Tensor by_key = torch::stable::transpose(problem.three(weights), 1, 2);
      d_values = problem.masks ? contained_product<T>(by_key, dc) : product(by_key, dc);
    }
  } else {
    d_scores = problem.empty({B, T_, S});
    if (need_values) d_values = torch::stable::new_zeros(query, {B, S, args.D});
  }
  args.d_scores = data_of<T>(d_scores);
  args.d_weights = args.d_scores;
  if (d_weights) {
    from_weights = dense(*d_weights);
    check_tensor("d_weights", from_weights, kScalarType<T>, problem.per_query(S));
    (d_context ? args.d_weights_too : args.d_weights) = data_of<T>(from_weights);
  } else if (!d_context) {
    fail("expected a gradient of the context, of the weights, or both");
  }

  Tensor d_query = problem.empty(problem.per_query(A)), d_keys = problem.empty({B, S, A});
  args.d_query = data_of<T>(d_query);
  args.d_keys = data_of<T>(d_keys);
  const bool masked = args.mask_bool || args.mask_add;
  std::vector<uint8_t> used(masked ? size_t(B * S) : 0);
  args.used = masked ? used.data() : nullptr;
  const Tensor d_v = backward(problem, [&](Gang& gang, Queue& rows) {
    rows.drain([&](int64_t begin, int64_t end) { kernel.d_scores(args, begin, end); });
    gang.barrier();
  });
  return {d_query, d_keys, d_values, d_v};
}

Tensor additive_pack_cpu(Tensor keys) {
  return by_type(keys, [&](auto zero) { return pack<decltype(zero)>(keys); });
}

std::tuple<Tensor, Tensor> additive_fwd_cpu(Tensor query, Tensor keys, MaybeTensor packed, Tensor values, Tensor v,
                                            MaybeTensor lengths, MaybeTensor mask, bool need_weights) {
  return by_type(query, [&](auto zero) {
    return fwd<decltype(zero)>(query, keys, packed, values, v, lengths, mask, need_weights);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_bwd_cpu(Tensor query, Tensor keys, Tensor values, Tensor v,
                                                            Tensor weights, MaybeTensor d_context,
                                                            MaybeTensor d_weights, MaybeTensor lengths,
                                                            MaybeTensor mask, bool need_values) {
  return by_type(query, [&](auto zero) {
    return bwd<decltype(zero)>(query, keys, values, v, weights, d_context, d_weights, lengths, mask, need_values);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("additive_pack", TORCH_BOX(&additive_pack_cpu));
  m.impl("additive_fwd", TORCH_BOX(&additive_fwd_cpu));
  m.impl("additive_bwd", TORCH_BOX(&additive_bwd_cpu));
}

}  // namespace seqattn
