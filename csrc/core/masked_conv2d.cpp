// Masked convolution on packed rows, forward and (with transposed weight and the other table) input gradient.
//
// A unit is one panel of output channels on one block of output rows. The panel's weights are packed once per range of
// units into [tap][input channel][kColumns], which stays in the second-level cache while all rows use it. The sum of an
// output element runs over the taps and then over the channels, whatever the units and the threads are.
#include "core/conv_tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastmkd::FASTMKD_ISA {
namespace {

// out[r] += rows[r] @ panel for kRows rows; `width` columns of the panel are real.
template <int kRows, bool kWhole>
inline void tile(const float* const* rows, int64_t depth, const float* panel, float* const* out, int64_t width) {
  const float* row[kRows];
  Floats sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    row[r] = rows[r];
    sum[r][0] = kWhole ? load(out[r]) : load_some(out[r], width);
    sum[r][1] = kWhole ? load(out[r] + kLanes) : load_some(out[r] + kLanes, width - kLanes);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, panel += kColumns) {
    const Floats left = load(panel), right = load(panel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats x = broadcast(row[r][k]);
      sum[r][0] += x * left;
      sum[r][1] += x * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (kWhole) {
      store(out[r], sum[r][0]);
      store(out[r] + kLanes, sum[r][1]);
    } else {
      store_some(out[r], sum[r][0], width);
      store_some(out[r] + kLanes, sum[r][1], width - kLanes);
    }
  }
}

template <int kRows = kTileRows>
inline void tile_of(int64_t count, const float* const* rows, int64_t depth, const float* panel, float* const* out,
                    int64_t width) {
  if (count != kRows) {
    if constexpr (kRows > 1) tile_of<kRows - 1>(count, rows, depth, panel, out, width);
  } else if (width == kColumns) {
    tile<kRows, true>(rows, depth, panel, out, width);
  } else {
    tile<kRows, false>(rows, depth, panel, out, width);
  }
}

// Multiplies `count` pairs in whole tiles, the last two of them shared out evenly: short tiles waste registers.
inline void multiply(const Pairs<float>& pairs, int64_t count, int64_t depth, const float* panel, int64_t width) {
  for (int64_t i = 0; i < count;) {
    const int64_t left = count - i;
    const int64_t height = left >= 2 * kTileRows || left <= kTileRows ? smaller(left, kTileRows) : (left + 1) / 2;
    tile_of(height, pairs.ins + i, depth, panel, pairs.outs + i, width);
    i += height;
  }
}

// Packs output channels [0, outs) of one group, input channels [0, ins), into columns of a panel of `depth` channels.
// `run` consecutive weights of an output channel are read together: they are the taps of all its inputs, or its inputs
// under one tap.
template <class T>
inline void pack_runs(const T* weight, int64_t out_stride, int64_t outs, int64_t run, int64_t taps_in_run,
                      int64_t depth, float* to) {
  int64_t t = 0, in = 0;  // of weight e
  for (int64_t e = 0; e < run; e += kLanes) {
    const int64_t count = smaller(kLanes, run - e);
    float* columns[kLanes];
    for (int64_t i = 0; i < count; ++i) {
      columns[i] = to + (t * depth + in) * kColumns;
      if (++t == taps_in_run) {
        t = 0;
        ++in;
      }
    }
    for (int64_t o = 0; o < outs; o += kLanes) {
      Floats block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const T* from = weight + (o + r) * out_stride + e;
        __builtin_prefetch(from + 8 * kLanes);  // more streams than the hardware follows
        block[r] = o + r >= outs ? Floats{} : count == kLanes ? load(from) : load_part(from, count);
      }
      transpose(block);
      for (int64_t i = 0; i < count; ++i) store_some(columns[i] + o, block[i], outs - o);
    }
  }
}

// out[o] = from[o * stride]
template <class T>
inline void load_strided(const T* from, int64_t stride, int64_t outs, float* to) {
  for (int64_t o = 0; o < outs; ++o) to[o] = widened(from[o * stride]);
}

#if defined(__AVX512F__)
inline void load_strided(const float* from, int64_t stride, int64_t outs, float* to) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(stride)));
  for (int64_t o = 0; o < outs; o += kLanes, from += kLanes * stride) {
    const __mmask16 mask = static_cast<__mmask16>((1u << smaller(kLanes, outs - o)) - 1u);
    _mm512_mask_storeu_ps(to + o, mask, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, from, 4));
  }
}
#endif

// Any strides (the transposed weight of the input gradient): an input channel at a time.
template <class T>
inline void pack_any(const T* weight, const int64_t* strides, int64_t outs, int64_t ins, int64_t taps, int64_t depth,
                     float* to) {
  const int64_t run = strides[2] == 1 && strides[0] == taps ? outs * taps : 0;  // consecutive weights of an input
  for (int64_t i = 0; i < ins; ++i) {
    const T* later = weight + smaller(i + 2, ins - 1) * strides[1];
    for (int64_t e = 0; e < run; e += kLanes) __builtin_prefetch(later + e);
    for (int64_t t = 0; t < taps; ++t) {
      const T* from = weight + i * strides[1] + t * strides[2];
      load_strided(from, strides[0], outs, to + (t * depth + i) * kColumns);
    }
  }
}

