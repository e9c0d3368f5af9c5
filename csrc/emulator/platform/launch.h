// Starting kernels, for the emulator: on return they have run.
#pragma once

#include <tuple>
#include <utility>

#include "types.h"

namespace seqattn::gpu {

using Stream = void*;
using Launch = emulator::Shape;

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& l, Stream, A&&... args) {
  const std::tuple<std::remove_cv_t<P>...> given(std::forward<A>(args)...);
  detail::machine().launched.insert(reinterpret_cast<const void*>(kernel));
  detail::machine().run(l, [&] { std::apply(kernel, given); });
}

// Device n has room for kResidentClusters[n] clusters, so that tests see batches spread and batches crowded.
inline constexpr int kResidentClusters[] = {8, 2, 1};
inline int current_device() { return detail::machine().device; }

template <class... P>
int resident_clusters(void (*)(P...), const Launch&) {
  return kResidentClusters[current_device()];
}
template <class... P>
int resident_blocks(void (*)(P...), const Launch& l) {
  return static_cast<int>(emulator::kSharedLimit / (l.shared_bytes + 1024));
}

}  // namespace seqattn::gpu
