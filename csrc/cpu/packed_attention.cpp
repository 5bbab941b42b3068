// fastmkd_native::packed_attention on the CPU.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/scratch.h"

namespace fastmkd {
namespace {

// Work below which a second thread costs more than it brings, in multiply-adds.
constexpr int64_t kGrain = 1 << 17;

// The kernel trusts the offsets, so every one is looked at.
void check_starts(const Tensor& starts, int64_t tokens) {
  const int32_t* start = starts.const_data_ptr<int32_t>();
  const int32_t* last = start + starts.numel() - 1;
  require(*start == 0 && *last == tokens && std::is_sorted(start, last + 1), "starts goes from ", *start, " to ", *last,
          "; expected offsets from 0 to ", tokens, ", the tokens of qkv, that never descend.");
}

Tensor packed_attention(const Tensor& qkv, const Tensor& starts, double scale) {
  require_dim(qkv, "qkv", 4, "(T, 3, H, d)");
  require_cpu(qkv, "qkv");
  require_contiguous(qkv, "qkv");
  PackedAttentionArgs args{};
  args.dtype = core_dtype(qkv, "qkv");
  require(args.dtype != DType::f64, "qkv has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  require(qkv.size(1) == 3 && qkv.size(2) > 0 && qkv.size(3) > 0, "qkv has shape ", shape_text(qkv),
          "; expected (T, 3, H, d) with at least one head and channel.");
  require(qkv.size(0) <= std::numeric_limits<int32_t>::max(), "qkv has ", qkv.size(0),
          " tokens; expected fewer than 2^31.");
  require_dim(starts, "starts", 1, "(B + 1,)");
  require_cpu(starts, "starts");
  require_dtype(starts, "starts", ScalarType::Int);
  require_contiguous(starts, "starts");
  require(starts.size(0) > 0, "starts has shape (0,); expected (B + 1,).");
  check_starts(starts, qkv.size(0));

  Tensor out =
      torch::stable::empty({qkv.size(0), qkv.size(2), qkv.size(3)}, qkv.scalar_type(), std::nullopt, qkv.device());
  args.qkv = qkv.const_data_ptr();
  args.starts = starts.const_data_ptr<int32_t>();
  args.images = starts.size(0) - 1;
  args.heads = qkv.size(2);
  args.head_dim = qkv.size(3);
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr();

  const Kernels& table = kernels();
  const AttentionPlan plan = table.packed_attention_plan(args);
  const int64_t unit_work = 24 * args.head_dim;  // a dozen queries and a key, once for the score and once for the sum
  torch::stable::parallel_for(0, plan.units, std::max<int64_t>(1, kGrain / unit_work), [&](int64_t begin, int64_t end) {
    table.packed_attention(args, begin, end, thread_scratch(plan.scratch));
  });
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("packed_attention", TORCH_BOX(&fastmkd::packed_attention)); }
