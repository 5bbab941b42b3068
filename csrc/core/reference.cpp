#include "core/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace fastmkd::reference {
namespace {

double decode_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) value = mantissa == 0 ? HUGE_VAL : std::nan("");
  return bits & 0x8000 ? -value : value;
}

// Round to nearest even at the type's precision, by scaling one unit in the last place to 1.
double round_to(double value, int precision, int least_exponent) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), least_exponent) - precision;
  return std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
}

uint16_t encode_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(round_to(value, 10, -14));
  uint16_t bits;
  if (std::isnan(magnitude)) {
    bits = 0x7e00;
  } else if (magnitude >= 65536.0) {
    bits = 0x7c00;
  } else if (magnitude < std::ldexp(1.0, -14)) {
    bits = static_cast<uint16_t>(std::ldexp(magnitude, 24));
  } else {
    const int exponent = std::ilogb(magnitude);
    bits = static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(std::ldexp(magnitude, 10 - exponent)));
  }
  return static_cast<uint16_t>(bits | sign);
}

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class T>
T read(const void* data, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + static_cast<size_t>(index) * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void write(T value, void* data, int64_t index) {
  std::memcpy(static_cast<char*>(data) + static_cast<size_t>(index) * sizeof(T), &value, sizeof(T));
}

// `volatile` keeps the compiler from fusing or widening any of these operations.
float mul(float a, float b) {
  volatile float product = a * b;
  return product;
}
float add(float a, float b) {
  volatile float sum = a + b;
  return sum;
}

struct Tap {
  int64_t first, second;
  float first_weight, second_weight;
};

Tap make_tap(int64_t target, int64_t size, float ratio) {
  const float source = std::max(add(mul(add(static_cast<float>(target), 0.5f), ratio), -0.5f), 0.0f);
  const int64_t first = std::min(static_cast<int64_t>(source), size - 1);
  const int64_t second = std::min(first + 1, size - 1);
  const float weight = first == second ? 0.0f : add(source, -static_cast<float>(first));
  return {first, second, add(1.0f, -weight), weight};
}

}  // namespace

size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    default:
      return 2;
  }
}

double decode(DType dtype, const void* data, int64_t index) {
  switch (dtype) {
    case DType::f64:
      return read<double>(data, index);
    case DType::f32:
      return read<float>(data, index);
    case DType::f16:
      return decode_half(read<uint16_t>(data, index));
    case DType::bf16: {
      const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(data, index)) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
  return 0;
}

void encode(DType dtype, double value, void* data, int64_t index) {
  switch (dtype) {
    case DType::f64:
      return write(value, data, index);
    case DType::f32:
      return write(static_cast<float>(value), data, index);
    case DType::f16:
      return write(encode_half(value), data, index);
    case DType::bf16: {
      const uint32_t bits = float_bits(static_cast<float>(round_to(value, 7, -126)));
      return write(static_cast<uint16_t>(std::isnan(value) ? 0x7fc0 : bits >> 16), data, index);
    }
  }
}

std::vector<double> cls_saliency(const ClsSaliencyArgs& args) {
  const int64_t tokens = args.prefix + args.patches;
  const int64_t first = args.include_prefix ? 0 : args.prefix;
  std::vector<double> out(static_cast<size_t>(args.batch * args.patches), 0.0);
  std::vector<double> logits(static_cast<size_t>(tokens));
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t h = 0; h < args.heads; ++h) {
      double most = -HUGE_VAL, sum = 0;
      for (int64_t i = first; i < tokens; ++i) {
        double product = 0;
        for (int64_t j = 0; j < args.head_dim; ++j) {
          product +=
              decode(args.dtype, args.q, b * args.q_strides[0] + h * args.q_strides[1] + j) *
              decode(args.dtype, args.k, b * args.k_strides[0] + h * args.k_strides[1] + i * args.k_strides[2] + j);
        }
        logits[static_cast<size_t>(i)] = static_cast<double>(args.scale) * product;
        most = std::max(most, logits[static_cast<size_t>(i)]);
      }
      for (int64_t i = first; i < tokens; ++i) sum += std::exp(logits[static_cast<size_t>(i)] - most);
      const double share = args.include_prefix ? 1.0 / static_cast<double>(args.heads) : 1.0;
      for (int64_t i = 0; i < args.patches; ++i) {
        const double p = std::exp(logits[static_cast<size_t>(args.prefix + i)] - most) / sum;
        out[static_cast<size_t>(b * args.patches + i)] += share * p;
      }
    }
  }
  return out;
}

