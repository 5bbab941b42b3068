// fastmkd_native::recovered_loss and its gradient on the CPU.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/layout.h"
#include "cpu/scratch.h"

namespace fastmkd {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

size_t as_size(int64_t n) { return static_cast<size_t>(n); }

int64_t units_of(const RecoveredArgs& args) { return args.batch * args.grid_h; }

void require_small(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == shape.begin()[i];
  std::string expected;
  for (const int64_t n : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(n);
  require(fits, name, " has shape ", shape_text(tensor), "; expected (", expected, ").");
  require_cpu(tensor, name);
  require_dtype(tensor, name, ScalarType::Float);
  require_contiguous(tensor, name);
}

// The same rows with zeros behind the channels.
std::vector<float> pad(const Tensor& tensor, const RecoveredArgs& args) {
  const int64_t rows = tensor.numel() / args.channels;
  std::vector<float> padded(as_size(rows * args.padded));
  const float* from = tensor.const_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(from + r * args.channels, args.channels, &padded[as_size(r * args.padded)]);
  return padded;
}

RecoveredArgs check(const Tensor& rows, const Tensor& teacher, const Tensor& queries, int64_t patch) {
  require_dim(rows, "rows", 3, "(B, gh * gw, p * p * C)");
  require_dim(teacher, "teacher", 4, "(B, C, H, W)");
  require_cpu(rows, "rows");
  require_cpu(teacher, "teacher");
  require_contiguous(rows, "rows");
  RecoveredArgs args{};
  args.dtype = core_dtype(rows, "rows");
  require(args.dtype != DType::f64, "rows has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  if (teacher.scalar_type() != ScalarType::Float) require_dtype(teacher, "teacher", rows.scalar_type());
  args.teacher_dtype = core_dtype(teacher, "teacher");
  args.batch = teacher.size(0);
  args.channels = teacher.size(1);
  require(patch > 0 && teacher.size(2) % patch == 0 && teacher.size(3) % patch == 0, "patch is ", patch,
          "; expected a divisor of the teacher's ", teacher.size(2), " x ", teacher.size(3), " positions.");
  args.patch = patch;
  args.grid_h = teacher.size(2) / patch;
  args.grid_w = teacher.size(3) / patch;
  const int64_t cells = args.grid_h * args.grid_w, values = patch * patch * args.channels;
  require(rows.size(0) == args.batch && rows.size(1) == cells && rows.size(2) == values && rows.numel() > 0,
          "rows has shape ", shape_text(rows), "; expected (", args.batch, ", ", cells, ", ", values,
          "), none of them 0.");
  args.channels_last = is_channels_last(teacher);
  require(args.channels_last || teacher.is_contiguous(),
          "teacher is neither contiguous nor channels-last; call .contiguous() on it.");
  require_small(queries, "queries", {2, args.channels});
  constexpr int64_t kWidest = 16;  // lanes of any instruction set
  args.padded = (args.channels + kWidest - 1) / kWidest * kWidest;
  args.rows = rows.const_data_ptr();
  args.teacher = teacher.const_data_ptr();
  return args;
}

template <class Kernel>
void run(Kernel kernel, const RecoveredArgs& args) {
  const int64_t unit = args.patch * args.patch * args.grid_w * args.channels;
  torch::stable::parallel_for(0, units_of(args), std::max<int64_t>(1, kGrain / unit), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, thread_scratch(recovered_scratch(args)));
  });
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, like.device());
}

// The parts of an image's rows of cells become one context; returns the logarithm of the softmax's denominator.
float join(const RecoveredArgs& args, int64_t side, int64_t b, float* context) {
  const int64_t step = recovered_parts(args);
  const float* parts = args.parts + b * args.grid_h * step;
  const float* numbers = parts + 3 * args.padded + side;
  float most = numbers[0];
  for (int64_t y = 1; y < args.grid_h; ++y) most = std::max(most, numbers[y * step]);
  std::vector<double> total(as_size(args.channels));
  double sum = 0;
  for (int64_t y = 0; y < args.grid_h; ++y, parts += step, numbers += step) {
    const double share = std::exp(static_cast<double>(numbers[0]) - static_cast<double>(most));
    const float* part = parts + (1 + side) * args.padded;
    sum += share * static_cast<double>(numbers[2]);
    for (int64_t c = 0; c < args.channels; ++c) total[as_size(c)] += share * static_cast<double>(part[c]);
  }
  for (int64_t c = 0; c < args.channels; ++c) context[c] = static_cast<float>(total[as_size(c)] / sum);
  return static_cast<float>(static_cast<double>(most) + std::log(sum));
}

