// The AVX-512 BF16 kernels with their one special instruction emulated, so that they run on any AVX-512 processor.
#include <cstdio>
#include <initializer_list>
#include <string>

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
  const auto expect = [&](const std::string& name, const check::Outcome& outcome) {
    std::printf("%s %s: %s\n", outcome.ok ? "ok  " : "FAIL", name.c_str(), outcome.detail.c_str());
    failures += !outcome.ok;
  };
  for (bool prefix : {false, true}) {
    for (int64_t dim : {1, 31, 32, 36, 64, 80}) {
      expect("cls_saliency dim " + std::to_string(dim),
             check::cls_saliency(table, DType::bf16, {2, 3, 2, 49, dim}, prefix));
    }
  }
  MaskedConvArgs even{}, odd{};
  for (MaskedConvArgs* args : {&even, &odd}) {
    args->dtype = args->weight_dtype = DType::bf16;
    args->cin = args == &even ? 64 : 63;
    args->cout = args->groups = 1;
    args->num_taps = 9;
  }
  const bool chosen = table.masked_conv2d_plan(even).dtype == DType::bf16;
  expect("bf16 rows are read as they are",
         {chosen && table.masked_conv2d_plan(odd).dtype == DType::f32, "by the plan"});
  // Wide and narrow panels, several packed parts, odd channels (widened instead), groups that share a panel or do not.
  for (const check::ConvShape& shape : std::initializer_list<check::ConvShape>{{300, 2100, 18, 6, 1, 9},
                                                                               {90, 140, 64, 70, 1, 9},
                                                                               {50, 60, 514, 96, 1, 4},
                                                                               {60, 50, 17, 24, 1, 9},
                                                                               {60, 50, 24, 12, 4, 9},
                                                                               {60, 50, 80, 160, 2, 3},
                                                                               {60, 50, 48, 27, 3, 9},
                                                                               {9, 7, 16, 16, 1, 9}}) {
    const std::string name = "masked_conv2d " + std::to_string(shape.cin) + " to " + std::to_string(shape.cout);
    for (check::WeightLayout layout :
         {check::WeightLayout::contiguous, check::WeightLayout::channels_last, check::WeightLayout::transposed}) {
      if (layout == check::WeightLayout::transposed && shape.groups > 1) continue;
      expect(name, check::masked_conv2d(table, DType::bf16, shape, layout));
    }
    expect(name + " weight", check::masked_conv2d_weight(table, DType::bf16, shape));
  }
  return failures;
}
