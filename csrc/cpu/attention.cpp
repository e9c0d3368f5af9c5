// Additive attention on the CPU: checks, work sharing, registration. The arithmetic is in attention_kernels.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attention_kernels.h"
#include "checks.h"
#include "gang.h"
#include "scores/registry.h"

namespace seqattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Score elements a thread should have before another is called in (some microseconds of work).
constexpr int64_t kElementsPerThread = 1 << 17;

template <class T>
constexpr ScalarType kScalarType = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <class T>
const AttentionKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return SEQATTN_KERNELS(attention_kernels_f32);
  } else {
    return SEQATTN_KERNELS(attention_kernels_f64);
  }
}

// Uninitialised memory on a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : memory_(static_cast<T*>(::operator new(size_t(std::max<int64_t>(n, 1)) * sizeof(T), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return memory_; }

 private:
  T* memory_;
};

// Hands out items to whichever thread is free, some at a time.
class Queue {
 public:
  Queue(int64_t items, int threads) : items_(items), grain_(std::max<int64_t>(1, items / (8 * threads))) {}
  template <class F>
  void drain(F&& work) {
    for (int64_t i; (i = next_.fetch_add(grain_, std::memory_order_relaxed)) < items_;) {
      work(i, std::min(i + grain_, items_));
    }
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  int64_t items_, grain_;
};

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// What both directions share: shapes, dense copies of the inputs where they are not dense, the mask.
template <class T>
struct Problem {
  AttentionArgs<T> args{};
  bool single_query;  // query [B, A]: results have no T dimension
  Tensor query, keys, values, v;
  MaybeTensor mask;
  std::vector<int64_t> lengths;
  std::vector<T> v_padded, v_groups;

  Problem(const Tensor& query_, const Tensor& keys_, const Tensor& values_, const Tensor& v_,
          const MaybeTensor& lengths_, const MaybeTensor& mask_)
      : query(dense(query_)), keys(dense(keys_)), values(dense(values_)), v(dense(v_)) {
    const ScalarType type = kScalarType<T>;
    single_query = query.dim() == 2;
    if (!single_query && query.dim() != 3) fail("query: expected [B, A] or [B, T, A], got ", shape_of(query));
    const int64_t B = query.size(0), A = query.size(-1), T_ = single_query ? 1 : query.size(1);
    check_tensor("query", query, type, single_query ? std::vector<int64_t>{B, A} : std::vector<int64_t>{B, T_, A});
    check_tensor("keys", keys, type, {B, -1, A});
    const int64_t S = keys.size(1);
    check_tensor("values", values, type, {B, S, -1});
    check_tensor("v", v, type, {A});
    args.B = B;
    args.T_ = T_;
    args.S = S;
    args.A = A;
    args.D = values.size(2);
    args.query = data<T>(query);
    args.keys = data<T>(keys);
    args.values = data<T>(values);
    args.v = data<T>(v);
    if (lengths_) read_lengths(*lengths_);
    if (mask_) read_mask(*mask_);
  }

  void read_lengths(const Tensor& t) {
    const ScalarType type = t.scalar_type();
    if (type != ScalarType::Long && type != ScalarType::Int) fail("lengths: expected int64 or int32");
    check_tensor("lengths", t, type, {args.B});
    const Tensor given = dense(t);
    lengths.resize(size_t(args.B));
    for (int64_t b = 0; b < args.B; ++b) {
      const int64_t n = type == ScalarType::Long ? data<int64_t>(given)[b] : data<int32_t>(given)[b];
      if (n < 0 || n > args.S) {
        std::ostringstream out;
        out << "lengths: expected values in [0, " << args.S << "] (S of keys), got " << n << " at [" << b << ']';
        throw std::invalid_argument(out.str());
      }
      lengths[size_t(b)] = n;
    }
    args.lengths = lengths.data();
  }

