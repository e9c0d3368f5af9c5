// A tile on the way back: where a chunk's gradients are and what forward computed. For decoder_backward.h alone.
#pragma once

namespace seqattn::SEQATTN_ISA {
namespace {

template <class Cell, class T>
class TileRows {
 protected:
  TileRows(const DecoderProblem<T>& problem, int64_t tile, T* shared)
      : p_(problem), s_(problem, shared), b0_(problem.tile_begin(tile)), n_(problem.tile_begin(tile + 1) - b0_) {}

  static void set_row(T* out, const T* in, int64_t n, int64_t ld) {
    __builtin_memset(out, 0, std::size_t(ld) * sizeof(T));
    if (in) __builtin_memcpy(out, in, std::size_t(n) * sizeof(T));
  }

  static void copy(T* out, int64_t at, const T* in, int64_t n) {
    if (out) __builtin_memcpy(out + at, in, std::size_t(n) * sizeof(T));
  }

  int64_t row(int64_t i, int64_t t) const { return i * steps_ + t - t0_; }
  T* grad(int64_t l, int64_t i, int64_t t) const {
    return s_.grad + (l * n_ * p_.chunk_steps + row(i, t)) * s_.ld_grad;
  }

  // Values forward computed at step t, those it began with for t = -1, null for zeros.
  const T* state(int64_t l, int64_t i, int64_t t) const {
    if (t >= 0) return p_.hidden_of(l, b0_ + i, t);
    return p_.h0 ? p_.h0 + (l * p_.B + b0_ + i) * p_.H : nullptr;
  }
  const T* context(int64_t i, int64_t t) const {
    if (t >= 0) return p_.attention.context + ((b0_ + i) * p_.steps + t) * p_.D;
    return p_.context0 ? p_.context0 + (b0_ + i) * p_.D : nullptr;
  }
  const T* attentional(int64_t i, int64_t t) const {
    if (t >= 0) return p_.attentional + ((b0_ + i) * p_.steps + t) * p_.M;
    return p_.attentional0 ? p_.attentional0 + (b0_ + i) * p_.M : nullptr;
  }

  const DecoderProblem<T>& p_;
  const BackwardTile<Cell, T> s_;
  const int64_t b0_, n_;
  int64_t t0_ = 0, steps_ = 0;  // of the chunk
};

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
