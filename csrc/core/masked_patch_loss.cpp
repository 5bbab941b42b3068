// A masked autoencoder's loss and its gradient, one hidden patch after the other: a patch stays in the nearest cache.
#include "core/simd.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

// out[x * channels + c] = lines[c * stride + x] for `count` pixels.
inline void interleave(const float* __restrict lines, int64_t stride, int64_t channels, int64_t count,
                       float* __restrict out) {
  if (channels == 3) {  // a loop of its own, which compilers turn into shuffles of vectors
    for (int64_t x = 0; x < count; ++x) {
      out[3 * x] = lines[x];
      out[3 * x + 1] = lines[stride + x];
      out[3 * x + 2] = lines[2 * stride + x];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < count; ++x) out[x * channels + c] = lines[c * stride + x];
  }
}

inline void interleave_any(const float* corner, int64_t plane, const PatchLossArgs& args, float*, float* out) {
  interleave(corner, plane, args.channels, args.patch_w, out);
}

template <class T>
inline void interleave_any(const T* corner, int64_t plane, const PatchLossArgs& args, float* lines, float* out) {
  for (int64_t c = 0; c < args.channels; ++c) {
    for (int64_t x = 0; x < args.patch_w; x += kLanes) {
      const int64_t left = args.patch_w - x;
      const T* from = corner + c * plane + x;
      float* to = lines + c * args.patch_w + x;
      if (left >= kLanes) {
        store(to, load(from));
      } else {
        store_part(to, load_part(from, left), left);
      }
    }
  }
  interleave(lines, args.patch_w, args.channels, args.patch_w, out);
}

template <class T>
inline const T* corner_of(const PatchLossArgs& args, int64_t r) {
  const int64_t grid_w = args.width / args.patch_w, patch = args.hidden[r];
  return static_cast<const T*>(args.images) + r / args.hidden_count * args.channels * args.height * args.width +
         patch / grid_w * args.patch_h * args.width + patch % grid_w * args.patch_w;
}

// The pixels of row r's patch in the order of a prediction. `pixels` has room for a line of each channel behind them.
// The lines of the patch after it are asked for meanwhile: they lie far apart, where no processor guesses them.
template <class T>
void read_patch(const PatchLossArgs& args, int64_t r, int64_t end, float* pixels) {
  const int64_t plane = args.height * args.width, line = args.patch_w * args.channels;
  const T *corner = corner_of<T>(args, r), *next = corner_of<T>(args, r + 1 < end ? r + 1 : r);
  float* lines = pixels + patch_values(args);
  for (int64_t y = 0; y < args.patch_h; ++y) {
    for (int64_t c = 0; c < args.channels; ++c) {
      const T* ahead = next + c * plane + y * args.width;
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + args.patch_w - 1);
    }
    interleave_any(corner + y * args.width, plane, args, lines, pixels + y * line);
  }
}

inline void subtract(float* values, int64_t count, float shift) {
  const Floats by = splat(shift);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, load(values + i) - by);
  for (; i < count; ++i) values[i] -= shift;
}

// Sums two vectors in turn: twice the speed of one, and half the rounding.
template <class Term>
inline float sum_of(const float* values, int64_t count, Term term) {
  Floats even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    even += term(load(values + i));
    odd += term(load(values + i + kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) even += term(load(values + i));
  if (i < count) odd += term(load_part(values + i, count - i));
  return reduce_add(even + odd);
}

inline float sum(const float* values, int64_t count) {
  return sum_of(values, count, [](Floats x) { return x; });
}
inline float sum_squares(const float* values, int64_t count) {
  return sum_of(values, count, [](Floats x) { return x * x; });
}

// pixels = prediction - scale * pixels
template <class T>
inline void difference(const T* prediction, float* pixels, int64_t count, float scale) {
  const Floats by = splat(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(pixels + i, load(prediction + i) - by * load(pixels + i));
  if (i < count) {
    store_part(pixels + i, load_part(prediction + i, count - i) - by * load_part(pixels + i, count - i), count - i);
  }
}

template <class T, class Pixel>
void loss(const PatchLossArgs& args, int64_t begin, int64_t end, float* pixels) {
  const int64_t count = patch_values(args);
  const auto n = static_cast<float>(count);
  for (int64_t r = begin; r < end; ++r) {
    read_patch<Pixel>(args, r, end, pixels);
    float mean = 0, rstd = 1;
    if (args.normalize) {
      // Shifted by one of the pixels first, so that a flat patch has exactly no variance.
      const float first = pixels[0];
      subtract(pixels, count, first);
      const float rest = sum(pixels, count) / n;
      subtract(pixels, count, rest);
      mean = first + rest;
      rstd = 1.0f / __builtin_sqrtf(sum_squares(pixels, count) / (n - 1) + 1e-6f);
    }
    difference(static_cast<const T*>(args.prediction) + r * count, pixels, count, rstd);
    args.stats[2 * r] = mean;
    args.stats[2 * r + 1] = rstd;
    args.sums[r] = static_cast<double>(sum_squares(pixels, count));
  }
}

template <class T, class Pixel>
void gradient(const PatchLossArgs& args, int64_t begin, int64_t end, float* pixels) {
  const int64_t count = patch_values(args);
  const Floats scale = splat(args.scale);
  for (int64_t r = begin; r < end; ++r) {
    read_patch<Pixel>(args, r, end, pixels);
    subtract(pixels, count, args.stats[2 * r]);
    difference(static_cast<const T*>(args.prediction) + r * count, pixels, count, args.stats[2 * r + 1]);
    T* out = static_cast<T*>(args.out) + r * count;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, scale * load(pixels + i));
    if (i < count) store_part(out + i, scale * load_part(pixels + i, count - i), count - i);
  }
}

}  // namespace

void masked_patch_loss(const PatchLossArgs& args, int64_t begin, int64_t end, float* scratch) {
  const bool wide = args.image_dtype == DType::f32;
  if (args.dtype == DType::f32) return loss<float, float>(args, begin, end, scratch);
  if (args.dtype == DType::bf16) return (wide ? loss<Bf16, float> : loss<Bf16, Bf16>)(args, begin, end, scratch);
  return (wide ? loss<Half, float> : loss<Half, Half>)(args, begin, end, scratch);
}

void masked_patch_loss_grad(const PatchLossArgs& args, int64_t begin, int64_t end, float* scratch) {
  const bool wide = args.image_dtype == DType::f32;
  if (args.dtype == DType::f32) return gradient<float, float>(args, begin, end, scratch);
  if (args.dtype == DType::bf16) {
    return (wide ? gradient<Bf16, float> : gradient<Bf16, Bf16>)(args, begin, end, scratch);
  }
  return (wide ? gradient<Half, float> : gradient<Half, Half>)(args, begin, end, scratch);
}

}  // namespace fastmkd::FASTMKD_ISA
