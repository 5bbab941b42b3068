// The AVX-512 BF16 kernels with their one special instruction emulated, so that they run on any AVX-512 processor.
#include <cstdio>

#include "core/check.h"
#include "core/dispatch.h"

namespace fastmkd {
FASTMKD_DECLARE_KERNELS(avx512_bf16_emulated)
}

int main() {
  using namespace fastmkd;
  constexpr int kSkipped = 77;  // ctest's SKIP_RETURN_CODE
  bool runs_avx512 = false;
  for (Isa isa : available_isas()) runs_avx512 |= isa == Isa::avx512;
  if (!runs_avx512) {
    std::puts("skipped: this processor has no AVX-512");
    return kSkipped;
  }
  const Kernels table = FASTMKD_KERNEL_TABLE(avx512_bf16_emulated);
  int failures = 0;
  for (bool prefix : {false, true}) {
    for (int64_t dim : {1, 31, 32, 36, 64, 80}) {
      const check::Outcome outcome = check::cls_saliency(table, DType::bf16, {2, 3, 2, 49, dim}, prefix);
      std::printf("%s dim %d: %s\n", outcome.ok ? "ok  " : "FAIL", static_cast<int>(dim), outcome.detail.c_str());
      failures += !outcome.ok;
    }
  }
  return failures;
}
