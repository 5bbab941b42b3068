// fastmkd_native::tap_table on CUDA.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/tap_table.cuh"

namespace fastmkd::cuda {
namespace {

std::tuple<Tensor, Tensor> tap_table(const Tensor& cells, const Tensor& rank, const std::vector<int64_t>& cell,
                                     const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                     bool transposed) {
  require(cells.is_cuda(), "cells is not on a CUDA device; move every argument to one device.");
  require(rank.is_cuda() && rank.get_device_index() == cells.get_device_index(),
          "rank is not on the device of cells; move every argument to one device.");
  const TapTableArgs args = check_tap_table(cells, rank, cell, kernel, stride, padding, dilation, transposed);
  const int64_t taps = tap_table_taps(args), rows = args.num_cells * tap_table_pixels(args);
  require(taps <= kMostTaps, "kernel has ", taps, " taps; the CUDA kernel takes at most ", kMostTaps, ".");
  const torch::stable::accelerator::DeviceGuard guard(cells.get_device_index());
  Tensor table = torch::stable::empty({rows, taps}, ScalarType::Int, std::nullopt, cells.device());
  Tensor pattern = torch::stable::empty({rows}, ScalarType::Long, std::nullopt, cells.device());
  if (rows == 0) return {table, pattern};

  TapTableParams params{};
  params.cells = args.cells;
  params.rank = args.rank;
  params.table = table.mutable_data_ptr<int32_t>();
  params.pattern = pattern.mutable_data_ptr<int64_t>();
  params.rows = static_cast<int>(rows);
  params.grid_h = static_cast<int>(args.grid_h);
  params.grid_w = static_cast<int>(args.grid_w);
  params.vertical = args.vertical;
  params.horizontal = args.horizontal;

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(cells.get_device_index(), &stream));
  const int per_block = tap_rows_per_block(static_cast<int>(taps));
  const auto blocks = static_cast<unsigned>((rows + per_block - 1) / per_block);
  tap_table_kernel<<<blocks, kTapThreads, static_cast<size_t>(tap_shared_bytes(static_cast<int>(taps))),
                     static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("tap_table: ") + cudaGetErrorString(error));
  return {table, pattern};
}

}  // namespace
}  // namespace fastmkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CUDA, m) { m.impl("tap_table", TORCH_BOX(&fastmkd::cuda::tap_table)); }