  void read_mask(const Tensor& t) {
    const bool boolean = t.scalar_type() == ScalarType::Bool;
    const bool per_query = t.dim() == 3;
    const int64_t rows = per_query ? t.size(1) : 1;
    if (per_query && rows != 1 && rows != args.T_) {
      fail("mask: expected [B, S], [B, 1, S] or [B, T, S], got ", shape_of(t));
    }
    mask = t.dim() && t.size(-1) > 1 && t.stride(-1) != 1 ? torch::stable::contiguous(t) : t;
    check_tensor("mask", *mask, boolean ? ScalarType::Bool : kScalarType<T>,
                 per_query ? std::vector<int64_t>{args.B, rows, args.S} : std::vector<int64_t>{args.B, args.S});
    args.mask_b = mask->stride(0);
    args.mask_t = per_query && rows > 1 ? mask->stride(1) : 0;
    if (boolean) {
      args.mask_bool = data<uint8_t>(*mask);
    } else {
      args.mask_add = data<T>(*mask);
    }
  }

  // Scales v by a power of two so that its largest element is at most 1: products of merged terms then stay finite.
  void group_v() {
    const int64_t rows = packed_rows(args.A) - 1;
    v_padded.assign(size_t(rows), T(0));
    v_groups.assign(size_t(2 * rows), T(0));
    std::copy_n(data<T>(v), args.A, v_padded.begin());
    T largest = 0, zero = 0;  // x - x is 0 unless x is infinite or NaN
    for (const T x : v_padded) {
      zero += x - x;
      largest = std::max(largest, std::abs(x));
    }
    args.v_finite = zero == 0;
    int exponent = 1;
    if (args.v_finite) std::frexp(largest, &exponent);
    exponent = std::max(exponent, std::numeric_limits<T>::min_exponent + 2);  // so that 2^-exponent is finite
    args.scale = std::ldexp(T(1), exponent - 1);
    const T inverse = std::ldexp(T(1), 1 - exponent);
    for (int64_t g = 0; g < rows / 4; ++g) {
      const T* from = v_padded.data() + 4 * g;
      T* group = v_groups.data() + 8 * g;
      for (int i = 0; i < 4; ++i) group[i] = from[i] * inverse;
      group[4] = -((group[0] + group[1]) + (group[2] + group[3])) / 2;
    }
    args.v = v_padded.data();
    args.v_groups = v_groups.data();
  }

  Tensor empty(std::vector<int64_t> shape) const { return torch::stable::new_empty(query, shape); }
  std::vector<int64_t> per_query(int64_t last) const {
    return single_query ? std::vector<int64_t>{args.B, last} : std::vector<int64_t>{args.B, args.T_, last};
  }
  Tensor three(const Tensor& t) const { return single_query ? torch::stable::unsqueeze(t, 1) : t; }

