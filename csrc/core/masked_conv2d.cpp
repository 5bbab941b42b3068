// Masked convolution on packed rows, forward and (with transposed weight and the other table) input gradient.
//
// A unit is one panel of output channels on one block of output rows, whose sums stay in the first-level cache until
// all taps are added. A panel's weights are packed once per range of units and stay in the second level while all rows
// use them; of one tap, a few input channels are multiplied at a time, so that their weights too stay in the first
// level. The sum of an output element runs over the packed parts of the input channels, then over the taps, then over
// the channels, whatever the units and the threads are.
#include "core/conv_pack.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int64_t kRows = 64;           // output rows of a block
constexpr int64_t kDepth = 64;          // words of a row multiplied at a time
constexpr int64_t kPackedDepth = 256;   // input channels packed at a time: all taps of a wide panel take 576 KiB
constexpr int64_t kGatheredRows = 256;  // output rows of a block whose taps are gathered side by side

// sums[r] += rows[r] @ weights for kHeight rows.
template <bool kBf16, int kVectors, int kHeight>
inline void tile(const float* const* rows, int64_t offset, int64_t depth, const float* weights, float* const* sums) {
  const float* row[kHeight];
  Floats sum[kHeight][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kHeight; ++r) {
    row[r] = rows[r] + offset;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums[r] + v * kLanes);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, weights += kVectors * kLanes) {
    Floats weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kHeight; ++r) {
      const Floats x = broadcast_word<kBf16>(row[r] + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add<kBf16>(sum[r][v], x, weight[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums[r] + v * kLanes, sum[r][v]);
  }
}

template <bool kBf16, int kVectors, int kHeight = kSums / kVectors>
inline void tile_of(int64_t height, const float* const* rows, int64_t offset, int64_t depth, const float* weights,
                    float* const* sums) {
  if (height == kHeight) {
    tile<kBf16, kVectors, kHeight>(rows, offset, depth, weights, sums);
  } else if constexpr (kHeight > 1) {
    tile_of<kBf16, kVectors, kHeight - 1>(height, rows, offset, depth, weights, sums);
  }
}

// Multiplies `count` pairs in whole tiles, the last two of them shared out evenly: short tiles waste registers.
template <bool kBf16, int kVectors>
void multiply(const Pairs<float>& pairs, int64_t count, int64_t depth, const float* weights) {
  constexpr int64_t kHeight = kSums / kVectors;
  for (int64_t k = 0; k < depth; k += kDepth, weights += kDepth * kVectors * kLanes) {
    for (int64_t i = 0; i < count;) {
      const int64_t left = count - i;
      const int64_t height = left >= 2 * kHeight || left <= kHeight ? smaller(left, kHeight) : (left + 1) / 2;
      tile_of<kBf16, kVectors>(height, pairs.ins + i, k, smaller(kDepth, depth - k), weights, pairs.outs + i);
      i += height;
    }
  }
}

struct Scratch {
  float *packed, *bias, *sums, *gathered;
  Pairs<float> pairs;
};

// One panel on the output rows [begin, end): input channels `ins` of it, the first of them start from the bias.
void run_block(const MaskedConvArgs& args, const Cut& cut, const Panel& panel, Share ins, Share rows,
               const Scratch& scratch) {
  const bool bf16 = reads_bf16(args.dtype, cut);
  const int64_t word = bf16 ? 2 : 1;  // channels
  const int64_t count = rows.end - rows.begin, depth = (ins.end - ins.begin) / word, columns = panel.columns;
  float* out = args.out + rows.begin * args.cout + panel.first_out;
  float* sums = scratch.sums;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t o = 0; o < columns; o += kLanes) {
      const float* from = out + r * args.cout + o;
      store(sums + r * columns + o, ins.begin == 0 ? load(scratch.bias + o) : load_some(from, panel.outs - o));
    }
  }
  const auto multiply_panel = columns == kColumns ? (bf16 ? multiply<kHasBf16, 2> : multiply<false, 2>)
                                                  : (bf16 ? multiply<kHasBf16, kWide> : multiply<false, kWide>);
  const float* values = static_cast<const float*>(args.values) + (panel.first_in + ins.begin) / word;
  if (cut.narrow) {
    gather_rows(values, args.cin, depth, args.taps, cut.taps, rows.begin, rows.end, scratch.gathered);
    list_rows(count, scratch.gathered, cut.taps * depth, sums, columns, scratch.pairs);
    multiply_panel(scratch.pairs, count, cut.taps * depth, scratch.packed);
  } else {
    for (int64_t t = 0; t < cut.taps; ++t) {
      const int64_t present = list_pairs(args.taps + rows.begin * cut.taps + t, cut.taps, count, values,
                                         args.cin / word, sums, columns, scratch.pairs);
      multiply_panel(scratch.pairs, present, depth, scratch.packed + t * depth * columns);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t o = 0; o < panel.outs; o += kLanes) {
      store_some(out + r * args.cout + o, load(sums + r * columns + o), panel.outs - o);
    }
  }
}

// Whether one of `count` sums is NaN: then their total is. So is inf - inf, which only costs a second look.
inline bool may_have_nan(const float* from, int64_t count) {
  Floats totals[4]{};
  for (; count >= 4 * kLanes; from += 4 * kLanes, count -= 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) totals[v] += load(from + v * kLanes);
  }
  for (; count > 0; from += kLanes, count -= kLanes) totals[0] += load(from);
  const float all = reduce_add((totals[0] + totals[1]) + (totals[2] + totals[3]));
  return all != all;
}

