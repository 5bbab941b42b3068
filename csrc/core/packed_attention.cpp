// Softmax attention of packed images: out = softmax(scale Q K^T) V for every image and head.
//
// A tile is a few queries of one image and head with all its keys: scores, softmax and the product with V follow each
// other while the tile's scores lie in the first-level cache. K^T and V are packed once per head, into panels of two
// vectors that stream from the second-level cache. Every sum has one order, whatever the tiles and the threads are.
#include "core/conv_tile.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int kTileRows = kSums / 2;  // of two vectors each
constexpr float kLog2E = 0x1.715476p0f;

inline int64_t vectors(int64_t count) { return ceil_div(count, kLanes); }

struct Scratch {
  float *keys, *values, *queries, *scores;
};

// 2^x for x <= 0 to about 1 ulp; NaN for NaN, and no less than 2^-126, which nothing in a softmax can tell from 0.
inline Floats exp2_negative(Floats x) {
  constexpr float kSmallest = -126.0f;
  // Adding it rounds to an integer n and leaves n + 127, the exponent field of 2^n, in the low bits.
  constexpr float kRound = 0x1.8p23f + 127.0f;
  const Floats clamped = maximum(x, splat(kSmallest));
  const Floats shifted = clamped + kRound;
  const Floats r = clamped - (shifted - kRound);
  // Minimax on [-1/2, 1/2] with p(0) = 1 exactly, so that a single key has weight 1.
  Floats p = splat(0x1.5d5408p-10f);
  p = p * r + 0x1.3cec96p-7f;
  p = p * r + 0x1.c6b31ap-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ep-1f;
  p = p * r + 1.0f;
  return p * bit_cast<Floats>(bit_cast<Words>(shifted) << 23);  // a product, so that any NaN stays one
}

// fn over all lanes, in every lane.
template <int kStep = kLanes / 2, class Fn>
inline Floats across(Floats x, Fn fn) {
  Ints other{};
  for (int i = 0; i < kLanes; ++i) other[i] = i ^ kStep;
  x = fn(x, shuffle(x, x, other));
  if constexpr (kStep > 1) x = across<kStep / 2>(x, fn);
  return x;
}

// sum += a @ b, where a is [depth / kLanes][kRows][kLanes] and b is [depth][kVectors * kLanes].
template <int kRows, int kVectors>
inline void multiply(const float* a, const float* b, int64_t depth, Floats (&sum)[kRows][kVectors]) {
  for (; depth > 0; depth -= kLanes, a += kRows * kLanes) {
    const int64_t count = smaller(depth, kLanes);
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k, b += kVectors * kLanes) {
      Floats right[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Floats left = broadcast(a[r * kLanes + k]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
      }
    }
  }
}

// K^T of one head as panels [head_dim][2 or 1 vectors of keys], zeros after the last key.
template <class T>
void pack_keys(const T* from, int64_t stride, int64_t keys, int64_t dim, float* to) {
  const int64_t count = vectors(keys);
  for (int64_t vector = 0; vector < count; ++vector) {
    const int64_t width = (vector | 1) < count ? 2 * kLanes : kLanes;
    float* column = to + (vector & ~int64_t{1}) * kLanes * dim + (vector & 1) * kLanes;
    for (int64_t c = 0; c < dim; c += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const int64_t key = vector * kLanes + r;
        block[r] = key < keys ? load_some(from + key * stride + c, dim - c) : Floats{};
      }
      transpose(block);
      for (int64_t i = 0; i < smaller(kLanes, dim - c); ++i) store(column + (c + i) * width, block[i]);
    }
  }
}

// V of one head as panels [keys][2 or 1 vectors of channels], zeros after the last channel.
template <class T>
void pack_values(const T* from, int64_t stride, int64_t keys, int64_t dim, float* to) {
  for (int64_t c = 0; c < dim; c += 2 * kLanes) {
    for (int64_t key = 0; key < keys; ++key) {
      const T* row = from + key * stride + c;
      store(to, load_some(row, dim - c));
      to += kLanes;
      if (c + kLanes < dim) {
        store(to, load_some(row + kLanes, dim - c - kLanes));
        to += kLanes;
      }
    }
  }
}

