// fastmkd_native::masked_conv2d and its weight gradient on the CPU. bf16 and f16 rows are widened to float32 before
// and the result is rounded once after; weights are widened while they are packed.
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/scratch.h"

namespace fastmkd {
namespace {

constexpr int64_t kGrain = 16384;        // elements to convert that are worth a second thread
constexpr int64_t kWorkGrain = 1 << 17;  // multiply-adds that are

Tensor float_tensor(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, like.device());
}

// The tensor itself when it is float32, else a float32 copy; contiguous.
Tensor widened(const Tensor& tensor, const char* name) {
  const DType dtype = core_dtype(tensor, name);
  if (dtype == DType::f32) return tensor;
  Tensor wide = torch::stable::empty(tensor.sizes(), ScalarType::Float, std::nullopt, tensor.device());
  const void* from = tensor.const_data_ptr();
  float* to = wide.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tensor.numel(), kGrain, [&, table = &kernels()](int64_t begin, int64_t end) {
    table->widen(dtype, from, to, begin, end);
  });
  return wide;
}

// The tensor itself when `type` is float32, else a copy rounded to it.
Tensor narrowed(const Tensor& wide, ScalarType type) {
  if (type == ScalarType::Float) return wide;
  Tensor out = torch::stable::empty(wide.sizes(), type, std::nullopt, wide.device());
  const DType dtype = core_dtype(out, "out");
  const float* from = wide.const_data_ptr<float>();
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, wide.numel(), kGrain, [&, table = &kernels()](int64_t begin, int64_t end) {
    table->narrow(dtype, from, to, begin, end);
  });
  return out;
}

void check_rows(const Tensor& rows, const char* name) {
  require_dim(rows, name, 2, "(N, C), a row per visible pixel");
  require_cpu(rows, name);
  require_contiguous(rows, name);
  require(core_dtype(rows, name) != DType::f64, name,
          " has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  require(rows.size(1) > 0, name, " has shape ", shape_text(rows), "; expected at least one channel.");
}

void check_table(const Tensor& table, const char* name, int64_t rows, int64_t taps) {
  require_dim(table, name, 2, "(N, kh * kw)");
  require_cpu(table, name);
  require_dtype(table, name, ScalarType::Int);
  require_contiguous(table, name);
  require(table.size(0) == rows && table.size(1) == taps, name, " has shape ", shape_text(table), "; expected (", rows,
          ", ", taps, ").");
}

void check_order(const Tensor& order, const char* name, int64_t rows) {
  require_dim(order, name, 1, "(N,)");
  require_cpu(order, name);
  require_dtype(order, name, ScalarType::Int);
  require_contiguous(order, name);
  require(order.size(0) == rows, name, " has shape ", shape_text(order), "; expected (", rows, ",).");
}

void check_groups(int64_t groups, int64_t cin, int64_t cout) {
  require(groups >= 1 && cin % groups == 0 && cout % groups == 0, "groups is ", groups,
          "; expected a divisor of the input channels (", cin, ") and of the output channels (", cout, ").");
}

// The kernels trust the row numbers in `table`, so every one is looked at.
void check_row_numbers(const Tensor& table, const char* name, int64_t rows) {
  const int32_t* data = table.const_data_ptr<int32_t>();
  const int64_t count = table.numel();
  uint32_t largest = 0;  // of the numbers plus 1: those below -1 wrap around to the largest of all
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(data[i]) + 1u);
  require(largest <= rows, name, " holds a row number outside -1 to ", rows - 1, ".");
}

int64_t grain(int64_t units, double work) {
  if (work <= 0) return units;
  return std::max<int64_t>(1, static_cast<int64_t>(kWorkGrain * static_cast<double>(units) / work));
}

