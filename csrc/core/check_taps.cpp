#include <algorithm>
#include <cstddef>
#include <random>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/reference.h"

namespace fastmkd::check {
namespace {

TapAxis make_axis(int64_t cell, const TapShape& shape, bool transposed) {
  const int64_t out_cell = cell / shape.stride;
  return {static_cast<int32_t>(transposed ? cell : out_cell),
          static_cast<int32_t>(transposed ? out_cell : cell),
          static_cast<int32_t>(shape.kernel),
          static_cast<int32_t>(shape.stride),
          static_cast<int32_t>(shape.padding),
          static_cast<int32_t>(shape.dilation),
          transposed};
}

}  // namespace

Outcome tap_table(const Kernels& kernels, const TapShape& shape, bool transposed) {
  std::mt19937 engine(3);
  std::uniform_int_distribution<int64_t> of_ten(0, 9);
  std::vector<int64_t> cells, rank;
  for (int64_t i = 0; i < shape.batch * shape.grid_h * shape.grid_w; ++i) {
    const bool visible = i == 0 || of_ten(engine) >= shape.hidden;
    rank.push_back(visible ? static_cast<int64_t>(cells.size()) : -1);
    if (visible) cells.push_back(i);
  }
  TapTableArgs args{};
  args.cells = cells.data();
  args.rank = rank.data();
  args.num_cells = static_cast<int64_t>(cells.size());
  args.grid_h = shape.grid_h;
  args.grid_w = shape.grid_w;
  args.vertical = make_axis(shape.cell_h, shape, transposed);
  args.horizontal = make_axis(shape.cell_w, shape, transposed);
  const int64_t rows = args.num_cells * tap_table_pixels(args), taps = tap_table_taps(args);
  std::vector<int32_t> table(static_cast<size_t>(rows * taps), -7);
  std::vector<int64_t> pattern(static_cast<size_t>(rows), -7);
  args.table = table.data();
  args.pattern = pattern.data();
  std::vector<int64_t> scratch(static_cast<size_t>(tap_table_scratch(args) / 2 + 1), -7);
  kernels.tap_table(args, args.num_cells / 2, args.num_cells, scratch.data());
  kernels.tap_table(args, 0, args.num_cells / 2, scratch.data());

  const std::vector<int32_t> want = reference::tap_table(args);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t bits = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const auto at = static_cast<size_t>(row * taps + tap);
      if (table[at] != want[at]) {
        return {false, "row " + std::to_string(row) + ", tap " + std::to_string(tap) + " is " +
                           std::to_string(table[at]) + ", expected " + std::to_string(want[at])};
      }
      if (want[at] >= 0 && tap < kPatternTaps) bits |= int64_t{1} << tap;
    }
    if (pattern[static_cast<size_t>(row)] != bits) return {false, "the pattern of row " + std::to_string(row)};
  }
  return {true, "equal"};
}

}  // namespace fastmkd::check
