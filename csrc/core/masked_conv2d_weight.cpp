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
  int64_t most_depth;  // rows of a unit's sums: tap-major, then input channel
  int64_t block_rows;
};

WeightCut cut_of(const MaskedConvWeightArgs& args) {
  WeightCut cut{};
  cut.channels = cut_channels(args.cin, args.cout, args.groups, args.num_taps);
  const bool splits = !cut.channels.narrow && cut.channels.groups_per_panel == 1;
  cut.parts = splits ? ceil_div(cut.channels.group_in, kIns) : 1;
  const int64_t units = cut.channels.panels * cut.parts, ins = ceil_div(cut.channels.most_ins(), cut.parts);
  cut.chunks = clamp(ceil_div(kWantedUnits, units), 1, larger(args.n_out / kMostRows, 1));
  cut.most_depth = args.num_taps * ins;
  cut.block_rows = clamp(kInputs / larger(cut.channels.narrow ? cut.most_depth : ins, 1), kPairs, kMostRows);
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
  unit.ins = share(unit.panel.ins, index % cut.parts, cut.parts);
  return unit;
}

// sums[r] += sum over k of rows[k][r] * grads[k] for kHeight input channels.
template <int kVectors, int kHeight>
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
      const Floats x = broadcast(row[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x * grad[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + r * kWidth + v * kLanes, sum[r][v]);
  }
}

template <int kVectors, int kHeight = kSums / kVectors>
inline void tile_of(int64_t height, const float* const* rows, int64_t offset, int64_t count, const float* grads,
                    float* sums) {
  if (height == kHeight) {
    tile<kVectors, kHeight>(rows, offset, count, grads, sums);
  } else if constexpr (kHeight > 1) {
    tile_of<kVectors, kHeight - 1>(height, rows, offset, count, grads, sums);
  }
}

struct Scratch {
  float *grads, *sums, *gathered;
  Pairs<const float> pairs;
};

// Adds the outer products of `count` pairs; `outs` columns of the panel are real.
template <int kVectors>
void multiply(const Scratch& scratch, int64_t count, int64_t depth, int64_t outs, float* sums) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t batches = ceil_div(count, kPairs);
  for (int64_t b = 0; b < batches; ++b) {
    const Share batch = share(count, b, batches);
    float* to = scratch.grads;
    for (int64_t i = batch.begin; i < batch.end; ++i) {
      for (int64_t o = 0; o < kWidth; o += kLanes, to += kLanes)
        store(to, load_some(scratch.pairs.outs[i] + o, outs - o));
    }
    const int64_t tiles = ceil_div(depth, kSums / kVectors);
    for (int64_t i = 0; i < tiles; ++i) {
      const Share part = share(depth, i, tiles);
      tile_of<kVectors>(part.end - part.begin, scratch.pairs.ins + batch.begin, part.begin, batch.end - batch.begin,
                        scratch.grads, sums + part.begin * kWidth);
    }
  }
}

void add_block(const MaskedConvWeightArgs& args, const WeightCut& cut, const Unit& unit, Share block,
               const Scratch& scratch, float* sums) {
  const float* values = args.values + unit.panel.first_in + unit.ins.begin;
  const float* grads = args.grad + unit.panel.first_out;
  const int64_t ins = unit.ins.end - unit.ins.begin, taps = args.num_taps;
  const auto multiply_panel = unit.panel.columns == kColumns ? multiply<2> : multiply<kWide>;
  if (cut.channels.narrow) {
    const int64_t depth = taps * ins;
    gather_rows(values, args.cin, ins, args.taps, taps, block.begin, block.end, scratch.gathered);
    const int64_t count = block.end - block.begin;
    list_rows(count, scratch.gathered, depth, grads + block.begin * args.cout, args.cout, scratch.pairs);
    multiply_panel(scratch, count, depth, unit.panel.outs, sums);
    return;
  }
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t count = list_pairs(args.taps + block.begin * taps + t, taps, block.end - block.begin, values,
                                     args.cin, grads + block.begin * args.cout, args.cout, scratch.pairs);
    multiply_panel(scratch, count, ins, unit.panel.outs, sums + t * ins * unit.panel.columns);
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
  plan.units = panels * cut.chunks;
  plan.scratch = (kPairs + cut.most_depth) * cut.channels.columns + pairs_scratch(cut.block_rows + kAhead) +
                 (cut.channels.narrow ? cut.block_rows * cut.most_depth : 0);
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
  parts.gathered = pairs + pairs_scratch(cut.block_rows + kAhead);
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
