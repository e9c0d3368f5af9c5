#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace seqattn {
namespace {

Isa detect() {
#if defined(SEQATTN_HAVE_X86)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const bool baseline_only = wish && std::strcmp(wish, "default") == 0;
  const bool no_avx512 = wish && std::strcmp(wish, "avx2") == 0;
  __builtin_cpu_init();
  if (baseline_only) return Isa::baseline;
  if (!no_avx512 && __builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

bool detect_bfloat16() {
#if defined(SEQATTN_HAVE_X86)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  if (active_isa() != Isa::avx512 || (wish && std::strcmp(wish, "avx512") == 0)) return false;
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

bool has_bfloat16_instructions() {
  static const bool has = detect_bfloat16();
  return has;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace seqattn