std::vector<int64_t> select_tokens(const SelectTokensArgs& args, int64_t batch) {
  const int64_t count = args.target_h * args.target_w;
  std::vector<int64_t> out;
  for (int64_t b = 0; b < batch; ++b) {
    const float* map = args.saliency + b * args.grid_h * args.grid_w;
    std::vector<float> values(map, map + args.grid_h * args.grid_w);
    if (resizes(args)) {
      values.resize(static_cast<size_t>(count));
      for (int64_t y = 0; y < args.target_h; ++y) {
        const Tap v = make_tap(y, args.grid_h, args.ratio_h);
        for (int64_t x = 0; x < args.target_w; ++x) {
          const Tap h = make_tap(x, args.grid_w, args.ratio_w);
          const auto along_row = [&](int64_t row) {
            return add(mul(h.first_weight, map[row * args.grid_w + h.first]),
                       mul(h.second_weight, map[row * args.grid_w + h.second]));
          };
          values[static_cast<size_t>(y * args.target_w + x)] =
              add(mul(v.first_weight, along_row(v.first)), mul(v.second_weight, along_row(v.second)));
        }
      }
    }
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return values[static_cast<size_t>(i)] > values[static_cast<size_t>(j)];
    });
    std::sort(order.begin(), order.begin() + args.k);
    out.insert(out.end(), order.begin(), order.begin() + args.k);
  }
  return out;
}

std::vector<double> packed_attention(const PackedAttentionArgs& args) {
  const int64_t tokens = args.starts[args.images], width = args.heads * args.head_dim;
  std::vector<double> out(static_cast<size_t>(tokens * width));
  const auto qkv = [&](int64_t token, int64_t part, int64_t h, int64_t c) {
    return decode(args.dtype, args.qkv, (token * 3 + part) * width + h * args.head_dim + c);
  };
  for (int64_t b = 0; b < args.images; ++b) {
    const int64_t first = args.starts[b], last = args.starts[b + 1];
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t i = first; i < last; ++i) {
        std::vector<double> weights;
        for (int64_t j = first; j < last; ++j) {
          double product = 0;
          for (int64_t c = 0; c < args.head_dim; ++c) product += qkv(i, 0, h, c) * qkv(j, 1, h, c);
          weights.push_back(static_cast<double>(args.scale) * product);
        }
        const double most = *std::max_element(weights.begin(), weights.end());
        double sum = 0;
        for (double& weight : weights) sum += weight = std::exp(weight - most);
        for (int64_t c = 0; c < args.head_dim; ++c) {
          double mixed = 0;
          for (int64_t j = first; j < last; ++j) mixed += weights[static_cast<size_t>(j - first)] * qkv(j, 2, h, c);
          out[static_cast<size_t>(i * width + h * args.head_dim + c)] = mixed / sum;
        }
      }
    }
  }
  return out;
}

std::vector<double> gather_patches(const PatchArgs& args, int64_t batch) {
  std::vector<double> rows;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < args.kept; ++i) {
      const int64_t index = args.keep[b * args.kept + i];
      const int64_t y = index / args.grid_w * args.stride_h, x = index % args.grid_w * args.stride_w;
      for (int64_t c = 0; c < args.channels; ++c) {
        for (int64_t dy = 0; dy < args.patch_h; ++dy) {
          for (int64_t dx = 0; dx < args.patch_w; ++dx) {
            const int64_t pixel = ((b * args.channels + c) * args.height + y + dy) * args.width + x + dx;
            rows.push_back(decode(args.dtype, args.images, pixel));
          }
        }
      }
    }
  }
  return rows;
}

