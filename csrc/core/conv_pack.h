// Weights of a masked convolution, packed into panels: [tap][input channel][column], zeros beside the real columns.
#pragma once

#include "core/conv_tile.h"

namespace {

using fastmkd::MaskedConvArgs;

// Where a group's weights go: columns of a panel of `depth` input channels.
struct PackedAt {
  float* to;
  int64_t depth, columns;

  float* row(int64_t tap, int64_t in) const { return to + (tap * depth + in) * columns; }
};

// Output channels [0, outs) of one group. `run` consecutive weights of an output channel are read together: they are
// the taps of all its inputs, or its inputs under one tap, or its taps for one input. No weight lies at `end` or
// behind.
template <class T>
inline void pack_runs(const T* weight, const T* end, int64_t out_stride, int64_t outs, int64_t run, int64_t taps_in_run,
                      const PackedAt& panel) {
  for (int64_t o = 0; o < outs; o += kLanes) {
    int64_t t = 0, in = 0;  // of weight e
    for (int64_t e = 0; e < run; e += kLanes) {
      const int64_t count = smaller(kLanes, run - e);
      Floats block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const T* from = weight + (o + r) * out_stride + e;
        __builtin_prefetch(from + 8 * kLanes);  // more streams than the hardware follows
        block[r] = o + r >= outs          ? Floats{}
                   : from + kLanes <= end ? load(from)
                   : count == kLanes      ? load(from)
                                          : load_part(from, count);
      }
      transpose(block);
      for (int64_t i = 0; i < count; ++i) {
        store_some(panel.row(t, in) + o, block[i], outs - o);
        if (++t == taps_in_run) {
          t = 0;
          ++in;
        }
      }
    }
  }
}

template <class T>
inline void pack_any(const T* weight, const int64_t* strides, int64_t outs, int64_t ins, int64_t taps,
                     const PackedAt& panel) {
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t i = 0; i < ins; ++i) {
      const T* from = weight + i * strides[1] + t * strides[2];
      for (int64_t o = 0; o < outs; ++o) panel.row(t, i)[o] = widened(from[o * strides[0]]);
    }
  }
}

template <class T>
void pack(const MaskedConvArgs& args, const Cut& cut, const Panel& panel, Share ins, float* to) {
  const int64_t* strides = args.weight_strides;
  const int64_t groups = cut.groups_per_panel == 1 ? 1 : panel.outs / cut.group_out;
  const int64_t outs = panel.outs / groups, depth = ins.end - ins.begin, group_ins = depth / groups;
  if (groups > 1 || outs < panel.columns) {
    for (int64_t i = 0; i < cut.taps * depth * panel.columns; ++i) to[i] = 0.0f;
  }
  const T* first = static_cast<const T*>(args.weight);
  const T* end = first + 1;
  for (int d = 0; d < 3; ++d) end += ((d == 0 ? args.cout : d == 1 ? cut.group_in : cut.taps) - 1) * strides[d];
  for (int64_t g = 0; g < groups; ++g) {
    const T* weight = first + (panel.first_out + g * outs) * strides[0] + ins.begin * strides[1];
    const PackedAt at{to + g * (group_ins * panel.columns + outs), depth, panel.columns};
    if (strides[2] == 1 && strides[1] == cut.taps) {
      pack_runs(weight, end, strides[0], outs, group_ins * cut.taps, cut.taps, at);
    } else if (strides[1] == 1) {
      for (int64_t t = 0; t < cut.taps; ++t) {
        const PackedAt tap{at.row(t, 0), depth, panel.columns};
        pack_runs(weight + t * strides[2], end, strides[0], outs, group_ins, 1, tap);
      }
    } else if (strides[2] == 1) {  // the transposed weight of the input gradient
      for (int64_t i = 0; i < group_ins; ++i) {
        const PackedAt input{at.row(0, i), depth, panel.columns};
        pack_runs(weight + i * strides[1], end, strides[0], outs, cut.taps, cut.taps, input);
      }
    } else {
      pack_any(weight, strides, outs, group_ins, cut.taps, at);
    }
  }
}

// From two rows of widened bf16 numbers to one row of words.
inline void pair_rows(const float* from, int64_t words, int64_t columns, float* to) {
  for (int64_t i = 0; i < words; ++i, from += 2 * columns, to += columns) {
    for (int64_t o = 0; o < columns; o += kLanes) store(to + o, paired(load(from + o), load(from + columns + o)));
  }
}

// Packs input channels `ins` of a panel, with bf16 rows two of them in a word.
inline void pack_panel(const MaskedConvArgs& args, const Cut& cut, const Panel& panel, Share ins, float* to) {
  if (args.weight_dtype == DType::f32) {
    pack<float>(args, cut, panel, ins, to);
  } else if (args.weight_dtype == DType::bf16) {
    pack<Bf16>(args, cut, panel, ins, to);
  } else {
    pack<Half>(args, cut, panel, ins, to);
  }
  if (reads_bf16(args.dtype, cut)) pair_rows(to, cut.taps * (ins.end - ins.begin) / 2, panel.columns, to);
}

}  // namespace
