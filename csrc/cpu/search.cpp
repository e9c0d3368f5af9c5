// One step of a beam search: the best continuations of each sentence's prefixes, in one pass over the
// log-probabilities.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "allocate.h"
#include "gang.h"
#include "launch.h"

namespace seqattn {
namespace {

template <class T>
struct Candidate {
  T score;
  int64_t prefix, word;
};

// The best candidates so far, best first; of equal ones the first that came.
template <class T>
class Best {
 public:
  explicit Best(int64_t most) : most_(size_t(most)) { kept_.reserve(most_ + 1); }

  // What a candidate must be above to be kept.
  T bound() const { return kept_.size() < most_ ? -std::numeric_limits<T>::infinity() : kept_.back().score; }

  void add(const Candidate<T>& c) {
    const auto after = std::upper_bound(kept_.begin(), kept_.end(), c,
                                        [](const Candidate<T>& a, const Candidate<T>& b) { return a.score > b.score; });
    kept_.insert(after, c);
    if (kept_.size() > most_) kept_.pop_back();
  }

  void clear() { kept_.clear(); }
  const std::vector<Candidate<T>>& kept() const { return kept_; }

 private:
  size_t most_;
  std::vector<Candidate<T>> kept_;
};

// Adds the words of one prefix: log_probs [V], and the log-probability of the prefix itself.
template <class T>
void add_words(const T* log_probs, int64_t V, T before, int64_t prefix, Best<T>* best) {
  constexpr int64_t kBlock = 32;
  T bound = best->bound();
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const T score = before + log_probs[w];
      if (!(score > bound)) continue;
      best->add({score, prefix, w});
      bound = best->bound();
    }
  };
  int64_t v = 0;
  for (; v + kBlock <= V; v += kBlock) {
    int above = 0;
    for (int64_t i = 0; i < kBlock; ++i) above |= before + log_probs[v + i] > bound;
    if (above) add(v, v + kBlock);
  }
  add(v, V);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grow(const Tensor& log_probs, const Tensor& scores, int64_t end) {
  const int64_t A = scores.size(0), K = scores.size(1), V = log_probs.size(1);
  check_tensor("scores", scores, dtype_of<T>(), {A, K});
  check_tensor("log_probs", log_probs, dtype_of<T>(), {A * K, V});
  const Tensor before = torch::stable::contiguous(scores), next = torch::stable::contiguous(log_probs);
  const auto numbers = [&] { return torch::stable::new_zeros(scores, std::vector<int64_t>{A, K}, ScalarType::Long); };
  Tensor grown = allocate(scores, {A, K}), ended = allocate(scores, {A, K});
  Tensor parents = numbers(), words = numbers(), ended_parents = numbers();
  T *grown_at = grown.mutable_data_ptr<T>(), *ended_at = ended.mutable_data_ptr<T>();
  std::fill_n(grown_at, A * K, -std::numeric_limits<T>::infinity());
  std::fill_n(ended_at, A * K, -std::numeric_limits<T>::infinity());
  int64_t *parent_at = parents.mutable_data_ptr<int64_t>(), *word_at = words.mutable_data_ptr<int64_t>();
  int64_t* ended_parent_at = ended_parents.mutable_data_ptr<int64_t>();
  const T *before_at = before.const_data_ptr<T>(), *next_at = next.const_data_ptr<T>();
  const int64_t most = torch::stable::get_num_threads();
  const int64_t threads = std::clamp<int64_t>(A * K * V / 30000, 1, most);
  run_gang(int(threads), [&](Gang& gang) {
    int64_t first, last;
    gang.share(A, &first, &last);
    // Of 2K candidates at most K end, one for each prefix; so the K best that go on are among them.
    Best<T> best(2 * K);
    for (int64_t a = first; a < last; ++a) {
      best.clear();
      for (int64_t k = 0; k < K; ++k) add_words(next_at + (a * K + k) * V, V, before_at[a * K + k], k, &best);
      int64_t going = 0, rank = 0;
      for (const Candidate<T>& c : best.kept()) {
        const bool ends = c.word == end;
        if (ends && rank < K) {
          ended_at[a * K + rank] = c.score;
          ended_parent_at[a * K + rank] = c.prefix;
        } else if (!ends && going < K) {
          grown_at[a * K + going] = c.score;
          parent_at[a * K + going] = c.prefix;
          word_at[a * K + going++] = c.word;
        }
        ++rank;
      }
    }
  });
  return {grown, parents, words, ended, ended_parents};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_grow_cpu(Tensor log_probs, Tensor scores, int64_t end) {
  if (log_probs.dim() != 2) fail("log_probs: expected [A * K, V], got ", shape_of(log_probs));
  if (scores.dim() != 2) fail("scores: expected [A, K], got ", shape_of(scores));
  return with_dtype(log_probs, [&](auto t) { return grow<decltype(t)>(log_probs, scores, end); });
}

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) { m.impl("beam_grow", TORCH_BOX(&beam_grow_cpu)); }

}  // namespace
}  // namespace seqattn
