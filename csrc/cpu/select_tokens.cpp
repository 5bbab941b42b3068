// fastmkd_native::select_tokens on the CPU.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>

#include "checks.h"
#include "core/dispatch.h"

namespace fastmkd {
namespace {

// Scores below which a second thread costs more than it brings.
constexpr int64_t kGrain = 4096;

Tensor select_tokens(const Tensor& saliency, int64_t k, int64_t grid_h, int64_t grid_w, int64_t target_h,
                     int64_t target_w) {
  require_cpu(saliency, "saliency");
  SelectTokensArgs args = check_select_tokens(saliency, k, grid_h, grid_w, target_h, target_w);
  const int64_t batch = saliency.size(0);
  Tensor out = torch::stable::empty({batch, k}, ScalarType::Long, std::nullopt, saliency.device());
  args.out = out.mutable_data_ptr<int64_t>();

  const Kernels& table = kernels();
  std::atomic<int64_t> bad_row{-1};
  torch::stable::parallel_for(
      0, batch, std::max<int64_t>(1, kGrain / (target_h * target_w)), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<std::byte[]> scratch(new std::byte[static_cast<size_t>(select_tokens_scratch(args)) * 4]);
        const int64_t bad = table.select_tokens(args, begin, end, scratch.get());
        if (bad >= 0) bad_row.store(bad, std::memory_order_relaxed);
      });
  require(bad_row < 0, "saliency holds NaN or infinity in row ", bad_row.load(), "; every score must be finite.");
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("select_tokens", TORCH_BOX(&fastmkd::select_tokens)); }
