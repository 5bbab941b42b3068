// Cells of a map as rows, and back. Nothing is rounded, so results are exact.
#include <cstddef>
#include <random>
#include <vector>

#include "core/check.h"
#include "core/check_tools.h"
#include "core/reference.h"

namespace fastmkd::check {

Outcome cell_rows(const Kernels& kernels, DType dtype, const CellShape& shape, bool channels_last) {
  const int64_t height = shape.grid_h * shape.patch, width = shape.grid_w * shape.patch, channels = shape.channels;
  const int64_t size = shape.patch * shape.patch * channels, lines = shape.batch * height;
  const Bytes map = random_values(dtype, shape.batch * channels * height * width, 30);
  std::vector<int64_t> slots(as_size(shape.batch * shape.grid_h * shape.grid_w), -1);
  std::mt19937 engine(31);
  int64_t visible = 0;
  for (int64_t& slot : slots) {
    if (static_cast<int64_t>(engine() % 10) >= shape.hidden) slot = visible++;
  }
  CellArgs args{};
  args.dtype = dtype;
  args.channels_last = channels_last;
  args.channels = channels;
  args.grid_h = shape.grid_h;
  args.grid_w = shape.grid_w;
  args.patch = shape.patch;
  args.slots = slots.data();
  for (DType row_dtype : {dtype, DType::f32}) {
    Bytes from = map, rows(as_size(visible * size) * reference::size_of(row_dtype), std::byte{0xff});
    Bytes back(map.size(), std::byte{0xff});
    args.row_dtype = row_dtype;
    args.rows = rows.data();
    args.map = from.data();
    kernels.gather_cells(args, 1, lines);
    kernels.gather_cells(args, 0, 1);
    args.map = back.data();
    kernels.scatter_cells(args, 1, lines);
    kernels.scatter_cells(args, 0, 1);
    for (int64_t i = 0; i < lines * width * channels; ++i) {
      const int64_t c = channels_last ? i % channels : i / (height * width) % channels;
      const int64_t line =
          channels_last ? i / channels / width : i / (height * width) / channels * height + i / width % height;
      const int64_t x = channels_last ? i / channels % width : i % width, y = line % height;
      const int64_t cell = (line / height * shape.grid_h + y / shape.patch) * shape.grid_w + x / shape.patch;
      const int64_t slot = slots[as_size(cell)], inner = y % shape.patch * shape.patch + x % shape.patch;
      const double want = reference::decode(dtype, map.data(), i);
      const double got = reference::decode(dtype, back.data(), i);
      if (slot < 0) {
        if (!(got == 0)) return {false, text("element ", i, " of a hidden cell is ", got)};
        continue;
      }
      const double row = reference::decode(row_dtype, rows.data(), slot * size + inner * channels + c);
      if (row != want || got != want) return {false, text("element ", i, " is ", row, ", then ", got, ", not ", want)};
    }
  }
  return {true, "equal"};
}

}  // namespace fastmkd::check
