// fastmkd_native::align_cells and its gradient on the CPU: visible cells as rows, torch's products, rows at their
// places.
#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/layout.h"
#include "cpu/products.h"

namespace fastmkd {
namespace {

struct Inputs {
  CellArgs cells;
  int64_t batch, dim;
  std::vector<int64_t> slots;  // of all cells: how many visible ones lie before, -1 where hidden
  int64_t visible;             // cells of the batch

  int64_t count() const { return cells.grid_h * cells.grid_w; }
  int64_t row_size() const { return cells.patch * cells.patch * cells.channels; }
  int64_t lines() const { return batch * cells.grid_h * cells.patch; }
  int64_t line_size() const { return cells.channels * cells.grid_w * cells.patch; }
};

Inputs check(const Tensor& level, const Tensor& weight, const std::optional<Tensor>& visible, int64_t patch) {
  require_dim(level, "level", 4, "(B, C, gh * p, gw * p)");
  require_dim(weight, "weight", 2, "(D, p * p * C)");
  require_cpu(level, "level");
  require_cpu(weight, "weight");
  Inputs in{};
  in.cells.dtype = core_dtype(level, "level");
  require(in.cells.dtype != DType::f64,
          "level has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  in.cells.channels_last = is_channels_last(level);
  require(in.cells.channels_last || level.is_contiguous(),
          "level is neither contiguous nor channels-last; call .contiguous() on it.");
  require(patch > 0 && level.size(2) % patch == 0 && level.size(3) % patch == 0, "patch is ", patch,
          "; expected a divisor of the level's ", level.size(2), " x ", level.size(3), " positions.");
  require_dtype(weight, "weight", level.scalar_type());
  require_contiguous(weight, "weight");
  in.batch = level.size(0);
  in.dim = weight.size(0);
  in.cells.channels = level.size(1);
  in.cells.patch = patch;
  in.cells.grid_h = level.size(2) / patch;
  in.cells.grid_w = level.size(3) / patch;
  require(weight.numel() > 0 && weight.size(1) == in.row_size(), "weight has shape ", shape_text(weight),
          "; expected (D, ", in.row_size(), "), none of them 0.");
  const int64_t total = in.batch * in.count();
  in.slots.assign(static_cast<size_t>(total), -1);
  const bool* seen = nullptr;
  if (visible) {
    require_cpu(*visible, "visible");
    require_dim(*visible, "visible", 2, "(B, gh * gw)");
    require_dtype(*visible, "visible", ScalarType::Bool);
    require_contiguous(*visible, "visible");
    require(visible->size(0) == in.batch && visible->size(1) == in.count(), "visible has shape ", shape_text(*visible),
            "; expected (", in.batch, ", ", in.count(), ").");
    seen = visible->const_data_ptr<bool>();
  }
  for (int64_t i = 0; i < total; ++i) {
    if (seen == nullptr || seen[i]) in.slots[static_cast<size_t>(i)] = in.visible++;
  }
  in.cells.map = level.data_ptr();
  in.cells.slots = in.slots.data();
  return in;
}

void require_tokens(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == shape.begin()[i];
  std::string expected;
  for (const int64_t n : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(n);
  require(fits, name, " has shape ", shape_text(tensor), "; expected (", expected, ").");
  require_cpu(tensor, name);
  require_dtype(tensor, name, dtype);
  require_contiguous(tensor, name);
}

// What is multiplied: the level's own type, or float32 where the processor has no products of it.
ScalarType product_type(const Tensor& level) {
  return level.scalar_type() == ScalarType::BFloat16 && multiplies_bf16() ? ScalarType::BFloat16 : ScalarType::Float;
}

// May be a view of the tensor.
Tensor as_product_type(const Tensor& tensor, const Inputs& in, int64_t rows, int64_t columns) {
  if (product_type(tensor) == tensor.scalar_type()) return matrix_view(tensor, rows, columns, false);
  return widened(tensor, in.cells.dtype, {rows, columns});
}

template <class Kernel>
void move_lines(Kernel kernel, const Inputs& in, const Tensor& rows) {
  CellArgs args = in.cells;
  args.row_dtype = core_dtype(rows, "rows");
  args.rows = rows.data_ptr();
  torch::stable::parallel_for(0, in.lines(), std::max<int64_t>(1, kGrain / in.line_size()),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// bias + rows @ weight^T for the visible cells, in the level's type.
Tensor multiply(const Inputs& in, const Tensor& level, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType type = product_type(level);
  Tensor tokens = empty_beside(level, {in.visible, in.dim}, level.scalar_type());
  if (in.visible == 0) return tokens;
  Tensor rows = empty_beside(level, {in.visible, in.row_size()}, type);
  move_lines(kernels().gather_cells, in, rows);
  Tensor sum = type == level.scalar_type() ? tokens : empty_beside(level, {in.visible, in.dim}, type);
  if (bias) {
    Tensor start = type == ScalarType::Float ? sum : empty_beside(level, {in.visible, in.dim}, ScalarType::Float);
    EpilogueArgs args{};
    args.bias_dtype = in.cells.dtype;
    args.bias = bias->const_data_ptr();
    args.width = in.dim;
    args.out = start.mutable_data_ptr();
    args.out_dtype = DType::f32;
    torch::stable::parallel_for(
        0, in.visible, std::max<int64_t>(1, kGrain / in.dim),
        [&, table = &kernels()](int64_t begin, int64_t end) { table->prefill(args, begin, end); });
    if (type != ScalarType::Float) narrow_into(start, in.cells.dtype, sum);
  }
  const Tensor right = as_product_type(weight, in, in.dim, in.row_size());
  add_product(sum, rows, matrix_view(right, in.row_size(), in.dim, true), bias ? 1.0 : 0.0);
  if (type != level.scalar_type()) narrow_into(sum, in.cells.dtype, tokens);
  return tokens;
}

Tensor align_cells(const Tensor& level, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& visible, const std::optional<Tensor>& mask_token,
                   const Tensor& positions, int64_t patch) {
  const Inputs in = check(level, weight, visible, patch);
  require(visible.has_value() == mask_token.has_value(), "visible and mask_token go together; pass both or neither.");
  if (bias) require_tokens(*bias, "bias", {in.dim}, level.scalar_type());
  if (mask_token) require_tokens(*mask_token, "mask_token", {in.dim}, level.scalar_type());
  require_tokens(positions, "positions", {in.count(), in.dim}, level.scalar_type());
  Tensor out = empty_beside(level, {in.batch, in.count(), in.dim}, level.scalar_type());
  const Tensor tokens = multiply(in, level, weight, bias);
  UnshuffleArgs args{};
  args.dtype = args.out_dtype = in.cells.dtype;
  args.tokens = tokens.const_data_ptr();
  args.source = in.slots.data();
  args.mask_token = mask_token ? mask_token->const_data_ptr() : nullptr;
  args.positions = positions.const_data_ptr();
  args.places = in.count();
  args.width = in.dim;
  args.out = out.mutable_data_ptr();
  torch::stable::parallel_for(
      0, in.batch * in.count(), std::max<int64_t>(1, kGrain / in.dim),
      [&, table = &kernels()](int64_t begin, int64_t end) { table->unshuffle_tokens(args, begin, end); });
  return out;
}

// The visible cells' rows of the gradient, side by side.
Tensor visible_rows(const Inputs& in, const Tensor& grad) {
  if (in.visible == in.batch * in.count()) return matrix_view(grad, in.visible, in.dim, false);
  Tensor rows = empty_beside(grad, {in.visible, in.dim}, grad.scalar_type());
  const size_t bytes = static_cast<size_t>(in.dim) * (grad.scalar_type() == ScalarType::Float ? 4 : 2);
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  for (size_t i = 0; i < in.slots.size(); ++i) {
    if (in.slots[i] >= 0) std::memcpy(to + static_cast<size_t>(in.slots[i]) * bytes, from + i * bytes, bytes);
  }
  return rows;
}

std::tuple<Tensor, Tensor> align_cells_grad(const Tensor& level, const Tensor& weight,
                                            const std::optional<Tensor>& visible, const Tensor& grad, int64_t patch) {
  Inputs in = check(level, weight, visible, patch);
  require_tokens(grad, "grad", {in.batch, in.count(), in.dim}, level.scalar_type());
  const ScalarType type = product_type(level);
  Tensor d_level = torch::stable::empty_like(level);
  Tensor d_weight = empty_beside(weight, {in.dim, in.row_size()}, weight.scalar_type());
  Tensor rows = empty_beside(level, {in.visible, in.row_size()}, type);
  const Tensor owner = visible_rows(in, grad), pull = as_product_type(owner, in, in.visible, in.dim);
  const bool widens = type != level.scalar_type();

  move_lines(kernels().gather_cells, in, rows);
  Tensor sum = widens ? empty_beside(weight, {in.dim, in.row_size()}, type) : d_weight;
  add_product(sum, matrix_view(pull, in.dim, in.visible, true), rows, 0.0);
  if (widens) narrow_into(sum, in.cells.dtype, d_weight);

  add_product(rows, pull, as_product_type(weight, in, in.dim, in.row_size()), 0.0);
  in.cells.map = d_level.mutable_data_ptr();
  move_lines(kernels().scatter_cells, in, rows);
  return {d_level, d_weight};
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) {
  m.impl("align_cells", TORCH_BOX(&fastmkd::align_cells));
  m.impl("align_cells_grad", TORCH_BOX(&fastmkd::align_cells_grad));
}
