// The memory side of patch embedding: kept pixels in, bias and positions as the starting value of the matrix product.
#include "core/simd.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

inline void copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

inline void copy(double* to, const double* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

inline void copy(uint16_t* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class T>
inline void copy(float* to, const T* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

template <class From, class To>
void gather(const PatchArgs& args, int64_t begin, int64_t end) {
  const From* images = static_cast<const From*>(args.images);
  To* row = static_cast<To*>(args.rows) + begin * args.channels * args.patch_h * args.patch_w;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t y = args.keep[r] / args.grid_w * args.stride_h;
    const int64_t x = args.keep[r] % args.grid_w * args.stride_w;
    const From* image = images + r / args.kept * args.channels * args.height * args.width;
    for (int64_t c = 0; c < args.channels; ++c) {
      const From* corner = image + (c * args.height + y) * args.width + x;
      for (int64_t dy = 0; dy < args.patch_h; ++dy, row += args.patch_w)
        copy(row, corner + dy * args.width, args.patch_w);
    }
  }
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(Bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) { return load_part(&x, 1)[0]; }

// out[i] += from[i], or = when `first`.
template <class Out, class In>
inline void add(Out* out, const In* from, int64_t count, bool first) {
  for (int64_t i = 0; i < count; ++i) out[i] = (first ? Out{} : out[i]) + static_cast<Out>(to_float(from[i]));
}

template <class In>
inline void add(float* out, const In* from, int64_t count, bool first) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats term = load(from + i);
    store(out + i, first ? term : load(out + i) + term);
  }
  for (; i < count; ++i) out[i] = first ? to_float(from[i]) : out[i] + to_float(from[i]);
}

template <class Out>
void add_typed(Out* out, DType dtype, const void* base, int64_t offset, int64_t count, bool first) {
  switch (dtype) {
    case DType::f32:
      return add(out, static_cast<const float*>(base) + offset, count, first);
    case DType::bf16:
      return add(out, static_cast<const Bf16*>(base) + offset, count, first);
    case DType::f16:
      return add(out, static_cast<const Half*>(base) + offset, count, first);
    case DType::f64:
      if constexpr (sizeof(Out) == sizeof(double)) {
        return add(out, static_cast<const double*>(base) + offset, count, first);
      }
  }
}

template <class Out>
void fill(const EpilogueArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    Out* row = static_cast<Out*>(args.out) + r * args.width;
    if (args.bias != nullptr) add_typed(row, args.bias_dtype, args.bias, 0, args.width, true);
    if (args.pos != nullptr) {
      add_typed(row, args.pos_dtype, args.pos, args.keep[r] * args.width, args.width, args.bias == nullptr);
    }
    if (args.bias == nullptr && args.pos == nullptr) {
      for (int64_t i = 0; i < args.width; ++i) row[i] = Out{};
    }
  }
}

template <class T>
void widen_from(const T* in, float* out, int64_t begin, int64_t end) {
  copy(out + begin, in + begin, end - begin);
}

template <class T>
void narrow_to(const float* in, T* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(out + i, load(in + i));
  if (i < end) store_part(out + i, load_part(in + i, end - i), end - i);
}

}  // namespace

void gather_patches(const PatchArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f64) return gather<double, double>(args, begin, end);
  if (args.dtype == DType::f32) return gather<float, float>(args, begin, end);
  if (args.row_dtype == args.dtype) return gather<uint16_t, uint16_t>(args, begin, end);
  if (args.dtype == DType::bf16) return gather<Bf16, float>(args, begin, end);
  return gather<Half, float>(args, begin, end);
}

void prefill(const EpilogueArgs& args, int64_t begin, int64_t end) {
  if (args.out_dtype == DType::f64) return fill<double>(args, begin, end);
  return fill<float>(args, begin, end);
}

void widen(DType from, const void* in, float* out, int64_t begin, int64_t end) {
  if (from == DType::bf16) return widen_from(static_cast<const Bf16*>(in), out, begin, end);
  return widen_from(static_cast<const Half*>(in), out, begin, end);
}

void narrow(DType to, const float* in, void* out, int64_t begin, int64_t end) {
  if (to == DType::bf16) return narrow_to(in, static_cast<Bf16*>(out), begin, end);
  return narrow_to(in, static_cast<Half*>(out), begin, end);
}

}  // namespace fastmkd::FASTMKD_ISA
