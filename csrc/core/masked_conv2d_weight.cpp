// Weight gradient of the masked convolution: for each tap, the outer products of its present (input, gradient) rows.
//
// A unit is one panel of output channels, one part of its input channels and one chunk of the output rows. How many
// chunks there are depends on the shape alone, and a second pass adds them in order, so the result does not depend on
// the number of threads. Few chunks are needed: only layers of few channels have few panels.
#include "core/conv_tile.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int64_t kPairs = 96;       // pairs multiplied at a time; their gradients stay in the first-level cache
constexpr int64_t kAhead = 6;        // pairs whose inputs are fetched early: rows are too far apart for the hardware
constexpr int64_t kIns = 256;        // most input channels of a part; the sums of all its taps stay in the second level
constexpr int64_t kInputs = 49152;   // floats that a block of output rows reads, for the second level too
constexpr int64_t kMostRows = 1024;  // of a block, and least of a chunk
constexpr int64_t kWantedUnits = 16;

// How the work is cut, and where a unit lies in it.
struct WeightCut {
  Cut channels;
  int64_t parts, chunks;
  int64_t most_ins;    // of a part
  int64_t most_depth;  // rows of a unit's sums: tap-major, then input channel
  int64_t block_rows;
};

WeightCut cut_of(const MaskedConvWeightArgs& args) {
  WeightCut cut{};
  cut.channels = cut_channels(args.cin, args.cout, args.groups, args.num_taps);
  const bool splits = !cut.channels.narrow && cut.channels.groups_per_panel == 1;
  cut.parts = splits ? ceil_div(cut.channels.group_in, kIns) : 1;
  const int64_t units = cut.channels.panels * cut.parts, ins = cut.channels.most_ins();
  cut.chunks = clamp(ceil_div(kWantedUnits, units), 1, larger(args.n_out / kMostRows, 1));
  cut.most_ins = 2 * ceil_div(ins / 2, cut.parts) + ins % 2;
  cut.most_depth = args.num_taps * cut.most_ins;
  cut.block_rows = clamp(kInputs / (cut.channels.narrow ? cut.most_depth : cut.most_ins), kPairs, kMostRows);
  return cut;
}

struct Unit {
  int64_t chunk;
  Panel panel;
  Share ins;  // within the panel's
};

Unit unit_of(const WeightCut& cut, int64_t cout, int64_t index) {
  const int64_t panels = cut.channels.panels * cut.parts;
  Unit unit{};
  unit.chunk = index / panels;
  unit.panel = panel_of(cut.channels, cout, index % panels / cut.parts);
  const Share words = share(unit.panel.ins / 2, index % cut.parts, cut.parts);  // whole words of bf16
  unit.ins = {2 * words.begin, index % cut.parts + 1 == cut.parts ? unit.panel.ins : 2 * words.end};
  return unit;
}

