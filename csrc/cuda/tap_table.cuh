// The row under each tap of each visible pixel, and which taps a row has. One thread a row.
//
// A block makes its rows in shared memory, from where they leave as one run of consecutive words. Neighbour cells are
// looked up in `rank` again and again: neighbouring threads ask for the same few words, which the cache hands to all of
// them at once.
//
// Holds no torch and no CUDA runtime call, so that tests/native can run this very source on a CPU.
#pragma once

#include <cstdint>

#include "core/tap_axis.h"
#include "cuda/shim.cuh"

namespace fastmkd::cuda {

constexpr int kTapThreads = 128;
constexpr int kMostTaps = 8192;  // words of a block's tile: 32 of the 48 KiB every device grants

struct TapTableParams {
  const int64_t* cells;  // (num_cells)
  const int64_t* rank;   // (batch, grid_h, grid_w)
  int32_t* table;        // (rows, taps)
  int64_t* pattern;      // (rows)
  int rows;
  int grid_h, grid_w;
  TapAxis vertical, horizontal;
};

// A large kernel leaves room for fewer rows than there are threads.
FASTMKD_DEVICE inline int tap_rows_per_block(int taps) {
  const int fit = kMostTaps / taps;
  return fit < kTapThreads ? fit : kTapThreads;
}

inline int tap_shared_bytes(int taps) { return tap_rows_per_block(taps) * taps * static_cast<int>(sizeof(int32_t)); }

// Writes one row of the table to `out` and returns its pattern.
__device__ inline int64_t tap_row(const TapTableParams& p, int row, int32_t* out) {
  const TapAxis &v = p.vertical, &h = p.horizontal;
  const int pixels = v.row_side * h.row_side, pixel = row % pixels;
  const int64_t cell = p.cells[row / pixels];
  const int cells = p.grid_h * p.grid_w, of_image = static_cast<int>(cell % cells);
  const int64_t* rank = p.rank + (cell - of_image);
  int64_t pattern = 0;
  int tap = 0;
  for (int i = 0; i < v.kernel; ++i) {
    const TapPlace down = tap_place(v, pixel / h.row_side, i);
    const int y = of_image / p.grid_w + down.offset;
    const bool has_row = down.pixel >= 0 && y >= 0 && y < p.grid_h;
    for (int j = 0; j < h.kernel; ++j, ++tap) {
      const TapPlace across = tap_place(h, pixel % h.row_side, j);
      const int x = of_image % p.grid_w + across.offset;
      const bool exists = has_row && across.pixel >= 0 && x >= 0 && x < p.grid_w;
      const int owner = exists ? static_cast<int>(rank[y * p.grid_w + x]) : -1;
      out[tap] = owner < 0 ? -1 : (owner * v.source_side + down.pixel) * h.source_side + across.pixel;
      if (owner >= 0 && tap < kPatternTaps) pattern |= int64_t{1} << tap;
    }
  }
  return pattern;
}

__global__ void __launch_bounds__(kTapThreads) tap_table_kernel(TapTableParams p) {
  FASTMKD_DYNAMIC_SHARED(int32_t, tile);  // (rows of the block, taps)
  const int thread = static_cast<int>(threadIdx.x);
  const int taps = p.vertical.kernel * p.horizontal.kernel, most = tap_rows_per_block(taps);
  const int64_t begin = int64_t{blockIdx.x} * most;
  const int here = p.rows - begin < most ? static_cast<int>(p.rows - begin) : most;
  if (thread < here) p.pattern[begin + thread] = tap_row(p, static_cast<int>(begin) + thread, tile + thread * taps);
  __syncthreads();
  int32_t* table = p.table + begin * taps;
  for (int i = thread; i < here * taps; i += kTapThreads) table[i] = tile[i];
}

}  // namespace fastmkd::cuda