// The factor comes last: a query that it makes 0 times an infinite key would be NaN.
template <int kRows, int kVectors>
inline void score_panel(const float* queries, const float* keys, int64_t dim, float factor, float* scores) {
  Floats sum[kRows][kVectors] = {};
  multiply<kRows, kVectors>(queries, keys, dim, sum);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(scores + (v * kRows + r) * kLanes, sum[r][v] * factor);
  }
}

// Scores (in units of log 2) to weights that still have to be divided by their sum; their inverse sums are returned.
template <int kRows>
inline void weigh(float* scores, int64_t keys, float (&inverse)[kRows]) {
  constexpr int64_t kStride = kRows * kLanes;
  const int64_t last = vectors(keys) - 1;
  Ints lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Ints is_key = lane < static_cast<int32_t>(keys - last * kLanes);
  Floats most[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* row = scores + r * kLanes;
    most[r] = is_key ? load(row + last * kStride) : splat(-__builtin_inff());
    store(row + last * kStride, most[r]);
    for (int64_t v = 0; v < last; ++v) most[r] = maximum(most[r], load(row + v * kStride));
    most[r] = across(most[r], maximum);
  }
  for (int r = 0; r < kRows; ++r) {
    float* row = scores + r * kLanes;
    Floats total{};
    for (int64_t v = 0; v <= last; ++v) {
      const Floats weight = exp2_negative(load(row + v * kStride) - most[r]);
      store(row + v * kStride, weight);
      total += weight;
    }
    inverse[r] = 1.0f / reduce_add(total);
  }
}

template <int kRows, int kVectors, class T>
inline void mix_panel(const float* weights, const float* values, int64_t keys, const float (&inverse)[kRows], T* out,
                      int64_t stride, int64_t width) {
  Floats sum[kRows][kVectors] = {};
  multiply<kRows, kVectors>(weights, values, keys, sum);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    T* row = out + r * stride;
    if (kVectors == 2) store(row, sum[r][0] * inverse[r]);
    constexpr int kLast = kVectors - 1;
    store_some(row + kLast * kLanes, sum[r][kLast] * inverse[r], width - kLast * kLanes);
  }
}

// One tile: kRows queries, all keys.
template <int kRows, class T>
void run_tile(const PackedAttentionArgs& args, const T* queries, int64_t keys, const Scratch& scratch, T* out) {
  const int64_t dim = args.head_dim, width = args.heads * dim;
  const float factor = args.scale * kLog2E;
  float* packed = scratch.queries;
  for (int64_t c = 0; c < dim; c += kLanes) {
    for (int r = 0; r < kRows; ++r, packed += kLanes) {
      store(packed, load_some(queries + r * 3 * width + c, dim - c));
    }
  }
  const int64_t key_vectors = vectors(keys);
  for (int64_t v = 0; v < key_vectors; v += 2) {
    const float* panel = scratch.keys + v * kLanes * dim;
    float* scores = scratch.scores + v * kRows * kLanes;
    if (v + 1 < key_vectors) {
      score_panel<kRows, 2>(scratch.queries, panel, dim, factor, scores);
    } else {
      score_panel<kRows, 1>(scratch.queries, panel, dim, factor, scores);
    }
  }
  float inverse[kRows];
  weigh<kRows>(scratch.scores, keys, inverse);
  for (int64_t c = 0; c < dim; c += 2 * kLanes) {
    const float* panel = scratch.values + c * keys;
    if (c + kLanes < dim) {
      mix_panel<kRows, 2>(scratch.scores, panel, keys, inverse, out + c, width, dim - c);
    } else {
      mix_panel<kRows, 1>(scratch.scores, panel, keys, inverse, out + c, width, dim - c);
    }
  }
}

