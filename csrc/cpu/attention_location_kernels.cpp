// Additive scores with a term of features, for one instruction set.
#include "attention_location_kernels.h"

#include "attention_location.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// The keys [s, end) of an item, of which those from `length` on count as absent.
struct Keys {
  int64_t s, end, length;
};

template <class T>
SEQATTN_INLINE Keys keys_of(const LocationArgs<T>& args, int64_t b, int64_t block) {
  const int64_t s = block * kLocationRows, end = s + kLocationRows < args.S ? s + kLocationRows : args.S;
  const int64_t length = args.lengths ? args.lengths[b] : args.S;
  return {s, end, length < end ? length : end};
}

template <class T>
FeatureTerm<T> term_of(const LocationArgs<T>& args) {
  return {args.A, args.F, args.weight, args.A, args.F};
}

template <class T>
void scores(const LocationArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.row_blocks(), S = args.S, A = args.A;
  const FeatureTerm<T> term = term_of(args);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, b = row / args.T_;
    const Keys at = keys_of(args, b, item % blocks);
    const T* query = args.query + row * A;
    const T* v = args.v + b % args.heads * A;
    const T* features = args.features + (args.feature_t ? row : b) * S * args.F;
    T* out = args.scores + row * S;
    int64_t s = at.s;
    for (; s + kRows<T> <= at.length; s += kRows<T>) {
      score_keys<T, kRows<T>>(term, query, v, args.keys + (b * S + s) * A, features + s * args.F, out + s);
    }
    for (; s < at.length; ++s) {
      score_keys<T, 1>(term, query, v, args.keys + (b * S + s) * A, features + s * args.F, out + s);
    }
    for (; s < at.end; ++s) out[s] = 0;
  }
}

template <class T>
void sums(const LocationArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.row_blocks(), S = args.S, A = args.A;
  const FeatureTerm<T> term = term_of(args);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks;
    const Keys at = keys_of(args, b, item % blocks);
    const T* features = args.features + (args.feature_t ? b * args.T_ + args.step : b) * S * args.F;
    T* out = args.sums + b * S * A;
    int64_t s = at.s;
    for (; s + kRows<T> <= at.length; s += kRows<T>) {
      sum_keys<T, kRows<T>>(term, args.keys + (b * S + s) * A, features + s * args.F, out + s * A);
    }
    for (; s < at.length; ++s) {
      sum_keys<T, 1>(term, args.keys + (b * S + s) * A, features + s * args.F, out + s * A);
    }
    for (; s < at.end; ++s) {
      for (int64_t a = 0; a < A; a += kLanes<T>) store_partial(out + s * A + a, Vec<T>{}, A - a);
    }
  }
}

}  // namespace

extern const LocationKernels<float> location_kernels_f32 = {scores<float>, sums<float>};
extern const LocationKernels<double> location_kernels_f64 = {scores<double>, sums<double>};

}  // namespace seqattn::SEQATTN_ISA
