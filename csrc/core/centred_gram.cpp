// U-centred Gram matrices (DPK, Eq. 6) of a ragged list of layers.
//
// A unit is one part of one layer's features. Chunks of kDepth features of all images are shifted by the first image,
// packed and multiplied tile by tile, lower triangle only, while the next chunk is on its way from memory. A vector
// holds kTogether features of each of a few images, and a lane sums every kTogether-th product of one pair: packing
// then moves pieces of vectors and not single floats, and the tiles are small enough to waste little above the
// diagonal. How many parts a layer has depends on the shapes alone, and the second pass adds them in order and in
// double, so that the result does not depend on the number of threads and is closer to the truth than one long chain of
// floats.
#include "core/conv_tile.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int64_t kDepth = 512;       // features of a chunk; it stays in the second-level cache
constexpr int64_t kLine = 16;         // features that are fetched, packed and multiplied at a time
constexpr int64_t kPartWidth = 8192;  // least features of a part, where there are more
constexpr int64_t kMostParts = 32;
constexpr int64_t kMostSums = 1 << 24;  // floats that the parts of one layer may take

constexpr int kTogether = 4;                // features of an image in a vector
constexpr int kGroup = kLanes / kTogether;  // images of a vector
constexpr int64_t kGroupFloats = kDepth * kGroup;

// Vectors of images on either side of a register tile: its sums hide the latency and leave registers for the factors.
#if defined(__AVX2__)
constexpr int kVectors = 2;
#elif defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 3;
#endif
constexpr int kSide = kVectors * kGroup;  // images on either side
constexpr int64_t kTileFloats = kSide * kVectors * kLanes;

inline int64_t sides(int64_t batch) { return ceil_div(batch, kSide); }
inline int64_t tiles(int64_t batch) { return sides(batch) * (sides(batch) + 1) / 2; }
inline int64_t packed_images(int64_t batch) { return ceil_div(sides(batch) * kSide, kLanes) * kLanes; }

inline int64_t parts_of(const GramArgs& args, const GramLayer& layer) {
  const int64_t square = args.batch * args.batch;
  return clamp(layer.width / kPartWidth, 1, clamp(kMostSums / square, 1, kMostParts));
}

// Features [first, first + depth) of all images minus those of image 0, as groups [group][depth / 4][image][4].
template <class T>
inline void pack(const GramArgs& args, const GramLayer& layer, int64_t first, int64_t depth, float* packed) {
  const T* origin = static_cast<const T*>(layer.features) + first;
  for (int64_t image = 0; image < packed_images(args.batch); image += kLanes) {
    float* to = packed + image / kGroup * kGroupFloats;
    for (int64_t k = 0; k < ceil_div(depth, kLine) * kLine; k += kLanes) {
      const int64_t rest = smaller(kLanes, depth - k);  // 0 and less in the padding
      const Floats shift = load_some(origin + k, rest);
      // Row b * kTogether + g is image b of group g; transposed, image b lies in piece b of the group's vectors.
      Floats block[kLanes];
      const auto image_of = [&](int row) { return image + row % kTogether * kGroup + row / kTogether; };
      if (rest >= kLanes && image + kLanes <= args.batch) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(origin + image_of(i) * layer.stride + k) - shift;
      } else {
        for (int i = 0; i < kLanes; ++i) {
          const bool real = image_of(i) < args.batch;
          block[i] = real ? load_some(origin + image_of(i) * layer.stride + k, rest) - shift : Floats{};
        }
      }
      if constexpr (kGroup > 1) transpose<kTogether>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        store(to + i % kTogether * kGroupFloats + (k + i / kTogether * kTogether) * kGroup, block[i]);
      }
    }
  }
}

// Memory that a tile asks for while it multiplies: two images' features of the next chunk.
struct Ahead {
  const char *one, *other;
  int64_t step;  // bytes of kLine features
};