template <class T>
void pack(const MaskedConvArgs& args, const Cut& cut, const Panel& panel, float* to) {
  const int64_t* strides = args.weight_strides;
  const int64_t groups = cut.groups_per_panel == 1 ? 1 : panel.outs / cut.group_out;
  const int64_t outs = panel.outs / groups;
  if (groups > 1 || outs < kColumns) {
    for (int64_t i = 0; i < cut.taps * panel.ins * kColumns; ++i) to[i] = 0.0f;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const T* weight = static_cast<const T*>(args.weight) + (panel.first_out + g * outs) * strides[0];
    float* corner = to + g * (cut.group_in * kColumns + outs);
    if (strides[2] == 1 && strides[1] == cut.taps) {
      pack_runs(weight, strides[0], outs, cut.group_in * cut.taps, cut.taps, panel.ins, corner);
    } else if (strides[1] == 1) {
      for (int64_t t = 0; t < cut.taps; ++t) {
        float* rows = corner + t * panel.ins * kColumns;
        pack_runs(weight + t * strides[2], strides[0], outs, cut.group_in, 1, panel.ins, rows);
      }
    } else {
      pack_any(weight, strides, outs, cut.group_in, cut.taps, panel.ins, corner);
    }
  }
}

void pack_panel(const MaskedConvArgs& args, const Cut& cut, const Panel& panel, float* to) {
  if (args.weight_dtype == DType::f32) {
    pack<float>(args, cut, panel, to);
  } else if (args.weight_dtype == DType::bf16) {
    pack<Bf16>(args, cut, panel, to);
  } else {
    pack<Half>(args, cut, panel, to);
  }
}

void start(const MaskedConvArgs& args, const Panel& panel, int64_t begin, int64_t end) {
  const float* bias = args.bias == nullptr ? nullptr : args.bias + panel.first_out;
  const Floats left = bias == nullptr ? Floats{} : load_some(bias, panel.outs);
  const Floats right = bias == nullptr ? Floats{} : load_some(bias + kLanes, panel.outs - kLanes);
  for (int64_t r = begin; r < end; ++r) {
    float* out = args.out + r * args.cout + panel.first_out;
    store_some(out, left, panel.outs);
    store_some(out + kLanes, right, panel.outs - kLanes);
  }
}

struct Scratch {
  float *packed, *gathered;
  Pairs<float> pairs;
};

void run_block(const MaskedConvArgs& args, const Cut& cut, const Panel& panel, int64_t begin, int64_t end,
               const Scratch& scratch) {
  start(args, panel, begin, end);
  const float* values = args.values + panel.first_in;
  float* out = args.out + panel.first_out;
  if (cut.narrow) {
    const int64_t depth = cut.taps * panel.ins;
    gather_rows(values, args.cin, panel.ins, args.taps, cut.taps, begin, end, scratch.gathered);
    const int64_t count = list_rows(begin, end, scratch.gathered, depth, out, args.cout, scratch.pairs);
    multiply(scratch.pairs, count, depth, scratch.packed, panel.outs);
    return;
  }
  for (int64_t t = 0; t < cut.taps; ++t) {
    const int64_t count =
        list_pairs(args.taps, cut.taps, t, begin, end, values, args.cin, out, args.cout, scratch.pairs);
    multiply(scratch.pairs, count, panel.ins, scratch.packed + t * panel.ins * kColumns, panel.outs);
  }
}

inline Cut cut_of(const MaskedConvArgs& args) { return cut_channels(args.cin, args.cout, args.groups, args.num_taps); }

}  // namespace

ConvPlan masked_conv2d_plan(const MaskedConvArgs& args) {
  const Cut cut = cut_of(args);
  const int64_t depth = cut.taps * cut.most_ins();
  ConvPlan plan{};
  plan.units = cut.panels * ceil_div(args.n_out, cut.block_rows);
  plan.scratch = depth * kColumns + pairs_scratch(cut.block_rows) + (cut.narrow ? cut.block_rows * depth : 0);
  return plan;
}

void masked_conv2d(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch) {
  const Cut cut = cut_of(args);
  const int64_t blocks = ceil_div(args.n_out, cut.block_rows);
  float* pairs = scratch + cut.taps * cut.most_ins() * kColumns;
  const Scratch parts{scratch, pairs + pairs_scratch(cut.block_rows), pairs_in<float>(pairs, cut.block_rows)};
  for (int64_t unit = begin; unit < end; ++unit) {
    const Panel panel = panel_of(cut, args.cout, unit / blocks);
    if (unit == begin || unit % blocks == 0) pack_panel(args, cut, panel, parts.packed);
    const Share rows = share(args.n_out, unit % blocks, blocks);
    run_block(args, cut, panel, rows.begin, rows.end, parts);
  }
}

}  // namespace fastmkd::FASTMKD_ISA
