// What the masked convolution kernels share: panels of output channels, lists of present taps, register tiles.
//
// A tap's present (input row, output row) pairs are collected into a list first and multiplied afterwards, so an absent
// tap costs nothing whatever the order of the rows, and every register tile is full.
#pragma once

#include "core/simd.h"

namespace {

using fastmkd::DType;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;  // registers of a tile that hold sums, of 32
constexpr int kWide = 4;   // vectors of a wide panel
#else
constexpr int kSums = 12;  // of 16
constexpr int kWide = 2;
#endif
constexpr int64_t kColumns = 2 * kLanes;  // output channels of a panel that is not wide

// Below this many input channels a tap is too short a product: the taps of a row are gathered side by side instead.
constexpr int64_t kNarrow = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return smaller(larger(x, low), high); }

// The 32-bit words that a tile multiplies hold a float each, or with kBf16 two bf16 numbers.
#ifdef FASTMKD_DOT_PAIRS
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// Unlike 0 + x, x - 0 is x for every x, so this is one broadcast.
inline Floats broadcast(float x) { return x - Floats{}; }

// sum + word * words; the word as bits, since arithmetic on two bf16 numbers as one float would change them.
template <bool kBf16>
inline Floats multiply_add(Floats sum, const Floats& word, const Floats& words) {
#ifdef FASTMKD_DOT_PAIRS
  if constexpr (kBf16) return (Floats)dot_pairs((__m512)sum, (__m512i)word, (__m512i)words);
#endif
  return sum + word * words;
}

template <bool kBf16>
inline Floats broadcast_word(const float* word) {
  if constexpr (!kBf16) return broadcast(*word);
  int32_t bits;
  __builtin_memcpy(&bits, word, sizeof bits);
  return bit_cast<Floats>(Ints{} + bits);
}

template <class T>
inline Floats load_some(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : count > 0 ? load_part(from, count) : Floats{};
}

// Words of two bf16 numbers, from what they are widened to.
inline Floats paired(Floats even, Floats odd) {
  return bit_cast<Floats>((bit_cast<Words>(even) >> 16) | bit_cast<Words>(odd));
}

template <class T>
inline void store_some(T* to, Floats x, int64_t count) {
  if (count >= kLanes) {
    store(to, x);
  } else if (count > 0) {
    store_part(to, x, count);
  }
}

inline float widened(float x) { return x; }
inline float widened(Bf16 x) { return load_part(&x, 1)[0]; }
inline float widened(Half x) { return load_part(&x, 1)[0]; }

// Part `index` of `parts` equal shares of [0, count).
struct Share {
  int64_t begin, end;
};
inline Share share(int64_t count, int64_t index, int64_t parts) {
  return {count * index / parts, count * (index + 1) / parts};
}

// How a convolution is cut: panels of some output channels with the input channels that they read. Small groups share a
// panel, whose weights are zero where output and input belong to different groups.
struct Cut {
  int64_t columns;  // of the widest panel
  int64_t taps, group_in, group_out;
  int64_t groups_per_panel, panels_per_group;  // one of them is 1
  int64_t panels;
  bool narrow;

  int64_t most_ins() const { return groups_per_panel * group_in; }
};

// Whether rows of bf16 are multiplied as they are, two channels in a word.
inline bool reads_bf16(DType dtype, const Cut& cut) {
  return kHasBf16 && dtype == DType::bf16 && !cut.narrow && cut.group_in % 2 == 0;
}

struct Panel {
  int64_t first_out, outs, first_in, ins;
  int64_t columns;  // the real ones and zeros
};

inline Cut cut_channels(int64_t cin, int64_t cout, int64_t groups, int64_t taps) {
  Cut cut{};
  cut.columns = cout / groups > kColumns ? kWide * kLanes : kColumns;
  cut.taps = taps;
  cut.group_in = cin / groups;
  cut.group_out = cout / groups;
  cut.groups_per_panel = clamp(cut.columns / cut.group_out, 1, groups);
  cut.panels_per_group = ceil_div(cut.group_out, cut.columns);
  cut.panels = ceil_div(groups, cut.groups_per_panel) * cut.panels_per_group;
  cut.narrow = cut.most_ins() < kNarrow && taps > 1;
  return cut;
}