// sums[r] += sum over k of rows[k][r] * grads[k] for kHeight input channels; with kBf16, k counts pairs of rows.
template <bool kBf16, int kVectors, int kHeight>
inline void tile(const float* const* rows, int64_t offset, int64_t count, const float* grads, float* sums) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Floats sum[kHeight][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * kWidth + v * kLanes);
  }
  for (int64_t k = 0; k < count; ++k, grads += kWidth) {
    const float* row = rows[k] + offset;
    __builtin_prefetch(rows[k + kAhead] + offset);
    Floats grad[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) grad[v] = load(grads + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kHeight; ++r) {
      const Floats x = broadcast_word<kBf16>(row + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add<kBf16>(sum[r][v], x, grad[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + r * kWidth + v * kLanes, sum[r][v]);
  }
}

template <bool kBf16, int kVectors, int kHeight = kSums / kVectors>
inline void tile_of(int64_t height, const float* const* rows, int64_t offset, int64_t count, const float* grads,
                    float* sums) {
  if (height == kHeight) {
    tile<kBf16, kVectors, kHeight>(rows, offset, count, grads, sums);
  } else if constexpr (kHeight > 1) {
    tile_of<kBf16, kVectors, kHeight - 1>(height, rows, offset, count, grads, sums);
  }
}

struct Scratch {
  float *grads, *sums, *gathered;
  Pairs<const float> pairs;
  const float** words;  // rows of `gathered`
};

// Copies the gradients of the pairs `batch` side by side.
inline void gather_grads(const Scratch& scratch, Share batch, int64_t columns, int64_t outs) {
  float* to = scratch.grads;
  for (int64_t i = batch.begin; i < batch.end; ++i, to += columns) {
    const float* from = scratch.pairs.outs[i];
    for (int64_t o = 0; o < columns; o += kLanes) store(to + o, load_some(from + o, outs - o));
  }
}

// out[i] = words of a[i] and b[i]; without b, of a[i] and zero.
inline void pair_up(const float* a, const float* b, int64_t count, int64_t padded, float* out) {
  const Bf16 *even = reinterpret_cast<const Bf16*>(a), *odd = reinterpret_cast<const Bf16*>(b);
  for (int64_t i = 0; i < padded; i += kLanes) {
    store_some(out + i,
               paired(load_some(even + i, count - i), odd == nullptr ? Floats{} : load_some(odd + i, count - i)),
               padded - i);
  }
}

// The same for bf16: words of two pairs' gradients, and of their inputs. Returns how many.
inline int64_t gather_words(const Scratch& scratch, Share batch, int64_t columns, int64_t outs, int64_t depth) {
  const Pairs<const float>& pairs = scratch.pairs;
  int64_t words = 0;
  for (int64_t i = batch.begin; i < batch.end; i += 2, ++words) {
    const bool alone = i + 1 == batch.end;
    float* to = scratch.gathered + words * depth;
    pair_up(pairs.outs[i], alone ? nullptr : pairs.outs[i + 1], outs, columns, scratch.grads + words * columns);
    pair_up(pairs.ins[i], alone ? nullptr : pairs.ins[i + 1], depth, depth, to);
    scratch.words[words] = to;
  }
  return words;
}

// Adds the outer products of `count` pairs; `outs` columns of the panel are real.
template <bool kBf16, int kVectors>
void multiply(const Scratch& scratch, int64_t count, int64_t depth, int64_t outs, float* sums) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t batches = ceil_div(count, kPairs);
  for (int64_t b = 0; b < batches; ++b) {
    const Share batch = share(count, b, batches);
    int64_t length = batch.end - batch.begin;
    if (kBf16) {
      length = gather_words(scratch, batch, kWidth, outs, depth);
    } else {
      gather_grads(scratch, batch, kWidth, outs);
    }
    const float* const* rows = kBf16 ? scratch.words : scratch.pairs.ins + batch.begin;
    const int64_t tiles = ceil_div(depth, kSums / kVectors);
    for (int64_t i = 0; i < tiles; ++i) {
      const Share part = share(depth, i, tiles);
      tile_of<kBf16, kVectors>(part.end - part.begin, rows, part.begin, length, scratch.grads,
                               sums + part.begin * kWidth);
    }
  }
}

inline bool reads_bf16(const MaskedConvWeightArgs& args, const Cut& cut) {
  return reads_bf16(args.dtype, cut) && cut.group_out % 2 == 0;
}

void add_block(const MaskedConvWeightArgs& args, const WeightCut& cut, const Unit& unit, Share block,
               const Scratch& scratch, float* sums) {
  const bool bf16 = reads_bf16(args, cut.channels);
  const int64_t word = bf16 ? 2 : 1;  // channels that lie in four bytes
  const float* values = static_cast<const float*>(args.values) + (unit.panel.first_in + unit.ins.begin) / word;
  const float* grads = static_cast<const float*>(args.grad) + (block.begin * args.cout + unit.panel.first_out) / word;
  const int64_t ins = unit.ins.end - unit.ins.begin, taps = args.num_taps, count = block.end - block.begin;
  const auto multiply_panel = unit.panel.columns == kColumns
                                  ? (bf16 ? multiply<kHasBf16, 2> : multiply<false, 2>)
                                  : (bf16 ? multiply<kHasBf16, kWide> : multiply<false, kWide>);
  if (cut.channels.narrow) {
    gather_rows(values, args.cin, ins, args.taps, taps, block.begin, block.end, scratch.gathered);
    list_rows(count, scratch.gathered, taps * ins, grads, args.cout, scratch.pairs);
    multiply_panel(scratch, count, taps * ins, unit.panel.outs, sums);
    return;
  }
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t present = list_pairs(args.taps + block.begin * taps + t, taps, count, values, args.cin / word, grads,
                                       args.cout / word, scratch.pairs);
    multiply_panel(scratch, present, ins, unit.panel.outs, sums + t * ins * unit.panel.columns);
  }
}