template <class T, int kRows = kTileRows>
void run_tile_of(int64_t rows, const PackedAttentionArgs& args, const T* queries, int64_t keys, const Scratch& scratch,
                 T* out) {
  if (rows == kRows) {
    run_tile<kRows>(args, queries, keys, scratch, out);
  } else if constexpr (kRows > 1) {
    run_tile_of<T, kRows - 1>(rows, args, queries, keys, scratch, out);
  }
}

// Asks for `rows` rows of a head's queries, keys and values, which lie too far apart for the hardware to foresee.
template <class T>
inline void prefetch_rows(const T* from, int64_t rows, int64_t width, int64_t dim) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t r = 0; r < 3 * rows; ++r, from += width) {
    for (int64_t c = 0; c < dim; c += kLine) __builtin_prefetch(from + c, 0, 2);
  }
}

// Tiles [first, last) of one head of one image, which starts at row `row` and has `tokens` rows.
template <class T>
void run_head(const PackedAttentionArgs& args, int64_t row, int64_t tokens, int64_t head, int64_t first, int64_t last,
              const Scratch& scratch) {
  const int64_t dim = args.head_dim, width = args.heads * dim, tiles = ceil_div(tokens, kTileRows);
  const T* queries = static_cast<const T*>(args.qkv) + row * 3 * width + head * dim;
  T* out = static_cast<T*>(args.out) + row * width + head * dim;
  pack_keys(queries + width, 3 * width, tokens, dim, scratch.keys);
  pack_values(queries + 2 * width, 3 * width, tokens, dim, scratch.values);
  for (int64_t t = first; t < last; ++t) {
    const Share rows = share(tokens, t, tiles);
    const int64_t count = rows.end - rows.begin;
    if (head + 1 < args.heads) prefetch_rows(queries + rows.begin * 3 * width + dim, count, width, dim);
    run_tile_of<T>(count, args, queries + rows.begin * 3 * width, tokens, scratch, out + rows.begin * width);
  }
}

// A unit is the work of one tile on one key; a tile of n keys is done by whoever has the first of its n units.
template <class T>
void run(const PackedAttentionArgs& args, int64_t begin, int64_t end, const Scratch& scratch) {
  int64_t unit = 0;  // the first of the image
  for (int64_t b = 0; b < args.images && unit < end; ++b) {
    const int64_t row = args.starts[b], tokens = args.starts[b + 1] - row, tiles = ceil_div(tokens, kTileRows);
    for (int64_t head = 0; head < args.heads && tokens > 0; ++head, unit += tiles * tokens) {
      const int64_t first = larger(0, ceil_div(begin - unit, tokens));
      const int64_t last = smaller(tiles, ceil_div(end - unit, tokens));
      if (first < last) run_head<T>(args, row, tokens, head, first, last, scratch);
    }
  }
}

inline int64_t padded(int64_t count) { return vectors(count) * kLanes; }

inline int64_t longest_image(const PackedAttentionArgs& args) {
  int64_t longest = 0;
  for (int64_t b = 0; b < args.images; ++b) longest = larger(longest, args.starts[b + 1] - args.starts[b]);
  return longest;
}

}  // namespace

AttentionPlan packed_attention_plan(const PackedAttentionArgs& args) {
  AttentionPlan plan{};
  for (int64_t b = 0; b < args.images; ++b) {
    const int64_t tokens = args.starts[b + 1] - args.starts[b];
    plan.units += args.heads * ceil_div(tokens, kTileRows) * tokens;
  }
  const int64_t longest = longest_image(args);
  plan.scratch = 2 * padded(longest) * padded(args.head_dim) + kTileRows * (padded(args.head_dim) + padded(longest));
  return plan;
}

void packed_attention(const PackedAttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t panels = padded(longest_image(args)) * padded(args.head_dim);
  float* queries = scratch + 2 * panels;
  const Scratch parts{scratch, scratch + panels, queries, queries + kTileRows * padded(args.head_dim)};
  switch (args.dtype) {
    case DType::bf16:
      return run<Bf16>(args, begin, end, parts);
    case DType::f16:
      return run<Half>(args, begin, end, parts);
    default:
      return run<float>(args, begin, end, parts);
  }
}

}  // namespace fastmkd::FASTMKD_ISA
