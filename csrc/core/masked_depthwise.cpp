// Depthwise masked convolution and its weight gradient: one weight per tap and channel, vectorised over the channels.
//
// core/depthwise_runs.h looks through a block of rows once and then visits it a panel of channels at a time. A sum runs
// over the taps in their order, however the rows were grouped.
#include "core/depthwise_runs.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int64_t kUnitRows = 16;    // output rows of a forward unit
constexpr int64_t kGroup = 8;        // vectors of channels of a unit of the weight gradient
constexpr int64_t kChunkRows = 512;  // least rows of a chunk of the weight gradient
constexpr int64_t kMostChunks = 16;

template <bool kWhole>
inline Floats load_channels(const float* from, int64_t channels) {
  return kWhole ? load(from) : load_part(from, channels);
}

// [tap][channel], padded with zeros to a whole vector.
template <class T>
void pack(const MaskedConvArgs& args, float* to) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t width = vectors(args.cout) * kLanes, *strides = args.weight_strides;
  for (int64_t c = 0; c < width; c += kLanes) {
    for (int64_t t = 0; t < args.num_taps; t += kLanes) {
      const int64_t taps = smaller(kLanes, args.num_taps - t);
      Floats block[kLanes]{};
      for (int64_t i = 0; i < smaller(kLanes, args.cout - c); ++i) {
        const T* from = weight + (c + i) * strides[0] + t * strides[2];
        if (strides[2] == 1) {
          block[i] = taps == kLanes ? load(from) : load_part(from, taps);
        } else {
          for (int64_t j = 0; j < taps; ++j) block[i][j] = widened(from[j * strides[2]]);
        }
      }
      transpose(block);
      for (int64_t j = 0; j < taps; ++j) store(to + (t + j) * width + c, block[j]);
    }
  }
}

struct Forward {
  const MaskedConvArgs& args;
  const float* weights;
  int64_t width;

  // Sums of kRows windows and kVectors vectors of channels in registers; an input is loaded once for all of them.
  template <int kKernel, int kRows, int kVectors>
  void windows(int64_t vector, const Run& run, const float* const* inputs) const {
    const int64_t c = start_of(vector, args.cout);
    Floats sum[kRows][kVectors]{};
    if (args.bias != nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load(args.bias + c + v * kLanes);
      }
    }
    const float* row = weights + c;
    for (uint32_t present = run.present; present != 0; present >>= 1, row += kKernel * width) {
      if (!(present & 1)) continue;
      Floats weight[kKernel][kVectors];
#pragma GCC unroll 7
      for (int k = 0; k < kKernel; ++k) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) weight[k][v] = load(row + k * width + v * kLanes);
      }
      slide<kKernel, kRows, kVectors>(
          inputs, c, [&](int window, int tap, int v, const Floats& x) { sum[window][v] += x * weight[tap][v]; });
      inputs += kRows + kKernel - 1;
    }
    float* out = args.out + run.first * args.cout + c;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r, out += run.step * args.cout) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, sum[r][v]);
    }
  }

  template <int kVectors, bool kWhole>
  void row(int64_t vector, const Run& run, const float* const* inputs, const int32_t* taps) const {
    const int64_t c = start_of(vector, args.cout);
    Floats sum[kVectors]{};
    if (args.bias != nullptr) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] = load_channels<kWhole>(args.bias + c + v * kLanes, args.cout);
    }
    for (int32_t i = 0; i < run.count; ++i) {
      const float *x = inputs[i] + c, *weight = weights + taps[i] * width + c;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[v] += load_channels<kWhole>(x + v * kLanes, args.cout) * load(weight + v * kLanes);
      }
    }
    float* out = args.out + run.first * args.cout + c;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (kWhole) {
        store(out + v * kLanes, sum[v]);
      } else {
        store_part(out, sum[v], args.cout);
      }
    }
  }
};

}  // namespace

// The scratch of a thread: weights, a row of zeros, and the runs of a block.
ConvPlan masked_depthwise_plan(const MaskedConvArgs& args) {
  const int64_t width = vectors(args.cout) * kLanes;
  ConvPlan plan{};
  plan.units = ceil_div(args.n_out, kUnitRows);
  plan.scratch = (args.num_taps + 1) * width + runs_scratch(args.num_taps);
  return plan;
}

void masked_depthwise(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = vectors(args.cout) * kLanes;
  float *weights = scratch, *zeros = weights + args.num_taps * width;
  for (int64_t i = 0; i < width; ++i) zeros[i] = 0.0f;
  if (args.weight_dtype == DType::f32) {
    pack<float>(args, weights);
  } else if (args.weight_dtype == DType::bf16) {
    pack<Bf16>(args, weights);
  } else {
    pack<Half>(args, weights);
  }
  const Rows rows{args.taps, args.num_taps, static_cast<const float*>(args.values), zeros, args.cin};
  visit(Forward{args, weights, width}, rows, begin * kUnitRows, smaller(end * kUnitRows, args.n_out), 0,
        vectors(args.cout), runs_in(zeros + width, args.num_taps));
}

namespace {

// The rows are cut into chunks, the channels into groups; a unit is a chunk of a group.
struct DepthwiseCut {
  int64_t groups, chunks, width;