// Adds up `count` rows that lie `step` apart, in order.
void add_rows(const float* rows, int64_t count, int64_t step, int64_t channels, float* out) {
  std::vector<double> total(as_size(channels));
  for (int64_t r = 0; r < count; ++r, rows += step) {
    for (int64_t c = 0; c < channels; ++c) total[as_size(c)] += static_cast<double>(rows[c]);
  }
  for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<float>(total[as_size(c)]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recovered_loss(const Tensor& rows, const Tensor& teacher,
                                                          const Tensor& queries, int64_t patch) {
  RecoveredArgs args = check(rows, teacher, queries, patch);
  const std::vector<float> padded_queries = pad(queries, args);
  std::vector<double> squares(as_size(units_of(args)));
  std::vector<float> parts(as_size(units_of(args) * recovered_parts(args)));
  args.queries = padded_queries.data();
  args.squares = squares.data();
  args.parts = parts.data();
  run(kernels().recovered_loss, args);

  Tensor error = torch::stable::empty(std::array<int64_t, 0>{}, ScalarType::Float, std::nullopt, rows.device());
  Tensor difference = empty(rows, {args.batch, args.channels});
  Tensor contexts = empty(rows, {2, args.batch, args.channels});
  Tensor log_sums = empty(rows, {2, args.batch});
  double total = 0;  // in the order of the units, whichever thread had them
  for (const double part : squares) total += part;
  *error.mutable_data_ptr<float>() = static_cast<float>(total / 2 / static_cast<double>(rows.numel()));
  for (int64_t b = 0; b < args.batch; ++b) {
    add_rows(args.parts + b * args.grid_h * recovered_parts(args), args.grid_h, recovered_parts(args), args.channels,
             difference.mutable_data_ptr<float>() + b * args.channels);
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t place = side * args.batch + b;
      log_sums.mutable_data_ptr<float>()[place] =
          join(args, side, b, contexts.mutable_data_ptr<float>() + place * args.channels);
    }
  }
  return {error, difference, contexts, log_sums};
}

std::tuple<Tensor, Tensor> recovered_loss_grad(const Tensor& rows, const Tensor& teacher, const Tensor& queries,
                                               const Tensor& log_sums, const Tensor& grad_error,
                                               const Tensor& grad_difference, const Tensor& grad_contexts,
                                               const Tensor& shifts, int64_t patch) {
  RecoveredArgs args = check(rows, teacher, queries, patch);
  require_small(log_sums, "log_sums", {2, args.batch});
  require_small(grad_error, "grad_error", {});
  require_small(grad_difference, "grad_difference", {args.batch, args.channels});
  require_small(grad_contexts, "grad_contexts", {2, args.batch, args.channels});
  require_small(shifts, "shifts", {2, args.batch});
  const std::vector<float> padded_queries = pad(queries, args), padded_difference = pad(grad_difference, args),
                           padded_contexts = pad(grad_contexts, args);
  std::vector<float> query_sums(as_size(units_of(args) * 2 * args.padded));
  Tensor d_rows =
      torch::stable::empty({rows.size(0), rows.size(1), rows.size(2)}, rows.scalar_type(), std::nullopt, rows.device());
  Tensor d_queries = empty(rows, {2, args.channels});
  args.queries = padded_queries.data();
  args.log_sums = log_sums.const_data_ptr<float>();
  args.shifts = shifts.const_data_ptr<float>();
  args.grad_difference = padded_difference.data();
  args.grad_contexts = padded_contexts.data();
  args.scale = *grad_error.const_data_ptr<float>() / static_cast<float>(rows.numel());
  args.out = d_rows.mutable_data_ptr();
  args.query_sums = query_sums.data();
  run(kernels().recovered_loss_grad, args);
  for (int64_t side = 0; side < 2; ++side) {
    add_rows(query_sums.data() + side * args.padded, units_of(args), 2 * args.padded, args.channels,
             d_queries.mutable_data_ptr<float>() + side * args.channels);
  }
  return {d_rows, d_queries};
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) {
  m.impl("recovered_loss", TORCH_BOX(&fastmkd::recovered_loss));
  m.impl("recovered_loss_grad", TORCH_BOX(&fastmkd::recovered_loss_grad));
}
