// The masked autoencoder's two ends: tokens back at their places, and the loss on hidden patches.
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/check_tools.h"
#include "core/reference.h"

namespace fastmkd::check {

Outcome unshuffle_tokens(const Kernels& kernels, DType dtype, DType out_dtype, const UnshuffleShape& shape) {
  const int64_t places = shape.prefix + shape.patches, rows = shape.prefix + shape.kept;
  const Bytes tokens = random_values(dtype, shape.batch * rows * shape.width, 18);
  const Bytes mask_token = random_values(out_dtype, shape.width, 19);
  const Bytes positions = random_values(out_dtype, places * shape.width, 20);
  const std::vector<int64_t> keep = random_keep(shape.batch, shape.patches, shape.kept, 21);
  std::vector<int64_t> source(as_size(shape.batch * places), -1);
  for (int64_t i = 0; i < shape.batch * rows; ++i) {
    const int64_t b = i / rows, row = i % rows;
    const int64_t place = row < shape.prefix ? row : shape.prefix + keep[as_size(b * shape.kept + row - shape.prefix)];
    source[as_size(b * places + place)] = i;
  }
  Bytes out(as_size(shape.batch) * positions.size(), std::byte{0xff});
  UnshuffleArgs args{dtype,  tokens.data(), source.data(), out_dtype, mask_token.data(), positions.data(),
                     places, shape.width,   out.data()};
  const int64_t half = shape.batch * places / 2;
  kernels.unshuffle_tokens(args, half, shape.batch * places);
  kernels.unshuffle_tokens(args, 0, half);
  return equals_rounded(out_dtype, out, reference::unshuffle_tokens(args, shape.batch));
}

Outcome masked_patch_loss(const Kernels& kernels, DType dtype, DType image_dtype, const PatchLossShape& shape,
                          bool normalize) {
  PatchLossArgs args{};
  args.dtype = dtype;
  args.image_dtype = image_dtype;
  args.channels = shape.channels;
  args.height = shape.grid_h * shape.patch_h;
  args.width = shape.grid_w * shape.patch_w;
  args.patch_h = shape.patch_h;
  args.patch_w = shape.patch_w;
  args.hidden_count = shape.hidden;
  args.normalize = normalize;
  const int64_t rows = shape.batch * shape.hidden, values = rows * patch_values(args);
  const Bytes prediction = random_values(dtype, values, 22);
  const Bytes images = random_values(image_dtype, shape.batch * args.channels * args.height * args.width, 23);
  const std::vector<int64_t> hidden = random_keep(shape.batch, shape.grid_h * shape.grid_w, shape.hidden, 24);
  std::vector<float> stats(as_size(2 * rows), kNaN);
  std::vector<double> sums(as_size(rows), kNaN);
  args.prediction = prediction.data();
  args.images = images.data();
  args.hidden = hidden.data();
  args.stats = stats.data();
  args.sums = sums.data();
  for (int64_t r = rows; r-- > 0;) {
    std::vector<float> scratch(as_size(patch_loss_scratch(args)), kNaN);
    kernels.masked_patch_loss(args, r, r + 1, scratch.data());
  }
  const reference::PatchLoss want = reference::masked_patch_loss(args, shape.batch);
  for (size_t i = 0; i < sums.size(); ++i) {
    if (!close(sums[i], want.sums[i], 2e-6)) return {false, text("sum ", i, " is ", sums[i], ", not ", want.sums[i])};
  }
  for (size_t i = 0; i < stats.size(); ++i) {
    const double error = std::fabs(stats[i] - want.stats[i]);
    if (!(error <= 1e-6 * (1 + std::fabs(want.stats[i])))) return {false, text("statistic ", i, " is off by ", error)};
  }
  Bytes out(prediction.size(), std::byte{0xff});
  args.scale = 0.75f;
  args.out = out.data();
  std::vector<float> scratch(as_size(patch_loss_scratch(args)), kNaN);
  kernels.masked_patch_loss_grad(args, rows / 2, rows, scratch.data());
  kernels.masked_patch_loss_grad(args, 0, rows / 2, scratch.data());
  const double unit = dtype == DType::f32 ? 1e-6 : dtype == DType::f16 ? 1e-3 : 8e-3;
  for (int64_t i = 0; i < values; ++i) {
    const double got = reference::decode(dtype, out.data(), i), expected = 0.75 * want.differences[as_size(i)];
    const double error = std::fabs(got - expected);
    if (!(error <= unit * (1 + std::fabs(expected)))) return {false, text("gradient ", i, " is off by ", error)};
  }
  return {true, "right"};
}

}  // namespace fastmkd::check
