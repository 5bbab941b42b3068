// fastmkd_native::patch_embed on the CPU: gather the kept pixels, start the output at bias + position, one product.
#include <algorithm>
#include <optional>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/numbers.h"
#include "cpu/products.h"

namespace fastmkd {
namespace {

struct Inputs {
  PatchArgs patches;
  EpilogueArgs epilogue;
  int64_t batch, dim;

  int64_t rows() const { return batch * patches.kept; }
  int64_t row_size() const { return patches.channels * patches.patch_h * patches.patch_w; }
  bool starts_from_zero() const { return epilogue.bias == nullptr && epilogue.pos == nullptr; }
};

Inputs check(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& pos, const Tensor& keep, int64_t stride_h, int64_t stride_w) {
  require_dim(images, "images", 4, "(B, C, H, W)");
  require_dim(weight, "weight", 4, "(D, C, ph, pw)");
  require_dim(keep, "keep", 2, "(B, k)");
  require_cpu(images, "images");
  require_cpu(weight, "weight");
  require_cpu(keep, "keep");
  require_contiguous(images, "images");
  require_contiguous(weight, "weight");
  require_contiguous(keep, "keep");
  Inputs in{};
  in.patches.dtype = core_dtype(images, "images");
  require_dtype(weight, "weight", images.scalar_type());
  require_dtype(keep, "keep", ScalarType::Long);
  in.batch = images.size(0);
  in.dim = weight.size(0);
  in.patches.channels = images.size(1);
  in.patches.height = images.size(2);
  in.patches.width = images.size(3);
  in.patches.patch_h = weight.size(2);
  in.patches.patch_w = weight.size(3);
  in.patches.stride_h = stride_h;
  in.patches.stride_w = stride_w;
  require(weight.numel() > 0 && weight.size(1) == images.size(1), "weight has shape ", shape_text(weight),
          "; expected (D, ", images.size(1), ", ph, pw), none of them 0.");
  require(stride_h > 0 && stride_w > 0, "stride is (", stride_h, ", ", stride_w, "); expected two positive numbers.");
  require(in.patches.height >= in.patches.patch_h && in.patches.width >= in.patches.patch_w, "images have shape ",
          shape_text(images), "; expected at least one patch of ", weight.size(2), " x ", weight.size(3), " pixels.");
  const int64_t grid_h = (in.patches.height - in.patches.patch_h) / stride_h + 1;
  in.patches.grid_w = (in.patches.width - in.patches.patch_w) / stride_w + 1;
  const int64_t count = grid_h * in.patches.grid_w;
  require(keep.size(0) == in.batch, "keep has shape ", shape_text(keep), "; expected (", in.batch, ", k).");
  require_numbers(keep, "keep", 0, count);
  in.patches.images = images.const_data_ptr();
  in.patches.keep = in.epilogue.keep = keep.const_data_ptr<int64_t>();
  in.patches.kept = keep.size(1);
  in.epilogue.width = in.dim;
  if (bias) {
    require_cpu(*bias, "bias");
    require_dim(*bias, "bias", 1, "(D,)");
    require(bias->size(0) == in.dim, "bias has shape ", shape_text(*bias), "; expected (", in.dim, ",).");
    require_dtype(*bias, "bias", images.scalar_type());
    require_contiguous(*bias, "bias");
    in.epilogue.bias = bias->const_data_ptr();
    in.epilogue.bias_dtype = in.patches.dtype;
  }
  if (pos) {
    require_cpu(*pos, "pos");
    require_dim(*pos, "pos", 2, "(N, D)");
    require(pos->size(0) == count && pos->size(1) == in.dim, "pos has shape ", shape_text(*pos), "; expected (", count,
            ", ", in.dim, ").");
    if (pos->scalar_type() != ScalarType::Float) require_dtype(*pos, "pos", images.scalar_type());
    require_contiguous(*pos, "pos");
    in.epilogue.pos = pos->const_data_ptr();
    in.epilogue.pos_dtype = core_dtype(*pos, "pos");
  }
  return in;
}

Tensor gather_rows(Inputs& in, const Tensor& images, ScalarType dtype) {
  Tensor rows = empty_beside(images, {in.rows(), in.row_size()}, dtype);
  in.patches.row_dtype = core_dtype(rows, "rows");
  in.patches.rows = rows.mutable_data_ptr();
  torch::stable::parallel_for(
      0, in.rows(), std::max<int64_t>(1, kGrain / in.row_size()),
      [&, table = &kernels()](int64_t begin, int64_t end) { table->gather_patches(in.patches, begin, end); });
  return rows;
}

void prefill(Inputs& in, Tensor& out) {
  in.epilogue.out_dtype = core_dtype(out, "out");
  in.epilogue.out = out.mutable_data_ptr();
  torch::stable::parallel_for(
      0, in.rows(), std::max<int64_t>(1, kGrain / in.dim),
      [&, table = &kernels()](int64_t begin, int64_t end) { table->prefill(in.epilogue, begin, end); });
}

void multiply(const Tensor& rows, const Tensor& weight, Tensor& out, const Inputs& in) {
  const Tensor right = matrix_view(weight, in.row_size(), in.dim, true);
  add_product(matrix_view(out, in.rows(), in.dim, false), rows, right, in.starts_from_zero() ? 0.0 : 1.0);
}

Tensor patch_embed(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& pos, const Tensor& keep, int64_t stride_h, int64_t stride_w) {
  Inputs in = check(images, weight, bias, pos, keep, stride_h, stride_w);
  const DType dtype = in.patches.dtype;
  const bool is_low = dtype == DType::bf16 || dtype == DType::f16;
  const ScalarType out_type = is_low && in.epilogue.pos != nullptr ? pos->scalar_type() : images.scalar_type();
  Tensor out = empty_beside(images, {in.batch, in.patches.kept, in.dim}, out_type);
  if (in.rows() == 0) return out;

  if (!is_low) {
    if (!in.starts_from_zero()) prefill(in, out);
    multiply(gather_rows(in, images, out_type), weight, out, in);
    return out;
  }
  const bool out_is_float = out_type == ScalarType::Float;
  if (dtype == DType::bf16 && !out_is_float && multiplies_bf16()) {
    if (!in.starts_from_zero()) {
      Tensor start = empty_beside(images, {in.rows(), in.dim}, ScalarType::Float);
      prefill(in, start);
      narrow_into(start, dtype, out);
    }
    multiply(gather_rows(in, images, out_type), weight, out, in);
    return out;
  }
  // Widened: everything is summed in float32 and rounded once, at the end.
  Tensor sum = out_is_float ? out : empty_beside(images, {in.rows(), in.dim}, ScalarType::Float);
  if (!in.starts_from_zero()) prefill(in, sum);
  const Tensor wide_weight = widened(weight, dtype, {in.dim, in.row_size()});
  multiply(gather_rows(in, images, ScalarType::Float), wide_weight, sum, in);
  if (!out_is_float) narrow_into(sum, dtype, out);
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("patch_embed", TORCH_BOX(&fastmkd::patch_embed)); }
