// U-centred Gram matrices (DPK, Eq. 6) of a ragged list of layers.
//
// A unit is one part of one layer's features: chunks of kDepth features of all images are shifted by the first image,
// transposed into panels of kColumns images and multiplied, lower triangle only. How many parts a layer has depends on
// the shapes alone, and the second pass adds them in order and in double, so that the result does not depend on the
// number of threads and is closer to the truth than one long chain of floats.
#include "core/conv_tile.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int64_t kDepth = 128;       // features of a chunk: a panel of it stays in the first-level cache
constexpr int64_t kPartWidth = 8192;  // least features of a part, where there are more
constexpr int64_t kMostParts = 32;
constexpr int64_t kNearWidth = 16 * kDepth;  // features of a near sum: short chains of floats lose less
constexpr int64_t kMostSums = 1 << 24;       // floats that the parts of one layer may take

// Images of a register tile. A low tile wastes little above the diagonal; 2 x kRows sums hide the latency.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif

inline int64_t padded(int64_t batch) { return ceil_div(batch, kColumns) * kColumns; }

inline int64_t parts_of(const GramArgs& args, const GramLayer& layer) {
  const int64_t square = padded(args.batch) * padded(args.batch);
  return clamp(layer.width / kPartWidth, 1, clamp(kMostSums / square, 1, kMostParts));
}

template <class T>
inline Floats load_any(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_part(from, count);
}

// Features [first, first + depth) of all images minus those of image 0, as panels [panel][feature][kColumns].
template <class T>
inline void pack(const GramArgs& args, const GramLayer& layer, int64_t first, int64_t depth, float* packed) {
  const T* origin = static_cast<const T*>(layer.features) + first;
  for (int64_t image = 0; image < padded(args.batch); image += kLanes) {
    const T* rows = origin + image * layer.stride;
    float* to = packed + image / kColumns * (kDepth * kColumns) + image % kColumns;
    const int64_t images = smaller(kLanes, args.batch - image);
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t rest = smaller(kLanes, depth - k);
      const Floats shift = load_any(origin + k, rest);
      Floats block[kLanes]{};
      for (int64_t i = 0; i < images; ++i) block[i] = load_any(rows + i * layer.stride + k, rest) - shift;
      transpose(block);
      for (int64_t r = 0; r < rest; ++r) store(to + (k + r) * kColumns, block[r]);
    }
  }
}

// kRows images times kVectors * kLanes images over one chunk; `first` overwrites the sums.
template <int kVectors>
inline void tile(const float* rows, const float* columns, int64_t depth, bool first, float* sums, int64_t width) {
  Floats sum[kRows][kVectors]{};
  for (int64_t k = 0; k < depth; ++k, rows += kColumns, columns += kColumns) {
    Floats right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(columns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats left = broadcast(rows[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + r * width + v * kLanes;
      store(to, first ? sum[r][v] : load(to) + sum[r][v]);
    }
  }
}

// Adds the products of a chunk to the lower triangle of sums (padded batch, padded batch).
inline void multiply(const GramArgs& args, const float* packed, int64_t depth, bool first, float* sums) {
  const int64_t width = padded(args.batch);
  for (int64_t j = 0; j < args.batch; j += kColumns) {
    const float* columns = packed + j * kDepth;
    for (int64_t i = j; i < args.batch; i += kRows) {
      const float* rows = packed + i / kColumns * (kDepth * kColumns) + i % kColumns;
      float* to = sums + i * width + j;
      if (i + kRows <= j + kLanes) {
        tile<1>(rows, columns, depth, first, to, width);
      } else {
        tile<2>(rows, columns, depth, first, to, width);
      }
    }
  }
}

// Adds the lower triangle of `near` to that of `sums`, or begins with it.
inline void add_near(const GramArgs& args, const float* near, bool first, float* sums) {
  const int64_t width = padded(args.batch);
  for (int64_t row = 0; row < args.batch; ++row) {
    for (int64_t j = row * width; j <= row * width + row; j += kLanes) {
      store(sums + j, first ? load(near + j) : load(sums + j) + load(near + j));
    }
  }
}

// The scratch holds a packed chunk and a near sum.
template <class T>
inline void add_part(const GramArgs& args, const GramLayer& layer, Share features, float* scratch, float* sums) {
  float *packed = scratch, *near = scratch + kDepth * padded(args.batch);
  for (int64_t start = features.begin; start < features.end; start += kNearWidth) {
    const int64_t end = smaller(start + kNearWidth, features.end);
    for (int64_t k = start; k < end; k += kDepth) {
      const int64_t depth = smaller(kDepth, end - k);
      pack<T>(args, layer, k, depth, packed);
      multiply(args, packed, depth, k == start, near);
    }
    add_near(args, near, start == features.begin, sums);
  }
}

// From the lower triangle of `sums` to a whole U-centred matrix. In this order equal entries give exact zeros.
void centre(const GramArgs& args, const double* sums, double* means, float* out) {
  const int64_t n = args.batch, width = padded(n);
  for (int64_t i = 0; i < n; ++i) means[i] = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double* row = sums + i * width;
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
    const double* row = sums + i * width;
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
  const int64_t width = padded(args.batch), doubles = args.batch * (width + 1);
  plan.scratch = larger((kDepth + width) * width, doubles * static_cast<int64_t>(sizeof(double) / sizeof(float)));
  plan.sums = plan.units * padded(args.batch) * padded(args.batch);
  plan.reduce_units = args.num_layers;
  return plan;
}

void centred_gram(const GramArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t square = padded(args.batch) * padded(args.batch);
  int64_t first = 0;  // unit of the layer
  for (int64_t i = 0; i < args.num_layers; ++i) {
    const GramLayer& layer = args.layers[i];
    const int64_t parts = parts_of(args, layer);
    for (int64_t unit = larger(first, begin); unit < smaller(first + parts, end); ++unit) {
      const Share features = share(layer.width, unit - first, parts);
      float* sums = args.sums + unit * square;
      if (args.dtype == DType::bf16) {
        add_part<Bf16>(args, layer, features, scratch, sums);
      } else if (args.dtype == DType::f16) {
        add_part<Half>(args, layer, features, scratch, sums);
      } else {
        add_part<float>(args, layer, features, scratch, sums);
      }
    }
    first += parts;
  }
}

void centred_gram_reduce(const GramArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = padded(args.batch), square = width * width;
  float* sums = args.sums;
  for (int64_t i = 0; i < end; ++i) {
    const int64_t parts = parts_of(args, args.layers[i]);
    if (i >= begin) {
      // In double: a float chain over the parts of a wide layer would lose more than all the products before it.
      double* total = reinterpret_cast<double*>(scratch);
      for (int64_t p = 0; p < parts; ++p) {
        for (int64_t row = 0; row < args.batch; ++row) {
          for (int64_t j = row * width; j < row * width + row; ++j) {
            const double part = static_cast<double>(sums[p * square + j]);
            total[j] = p == 0 ? part : total[j] + part;
          }
        }
      }
      centre(args, total, total + args.batch * width, args.out + i * args.batch * args.batch);
    }
    sums += parts * square;
  }
}

}  // namespace fastmkd::FASTMKD_ISA
