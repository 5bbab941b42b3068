#include "core/dispatch.h"

namespace fastmkd {

FASTMKD_DECLARE_KERNELS(generic)
#ifdef FASTMKD_HAVE_NEON
FASTMKD_DECLARE_KERNELS(neon)
#endif
#ifdef FASTMKD_HAVE_AVX2
FASTMKD_DECLARE_KERNELS(avx2)
#endif
#ifdef FASTMKD_HAVE_AVX512
FASTMKD_DECLARE_KERNELS(avx512)
#endif
#ifdef FASTMKD_HAVE_AVX512_BF16
FASTMKD_DECLARE_KERNELS(avx512_bf16)
#endif

const Kernels& kernels(Isa isa) {
  switch (isa) {
#ifdef FASTMKD_HAVE_NEON
    case Isa::neon: {
      static const Kernels table = FASTMKD_KERNEL_TABLE(neon);
      return table;
    }
#endif
#ifdef FASTMKD_HAVE_AVX2
    case Isa::avx2: {
      static const Kernels table = FASTMKD_KERNEL_TABLE(avx2);
      return table;
    }
#endif
#ifdef FASTMKD_HAVE_AVX512
    case Isa::avx512: {
      static const Kernels table = FASTMKD_KERNEL_TABLE(avx512);
      return table;
    }
#endif
#ifdef FASTMKD_HAVE_AVX512_BF16
    case Isa::avx512_bf16: {
      static const Kernels table = FASTMKD_KERNEL_TABLE(avx512_bf16);
      return table;
    }
#endif
    default: {
      static const Kernels table = FASTMKD_KERNEL_TABLE(generic);
      return table;
    }
  }
}

const Kernels& kernels() { return kernels(active_isa()); }

}  // namespace fastmkd
