// What the launchers of attention operators share: checks, dense copies, masks, work sharing.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "allocate.h"
#include "attention_kernels.h"
#include "checks.h"
#include "gang.h"
#include "scores/registry.h"

namespace seqattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Score elements a thread should have before another is called in (some microseconds of work).
inline constexpr int64_t kElementsPerThread = 1 << 17;

// Columns of the context of a tile that a thread should have where tiles are split.
inline constexpr int64_t kContextChunk = 64;

template <class T>
inline constexpr ScalarType kScalarType = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <class T>
const AttentionKernels<T>& attention_kernels() {
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

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// The masks of an operator: lengths read and checked, where a mask lies and how far its rows are apart.
template <class T>
struct Masks {
  const int64_t* lengths = nullptr;
  const uint8_t* mask_bool = nullptr;
  const T* mask_add = nullptr;
  int64_t mask_b = 0, mask_t = 0;
  MaybeTensor mask;
  std::vector<int64_t> lengths_read;

  Masks(int64_t B, int64_t T_, int64_t S, const MaybeTensor& lengths_, const MaybeTensor& mask_) {
    if (lengths_) read_lengths(*lengths_, B, S);
    if (mask_) read_mask(*mask_, B, T_, S);
  }
  Masks(const Masks&) = delete;
  Masks& operator=(const Masks&) = delete;

 private:
  void read_lengths(const Tensor& t, int64_t B, int64_t S) {
    const ScalarType type = t.scalar_type();
    if (type != ScalarType::Long && type != ScalarType::Int) fail("lengths: expected int64 or int32");
    check_tensor("lengths", t, type, {B});
    const Tensor given = dense(t);
    lengths_read.resize(size_t(B));
    for (int64_t b = 0; b < B; ++b) {
      const int64_t n = type == ScalarType::Long ? data_of<int64_t>(given)[b] : data_of<int32_t>(given)[b];
      if (n < 0 || n > S) {
        std::ostringstream out;
        out << "lengths: expected values in [0, " << S << "] (S of keys), got " << n << " at [" << b << ']';
        throw std::invalid_argument(out.str());
      }
      lengths_read[size_t(b)] = n;
    }
    lengths = lengths_read.data();
  }

  void read_mask(const Tensor& t, int64_t B, int64_t T_, int64_t S) {
    const bool boolean = t.scalar_type() == ScalarType::Bool;
    const bool per_query = t.dim() == 3;
    const int64_t rows = per_query ? t.size(1) : 1;
    if (per_query && rows != 1 && rows != T_) {
      fail("mask: expected [B, S], [B, 1, S] or [B, T, S], got ", shape_of(t));
    }
    mask = t.dim() && t.size(-1) > 1 && t.stride(-1) != 1 ? torch::stable::contiguous(t) : t;
    check_tensor("mask", *mask, boolean ? ScalarType::Bool : kScalarType<T>,
                 per_query ? std::vector<int64_t>{B, rows, S} : std::vector<int64_t>{B, S});
    mask_b = mask->stride(0);
    mask_t = per_query && rows > 1 ? mask->stride(1) : 0;
    if (boolean) {
      mask_bool = data_of<uint8_t>(*mask);
    } else {
      mask_add = data_of<T>(*mask);
    }
  }
};

// What forward and backward of scores share: shapes, dense copies of the inputs where they are not dense, the masks.
template <class T>
struct Problem {
  AttentionArgs<T> args{};
  bool single_query;  // query [B, A]: results have no T dimension
  Tensor query, keys;
  MaybeTensor values, v;
  std::optional<Masks<T>> masks;
  std::vector<T> v_padded, v_groups, scales;

  // Without `values_` there is no context to compute; `v_` is [A] or [H, A], ones where absent.
  Problem(const Tensor& query_, const Tensor& keys_, const MaybeTensor& values_, const MaybeTensor& v_,
          const MaybeTensor& lengths, const MaybeTensor& mask)
      : query(dense(query_)), keys(dense(keys_)) {
    const ScalarType type = kScalarType<T>;
    single_query = query.dim() == 2;
    if (!single_query && query.dim() != 3) fail("query: expected [B, A] or [B, T, A], got ", shape_of(query));
    const int64_t B = query.size(0), A = query.size(-1), T_ = single_query ? 1 : query.size(1);
    check_tensor("query", query, type, single_query ? std::vector<int64_t>{B, A} : std::vector<int64_t>{B, T_, A});
    check_tensor("keys", keys, type, {B, -1, A});
    const int64_t S = keys.size(1);
    args.B = B;
    args.T_ = T_;
    args.S = S;
    args.A = A;
    args.heads = 1;
    args.query = data_of<T>(query);
    args.keys = data_of<T>(keys);
    if (values_) {
      values = dense(*values_);
      check_tensor("values", *values, type, {B, S, -1});
      args.D = values->size(2);
      args.values = data_of<T>(*values);
    }
    if (v_) {
      v = dense(*v_);
      if (v->dim() == 2) args.heads = v->size(0);
      if (args.heads < 1 || B % args.heads)
        fail("v: expected [A] or [H, A] with H dividing B=", B, ", got ", shape_of(*v));
      if (v->dim() == 2) {
        check_tensor("v", *v, type, {-1, A});
      } else {
        check_tensor("v", *v, type, {A});
      }
    }
    if (lengths || mask) {
      masks.emplace(B, T_, S, lengths, mask);
      args.lengths = masks->lengths;
      args.mask_bool = masks->mask_bool;
      args.mask_add = masks->mask_add;
      args.mask_b = masks->mask_b;
      args.mask_t = masks->mask_t;
    }
  }

  // v with ones where absent, each head padded to `stride` elements by zeros.
  void read_v(int64_t stride) {
    args.v_stride = stride;
    v_padded.assign(size_t(args.heads * stride), T(0));
    for (int64_t h = 0; h < args.heads; ++h) {
      if (v) {
        std::copy_n(data_of<T>(*v) + h * args.A, args.A, v_padded.begin() + h * stride);
      } else {
        std::fill_n(v_padded.begin() + h * stride, args.A, T(1));
      }
    }
    args.v = v_padded.data();
  }

  // Scales v by a power of two so that its largest element is at most 1: products of merged terms then stay finite.
  void group_v() {
    const int64_t rows = packed_rows(args.A) - 1;
    read_v(rows);
    v_groups.assign(size_t(2 * rows * args.heads), T(0));
    scales.resize(size_t(args.heads));
    T zero = 0;  // x - x is 0 unless x is infinite or NaN
    for (const T x : v_padded) zero += x - x;
    args.v_finite = zero == 0;
    for (int64_t h = 0; h < args.heads; ++h) {
      const T* v_head = v_padded.data() + h * rows;
      T largest = 0;
      for (int64_t a = 0; a < args.A; ++a) largest = std::max(largest, std::abs(v_head[a]));
      int exponent = 1;
      if (args.v_finite) std::frexp(largest, &exponent);
      exponent = std::max(exponent, std::numeric_limits<T>::min_exponent + 2);  // so that 2^-exponent is finite
      scales[size_t(h)] = std::ldexp(T(1), exponent - 1);
      const T inverse = std::ldexp(T(1), 1 - exponent);
      for (int64_t g = 0; g < rows / 4; ++g) {
        T* group = v_groups.data() + 2 * h * rows + 8 * g;
        for (int i = 0; i < 4; ++i) group[i] = v_head[4 * g + i] * inverse;
        group[4] = -((group[0] + group[1]) + (group[2] + group[3])) / 2;
      }
    }
    args.v_groups = v_groups.data();
    args.scales = scales.data();
  }

  Tensor empty(const std::vector<int64_t>& shape) const { return allocate(query, shape); }
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
    queue.drain([&](int64_t begin, int64_t end) { attention_kernels<T>().pack(args, packed, begin, end); });
  });
}

