// Each token from the student or the teacher, with its position added.
#include "core/simd.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

template <class T>
void stitch(const StitchArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  for (int64_t r = begin; r < end; ++r) {
    const T* token = static_cast<const T*>(args.from_teacher[r] ? args.teacher : args.student) + r * width;
    const T* position = static_cast<const T*>(args.position) + r % args.tokens * width;
    T* out = static_cast<T*>(args.out) + r * width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, load(token + i) + load(position + i));
    if (i < width) {
      store_part(out + i, load_part(token + i, width - i) + load_part(position + i, width - i), width - i);
    }
  }
}

}  // namespace

void stitch_tokens(const StitchArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f32) return stitch<float>(args, begin, end);
  if (args.dtype == DType::bf16) return stitch<Bf16>(args, begin, end);
  return stitch<Half>(args, begin, end);
}

}  // namespace fastmkd::FASTMKD_ISA