// Adds one row of a panel up again, in each column the inputs of its own group alone.
template <bool kBf16>
void sum_groups(const MaskedConvArgs& args, const Cut& cut, const Panel& panel, const int32_t* taps,
                const float* values, const Scratch& scratch, float* sums) {
  constexpr int64_t kWord = kBf16 ? 2 : 1;
  const int64_t depth = panel.ins / kWord, group_depth = cut.group_in / kWord;
  for (int64_t o = 0; o < panel.outs; o += kLanes) {
    const int64_t end = smaller(o + kLanes, panel.outs);
    for (int64_t g = o / cut.group_out; g * cut.group_out < end; ++g) {
      Floats sum = load(scratch.bias + o);
      for (int64_t t = 0; t < cut.taps; ++t) {
        if (taps[t] < 0) continue;
        const float* row = values + taps[t] * (args.cin / kWord) + g * group_depth;
        const float* weights = scratch.packed + (t * depth + g * group_depth) * panel.columns + o;
        for (int64_t k = 0; k < group_depth; ++k) {
          sum = multiply_add<kBf16>(sum, broadcast_word<kBf16>(row + k), load(weights + k * panel.columns));
        }
      }
      const int64_t first = larger(g * cut.group_out, o), last = smaller((g + 1) * cut.group_out, end);
      for (int64_t i = first; i < last; ++i) sums[i] = sum[i - o];
    }
  }
}

// Groups that share a panel multiply each other's inputs by zeros, which is NaN for an infinity or NaN: rows of the
// block just run that have a NaN are added up again. Not inlined, so that the block keeps its registers.
__attribute__((noinline)) void keep_groups_apart(const MaskedConvArgs& args, const Cut& cut, const Panel& panel,
                                                 Share rows, const Scratch& scratch) {
  const int64_t columns = panel.columns;
  if (!may_have_nan(scratch.sums, (rows.end - rows.begin) * columns)) return;
  const bool bf16 = reads_bf16(args.dtype, cut);
  const auto sum_row = bf16 ? sum_groups<kHasBf16> : sum_groups<false>;
  const float* values = static_cast<const float*>(args.values) + panel.first_in / (bf16 ? 2 : 1);
  float* sums = scratch.sums;
  for (int64_t r = rows.begin; r < rows.end; ++r, sums += columns) {
    if (!may_have_nan(sums, columns)) continue;
    sum_row(args, cut, panel, args.taps + r * cut.taps, values, scratch, sums);
    for (int64_t o = 0; o < panel.outs; ++o) args.out[r * args.cout + panel.first_out + o] = sums[o];
  }
}

inline Cut cut_of(const MaskedConvArgs& args) { return cut_channels(args.cin, args.cout, args.groups, args.num_taps); }

inline int64_t rows_of(const Cut& cut) { return cut.narrow ? kGatheredRows : kRows; }

inline int64_t packed_depth(const Cut& cut) {
  return cut.narrow || cut.groups_per_panel > 1 ? cut.most_ins() : smaller(cut.most_ins(), kPackedDepth);
}

}  // namespace

ConvPlan masked_conv2d_plan(const MaskedConvArgs& args) {
  const Cut cut = cut_of(args);
  const int64_t rows = rows_of(cut);
  ConvPlan plan{};
  plan.dtype = reads_bf16(args.dtype, cut) ? DType::bf16 : DType::f32;
  plan.units = cut.panels * ceil_div(args.n_out, rows);
  plan.scratch = (cut.taps * packed_depth(cut) + 1 + rows) * cut.columns + pairs_scratch(rows) +
                 (cut.narrow ? rows * cut.taps * cut.most_ins() : 0);
  return plan;
}

void masked_conv2d(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch) {
  const Cut cut = cut_of(args);
  const int64_t most_rows = rows_of(cut), blocks = ceil_div(args.n_out, most_rows);
  Scratch parts{};
  parts.packed = scratch;
  parts.bias = parts.packed + cut.taps * packed_depth(cut) * cut.columns;
  parts.sums = parts.bias + cut.columns;
  parts.pairs = pairs_in<float>(parts.sums + most_rows * cut.columns, most_rows);
  parts.gathered = parts.sums + most_rows * cut.columns + pairs_scratch(most_rows);
  while (begin < end) {
    const Panel panel = panel_of(cut, args.cout, begin / blocks);
    const int64_t stop = smaller(end, (begin / blocks + 1) * blocks);
    for (int64_t o = 0; o < panel.columns; ++o) {
      parts.bias[o] = args.bias == nullptr || o >= panel.outs ? 0.0f : args.bias[panel.first_out + o];
    }
    const int64_t depths = ceil_div(panel.ins, packed_depth(cut));
    for (int64_t d = 0; d < depths; ++d) {
      const Share words = share(panel.ins / 2, d, depths);
      const Share ins{2 * words.begin, d + 1 == depths ? panel.ins : 2 * words.end};
      pack_panel(args, cut, panel, ins, parts.packed);
      for (int64_t unit = begin; unit < stop; ++unit) {
        const Share rows = share(args.n_out, unit % blocks, blocks);
        run_block(args, cut, panel, ins, rows, parts);
        if (cut.groups_per_panel > 1) keep_groups_apart(args, cut, panel, rows, parts);
      }
    }
    begin = stop;
  }
}

}  // namespace fastmkd::FASTMKD_ISA