// The gradients of query, keys (set in args) and v, which is returned, from args.d_scores; `prepare(gang, rows)` runs
// first, on every thread of the gang, with a queue of the rows (b, t).
template <class T, class F>
Tensor backward(Problem<T>& problem, F&& prepare) {
  AttentionArgs<T>& args = problem.args;
  const AttentionKernels<T>& kernel = attention_kernels<T>();
  problem.read_v(args.A);
  std::vector<T> per_batch(size_t(args.B * args.A));
  args.d_v = per_batch.data();
  const int threads = problem.threads(args.B * args.T_ * args.S * args.A);
  const int64_t each = round_up(backward_scratch(args, kernel.lanes), 64 / int64_t(sizeof(T)));
  Scratch<T> scratch(each * threads);
  Queue rows(args.B * args.T_, threads), columns(args.B * ceil_div(args.A, int64_t(kernel.lanes)), threads);
  run_gang(threads, [&](Gang& gang) {
    prepare(gang, rows);
    T* own = scratch.get() + gang.rank * each;
    columns.drain([&](int64_t begin, int64_t end) { kernel.backward(args, begin, end, own); });
  });
  Tensor d_v = problem.empty(problem.v && problem.v->dim() == 2 ? std::vector<int64_t>{args.heads, args.A}
                                                                : std::vector<int64_t>{args.A});
  T* sum = data_of<T>(d_v);
  std::fill_n(sum, args.heads * args.A, T(0));
  for (int64_t b = 0; b < args.B; ++b) {
    T* own = sum + args.head(b) * args.A;
    for (int64_t a = 0; a < args.A; ++a) own[a] += per_batch[size_t(b * args.A + a)];
  }
  return d_v;
}

template <class F>
auto by_type(const Tensor& t, F&& body) {
  if (t.scalar_type() == ScalarType::Float) return body(float{});
  if (t.scalar_type() == ScalarType::Double) return body(double{});
  fail("query: expected float32 or float64");
}

}  // namespace seqattn