std::vector<double> stitch_tokens(const StitchArgs& args, int64_t batch) {
  std::vector<double> out;
  for (int64_t i = 0; i < batch * args.tokens * args.width; ++i) {
    const void* source = args.from_teacher[i / args.width] ? args.teacher : args.student;
    const int64_t position = i % (args.tokens * args.width);
    out.push_back(decode(args.dtype, source, i) + decode(args.dtype, args.position, position));
  }
  return out;
}

std::vector<double> unshuffle_tokens(const UnshuffleArgs& args, int64_t batch) {
  std::vector<double> out;
  for (int64_t i = 0; i < batch * args.places * args.width; ++i) {
    const int64_t row = args.source[i / args.width], channel = i % args.width;
    const double token = row < 0 ? decode(args.out_dtype, args.mask_token, channel)
                                 : decode(args.dtype, args.tokens, row * args.width + channel);
    out.push_back(token + decode(args.out_dtype, args.positions, i % (args.places * args.width)));
  }
  return out;
}

PatchLoss masked_patch_loss(const PatchLossArgs& args, int64_t batch) {
  const int64_t values = patch_values(args), grid_w = args.width / args.patch_w;
  PatchLoss found;
  for (int64_t r = 0; r < batch * args.hidden_count; ++r) {
    const int64_t top = args.hidden[r] / grid_w * args.patch_h, left = args.hidden[r] % grid_w * args.patch_w;
    std::vector<double> pixels;
    for (int64_t i = 0; i < values; ++i) {
      const int64_t c = i % args.channels, x = i / args.channels % args.patch_w, y = i / args.channels / args.patch_w;
      const int64_t line = (r / args.hidden_count * args.channels + c) * args.height + top + y;
      pixels.push_back(decode(args.image_dtype, args.images, line * args.width + left + x));
    }
    double mean = 0, rstd = 1, sum = 0, squares = 0;
    if (args.normalize) {
      mean = std::accumulate(pixels.begin(), pixels.end(), 0.0) / static_cast<double>(values);
      for (double x : pixels) squares += (x - mean) * (x - mean);
      rstd = 1 / std::sqrt(squares / static_cast<double>(values - 1) + 1e-6);
    }
    for (int64_t i = 0; i < values; ++i) {
      const double target = (pixels[static_cast<size_t>(i)] - mean) * rstd;
      found.differences.push_back(decode(args.dtype, args.prediction, r * values + i) - target);
      sum += found.differences.back() * found.differences.back();
    }
    found.sums.push_back(sum);
    found.stats.insert(found.stats.end(), {mean, rstd});
  }
  return found;
}

std::vector<double> centred_gram(const GramArgs& args) {
  const int64_t n = args.batch;
  std::vector<double> out;
  for (int64_t index = 0; index < args.num_layers; ++index) {
    const GramLayer& layer = args.layers[index];
    std::vector<double> gram(static_cast<size_t>(n * n)), sums(static_cast<size_t>(n));
    const auto at = [&](int64_t i, int64_t j) -> double& { return gram[static_cast<size_t>(i * n + j)]; };
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t k = 0; k < layer.width && i != j; ++k) {
          at(i, j) += decode(args.dtype, layer.features, i * layer.stride + k) *
                      decode(args.dtype, layer.features, j * layer.stride + k);
        }
        sums[static_cast<size_t>(i)] += at(i, j);
      }
      total += sums[static_cast<size_t>(i)];
    }
    const auto m = static_cast<double>(n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const double rows = sums[static_cast<size_t>(i)] + sums[static_cast<size_t>(j)];
        at(i, j) = i == j ? 0.0 : at(i, j) - rows / (m - 2) + total / ((m - 1) * (m - 2));
      }
    }
    out.insert(out.end(), gram.begin(), gram.end());
  }
  return out;
}