inline Panel panel_of(const Cut& cut, int64_t cout, int64_t index) {
  if (cut.panels_per_group > 1 || cut.groups_per_panel == 1) {
    const int64_t group = index / cut.panels_per_group;
    const int64_t first = index % cut.panels_per_group * cut.columns;
    const int64_t outs = smaller(cut.columns, cut.group_out - first);
    return {group * cut.group_out + first, outs, group * cut.group_in, cut.group_in,
            outs > kColumns ? cut.columns : kColumns};
  }
  const int64_t first = index * cut.groups_per_panel;
  const int64_t groups = smaller(cut.groups_per_panel, cout / cut.group_out - first);
  return {first * cut.group_out, groups * cut.group_out, first * cut.group_in, groups * cut.group_in, cut.columns};
}

// Pointers to the input and output rows of a tap's pairs: products run over them without further arithmetic.
template <class Out>
struct Pairs {
  const float** ins;
  Out** outs;
};

// Floats of scratch that the pointers to `count` pairs take.
inline int64_t pairs_scratch(int64_t count) { return 4 * count; }

template <class Out>
inline Pairs<Out> pairs_in(float* scratch, int64_t count) {
  return {reinterpret_cast<const float**>(scratch), reinterpret_cast<Out**>(scratch + 2 * count)};
}

// Lists, among `count` output rows, those that have the tap: `taps` is its column of the table. Returns how many.
template <class Out>
inline int64_t list_pairs(const int32_t* taps, int64_t num_taps, int64_t count, const float* values, int64_t cin,
                          Out* out, int64_t cout, const Pairs<Out>& pairs) {
  int64_t present = 0;
  for (int64_t r = 0; r < count; ++r, taps += num_taps, out += cout) {
    const int64_t n = *taps;
    pairs.ins[present] = values + (n < 0 ? 0 : n) * cin;
    pairs.outs[present] = out;
    present += n >= 0;
  }
  return present;
}

// The same for rows whose inputs are gathered: all of them.
template <class Out>
inline void list_rows(int64_t count, const float* gathered, int64_t depth, Out* out, int64_t cout,
                      const Pairs<Out>& pairs) {
  for (int64_t r = 0; r < count; ++r) {
    pairs.ins[r] = gathered + r * depth;
    pairs.outs[r] = out + r * cout;
  }
}

// Writes the inputs under all taps of rows [begin, end) side by side, zeros where a tap is absent.
inline void gather_rows(const float* values, int64_t stride, int64_t ins, const int32_t* taps, int64_t num_taps,
                        int64_t begin, int64_t end, float* to) {
  for (const int32_t* tap = taps + begin * num_taps; tap < taps + end * num_taps; ++tap, to += ins) {
    const float* from = values + (*tap < 0 ? 0 : *tap) * stride;
    for (int64_t i = 0; i < ins; ++i) to[i] = *tap < 0 ? 0.0f : from[i];
  }
}

inline Floats shuffle(Floats a, Floats b, const Ints& index) {
#if defined(__clang__)
  Floats result{};
  for (int i = 0; i < kLanes; ++i) result[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Transposes kLanes x kLanes floats: at step s, the off-diagonal s x s blocks of every 2s x 2s block change places.
template <int kStep = 1>
inline void transpose(Floats (&rows)[kLanes]) {
  Ints low{}, high{};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kStep ? kLanes + i - kStep : i;
    high[i] = i & kStep ? kLanes + i : i + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Floats a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle(a, b, low);
    rows[i + kStep] = shuffle(a, b, high);
  }
  if constexpr (2 * kStep < kLanes) transpose<2 * kStep>(rows);
}

}  // namespace
