// fastmkd_native::centred_gram on CUDA.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cuda/centred_gram.cuh"

namespace fastmkd::cuda {
namespace {

using Kernel = void (*)(GramParams);

Kernel parts_kernel(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return &gram_parts_kernel<GramBf16>;
  if (dtype == ScalarType::Half) return &gram_parts_kernel<GramHalf>;
  require(dtype == ScalarType::Float, "features[0] has dtype ", torch::headeronly::toString(dtype),
          "; the compiled kernel takes float32, bfloat16 and float16.");
  return &gram_parts_kernel<float>;
}

// Layers [begin, end) of the list.
void launch(const std::vector<Tensor>& features, size_t begin, size_t end, GramParams params, Kernel kernel,
            cudaStream_t stream) {
  int64_t blocks = 0;
  for (size_t i = begin; i < end; ++i) {
    const Tensor& x = features[i];
    const int64_t parts = gram_parts(x.size(1), params.tiles);
    params.layers[i - begin] = {x.const_data_ptr(), x.stride(0), x.size(1), static_cast<int32_t>(blocks),
                                static_cast<int32_t>(parts)};
    blocks += parts * params.tiles;
  }
  params.num_layers = static_cast<int>(end - begin);
  // The allocator keeps both alive for work queued on this stream.
  Tensor sums = torch::stable::empty({blocks, kGramSquare}, ScalarType::Float, std::nullopt, features[0].device());
  Tensor means =
      torch::stable::empty({params.num_layers, params.batch}, ScalarType::Double, std::nullopt, features[0].device());
  params.sums = sums.mutable_data_ptr<float>();
  params.means = means.mutable_data_ptr<double>();
  kernel<<<static_cast<unsigned>(blocks), kGramThreads, 0, stream>>>(params);
  gram_reduce_kernel<<<static_cast<unsigned>(params.num_layers), kGramThreads, 0, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("centred_gram: ") + cudaGetErrorString(error));
}

Tensor centred_gram(const std::vector<Tensor>& features) {
  check_centred_gram(features);
  for (const Tensor& x : features) {
    require(x.is_cuda() && x.get_device_index() == features[0].get_device_index(),
            "features are not all on one CUDA device; move every layer to one device.");
  }
  const int64_t layers = static_cast<int64_t>(features.size()), batch = features[0].size(0);
  constexpr int64_t kMostImages = 1 << 15;  // far above what a Gram of this kind is made of; block numbers stay small
  require(batch <= kMostImages, "features[0] holds ", batch, " images; expected at most ", kMostImages, ".");
  const Kernel kernel = parts_kernel(features[0].scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  Tensor out = torch::stable::empty({layers, batch, batch}, ScalarType::Float, std::nullopt, features[0].device());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(features[0].get_device_index(), &stream));
  GramParams params{};
  params.batch = static_cast<int>(batch);
  params.tiles = static_cast<int>(gram_tiles(batch));
  for (size_t begin = 0; begin < features.size(); begin += kGramMostLayers) {
    params.out = out.mutable_data_ptr<float>() + static_cast<int64_t>(begin) * batch * batch;
    launch(features, begin, std::min(begin + kGramMostLayers, features.size()), params, kernel,
           static_cast<cudaStream_t>(stream));
  }
  return out;
}

}  // namespace
}  // namespace fastmkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CUDA, m) { m.impl("centred_gram", TORCH_BOX(&fastmkd::cuda::centred_gram)); }
