// Token selection: optional bilinear resize, then the k largest of each row in ascending order of index.
//
// Compiled with -ffp-contract=off: the resize is defined to the bit, each operation rounded on its own.
#include "core/simd.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

// One target position along one axis: two source positions and their weights.
struct Tap {
  int64_t first, second;
  float first_weight, second_weight;
};

inline Tap make_tap(int64_t target, int64_t size, float ratio) {
  const float exact = (static_cast<float>(target) + 0.5f) * ratio - 0.5f;
  const float source = exact > 0.0f ? exact : 0.0f;
  int64_t first = static_cast<int64_t>(source);
  first = first < size - 1 ? first : size - 1;
  const int64_t second = first + 1 < size - 1 ? first + 1 : size - 1;
  const float weight = first == second ? 0.0f : source - static_cast<float>(first);
  return {first, second, 1.0f - weight, weight};
}

// Same order as the floats, with -0 equal to +0; no finite float maps to INT32_MIN, which pads the row.
inline Ints ordered(Floats x) {
  const Ints bits = bit_cast<Ints>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

void make_keys(const float* values, int64_t count, int32_t* keys) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_raw(keys + i, ordered(load(values + i)));
  if (i < count) {
    store_raw(keys + i, ordered(load_part(values + i, count - i)));
    for (int64_t j = count; j < i + kLanes; ++j) keys[j] = INT32_MIN;
  }
}

// The resized map's rows, one after the other, as keys. `rows` holds the map resized along its rows only, `taps` the
// interpolation table of one row.
void make_resized_keys(const SelectTokensArgs& args, const float* map, float* rows, float* weights, int32_t* columns,
                       int32_t* keys) {
  for (int64_t x = 0; x < args.target_w; ++x) {
    const Tap tap = make_tap(x, args.grid_w, args.ratio_w);
    columns[2 * x] = static_cast<int32_t>(tap.first);
    columns[2 * x + 1] = static_cast<int32_t>(tap.second);
    weights[2 * x] = tap.first_weight;
    weights[2 * x + 1] = tap.second_weight;
  }
  for (int64_t y = 0; y < args.grid_h; ++y) {
    const float* from = map + y * args.grid_w;
    float* to = rows + y * args.target_w;
    for (int64_t x = 0; x < args.target_w; ++x) {
      to[x] = weights[2 * x] * from[columns[2 * x]] + weights[2 * x + 1] * from[columns[2 * x + 1]];
    }
  }
  for (int64_t y = 0; y < args.target_h; ++y) {
    const Tap tap = make_tap(y, args.grid_h, args.ratio_h);
    const float* first = rows + tap.first * args.target_w;
    const float* second = rows + tap.second * args.target_w;
    int32_t* to = keys + y * args.target_w;
    int64_t x = 0;
    for (; x + kLanes <= args.target_w; x += kLanes) {
      store_raw(to + x, ordered(load(first + x) * tap.first_weight + load(second + x) * tap.second_weight));
    }
    const int64_t rest = args.target_w - x;
    if (rest > 0) {
      const Ints last =
          ordered(load_part(first + x, rest) * tap.first_weight + load_part(second + x, rest) * tap.second_weight);
      for (int64_t j = 0; j < rest; ++j) to[x + j] = last[j];
    }
  }
  const int64_t count = args.target_h * args.target_w;
  for (int64_t i = count; i < count + kLanes; ++i) keys[i] = INT32_MIN;
}

bool all_finite(const float* values, int64_t count) {
  Ints bad{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) bad |= (load_raw<Ints>(values + i) & 0x7f800000) == 0x7f800000;
  if (i < count) bad |= (bit_cast<Ints>(load_part(values + i, count - i)) & 0x7f800000) == 0x7f800000;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (bad[lane] != 0) return false;
  }
  return true;
}

inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t threshold) {
  Ints found{};
  for (int64_t i = 0; i < count; i += kLanes) found -= load_raw<Ints>(keys + i) >= threshold;
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += found[lane];
  return total;
}

// The k-th largest key, found bit by bit from the top: at every step, at least k keys are >= the threshold.
// Stops early when exactly k are, which leaves a threshold that may lie below the k-th largest key.
int32_t find_threshold(const int32_t* keys, int64_t count, int64_t k) {
  constexpr uint32_t kSignBit = 0x80000000u;
  uint32_t threshold = 0;  // with the sign bit flipped, unsigned order is the keys' order
  for (uint32_t bit = kSignBit; bit != 0; bit >>= 1) {
    const uint32_t candidate = threshold | bit;
    const int64_t found = count_at_least(keys, count, static_cast<int32_t>(candidate ^ kSignBit));
    if (found >= k) threshold = candidate;
    if (found == k) break;
  }
  return static_cast<int32_t>(threshold ^ kSignBit);
}

void take_largest(const int32_t* keys, int64_t count, int64_t k, int64_t* out) {
  const int32_t threshold = find_threshold(keys, count, k);
  // INT32_MAX is no finite float's key, so the next threshold exists.
  int64_t ties = k - count_at_least(keys, count, threshold + 1);
  int64_t taken = 0;
  for (int64_t i = 0; i < count && taken < k; ++i) {
    const bool tie = keys[i] == threshold && ties > 0;
    out[taken] = i;
    taken += keys[i] > threshold || tie;
    ties -= tie;
  }
}

}  // namespace

int64_t select_tokens(const SelectTokensArgs& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t patches = args.grid_h * args.grid_w;
  const int64_t count = args.target_h * args.target_w;
  int32_t* keys = static_cast<int32_t*>(scratch);
  for (int64_t b = begin; b < end; ++b) {
    const float* map = args.saliency + b * patches;
    if (!all_finite(map, patches)) return b;
    if (resizes(args)) {
      float* rows = reinterpret_cast<float*>(keys + count + 16);
      float* weights = rows + args.grid_h * args.target_w;
      int32_t* columns = reinterpret_cast<int32_t*>(weights + 2 * args.target_w);
      make_resized_keys(args, map, rows, weights, columns, keys);
    } else {
      make_keys(map, count, keys);
    }
    take_largest(keys, count, args.k, args.out + b * args.k);
  }
  return -1;
}

}  // namespace fastmkd::FASTMKD_ISA
