// Where the taps of a sliding window lie along one axis of a map that is cut into cells: the integer arithmetic of
// fastmkd::tap_table, one definition for CPU and CUDA.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTMKD_DEVICE __host__ __device__
#else
#define FASTMKD_DEVICE
#endif

namespace fastmkd {

// Bits of a row's pattern; more taps would not be exact where PyTorch adds the bits as float64.
constexpr int32_t kPatternTaps = 52;

struct TapAxis {
  int32_t row_side;     // pixels per cell of the map whose rows the table lists
  int32_t source_side;  // the same of the map that its entries point into
  int32_t kernel, stride, padding, dilation;
  bool transposed;  // rows are input pixels and entries output pixels, instead of the other way round
};

struct TapPlace {
  int32_t offset;  // cells from the row's own to the one that holds the tap
  int32_t pixel;   // where in that cell; -1 if this tap never meets a pixel
};

// Rounds down; b > 0.
FASTMKD_DEVICE static inline int32_t floor_div(int32_t a, int32_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// Where a tap of one pixel of a cell lies.
FASTMKD_DEVICE static inline TapPlace tap_place(const TapAxis& axis, int32_t pixel, int32_t tap) {
  int32_t at = pixel * axis.stride + tap * axis.dilation - axis.padding;  // from the corner of the cell
  bool exists = true;
  if (axis.transposed) {  // the output pixel for which the line above gives this input pixel
    const int32_t shifted = pixel + axis.padding - tap * axis.dilation;
    at = floor_div(shifted, axis.stride);
    exists = at * axis.stride == shifted;
  }
  const int32_t offset = floor_div(at, axis.source_side);
  return {offset, exists ? at - offset * axis.source_side : -1};
}

// Cells along one axis that can hold a tap: those at offsets low, low + 1, ...
struct TapSpan {
  int32_t low, count;
};

// Offsets that leave the grid from each of its cells are left out.
static inline TapSpan tap_span(const TapAxis& axis, int64_t grid) {
  const int32_t last_pixel = axis.row_side - 1, last_tap = axis.kernel - 1;
  const int32_t most = static_cast<int32_t>(grid) - 1;
  int32_t low = tap_place(axis, 0, axis.transposed ? last_tap : 0).offset;
  int32_t high = tap_place(axis, last_pixel, axis.transposed ? 0 : last_tap).offset;
  low = low < -most ? -most : low < most ? low : most;
  high = high < -most ? -most : high < most ? high : most;
  return {low, high - low + 1};
}

}  // namespace fastmkd
