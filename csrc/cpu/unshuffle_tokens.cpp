// fastmkd_native::unshuffle_tokens on the CPU.
#include <algorithm>
#include <utility>
#include <vector>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/numbers.h"

namespace fastmkd {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// The row of tokens that stands at each place of each image, -1 where it is the mask token.
std::vector<int64_t> invert(const Tensor& keep, int64_t rows, int64_t places) {
  const int64_t batch = keep.size(0), kept = keep.size(1), prefix = rows - kept;
  require_numbers(keep, "keep", 0, places - prefix);
  const int64_t* patch = keep.const_data_ptr<int64_t>();
  std::vector<int64_t> source(static_cast<size_t>(batch * places), -1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t place = i < prefix ? i : prefix + patch[b * kept + i - prefix];
      int64_t& row = source[static_cast<size_t>(b * places + place)];
      require(row < 0, "keep names the patch ", place - prefix, " twice for image ", b, "; each may occur once.");
      row = b * rows + i;
    }
  }
  return source;
}

Tensor unshuffle_tokens(const Tensor& tokens, const Tensor& keep, const Tensor& mask_token, const Tensor& positions) {
  require_dim(tokens, "tokens", 3, "(B, P + k, D)");
  require_dim(keep, "keep", 2, "(B, k)");
  require_dim(mask_token, "mask_token", 1, "(D,)");
  require_dim(positions, "positions", 2, "(P + N, D)");
  UnshuffleArgs args{};
  args.dtype = core_dtype(tokens, "tokens");
  require(args.dtype != DType::f64, "tokens has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  const int64_t batch = tokens.size(0), rows = tokens.size(1), width = tokens.size(2), places = positions.size(0);
  require(width >= 1, "tokens has shape ", shape_text(tokens), "; expected at least one channel.");
  require(keep.size(0) == batch && keep.size(1) <= rows, "keep has shape ", shape_text(keep), "; expected (", batch,
          ", k), k at most ", rows, ".");
  require(mask_token.size(0) == width, "mask_token has shape ", shape_text(mask_token), "; expected (", width, ",).");
  require(places >= rows && positions.size(1) == width, "positions has shape ", shape_text(positions),
          "; expected at least ", rows, " rows of ", width, ".");
  require_dtype(keep, "keep", ScalarType::Long);
  if (positions.scalar_type() != ScalarType::Float) require_dtype(positions, "positions", tokens.scalar_type());
  require_dtype(mask_token, "mask_token", positions.scalar_type());
  for (const auto& [tensor, name] : {std::pair{&tokens, "tokens"}, std::pair{&keep, "keep"},
                                     std::pair{&mask_token, "mask_token"}, std::pair{&positions, "positions"}}) {
    require_cpu(*tensor, name);
    require_contiguous(*tensor, name);
  }
  const std::vector<int64_t> source = invert(keep, rows, places);
  args.tokens = tokens.const_data_ptr();
  args.source = source.data();
  args.out_dtype = core_dtype(positions, "positions");
  args.mask_token = mask_token.const_data_ptr();
  args.positions = positions.const_data_ptr();
  args.places = places;
  args.width = width;
  Tensor out = torch::stable::empty({batch, places, width}, positions.scalar_type(), std::nullopt, tokens.device());
  args.out = out.mutable_data_ptr();
  const Kernels& table = kernels();
  torch::stable::parallel_for(0, batch * places, std::max<int64_t>(1, kGrain / width),
                              [&](int64_t begin, int64_t end) { table.unshuffle_tokens(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("unshuffle_tokens", TORCH_BOX(&fastmkd::unshuffle_tokens)); }
