// fastmkd_native::select_tokens on CUDA.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"
#include "cuda/select_tokens.cuh"

namespace fastmkd::cuda {
namespace {

Tensor select_tokens(const Tensor& saliency, int64_t k, int64_t grid_h, int64_t grid_w, int64_t target_h,
                     int64_t target_w) {
  require(saliency.is_cuda(), "saliency is not on a CUDA device; move every argument to one device.");
  const SelectTokensArgs args = check_select_tokens(saliency, k, grid_h, grid_w, target_h, target_w);
  const int64_t batch = saliency.size(0), count = target_h * target_w;
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  require(batch <= kMostBlocks, "saliency has ", batch, " rows; expected at most ", kMostBlocks, ".");
  const torch::stable::accelerator::DeviceGuard guard(saliency.get_device_index());
  Tensor out = torch::stable::empty({batch, k}, ScalarType::Long, std::nullopt, saliency.device());
  if (batch == 0) return out;
  // int32 in torch, plain words in the kernel; the allocator keeps it alive for work queued on this stream.
  const int64_t words = select_needs_workspace(count) ? batch * count : 0;
  Tensor workspace = torch::stable::empty({words}, ScalarType::Int, std::nullopt, saliency.device());

  SelectParams params{};
  params.saliency = args.saliency;
  params.out = out.mutable_data_ptr<int64_t>();
  params.workspace = words == 0 ? nullptr : reinterpret_cast<uint32_t*>(workspace.mutable_data_ptr<int32_t>());
  params.k = static_cast<int>(k);
  params.grid_h = static_cast<int>(grid_h);
  params.grid_w = static_cast<int>(grid_w);
  params.target_h = static_cast<int>(target_h);
  params.target_w = static_cast<int>(target_w);
  params.ratio_h = args.ratio_h;
  params.ratio_w = args.ratio_w;

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(saliency.get_device_index(), &stream));
  select_tokens_kernel<<<static_cast<unsigned>(batch), kSelectThreads, static_cast<size_t>(select_shared_bytes(count)),
                         static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("select_tokens: ") + cudaGetErrorString(error));
  return out;
}

}  // namespace
}  // namespace fastmkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CUDA, m) {
  m.impl("select_tokens", TORCH_BOX(&fastmkd::cuda::select_tokens));
}
