// U-centred Gram matrices (DPK, Eq. 6) of a ragged list of layers, in two launches.
//
// The images are few and the features many, so the work is split over the features: a block of the first launch makes
// one kGramTile x kGramTile tile of the lower triangle from one part of one layer's features. How many parts a layer
// has depends on the shapes alone, and the second launch, one block a layer, adds them in order and centres in float64,
// so the result does not depend on the device. The list of layers travels in the kernels' arguments: nothing is copied,
// nobody waits, and a captured launch holds all it needs.
//
// Holds no torch and no CUDA runtime call, so that tests/native can run this very source on a CPU.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "cuda_shim.h"
#endif

namespace fastmkd::cuda {

constexpr int kGramThreads = 256;
constexpr int kGramSide = 16;                       // threads along each side of a tile
constexpr int kGramEach = 4;                        // sums of a thread along each side
constexpr int kGramTile = kGramSide * kGramEach;    // images
constexpr int kGramSquare = kGramTile * kGramTile;  // sums of a tile
constexpr int kGramDepth = 32;                      // features of a step: one warp reads those of one image
constexpr int kGramRun = 16 * kGramDepth;           // a thread sets its sums aside after so many features: short
                                                    // chains of additions keep the rounding small
constexpr int64_t kGramLeastPart = 2048;            // features, where there are more
constexpr int64_t kGramMostBlocks = 528;            // of a layer: four for each multiprocessor of a large GPU
constexpr int kGramMostLayers = 96;                 // of a launch: a kernel's arguments hold 4 KiB

// As they lie in memory; widened below.
struct GramBf16 {
  uint16_t bits;
};
struct GramHalf {
  uint16_t bits;
};

struct GramSource {
  const void* features;  // (batch, width), rows `stride` elements apart
  int64_t stride, width;
  int32_t first;  // block of the first launch that begins this layer
  int32_t parts;
};

struct GramParams {
  GramSource layers[kGramMostLayers];
  float* sums;    // (blocks, kGramTile, kGramTile)
  double* means;  // (num_layers, batch)
  float* out;     // (num_layers, batch, batch)
  int num_layers, batch, tiles;
};

inline int64_t gram_tiles(int64_t batch) {
  const int64_t side = (batch + kGramTile - 1) / kGramTile;
  return side * (side + 1) / 2;
}

inline int64_t gram_parts(int64_t width, int64_t tiles) {
  const int64_t wanted = (width + kGramLeastPart - 1) / kGramLeastPart;
  const int64_t most = kGramMostBlocks > tiles ? kGramMostBlocks / tiles : 1;
  return wanted < most ? wanted : most;
}

__device__ inline float gram_widen(float x) { return x; }
__device__ inline float gram_widen(GramBf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float gram_widen(GramHalf x) {
  // Exponent and mantissa in float's places make a number 2^112 too small, exactly, subnormal ones too.
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  const float magnitude = rest >= 0x0f800000u ? __uint_as_float(rest | 0x7f800000u)  // infinity, NaN
                                              : __uint_as_float(rest) * 0x1p112f;
  return sign == 0 ? magnitude : -magnitude;
}

// Row of a tile of the lower triangle: tiles 0, 1, 2, 3 ... are (0, 0), (1, 0), (1, 1), (2, 0) ...
__device__ inline int gram_tile_row(int tile) {
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= tile) ++row;
  return row;
}

// Features [start, start + kGramDepth) of kGramTile images minus those of image 0; zero past either end.
template <class T>
__device__ inline void gram_load(const GramSource& layer, int batch, int first, int64_t start, int64_t end,
                                 float (*to)[kGramDepth + 1]) {
  const T* features = static_cast<const T*>(layer.features);
  for (int i = static_cast<int>(threadIdx.x); i < kGramTile * kGramDepth; i += kGramThreads) {
    const int image = first + i / kGramDepth;
    const int64_t k = start + i % kGramDepth;
    to[i / kGramDepth][i % kGramDepth] =
        image < batch && k < end ? gram_widen(features[image * layer.stride + k]) - gram_widen(features[k]) : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kGramThreads) gram_parts_kernel(const __grid_constant__ GramParams p) {
  __shared__ float left[kGramTile][kGramDepth + 1];
  __shared__ float right[kGramTile][kGramDepth + 1];
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int own_row = thread / kGramSide, own_column = thread % kGramSide;
  int number = 0;
  while (number + 1 < p.num_layers && p.layers[number + 1].first <= block) ++number;
  const GramSource& layer = p.layers[number];
  const int tile = (block - layer.first) % p.tiles, part = (block - layer.first) / p.tiles;
  const int tile_row = gram_tile_row(tile), tile_column = tile - tile_row * (tile_row + 1) / 2;

  // Whole steps, so that every part starts on a full line of memory; the last parts may be empty.
  const int64_t steps = (layer.width + kGramDepth - 1) / kGramDepth;
  const int64_t size = (steps + layer.parts - 1) / layer.parts * kGramDepth;
  const int64_t begin = part * size;
  const int64_t end = begin + size < layer.width ? begin + size : layer.width;

  float sum[kGramEach][kGramEach] = {}, run[kGramEach][kGramEach] = {};
  for (int64_t start = begin; start < end; start += kGramDepth) {
    gram_load<T>(layer, p.batch, tile_row * kGramTile, start, end, left);
    gram_load<T>(layer, p.batch, tile_column * kGramTile, start, end, right);
    __syncthreads();
    for (int k = 0; k < kGramDepth; ++k) {
      for (int r = 0; r < kGramEach; ++r) {
        for (int c = 0; c < kGramEach; ++c) {
          run[r][c] += left[own_row + r * kGramSide][k] * right[own_column + c * kGramSide][k];
        }
      }
    }
    __syncthreads();  // both panels may be written again
    if ((start - begin) % kGramRun != kGramRun - kGramDepth && start + kGramDepth < end) continue;
    for (int r = 0; r < kGramEach; ++r) {
      for (int c = 0; c < kGramEach; ++c) {
        sum[r][c] += run[r][c];
        run[r][c] = 0.0f;
      }
    }
  }
  float* sums = p.sums + static_cast<int64_t>(block) * kGramSquare;
  for (int r = 0; r < kGramEach; ++r) {
    for (int c = 0; c < kGramEach; ++c) {
      sums[(own_row + r * kGramSide) * kGramTile + own_column + c * kGramSide] = sum[r][c];
    }
  }
}

// One block a layer: adds the parts in order, mirrors the triangle, centres. In this order equal entries give zeros.
__global__ void __launch_bounds__(kGramThreads) gram_reduce_kernel(const __grid_constant__ GramParams p) {
  __shared__ double everything;
  const int thread = static_cast<int>(threadIdx.x), n = p.batch;
  const GramSource& layer = p.layers[blockIdx.x];
  float* out = p.out + static_cast<int64_t>(blockIdx.x) * n * n;
  double* means = p.means + static_cast<int64_t>(blockIdx.x) * n;
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int tile_row = gram_tile_row(tile), tile_column = tile - tile_row * (tile_row + 1) / 2;
    for (int place = thread; place < kGramSquare; place += kGramThreads) {
      const int64_t row = tile_row * kGramTile + place / kGramTile,
                    column = tile_column * kGramTile + place % kGramTile;
      if (row >= n || column >= row) continue;
      const float* part = p.sums + (static_cast<int64_t>(layer.first) + tile) * kGramSquare + place;
      double value = 0.0;
      for (int i = 0; i < layer.parts; ++i, part += static_cast<int64_t>(p.tiles) * kGramSquare) {
        value += static_cast<double>(*part);
      }
      out[row * n + column] = out[column * n + row] = static_cast<float>(value);
    }
  }
  for (int64_t i = thread; i < n; i += kGramThreads) out[i * n + i] = 0.0f;
  __syncthreads();
  for (int64_t i = thread; i < n; i += kGramThreads) {
    double total = 0.0;
    for (int64_t j = 0; j < n; ++j) total += static_cast<double>(out[j * n + i]);
    means[i] = total / (n - 2);
  }
  __syncthreads();
  if (thread == 0) {
    double total = 0.0;
    for (int i = 0; i < n; ++i) total += means[i];
    everything = total / (n - 1);
  }
  __syncthreads();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = thread; j < i; j += kGramThreads) {
      const double value = static_cast<double>(out[i * n + j]) - means[i] - means[j] + everything;
      out[i * n + j] = out[j * n + i] = static_cast<float>(value);
    }
  }
}

}  // namespace fastmkd::cuda
