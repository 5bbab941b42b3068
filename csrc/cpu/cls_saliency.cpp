// fastmkd_native::cls_saliency on the CPU.
#include <algorithm>
#include <memory>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"

namespace fastmkd {
namespace {

// Work below which a second thread costs more than it brings, in multiply-adds.
constexpr int64_t kGrain = 32768;

Tensor cls_saliency(const Tensor& q, const Tensor& k, int64_t num_prefix_tokens, double scale, bool include_prefix) {
  require_dim(q, "q", 3, "(B, H, d)");
  require_dim(k, "k", 4, "(B, H, P + N, d)");
  require_cpu(q, "q");
  require_cpu(k, "k");
  ClsSaliencyArgs args{};
  args.dtype = core_dtype(q, "q");
  require(args.dtype != DType::f64, "q has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  require_dtype(k, "k", q.scalar_type());
  require(k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(2), "k has shape ", shape_text(k),
          "; expected (", q.size(0), ", ", q.size(1), ", P + N, ", q.size(2), ") to match q.");
  require(q.size(1) >= 1 && q.size(2) >= 1, "q has shape ", shape_text(q), "; expected at least one head and channel.");
  require(num_prefix_tokens >= 1 && num_prefix_tokens < k.size(2), "num_prefix_tokens is ", num_prefix_tokens,
          "; expected 1 to ", k.size(2) - 1, ", k holds ", k.size(2), " tokens.");
  require(q.size(2) == 1 || q.stride(2) == 1, "q's last dimension has stride ", q.stride(2), "; expected 1.");
  require(k.size(3) == 1 || k.stride(3) == 1, "k's last dimension has stride ", k.stride(3), "; expected 1.");

  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  for (int i = 0; i < 2; ++i) args.q_strides[i] = q.stride(i);
  for (int i = 0; i < 3; ++i) args.k_strides[i] = k.stride(i);
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.head_dim = q.size(2);
  args.prefix = num_prefix_tokens;
  args.patches = k.size(2) - num_prefix_tokens;
  args.scale = static_cast<float>(scale);
  args.include_prefix = include_prefix;

  Tensor out = torch::stable::empty({args.batch, args.patches}, ScalarType::Float, std::nullopt, q.device());
  const int64_t keys = softmax_keys(args);
  const std::unique_ptr<float[]> logits(new float[static_cast<size_t>(args.batch * args.heads * keys)]);
  args.logits = logits.get();
  args.out = out.mutable_data_ptr<float>();

  const Kernels& table = kernels();
  const int64_t token_work = args.heads * args.head_dim;
  torch::stable::parallel_for(
      0, args.batch * keys, std::max<int64_t>(1, kGrain / token_work), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(cls_logits_scratch(args))]);
        table.cls_logits(args, begin, end, scratch.get());
      });
  const int64_t image_work = 8 * args.heads * keys;  // an exponential is worth about eight multiply-adds
  torch::stable::parallel_for(0, args.batch, std::max<int64_t>(1, kGrain / image_work),
                              [&](int64_t begin, int64_t end) { table.cls_softmax(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("cls_saliency", TORCH_BOX(&fastmkd::cls_saliency)); }
