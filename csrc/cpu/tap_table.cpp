// fastmkd_native::tap_table on the CPU.
#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/numbers.h"
#include "cpu/scratch.h"

namespace fastmkd {
namespace {

// Entries below which a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

std::tuple<Tensor, Tensor> tap_table(const Tensor& cells, const Tensor& rank, const std::vector<int64_t>& cell,
                                     const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                     bool transposed) {
  require_cpu(cells, "cells");
  require_cpu(rank, "rank");
  TapTableArgs args = check_tap_table(cells, rank, cell, kernel, stride, padding, dilation, transposed);
  require_numbers(cells, "cells", 0, rank.numel());
  require_numbers(rank, "rank", -1, args.num_cells);
  const int64_t pixels = tap_table_pixels(args), taps = tap_table_taps(args), rows = args.num_cells * pixels;
  Tensor out = torch::stable::empty({rows, taps}, ScalarType::Int, std::nullopt, cells.device());
  Tensor pattern = torch::stable::empty({rows}, ScalarType::Long, std::nullopt, cells.device());
  args.table = out.mutable_data_ptr<int32_t>();
  args.pattern = pattern.mutable_data_ptr<int64_t>();
  const Kernels& table = kernels();
  const int64_t scratch = tap_table_scratch(args);
  torch::stable::parallel_for(
      0, args.num_cells, std::max<int64_t>(1, kGrain / (pixels * taps)),
      [&](int64_t begin, int64_t end) { table.tap_table(args, begin, end, thread_scratch(scratch)); });
  return {out, pattern};
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("tap_table", TORCH_BOX(&fastmkd::tap_table)); }
