// Kept tokens back at their places, the mask token at all others, positions added.
#include "core/simd.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

template <class T, class Out>
inline void add_row(const T* token, const Out* position, Out* out, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, load(token + i) + load(position + i));
  if (i < width) {
    store_part(out + i, load_part(token + i, width - i) + load_part(position + i, width - i), width - i);
  }
}

template <class T, class Out>
void unshuffle(const UnshuffleArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t source = args.source[r];
    const Out* position = static_cast<const Out*>(args.positions) + r % args.places * width;
    Out* out = static_cast<Out*>(args.out) + r * width;
    if (source < 0) {
      add_row(static_cast<const Out*>(args.mask_token), position, out, width);
    } else {
      add_row(static_cast<const T*>(args.tokens) + source * width, position, out, width);
    }
  }
}

}  // namespace

void unshuffle_tokens(const UnshuffleArgs& args, int64_t begin, int64_t end) {
  const bool widens = args.out_dtype != args.dtype;
  if (args.dtype == DType::f32) return unshuffle<float, float>(args, begin, end);
  if (args.dtype == DType::bf16) return (widens ? unshuffle<Bf16, float> : unshuffle<Bf16, Bf16>)(args, begin, end);
  return (widens ? unshuffle<Half, float> : unshuffle<Half, Half>)(args, begin, end);
}

}  // namespace fastmkd::FASTMKD_ISA