Tensor masked_conv2d(const Tensor& values, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& taps,
                     const Tensor& taps_back, const Tensor& order, const Tensor& order_back, int64_t groups) {
  check_rows(values, "values");
  require_dim(weight, "weight", 4, "(Cout, Cin / groups, kh, kw)");
  require_cpu(weight, "weight");
  require_dtype(weight, "weight", values.scalar_type());
  require(weight.numel() > 0, "weight has shape ", shape_text(weight), "; expected no dimension of 0.");
  MaskedConvArgs args{};
  args.cin = values.size(1);
  args.cout = weight.size(0);
  args.groups = groups;
  args.num_taps = weight.size(2) * weight.size(3);
  check_groups(groups, args.cin, args.cout);
  require(weight.size(1) == args.cin / groups, "weight has shape ", shape_text(weight), "; expected (Cout, ",
          args.cin / groups, ", kh, kw) for ", args.cin, " input channels in ", groups, " groups.");
  require_dim(taps, "taps", 2, "(N_out, kh * kw)");
  args.n_out = taps.size(0);
  require(args.n_out <= std::numeric_limits<int32_t>::max(), "taps has ", args.n_out,
          " rows; expected fewer than 2^31.");
  check_table(taps, "taps", args.n_out, args.num_taps);
  const bool has_gradient = taps_back.dim() != 2 || taps_back.size(0) > 0;  // else nobody wants it
  const int64_t rows_back = has_gradient ? values.size(0) : 0;
  check_table(taps_back, "taps_back", rows_back, args.num_taps);
  check_order(order, "order", args.n_out);
  check_order(order_back, "order_back", rows_back);
  check_row_numbers(taps, "taps", values.size(0));
  if (bias) {
    require_cpu(*bias, "bias");
    require_dim(*bias, "bias", 1, "(Cout,)");
    require(bias->size(0) == args.cout, "bias has shape ", shape_text(*bias), "; expected (", args.cout, ",).");
    require_dtype(*bias, "bias", values.scalar_type());
    require_contiguous(*bias, "bias");
  }

  // The two dimensions of the kernel as one; only a strange view needs a copy for that.
  const bool one_stride =
      weight.size(2) == 1 || weight.size(3) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
  const Tensor kernel = one_stride ? weight : torch::stable::contiguous(weight);
  args.weight_dtype = core_dtype(kernel, "weight");
  args.weight = kernel.const_data_ptr();
  args.weight_strides[0] = kernel.stride(0);
  args.weight_strides[1] = kernel.stride(1);
  args.weight_strides[2] = kernel.size(3) == 1 ? kernel.stride(2) : kernel.stride(3);
  const std::optional<Tensor> wide_bias = bias ? std::optional<Tensor>(widened(*bias, "bias")) : std::nullopt;
  Tensor out = float_tensor(values, {args.n_out, args.cout});
  args.bias = wide_bias ? wide_bias->const_data_ptr<float>() : nullptr;
  args.taps = taps.const_data_ptr<int32_t>();
  args.out = out.mutable_data_ptr<float>();

  const Kernels& table = kernels();
  const bool depthwise = groups == args.cin && groups == args.cout;
  args.dtype = core_dtype(values, "values");
  const ConvPlan plan = (depthwise ? table.masked_depthwise_plan : table.masked_conv2d_plan)(args);
  const Tensor rows = plan.dtype == args.dtype ? values : widened(values, "values");
  args.dtype = plan.dtype;
  args.values = rows.const_data_ptr();
  const auto run = depthwise ? table.masked_depthwise : table.masked_conv2d;
  const double work = static_cast<double>(args.n_out) * static_cast<double>(weight.numel());
  torch::stable::parallel_for(0, plan.units, grain(plan.units, work),
                              [&](int64_t begin, int64_t end) { run(args, begin, end, thread_scratch(plan.scratch)); });
  return narrowed(out, values.scalar_type());
}

Tensor masked_conv2d_weight(const Tensor& values, const Tensor& grad, const Tensor& taps, const Tensor& order,
                            int64_t kh, int64_t kw, int64_t groups) {
  check_rows(values, "values");
  check_rows(grad, "grad");
  require_dtype(grad, "grad", values.scalar_type());
  require(kh > 0 && kw > 0, "the kernel is (", kh, ", ", kw, "); expected two positive numbers.");
  MaskedConvWeightArgs args{};
  args.n_out = grad.size(0);
  args.cin = values.size(1);
  args.cout = grad.size(1);
  args.groups = groups;
  args.num_taps = kh * kw;
  check_groups(groups, args.cin, args.cout);
  require(args.n_out <= std::numeric_limits<int32_t>::max(), "grad has ", args.n_out,
          " rows; expected fewer than 2^31.");
  check_table(taps, "taps", args.n_out, args.num_taps);
  check_order(order, "order", args.n_out);
  check_row_numbers(taps, "taps", values.size(0));

  Tensor out = float_tensor(values, {args.cout, args.cin / groups, kh, kw});
  args.taps = taps.const_data_ptr<int32_t>();
  args.out = out.mutable_data_ptr<float>();

  const Kernels& table = kernels();
  const bool depthwise = groups == args.cin && groups == args.cout;
  args.dtype = core_dtype(values, "values");
  const ConvPlan plan = (depthwise ? table.masked_depthwise_weight_plan : table.masked_conv2d_weight_plan)(args);
  const bool widens = plan.dtype != args.dtype;
  const Tensor rows = widens ? widened(values, "values") : values, grads = widens ? widened(grad, "grad") : grad;
  args.dtype = plan.dtype;
  args.values = rows.const_data_ptr();
  args.grad = grads.const_data_ptr();
  const auto run = depthwise ? table.masked_depthwise_weight : table.masked_conv2d_weight;
  const auto reduce = depthwise ? table.masked_depthwise_weight_reduce : table.masked_conv2d_weight_reduce;
  Tensor sums = float_tensor(values, {plan.sums});
  args.sums = sums.mutable_data_ptr<float>();
  const double work = static_cast<double>(args.n_out) * static_cast<double>(out.numel());
  torch::stable::parallel_for(0, plan.units, grain(plan.units, work),
                              [&](int64_t begin, int64_t end) { run(args, begin, end, thread_scratch(plan.scratch)); });
  const int64_t reduce_grain = std::max<int64_t>(1, kGrain * plan.reduce_units / std::max<int64_t>(1, plan.sums));
  torch::stable::parallel_for(0, plan.reduce_units, reduce_grain,
                              [&](int64_t begin, int64_t end) { reduce(args, begin, end); });
  return narrowed(out, values.scalar_type());
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&fastmkd::masked_conv2d));
  m.impl("masked_conv2d_weight", TORCH_BOX(&fastmkd::masked_conv2d_weight));
}
