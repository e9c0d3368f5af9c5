// The instruction sets the CPU kernels are compiled for, and the choice among them.
//
// Every kernel source is compiled once per instruction set and defines one table of its entry points in the namespace
// of that set. A launcher writes SEQATTN_KERNELS(recurrence_kernels) to get the table this machine should use. Sources
// named *_bfloat16_kernels.cpp are compiled for AVX-512 with its bfloat16 instructions besides:
// SEQATTN_BFLOAT16_KERNELS.
#pragma once

namespace seqattn {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that was built, that the processor has and that ATEN_CPU_CAPABILITY allows.
Isa active_isa();
const char* isa_name(Isa isa);

// Whether avx512 is active and the processor multiplies bfloat16 itself. ATEN_CPU_CAPABILITY=avx512 leaves that out.
bool has_bfloat16_instructions();

#if defined(SEQATTN_HAVE_X86)
#define SEQATTN_DECLARE_KERNELS(Table, name) \
  namespace avx512 {                         \
  extern const Table name;                   \
  }                                          \
  namespace avx2 {                           \
  extern const Table name;                   \
  }                                          \
  namespace baseline {                       \
  extern const Table name;                   \
  }
#define SEQATTN_KERNELS(name)                                                  \
  (::seqattn::active_isa() == ::seqattn::Isa::avx512 ? ::seqattn::avx512::name \
   : ::seqattn::active_isa() == ::seqattn::Isa::avx2 ? ::seqattn::avx2::name   \
                                                     : ::seqattn::baseline::name)
#define SEQATTN_DECLARE_BFLOAT16_KERNELS(Table, name) \
  SEQATTN_DECLARE_KERNELS(Table, name)                \
  namespace avx512_bf16 {                             \
  extern const Table name;                            \
  }
#define SEQATTN_BFLOAT16_KERNELS(name) \
  (::seqattn::has_bfloat16_instructions() ? ::seqattn::avx512_bf16::name : SEQATTN_KERNELS(name))
#else
#define SEQATTN_DECLARE_KERNELS(Table, name) \
  namespace baseline {                       \
  extern const Table name;                   \
  }
#define SEQATTN_KERNELS(name) (::seqattn::baseline::name)
#define SEQATTN_DECLARE_BFLOAT16_KERNELS(Table, name) SEQATTN_DECLARE_KERNELS(Table, name)
#define SEQATTN_BFLOAT16_KERNELS(name) SEQATTN_KERNELS(name)
#endif

}  // namespace seqattn