// From a unit's sums [tap][input channel][column] to the weight's layout, where an output channel's inputs and taps are
// consecutive. Groups that share a panel own a diagonal block each.
void unpack(const MaskedConvWeightArgs& args, const Cut& cut, const Unit& unit, const float* sums) {
  const int64_t ins = unit.ins.end - unit.ins.begin;
  const int64_t groups = cut.groups_per_panel == 1 ? 1 : unit.panel.outs / cut.group_out;
  const int64_t outs = unit.panel.outs / groups, run = (groups == 1 ? ins : cut.group_in) * cut.taps;
  const int64_t row = cut.group_in * cut.taps;
  for (int64_t g = 0; g < groups; ++g) {
    const float* corner = sums + g * (cut.group_in * unit.panel.columns + outs);
    float* to = args.out + (unit.panel.first_out + g * outs) * row + unit.ins.begin * cut.taps;
    int64_t t = 0, in = 0;  // of weight e
    for (int64_t e = 0; e < run; e += kLanes) {
      const int64_t count = smaller(kLanes, run - e);
      const float* columns[kLanes];
      for (int64_t i = 0; i < count; ++i) {
        columns[i] = corner + (t * ins + in) * unit.panel.columns;
        if (++t == cut.taps) {
          t = 0;
          ++in;
        }
      }
      for (int64_t o = 0; o < outs; o += kLanes) {
        Floats block[kLanes]{};
        for (int64_t i = 0; i < count; ++i) block[i] = load_some(columns[i] + o, outs - o);
        transpose(block);
        for (int64_t r = 0; r < smaller(kLanes, outs - o); ++r) {
          float* out = to + (o + r) * row + e;
          if (count == kLanes && is_aligned(out)) {
            stream(out, block[r]);
          } else {
            store_some(out, block[r], count);
          }
        }
      }
    }
  }
}

}  // namespace

ConvPlan masked_conv2d_weight_plan(const MaskedConvWeightArgs& args) {
  const WeightCut cut = cut_of(args);
  const int64_t panels = cut.channels.panels * cut.parts;
  ConvPlan plan{};
  plan.dtype = reads_bf16(args, cut.channels) ? DType::bf16 : DType::f32;
  plan.units = panels * cut.chunks;
  const int64_t gathered = cut.channels.narrow ? cut.block_rows * cut.most_depth : kPairs / 2 * cut.most_ins;
  plan.scratch = (kPairs + cut.most_depth) * cut.channels.columns + pairs_scratch(cut.block_rows + kAhead) +
                 pairs_scratch(kPairs / 2 + kAhead) + gathered;
  plan.sums = cut.chunks > 1 ? plan.units * cut.most_depth * cut.channels.columns : 0;
  plan.reduce_units = cut.chunks > 1 ? panels : 0;
  return plan;
}

void masked_conv2d_weight(const MaskedConvWeightArgs& args, int64_t begin, int64_t end, float* scratch) {
  const WeightCut cut = cut_of(args);
  Scratch parts{};
  parts.grads = scratch;
  parts.sums = parts.grads + kPairs * cut.channels.columns;
  float* pairs = parts.sums + cut.most_depth * cut.channels.columns;
  parts.pairs = pairs_in<const float>(pairs, cut.block_rows + kAhead);
  pairs += pairs_scratch(cut.block_rows + kAhead);
  parts.words = pairs_in<const float>(pairs, kPairs / 2 + kAhead).ins;
  parts.gathered = pairs + pairs_scratch(kPairs / 2 + kAhead);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_of(cut, args.cout, index);
    float* sums = cut.chunks > 1 ? args.sums + index * cut.most_depth * cut.channels.columns : parts.sums;
    for (int64_t i = 0; i < cut.most_depth * cut.channels.columns; ++i) sums[i] = 0.0f;
    const Share rows = share(args.n_out, unit.chunk, cut.chunks);
    const int64_t blocks = ceil_div(rows.end - rows.begin, cut.block_rows);
    for (int64_t b = 0; b < blocks; ++b) {
      const Share block = share(rows.end - rows.begin, b, blocks);
      add_block(args, cut, unit, {rows.begin + block.begin, rows.begin + block.end}, parts, sums);
    }
    if (cut.chunks == 1) unpack(args, cut.channels, unit, sums);
  }
  end_streams();
}

void masked_conv2d_weight_reduce(const MaskedConvWeightArgs& args, int64_t begin, int64_t end) {
  const WeightCut cut = cut_of(args);
  const int64_t size = cut.most_depth * cut.channels.columns;
  const int64_t chunk = cut.channels.panels * cut.parts * size;
  for (int64_t index = begin; index < end; ++index) {
    float* sums = args.sums + index * size;
    for (int64_t c = 1; c < cut.chunks; ++c) {
      for (int64_t i = 0; i < size; i += kLanes) store(sums + i, load(sums + i) + load(sums + c * chunk + i));
    }
    unpack(args, cut.channels, unit_of(cut, args.cout, index), sums);
  }
  end_streams();
}

}  // namespace fastmkd::FASTMKD_ISA
