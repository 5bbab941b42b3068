// What the checks of kernels share: random inputs, comparison, text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/reference.h"

namespace fastmkd::check {

using Bytes = std::vector<std::byte>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline size_t as_size(int64_t n) { return static_cast<size_t>(n); }

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Normal variates rounded to the type.
inline Bytes random_values(DType dtype, int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  Bytes bytes(as_size(count) * reference::size_of(dtype));
  for (int64_t i = 0; i < count; ++i) reference::encode(dtype, normal(engine), bytes.data(), i);
  return bytes;
}

// Distinct indices in random order, one row per image.
inline std::vector<int64_t> random_keep(int64_t batch, int64_t patches, int64_t kept, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<int64_t> keep, all(as_size(patches));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < patches; ++i) all[as_size(i)] = i;
    std::shuffle(all.begin(), all.end(), engine);
    keep.insert(keep.end(), all.begin(), all.begin() + kept);
  }
  return keep;
}

// Same number, both NaN, or within a relative tolerance (0 = exact).
inline bool close(double got, double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  return got == want || std::fabs(got - want) <= tolerance * std::fabs(want);
}

// Against numbers that the kernel rounds twice: to float32, then to the type.
inline Outcome equals_rounded(DType dtype, const Bytes& got, const std::vector<double>& want) {
  Bytes rounded(reference::size_of(dtype));
  for (size_t i = 0; i < want.size(); ++i) {
    reference::encode(dtype, static_cast<float>(want[i]), rounded.data(), 0);
    const double expected = reference::decode(dtype, rounded.data(), 0);
    const double value = reference::decode(dtype, got.data(), static_cast<int64_t>(i));
    if (!close(value, expected, 0)) return {false, text("element ", i, " is ", value, ", expected ", expected)};
  }
  return {true, "equal"};
}

}  // namespace fastmkd::check
