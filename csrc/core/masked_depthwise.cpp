// Depthwise masked convolution and its weight gradient: one weight per tap and channel, vectorised over the channels.
#include "core/conv_tile.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int64_t kRowTile = 4;  // output rows that share the loads of the weights
constexpr int64_t kTapTile = kLanes == 16 ? 8 : 4;
constexpr int64_t kBlockRows = 256;  // output rows of a forward unit
constexpr int64_t kChunkRows = 512;  // least rows of a chunk of the weight gradient
constexpr int64_t kMostChunks = 16;

inline int64_t padded(int64_t channels) { return ceil_div(channels, kColumns) * kColumns; }

// [tap][channel], channels padded with zeros.
template <class T>
void pack(const MaskedConvArgs& args, float* to) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t width = padded(args.cout);
  for (int64_t t = 0; t < args.num_taps; ++t) {
    for (int64_t c = 0; c < width; ++c) {
      const T* from = weight + c * args.weight_strides[0] + t * args.weight_strides[2];
      to[t * width + c] = c < args.cout ? widened(*from) : 0.0f;
    }
  }
}

// kRowTile rows, or fewer when rows repeat, and two vectors of channels.
inline void tile(const MaskedConvArgs& args, const float* (*present)[kRowTile], const int32_t* tap_of, int64_t count,
                 const float* weights, int64_t c, float* const* outs, int64_t rows) {
  const int64_t rest = args.cout - c, width = padded(args.cout);
  const float* bias = args.bias;
  Floats sum[kRowTile][2];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRowTile; ++r) {
    sum[r][0] = bias == nullptr ? Floats{} : load_some(bias + c, rest);
    sum[r][1] = bias == nullptr ? Floats{} : load_some(bias + c + kLanes, rest - kLanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* w = weights + tap_of[i] * width + c;
    const Floats left = load(w), right = load(w + kLanes);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRowTile; ++r) {
      const float* x = present[i][r] + c;
      sum[r][0] += (rest >= kLanes ? load(x) : load_some(x, rest)) * left;
      if (rest > kLanes) sum[r][1] += load_some(x + kLanes, rest - kLanes) * right;
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRowTile; ++r) {  // a loop of unknown length would keep the sums in memory
    if (r >= rows) break;
    store_some(outs[r] + c, sum[r][0], rest);
    store_some(outs[r] + c + kLanes, sum[r][1], rest - kLanes);
  }
}

// The same for channels that fill both vectors.
inline void whole_tile(const MaskedConvArgs& args, const float* (*present)[kRowTile], const int32_t* tap_of,
                       int64_t count, const float* weights, int64_t c, float* const* outs, int64_t rows) {
  const int64_t width = padded(args.cout);
  Floats sum[kRowTile][2]{};
  if (args.bias != nullptr) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRowTile; ++r) {
      sum[r][0] = load(args.bias + c);
      sum[r][1] = load(args.bias + c + kLanes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* w = weights + tap_of[i] * width + c;
    const Floats left = load(w), right = load(w + kLanes);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRowTile; ++r) {
      const float* x = present[i][r] + c;
      sum[r][0] += load(x) * left;
      sum[r][1] += load(x + kLanes) * right;
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRowTile; ++r) {
    if (r >= rows) break;
    store(outs[r] + c, sum[r][0]);
    store(outs[r] + c + kLanes, sum[r][1]);
  }
}

}  // namespace

// The scratch of a thread: weights, a row of zeros, and for one row tile the present taps with their input rows.
ConvPlan masked_depthwise_plan(const MaskedConvArgs& args) {
  const int64_t width = padded(args.cout);
  ConvPlan plan{};
  plan.units = ceil_div(args.n_out, kBlockRows);
  plan.scratch = args.num_taps * (width + 2 * kRowTile + 1) + width;
  return plan;
}

void masked_depthwise(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = padded(args.cout), taps = args.num_taps;
  const float*(*present)[kRowTile] = reinterpret_cast<const float*(*)[kRowTile]>(scratch);
  float* weights = scratch + 2 * kRowTile * taps;
  float* zeros = weights + taps * width;
  int32_t* tap_of = reinterpret_cast<int32_t*>(zeros + width);
  for (int64_t i = 0; i < width; ++i) zeros[i] = 0.0f;
  if (args.weight_dtype == DType::f32) {
    pack<float>(args, weights);
  } else if (args.weight_dtype == DType::bf16) {
    pack<Bf16>(args, weights);
  } else {
    pack<Half>(args, weights);
  }
  const int64_t last = smaller(end * kBlockRows, args.n_out);
  for (int64_t o = begin * kBlockRows; o < last; o += kRowTile) {
    const int64_t rows = smaller(kRowTile, last - o);
    int64_t count = 0;
    for (int64_t t = 0; t < taps; ++t) {
      bool any = false;
      for (int64_t r = 0; r < kRowTile; ++r) {
        const int32_t n = r < rows ? args.taps[(o + r) * taps + t] : -1;
        any |= n >= 0;
        present[count][r] = n >= 0 ? static_cast<const float*>(args.values) + n * args.cin : zeros;
      }
      tap_of[count] = static_cast<int32_t>(t);
      count += any;
    }
    float* outs[kRowTile];
    for (int64_t r = 0; r < rows; ++r) outs[r] = args.out + (o + r) * args.cout;
    for (int64_t c = 0; c < args.cout; c += kColumns) {
      if (args.cout - c >= kColumns) {
        whole_tile(args, present, tap_of, count, weights, c, outs, rows);
      } else {
        tile(args, present, tap_of, count, weights, c, outs, rows);
      }
    }
  }
}