// kSide images times kSide images over one chunk; on the diagonal only vectors with a column left of the row.
template <bool kDiagonal>
inline void tile(const float* rows, const float* columns, int64_t depth, bool first, Ahead ahead, float* sums) {
  Floats sum[kSide][kVectors]{};
  for (int64_t k = 0; k < depth; k += kLine, ahead.one += ahead.step, ahead.other += ahead.step) {
    __builtin_prefetch(ahead.one, 0, 2);
    __builtin_prefetch(ahead.other, 0, 2);
#pragma GCC unroll 4
    for (int q = 0; q < kLine / kTogether; ++q, rows += kLanes, columns += kLanes) {
      Floats right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = load(columns + v * kGroupFloats);
#pragma GCC unroll 8
      for (int r = 0; r < kSide; ++r) {
        const Floats left = repeat4(rows + r / kGroup * kGroupFloats + r % kGroup * kTogether);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          if (!kDiagonal || v * kGroup < r) sum[r][v] += left * right[v];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSide; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v, sums += kLanes) store(sums, first ? sum[r][v] : load(sums) + sum[r][v]);
  }
}

// Adds the products of a chunk to the sums of all tiles and fetches features from `next` on.
template <class T>
inline void multiply(const GramArgs& args, const GramLayer& layer, const float* packed, int64_t depth, bool first,
                     int64_t next, float* sums) {
  const T* features = static_cast<const T*>(layer.features) + next;
  const auto row_of = [&](int64_t image) {
    return reinterpret_cast<const char*>(features + smaller(image, args.batch - 1) * layer.stride);
  };
  int64_t image = 0;
  for (int64_t i = 0; i < sides(args.batch); ++i) {
    const float* rows = packed + i * kVectors * kGroupFloats;
    for (int64_t j = 0; j <= i; ++j, image += 2, sums += kTileFloats) {
      const float* columns = packed + j * kVectors * kGroupFloats;
      const Ahead ahead{row_of(image), row_of(image + 1), kLine * static_cast<int64_t>(sizeof(T))};
      if (i == j) {
        tile<true>(rows, columns, depth, first, ahead, sums);
      } else {
        tile<false>(rows, columns, depth, first, ahead, sums);
      }
    }
  }
}

// The lanes of each pair added up: the lower triangle of gram (batch, batch).
inline void fold(const GramArgs& args, const float* sums, float* gram) {
  const int64_t n = args.batch;
  for (int64_t i = 0; i < n; i += kSide) {
    for (int64_t j = 0; j <= i; j += kSide) {
      for (int64_t row = i; row < i + kSide; ++row) {
        for (int64_t column = j; column < j + kSide; ++column, sums += kTogether) {
          if (row < n && column < row) gram[row * n + column] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
      }
    }
  }
}

// The scratch holds a packed chunk and the sums of all tiles.
template <class T>
inline void add_part(const GramArgs& args, const GramLayer& layer, Share features, float* scratch, float* gram) {
  float *packed = scratch, *sums = scratch + kDepth * packed_images(args.batch);
  for (int64_t k = features.begin; k < features.end; k += kDepth) {
    const int64_t depth = smaller(kDepth, features.end - k);
    pack<T>(args, layer, k, depth, packed);
    multiply<T>(args, layer, packed, depth, k == features.begin, smaller(k + kDepth, layer.width - 1), sums);
  }
  fold(args, sums, gram);
}

// From the lower triangle of `sums` to a whole U-centred matrix. In this order equal entries give exact zeros.
void centre(const GramArgs& args, const double* sums, double* means, float* out) {
  const int64_t n = args.batch;
  for (int64_t i = 0; i < n; ++i) means[i] = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double* row = sums + i * n;
    double total = 0.0;
    for (int64_t j = 0; j < i; ++j) {
      total += row[j];
      means[j] += row[j];
    }
    means[i] += total;
  }
  double all = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    means[i] /= static_cast<double>(n - 2);
    all += means[i];
  }
  all /= static_cast<double>(n - 1);
  for (int64_t i = 0; i < n; ++i) {
    const double* row = sums + i * n;
    for (int64_t j = 0; j < i; ++j) {
      const double value = row[j] - means[i] - means[j] + all;
      out[i * n + j] = out[j * n + i] = static_cast<float>(value);
    }
    out[i * n + i] = 0.0f;
  }
}

}  // namespace

ConvPlan centred_gram_plan(const GramArgs& args) {
  ConvPlan plan{};
  for (int64_t i = 0; i < args.num_layers; ++i) plan.units += parts_of(args, args.layers[i]);
  const int64_t n = args.batch, doubles = n * (n + 1);
  plan.scratch = larger(kDepth * packed_images(n) + kTileFloats * tiles(n),
                        doubles * static_cast<int64_t>(sizeof(double) / sizeof(float)));
  plan.sums = plan.units * n * n;
  plan.reduce_units = args.num_layers;
  return plan;
}

void centred_gram(const GramArgs& args, int64_t begin, int64_t end, float* scratch) {
  int64_t first = 0;  // unit of the layer
  for (int64_t i = 0; i < args.num_layers; ++i) {
    const GramLayer& layer = args.layers[i];
    const int64_t parts = parts_of(args, layer);
    for (int64_t unit = larger(first, begin); unit < smaller(first + parts, end); ++unit) {
      const Share features = share(layer.width, unit - first, parts);
      float* gram = args.sums + unit * args.batch * args.batch;
      if (args.dtype == DType::bf16) {
        add_part<Bf16>(args, layer, features, scratch, gram);
      } else if (args.dtype == DType::f16) {
        add_part<Half>(args, layer, features, scratch, gram);
      } else {
        add_part<float>(args, layer, features, scratch, gram);
      }
    }
    first += parts;
  }
}

void centred_gram_reduce(const GramArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = args.batch;
  const float* grams = args.sums;
  for (int64_t i = 0; i < end; ++i) {
    const int64_t parts = parts_of(args, args.layers[i]);
    if (i >= begin) {
      // In double: a float chain over the parts of a wide layer would lose more than all the products before it.
      double* total = reinterpret_cast<double*>(scratch);
      for (int64_t p = 0; p < parts; ++p) {
        for (int64_t row = 0; row < n; ++row) {
          for (int64_t j = row * n; j < row * n + row; ++j) {
            const double part = static_cast<double>(grams[p * n * n + j]);
            total[j] = p == 0 ? part : total[j] + part;
          }
        }
      }
      centre(args, total, total + n * n, args.out + i * n * n);
    }
    grams += parts * n * n;
  }
}

}  // namespace fastmkd::FASTMKD_ISA
