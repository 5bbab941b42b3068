// csrc/cuda/tap_table.cuh as a CPU function, for ctypes.
#include <cstdio>
#include <exception>

#include "cuda/tap_table.cuh"

namespace {

// `window` holds kernel, stride, padding and dilation, each vertical and horizontal.
fastmkd::TapAxis make_axis(int cell, const int* window, bool transposed) {
  const int out_cell = cell / window[2];
  return {transposed ? cell : out_cell,
          transposed ? out_cell : cell,
          window[0],
          window[2],
          window[4],
          window[6],
          transposed};
}

}  // namespace

// Returns 0, or 1 after printing what went wrong.
extern "C" int tap_table_shim(const int64_t* cells, const int64_t* rank, int num_cells, int grid_h, int grid_w,
                              int cell_h, int cell_w, const int* window, int transposed, int32_t* table,
                              int64_t* pattern, int order) {
  using namespace fastmkd::cuda;
  TapTableParams params{};
  params.cells = cells;
  params.rank = rank;
  params.table = table;
  params.pattern = pattern;
  params.grid_h = grid_h;
  params.grid_w = grid_w;
  params.vertical = make_axis(cell_h, window, transposed != 0);
  params.horizontal = make_axis(cell_w, window + 1, transposed != 0);
  params.rows = num_cells * params.vertical.row_side * params.horizontal.row_side;
  const int taps = window[0] * window[1], per_block = tap_rows_per_block(taps);
  try {
    cuda_shim::launch(&tap_table_kernel, static_cast<unsigned>((params.rows + per_block - 1) / per_block), kTapThreads,
                      static_cast<size_t>(tap_shared_bytes(taps)), static_cast<cuda_shim::Order>(order), params);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
