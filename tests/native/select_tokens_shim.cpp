// csrc/cuda/select_tokens.cuh as a CPU function, for ctypes.
#include <cstdio>
#include <exception>

#include "cuda/select_tokens.cuh"

// Returns 0, or 1 after printing what went wrong. `workspace` may be null for rows that fit into shared memory.
extern "C" int select_tokens_shim(const float* saliency, int batch, int k, int grid_h, int grid_w, int target_h,
                                  int target_w, int64_t* out, uint32_t* workspace, int order) {
  using namespace fastmkd::cuda;
  const int64_t count = static_cast<int64_t>(target_h) * target_w;
  SelectParams params{};
  params.saliency = saliency;
  params.out = out;
  params.workspace = select_needs_workspace(count) ? workspace : nullptr;
  params.k = k;
  params.grid_h = grid_h;
  params.grid_w = grid_w;
  params.target_h = target_h;
  params.target_w = target_w;
  params.ratio_h = static_cast<float>(static_cast<double>(grid_h) / target_h);
  params.ratio_w = static_cast<float>(static_cast<double>(grid_w) / target_w);
  try {
    cuda_shim::launch(&select_tokens_kernel, static_cast<unsigned>(batch), kSelectThreads,
                      static_cast<size_t>(select_shared_bytes(count)), static_cast<cuda_shim::Order>(order), params);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
