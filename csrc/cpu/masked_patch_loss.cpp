// fastmkd_native::masked_patch_loss and its gradient on the CPU.
#include <algorithm>
#include <array>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/numbers.h"
#include "cpu/scratch.h"

namespace fastmkd {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

PatchLossArgs check(const Tensor& prediction, const Tensor& images, const Tensor& hidden, int64_t patch_h,
                    int64_t patch_w) {
  require_dim(prediction, "prediction", 3, "(B, m, n)");
  require_dim(images, "images", 4, "(B, C, H, W)");
  require_dim(hidden, "hidden", 2, "(B, m)");
  for (const auto& [tensor, name] :
       {std::pair{&prediction, "prediction"}, std::pair{&images, "images"}, std::pair{&hidden, "hidden"}}) {
    require_cpu(*tensor, name);
    require_contiguous(*tensor, name);
  }
  PatchLossArgs args{};
  args.dtype = core_dtype(prediction, "prediction");
  require(args.dtype != DType::f64,
          "prediction has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  if (images.scalar_type() != ScalarType::Float) require_dtype(images, "images", prediction.scalar_type());
  require_dtype(hidden, "hidden", ScalarType::Long);
  args.image_dtype = core_dtype(images, "images");
  args.channels = images.size(1);
  args.height = images.size(2);
  args.width = images.size(3);
  require(patch_h > 0 && patch_w > 0 && args.height % patch_h == 0 && args.width % patch_w == 0, "the patch size is (",
          patch_h, ", ", patch_w, "); expected divisors of the images' (", args.height, ", ", args.width, ").");
  args.patch_h = patch_h;
  args.patch_w = patch_w;
  args.hidden_count = hidden.size(1);
  require(hidden.size(0) == images.size(0), "hidden has shape ", shape_text(hidden), "; expected (", images.size(0),
          ", m).");
  require(prediction.size(0) == images.size(0) && prediction.size(1) == args.hidden_count &&
              prediction.size(2) == patch_values(args) && prediction.numel() > 0,
          "prediction has shape ", shape_text(prediction), "; expected (", images.size(0), ", ", args.hidden_count,
          ", ", patch_values(args), "), none of them 0.");
  require_numbers(hidden, "hidden", 0, args.height / patch_h * (args.width / patch_w));
  args.prediction = prediction.const_data_ptr();
  args.images = images.const_data_ptr();
  args.hidden = hidden.const_data_ptr<int64_t>();
  return args;
}

template <class Kernel>
void run(Kernel kernel, const PatchLossArgs& args, int64_t rows) {
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kGrain / patch_values(args)),
      [&](int64_t begin, int64_t end) { kernel(args, begin, end, thread_scratch(patch_loss_scratch(args))); });
}

std::tuple<Tensor, Tensor> masked_patch_loss(const Tensor& prediction, const Tensor& images, const Tensor& hidden,
                                             int64_t patch_h, int64_t patch_w, bool normalize) {
  PatchLossArgs args = check(prediction, images, hidden, patch_h, patch_w);
  args.normalize = normalize;
  Tensor stats = torch::stable::empty({hidden.size(0), hidden.size(1), 2}, ScalarType::Float, std::nullopt,
                                      prediction.device());
  std::vector<double> sums(static_cast<size_t>(hidden.numel()));
  args.stats = stats.mutable_data_ptr<float>();
  args.sums = sums.data();
  run(kernels().masked_patch_loss, args, hidden.numel());
  // In the order of the patches, whichever thread had them.
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  Tensor loss = torch::stable::empty(std::array<int64_t, 0>{}, ScalarType::Float, std::nullopt, prediction.device());
  *loss.mutable_data_ptr<float>() = static_cast<float>(total / static_cast<double>(prediction.numel()));
  return {loss, stats};
}

Tensor masked_patch_loss_grad(const Tensor& prediction, const Tensor& images, const Tensor& hidden, const Tensor& stats,
                              const Tensor& grad, int64_t patch_h, int64_t patch_w) {
  PatchLossArgs args = check(prediction, images, hidden, patch_h, patch_w);
  require(stats.dim() == 3 && stats.size(0) == hidden.size(0) && stats.size(1) == hidden.size(1) && stats.size(2) == 2,
          "stats has shape ", shape_text(stats), "; expected (", hidden.size(0), ", ", hidden.size(1), ", 2).");
  require_dim(grad, "grad", 0, "a scalar");
  for (const auto& [tensor, name] : {std::pair{&stats, "stats"}, std::pair{&grad, "grad"}}) {
    require_cpu(*tensor, name);
    require_dtype(*tensor, name, ScalarType::Float);
    require_contiguous(*tensor, name);
  }
  args.stats = const_cast<float*>(stats.const_data_ptr<float>());  // only read here
  args.scale = 2 * *grad.const_data_ptr<float>() / static_cast<float>(prediction.numel());
  Tensor out = torch::stable::empty({prediction.size(0), prediction.size(1), prediction.size(2)},
                                    prediction.scalar_type(), std::nullopt, prediction.device());
  args.out = out.mutable_data_ptr();
  run(kernels().masked_patch_loss_grad, args, hidden.numel());
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) {
  m.impl("masked_patch_loss", TORCH_BOX(&fastmkd::masked_patch_loss));
  m.impl("masked_patch_loss_grad", TORCH_BOX(&fastmkd::masked_patch_loss_grad));
}