  Share vectors_of(int64_t group) const { return {group * kGroup, smaller((group + 1) * kGroup, width / kLanes)}; }
};

inline DepthwiseCut cut_of(const MaskedConvWeightArgs& args) {
  return {ceil_div(vectors(args.cout), kGroup), clamp(args.n_out / kChunkRows, 1, kMostChunks),
          vectors(args.cout) * kLanes};
}

// Adds up sums[tap][channel], where a last vector of channels has its place for itself.
struct WeightGradient {
  const MaskedConvWeightArgs& args;
  float* sums;
  int64_t width;

  // The sums of a kernel row in registers, and the gradients of all windows.
  template <int kKernel, int kRows, int kVectors>
  void windows(int64_t vector, const Run& run, const float* const* inputs) const {
    const int64_t c = start_of(vector, args.cout);
    Floats grad[kRows][kVectors];
    const float* from = static_cast<const float*>(args.grad) + run.first * args.cout + c;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r, from += run.step * args.cout) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) grad[r][v] = load(from + v * kLanes);
    }
    float* row = sums + vector * kLanes;
    for (uint32_t present = run.present; present != 0; present >>= 1, row += kKernel * width) {
      if (!(present & 1)) continue;
      Floats sum[kKernel][kVectors];
#pragma GCC unroll 7
      for (int k = 0; k < kKernel; ++k) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[k][v] = load(row + k * width + v * kLanes);
      }
      slide<kKernel, kRows, kVectors>(
          inputs, c, [&](int window, int tap, int v, const Floats& x) { sum[tap][v] += x * grad[window][v]; });
#pragma GCC unroll 7
      for (int k = 0; k < kKernel; ++k) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store(row + k * width + v * kLanes, sum[k][v]);
      }
      inputs += kRows + kKernel - 1;
    }
  }

  template <int kVectors, bool kWhole>
  void row(int64_t vector, const Run& run, const float* const* inputs, const int32_t* taps) const {
    const int64_t c = start_of(vector, args.cout);
    const float* from = static_cast<const float*>(args.grad) + run.first * args.cout + c;
    Floats grad[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      grad[v] = load_channels<kWhole>(from + v * kLanes, args.cout);
    }
    for (int32_t i = 0; i < run.count; ++i) {
      const float* x = inputs[i] + c;
      float* sum = sums + taps[i] * width + vector * kLanes;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(sum + v * kLanes, load(sum + v * kLanes) + load_channels<kWhole>(x + v * kLanes, args.cout) * grad[v]);
      }
    }
  }
};

}  // namespace

// The sums are [chunk][tap][channel]; the scratch of a thread is a row of zeros and the runs of a block.
ConvPlan masked_depthwise_weight_plan(const MaskedConvWeightArgs& args) {
  const DepthwiseCut cut = cut_of(args);
  ConvPlan plan{};
  plan.units = cut.groups * cut.chunks;
  plan.scratch = cut.width + runs_scratch(args.num_taps);
  plan.sums = cut.chunks * args.num_taps * cut.width;
  plan.reduce_units = cut.groups;
  return plan;
}

void masked_depthwise_weight(const MaskedConvWeightArgs& args, int64_t begin, int64_t end, float* scratch) {
  const DepthwiseCut cut = cut_of(args);
  for (int64_t i = 0; i < cut.width; ++i) scratch[i] = 0.0f;
  const Rows rows{args.taps, args.num_taps, static_cast<const float*>(args.values), scratch, args.cin};
  for (int64_t unit = begin; unit < end; ++unit) {
    const Share chunk = share(args.n_out, unit / cut.groups, cut.chunks), group = cut.vectors_of(unit % cut.groups);
    float* sums = args.sums + unit / cut.groups * args.num_taps * cut.width;
    for (int64_t t = 0; t < args.num_taps; ++t) {
      for (int64_t v = group.begin; v < group.end; ++v) store(sums + t * cut.width + v * kLanes, Floats{});
    }
    visit(WeightGradient{args, sums, cut.width}, rows, chunk.begin, chunk.end, group.begin, group.end,
          runs_in(scratch + cut.width, args.num_taps));
  }
}

void masked_depthwise_weight_reduce(const MaskedConvWeightArgs& args, int64_t begin, int64_t end) {
  const DepthwiseCut cut = cut_of(args);
  const int64_t size = args.num_taps * cut.width;
  for (int64_t v = cut.vectors_of(begin).begin; v < cut.vectors_of(end - 1).end; ++v) {
    for (int64_t t = 0; t < args.num_taps; t += kLanes) {
      const int64_t taps = smaller(kLanes, args.num_taps - t);
      Floats block[kLanes]{};
      for (int64_t j = 0; j < taps; ++j) {
        const float* sums = args.sums + (t + j) * cut.width + v * kLanes;
        block[j] = load(sums);
        for (int64_t chunk = 1; chunk < cut.chunks; ++chunk) block[j] += load(sums + chunk * size);
      }
      transpose(block);
      float* to = args.out + start_of(v, args.cout) * args.num_taps + t;
      for (int64_t i = 0; i < smaller(kLanes, args.cout); ++i) store_some(to + i * args.num_taps, block[i], taps);
    }
  }
}

}  // namespace fastmkd::FASTMKD_ISA