namespace {

struct DepthwiseCut {
  int64_t panels, chunks;
};

inline DepthwiseCut cut_of(const MaskedConvWeightArgs& args) {
  return {ceil_div(args.cout, kColumns), clamp(args.n_out / kChunkRows, 1, kMostChunks)};
}

// sums[t] += x[t-th tap] * grad over rows [begin, end) for kTapTile taps (those past `taps` repeat the last one) and
// one panel of channels.
template <bool kWhole>
inline void tap_tile(const MaskedConvWeightArgs& args, int64_t first_tap, int64_t taps, int64_t c, int64_t begin,
                     int64_t end, const float* zeros, float* sums) {
  const int64_t rest = args.cout - c;
  int64_t tap[kTapTile];
  for (int64_t i = 0; i < kTapTile; ++i) tap[i] = first_tap + smaller(i, taps - 1);
  Floats sum[kTapTile][2]{};
  for (int64_t o = begin; o < end; ++o) {
    const float* grad = static_cast<const float*>(args.grad) + o * args.cout + c;
    const int32_t* row = args.taps + o * args.num_taps;
    const Floats left = kWhole ? load(grad) : load_some(grad, rest);
    const Floats right = kWhole ? load(grad + kLanes) : load_some(grad + kLanes, rest - kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTapTile; ++i) {
      const int32_t n = row[tap[i]];
      const float* x = n >= 0 ? static_cast<const float*>(args.values) + n * args.cin + c : zeros;
      sum[i][0] += (kWhole ? load(x) : load_some(x, rest)) * left;
      sum[i][1] += (kWhole ? load(x + kLanes) : load_some(x + kLanes, rest - kLanes)) * right;
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTapTile; ++i) {
    if (i >= taps) break;
    float* to = sums + (first_tap + i) * kColumns;
    store(to, load(to) + sum[i][0]);
    store(to + kLanes, load(to + kLanes) + sum[i][1]);
  }
}

}  // namespace

ConvPlan masked_depthwise_weight_plan(const MaskedConvWeightArgs& args) {
  const DepthwiseCut cut = cut_of(args);
  ConvPlan plan{};
  plan.units = cut.panels * cut.chunks;
  plan.scratch = kColumns;
  plan.sums = plan.units * args.num_taps * kColumns;
  plan.reduce_units = cut.panels;
  return plan;
}

void masked_depthwise_weight(const MaskedConvWeightArgs& args, int64_t begin, int64_t end, float* scratch) {
  const DepthwiseCut cut = cut_of(args);
  for (int64_t i = 0; i < kColumns; ++i) scratch[i] = 0.0f;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Share rows = share(args.n_out, unit / cut.panels, cut.chunks);
    const int64_t c = unit % cut.panels * kColumns;
    float* sums = args.sums + unit * args.num_taps * kColumns;
    for (int64_t i = 0; i < args.num_taps * kColumns; ++i) sums[i] = 0.0f;
    // Blocks of rows, so that their inputs stay cached from one group of taps to the next.
    const int64_t blocks = ceil_div(rows.end - rows.begin, kBlockRows);
    for (int64_t b = 0; b < blocks; ++b) {
      const Share block = share(rows.end - rows.begin, b, blocks);
      const int64_t first = rows.begin + block.begin, last = rows.begin + block.end;
      for (int64_t t = 0; t < args.num_taps; t += kTapTile) {
        const int64_t taps = smaller(kTapTile, args.num_taps - t);
        if (args.cout - c >= kColumns) {
          tap_tile<true>(args, t, taps, c, first, last, scratch, sums);
        } else {
          tap_tile<false>(args, t, taps, c, first, last, scratch, sums);
        }
      }
    }
  }
}

void masked_depthwise_weight_reduce(const MaskedConvWeightArgs& args, int64_t begin, int64_t end) {
  const DepthwiseCut cut = cut_of(args);
  const int64_t size = args.num_taps * kColumns;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* sums = args.sums + panel * size;
    for (int64_t chunk = 1; chunk < cut.chunks; ++chunk) {
      const float* more = sums + chunk * cut.panels * size;
      for (int64_t i = 0; i < size; i += kLanes) store(sums + i, load(sums + i) + load(more + i));
    }
    const int64_t first = panel * kColumns;
    for (int64_t i = 0; i < smaller(kColumns, args.cout - first); ++i) {
      for (int64_t t = 0; t < args.num_taps; ++t) args.out[(first + i) * args.num_taps + t] = sums[t * kColumns + i];
    }
  }
}

}  // namespace fastmkd::FASTMKD_ISA
