#include "core/self_test.h"

#include <cmath>
#include <cstddef>
#include <memory>
#include <random>
#include <sstream>

#include "core/check.h"
#include "core/dispatch.h"

namespace fastmkd {

std::vector<SelfTestResult> self_test() {
  std::vector<SelfTestResult> results;
  const auto record = [&](Isa isa, const char* name, const check::Outcome& outcome) {
    results.push_back({std::string(isa_name(isa)) + "/" + name, outcome.ok, outcome.detail});
  };
  for (Isa isa : available_isas()) {
    const Kernels& table = kernels(isa);
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (bool include_prefix : {false, true}) {
        record(isa, "cls_saliency", check::cls_saliency(table, dtype, {2, 3, 2, 50, 36}, include_prefix));
      }
      record(isa, "centred_gram", check::centred_gram(table, dtype, {37, 150, 3}));
      record(isa, "packed_attention", check::packed_attention(table, dtype, {20, 1, 0, 37}, 2, 36));
      record(isa, "stitch_tokens", check::stitch_tokens(table, dtype, {3, 5, 37}));
      for (DType other : {dtype, DType::f32}) {
        record(isa, "unshuffle_tokens", check::unshuffle_tokens(table, dtype, other, {3, 1, 9, 4, 37}));
        record(isa, "masked_patch_loss", check::masked_patch_loss(table, dtype, other, {2, 3, 3, 2, 6, 7, 4}, true));
        record(isa, "recovered_loss", check::recovered_loss(table, dtype, other, {2, 37, 2, 3, 3}, dtype == other));
      }
      record(isa, "cell_rows", check::cell_rows(table, dtype, {2, 37, 2, 5, 3, 3}, false));
      record(isa, "gather_patches", check::gather_patches(table, dtype, {2, 3, 24, 30, 6, 5, 4}));
    }
    for (const check::ConvShape& shape :
         {check::ConvShape{40, 50, 20, 37, 1, 9}, check::ConvShape{40, 50, 24, 24, 24, 9}}) {
      const char* name = shape.groups == 1 ? "masked_conv2d" : "masked_depthwise";
      for (DType dtype : {DType::f32, DType::bf16}) {
        record(isa, name, check::masked_conv2d(table, dtype, shape, check::WeightLayout::contiguous));
        record(isa, name, check::masked_conv2d_weight(table, dtype, shape));
      }
    }
    record(isa, "select_tokens", check::select_tokens(table, {3, 7, 9, 7, 9, 31}));
    record(isa, "select_tokens resized", check::select_tokens(table, {3, 7, 9, 12, 5, 31}));
    for (bool transposed : {false, true}) {
      record(isa, "tap_table", check::tap_table(table, {2, 3, 2, 4, 2, 3, 2, 1, 1, 4}, transposed));
    }
    record(isa, "conversions", check::conversions(table));
    record(isa, "prefill", check::prefill(table));
  }
  return results;
}

}  // namespace fastmkd
