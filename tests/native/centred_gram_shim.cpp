// csrc/cuda/centred_gram.cuh as CPU functions, for ctypes.
#include <cstdio>
#include <exception>

#include "cuda/centred_gram.cuh"

using namespace fastmkd::cuda;

// Blocks of the first launch; `sums` holds kGramSquare floats for each.
extern "C" int64_t gram_blocks(int num_layers, int batch, const int64_t* widths) {
  int64_t blocks = 0;
  for (int i = 0; i < num_layers; ++i) blocks += gram_parts(widths[i], gram_tiles(batch)) * gram_tiles(batch);
  return blocks;
}

extern "C" int gram_square() { return kGramSquare; }

// dtype: 0 float32, 1 bfloat16, 2 float16. Returns 0, or 1 after printing what went wrong.
extern "C" int centred_gram_shim(int num_layers, int batch, const void* const* features, const int64_t* strides,
                                 const int64_t* widths, int dtype, float* sums, double* means, float* out, int order) {
  GramParams params{};
  params.sums = sums;
  params.means = means;
  params.out = out;
  params.num_layers = num_layers;
  params.batch = batch;
  params.tiles = static_cast<int>(gram_tiles(batch));
  int32_t blocks = 0;
  for (int i = 0; i < num_layers; ++i) {
    const auto parts = static_cast<int32_t>(gram_parts(widths[i], params.tiles));
    params.layers[i] = {features[i], strides[i], widths[i], blocks, parts};
    blocks += parts * params.tiles;
  }
  auto* kernel = dtype == 0   ? &gram_parts_kernel<float>
                 : dtype == 1 ? &gram_parts_kernel<GramBf16>
                              : &gram_parts_kernel<GramHalf>;
  const auto way = static_cast<cuda_shim::Order>(order);
  try {
    cuda_shim::launch(kernel, static_cast<unsigned>(blocks), kGramThreads, 0, way, params);
    cuda_shim::launch(&gram_reduce_kernel, static_cast<unsigned>(num_layers), kGramThreads, 0, way, params);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