namespace {

// The pixel of the other map that meets pixel `at` of this one through a tap, along one axis of the whole image; -1 for
// none. `side` is the length of the other map.
int64_t meeting_pixel(const TapAxis& axis, int64_t at, int64_t tap, int64_t side) {
  for (int64_t other = 0; other < side; ++other) {
    const int64_t out = axis.transposed ? other : at, in = axis.transposed ? at : other;
    if (out * axis.stride + tap * axis.dilation - axis.padding == in) return other;
  }
  return -1;
}

}  // namespace

std::vector<int32_t> tap_table(const TapTableArgs& args) {
  const TapAxis &v = args.vertical, &h = args.horizontal;
  std::vector<int32_t> table;
  for (int64_t row = 0; row < args.num_cells * v.row_side * h.row_side; ++row) {
    const int64_t cell = args.cells[row / (v.row_side * h.row_side)], pixel = row % (v.row_side * h.row_side);
    const int64_t y = cell / args.grid_w % args.grid_h * v.row_side + pixel / h.row_side;
    const int64_t x = cell % args.grid_w * h.row_side + pixel % h.row_side;
    for (int64_t tap = 0; tap < v.kernel * h.kernel; ++tap) {
      const int64_t up = meeting_pixel(v, y, tap / h.kernel, args.grid_h * v.source_side);
      const int64_t left = meeting_pixel(h, x, tap % h.kernel, args.grid_w * h.source_side);
      int64_t entry = -1;
      if (up >= 0 && left >= 0) {
        const int64_t image = cell / (args.grid_h * args.grid_w);
        const int64_t owner =
            args.rank[(image * args.grid_h + up / v.source_side) * args.grid_w + left / h.source_side];
        const int64_t inside = up % v.source_side * h.source_side + left % h.source_side;
        if (owner >= 0) entry = owner * v.source_side * h.source_side + inside;
      }
      table.push_back(static_cast<int32_t>(entry));
    }
  }
  return table;
}

namespace {

// Calls fn(o, n, out_channel, in_channel of the group, tap) for every product of a masked convolution.
template <class Args, class Fn>
void for_each_product(const Args& args, Fn fn) {
  const int64_t group_in = args.cin / args.groups, group_out = args.cout / args.groups;
  for (int64_t o = 0; o < args.n_out; ++o) {
    for (int64_t t = 0; t < args.num_taps; ++t) {
      const int64_t n = args.taps[o * args.num_taps + t];
      if (n < 0) continue;
      for (int64_t c = 0; c < args.cout; ++c) {
        for (int64_t i = 0; i < group_in; ++i) fn(o, n * args.cin + c / group_out * group_in + i, c, i, t);
      }
    }
  }
}

}  // namespace

std::vector<double> masked_conv2d(const MaskedConvArgs& args) {
  std::vector<double> out(static_cast<size_t>(args.n_out * args.cout));
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = args.bias == nullptr ? 0.0 : args.bias[i % static_cast<size_t>(args.cout)];
  }
  for_each_product(args, [&](int64_t o, int64_t x, int64_t c, int64_t i, int64_t t) {
    const int64_t* strides = args.weight_strides;
    const double w = decode(args.weight_dtype, args.weight, c * strides[0] + i * strides[1] + t * strides[2]);
    out[static_cast<size_t>(o * args.cout + c)] += decode(args.dtype, args.values, x) * w;
  });
  return out;
}

std::vector<double> masked_conv2d_weight(const MaskedConvWeightArgs& args) {
  const int64_t group_in = args.cin / args.groups;
  std::vector<double> out(static_cast<size_t>(args.cout * group_in * args.num_taps));
  for_each_product(args, [&](int64_t o, int64_t x, int64_t c, int64_t i, int64_t t) {
    out[static_cast<size_t>((c * group_in + i) * args.num_taps + t)] +=
        decode(args.dtype, args.values, x) * decode(args.dtype, args.grad, o * args.cout + c);
  });
  return out;
}

}  // namespace fastmkd::reference