  int threads(int64_t elements) const {
    const int64_t useful = elements / kElementsPerThread + 1;
    return int(std::min<int64_t>(useful, torch::stable::get_num_threads()));
  }
};

template <class T>
void pack_all(const AttentionArgs<T>& args, T* packed) {
  const int64_t items = args.B * args.blocks();
  const int64_t useful = args.B * args.S * args.A / (kElementsPerThread / 8) + 1;
  const int threads = int(std::min<int64_t>(useful, torch::stable::get_num_threads()));
  Queue queue(items, threads);
  run_gang(threads, [&](Gang&) {
    queue.drain([&](int64_t begin, int64_t end) { kernels<T>().pack(args, packed, begin, end); });
  });
}

template <class T>
Tensor pack(const Tensor& given) {
  const Tensor keys = dense(given);
  check_tensor("keys", keys, kScalarType<T>, {-1, -1, -1});
  AttentionArgs<T> args{};
  args.B = keys.size(0);
  args.S = keys.size(1);
  args.A = keys.size(2);
  args.keys = data<T>(keys);
  Tensor packed = torch::stable::new_empty(keys, {args.B, args.blocks(), packed_rows(args.A), kKeyBlock});
  pack_all(args, data<T>(packed));
  return packed;
}

template <class T>
void forward(Problem<T>& problem) {
  AttentionArgs<T>& args = problem.args;
  const AttentionKernels<T>& kernel = kernels<T>();
  const int64_t items = args.B * args.tiles();
  const int threads = problem.threads(args.B * args.T_ * args.S * (args.A + args.D));
  const int64_t each = round_up(forward_scratch(args), 64 / int64_t(sizeof(T)));
  Scratch<T> scratch(each * threads);
  if (threads > 1 && items < 4 * threads && items % threads) {
    // Too few tiles to share evenly: split each.
    args.row = round_up(args.S, kKeyBlock);
    Scratch<T> rows(args.B * args.T_ * args.row);
    args.rows = rows.get();
    args.key_chunk = std::max<int64_t>(1, args.blocks() * items / (4 * threads));
    Queue scores(items * ceil_div(args.blocks(), args.key_chunk), threads), softmax(args.B * args.T_, threads),
        context(items * ceil_div(args.D, kContextChunk), threads);
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
    pack_all(args, data<T>(*ready));
  }
  args.packed = ready ? data<T>(*ready) : nullptr;
  Tensor context = problem.empty(problem.per_query(args.D));
  Tensor weights = problem.empty(need_weights ? problem.per_query(args.S) : std::vector<int64_t>{0});
  args.context = data<T>(context);
  args.weights = need_weights ? data<T>(weights) : nullptr;
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
  const AttentionKernels<T>& kernel = kernels<T>();
  const int64_t B = args.B, T_ = args.T_, S = args.S, A = args.A;
  const Tensor weights = dense(weights_);
  check_tensor("weights", weights, kScalarType<T>, problem.per_query(S));
  args.weights = data<T>(weights);

  Tensor d_values = problem.empty({0}), d_scores, from_weights;
  if (d_context) {
    check_tensor("d_context", dense(*d_context), kScalarType<T>, problem.per_query(args.D));
    const Tensor dc = problem.three(*d_context);
    d_scores = torch::stable::matmul(dc, torch::stable::transpose(problem.values, 1, 2));
    if (need_values) d_values = torch::stable::matmul(torch::stable::transpose(problem.three(weights), 1, 2), dc);
  } else {
    d_scores = problem.empty({B, T_, S});
    if (need_values) d_values = torch::stable::new_zeros(query, {B, S, args.D});
  }
  args.d_scores = data<T>(d_scores);
  args.d_weights = args.d_scores;
  if (d_weights) {
    from_weights = dense(*d_weights);
    check_tensor("d_weights", from_weights, kScalarType<T>, problem.per_query(S));
    (d_context ? args.d_weights_too : args.d_weights) = data<T>(from_weights);
  } else if (!d_context) {
    fail("expected a gradient of the context, of the weights, or both");
  }

  Tensor d_query = problem.empty(problem.per_query(A)), d_keys = problem.empty({B, S, A}), d_v = problem.empty({A});
  args.d_query = data<T>(d_query);
  args.d_keys = data<T>(d_keys);
  std::vector<T> per_batch(size_t(B * A));
  args.d_v = per_batch.data();
  std::vector<uint8_t> used(problem.mask ? size_t(B * S) : 0);
  args.used = problem.mask ? used.data() : nullptr;

  const int threads = problem.threads(B * T_ * S * A);
  const int64_t each = round_up(backward_scratch(args, kernel.lanes), 64 / int64_t(sizeof(T)));
  Scratch<T> scratch(each * threads);
  Queue rows(B * T_, threads), columns(B * ceil_div(A, int64_t(kernel.lanes)), threads);
  run_gang(threads, [&](Gang& gang) {
    rows.drain([&](int64_t begin, int64_t end) { kernel.d_scores(args, begin, end); });
    gang.barrier();
    T* own = scratch.get() + gang.rank * each;
    columns.drain([&](int64_t begin, int64_t end) { kernel.backward(args, begin, end, own); });
  });
  T* sum = data<T>(d_v);
  std::fill_n(sum, A, T(0));
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t a = 0; a < A; ++a) sum[a] += per_batch[size_t(b * A + a)];
  }
  return {d_query, d_keys, d_values, d_v};
}

template <class F>
auto by_type(const Tensor& t, F&& body) {
  if (t.scalar_type() == ScalarType::Float) return body(float{});
  if (t.scalar_type() == ScalarType::Double) return body(double{});
  fail("query: expected float32 or float64");
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
