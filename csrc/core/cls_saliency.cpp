// CLS saliency (MaskedKD, Eq. 2): one query row against all keys, softmax, sum over heads.
//
// The keys are read token by token: in a (batch, token, 3, head, dim) qkv tensor the keys of one token's heads lie side
// by side, so memory is read in order whatever the strides of the head and token dimensions say.
#include "core/simd.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

// float32 query, already multiplied by the scale, against one key.
template <class T>
inline float dot(const float* q, const T* k, int64_t dim) {
  Floats even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    even += load(q + i) * load(k + i);
    odd += load(q + i + kLanes) * load(k + i + kLanes);
  }
  if (i + kLanes <= dim) {
    even += load(q + i) * load(k + i);
    i += kLanes;
  }
  if (i < dim) odd += load_part(q + i, dim - i) * load_part(k + i, dim - i);
  return reduce_add(even + odd);
}

template <class T>
void scale_queries(const ClsSaliencyArgs& args, const T* q, float* scaled) {
  for (int64_t h = 0; h < args.heads; ++h) {
    const T* from = q + h * args.q_strides[1];
    float* to = scaled + h * args.head_dim;
    int64_t i = 0;
    for (; i + kLanes <= args.head_dim; i += kLanes) store(to + i, load(from + i) * args.scale);
    const int64_t rest = args.head_dim - i;
    if (rest > 0) store_part(to + i, load_part(from + i, rest) * args.scale, rest);
  }
}

// Calls fn(image, key, first_key_of_image) for the flattened tokens [begin, end).
template <class Fn>
inline void for_each_key(const ClsSaliencyArgs& args, int64_t begin, int64_t end, Fn fn) {
  const int64_t keys = softmax_keys(args);
  int64_t b = begin / keys, i = begin % keys;
  for (int64_t token = begin; token < end; ++token) {
    fn(b, i, token == begin || i == 0);
    if (++i == keys) {
      i = 0;
      ++b;
    }
  }
}

template <class T>
void logits(const ClsSaliencyArgs& args, int64_t begin, int64_t end, float* scaled) {
  const T* q = static_cast<const T*>(args.q);
  const T* k = static_cast<const T*>(args.k);
  const int64_t keys = softmax_keys(args);
  const int64_t skipped = args.include_prefix ? 0 : args.prefix;
  for_each_key(args, begin, end, [&](int64_t b, int64_t i, bool new_image) {
    if (new_image) scale_queries(args, q + b * args.q_strides[0], scaled);
    const T* key = k + b * args.k_strides[0] + (skipped + i) * args.k_strides[2];
    float* out = args.logits + b * args.heads * keys + i;
    for (int64_t h = 0; h < args.heads; ++h) {
      out[h * keys] = dot(scaled + h * args.head_dim, key + h * args.k_strides[1], args.head_dim);
    }
  });
}

#ifdef FASTMKD_DOT_PAIRS

// The first `count` <= 32 elements, zeros after them.
inline __m512i load_pairs(const Bf16* from, int64_t count) {
  const __mmask32 mask = count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << count) - 1u);
  return _mm512_maskz_loadu_epi16(mask, from);
}

// The processor multiplies bf16 pairs itself: nothing is widened, and the scale is applied to the sum.
template <>
void logits<Bf16>(const ClsSaliencyArgs& args, int64_t begin, int64_t end, float* /*scaled*/) {
  const Bf16* q = static_cast<const Bf16*>(args.q);
  const Bf16* k = static_cast<const Bf16*>(args.k);
  const int64_t keys = softmax_keys(args);
  const int64_t skipped = args.include_prefix ? 0 : args.prefix;
  for_each_key(args, begin, end, [&](int64_t b, int64_t i, bool /*new_image*/) {
    float* out = args.logits + b * args.heads * keys + i;
    for (int64_t h = 0; h < args.heads; ++h) {
      const Bf16* query = q + b * args.q_strides[0] + h * args.q_strides[1];
      const Bf16* key = k + b * args.k_strides[0] + h * args.k_strides[1] + (skipped + i) * args.k_strides[2];
      __m512 sum = _mm512_setzero_ps();
      for (int64_t j = 0; j < args.head_dim; j += 32) {
        sum = dot_pairs(sum, load_pairs(query + j, args.head_dim - j), load_pairs(key + j, args.head_dim - j));
      }
      out[h * keys] = args.scale * reduce_add((Floats)sum);
    }
  });
}

#endif

inline float row_max(const float* row, int64_t count) {
  Floats most = splat(row[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = maximum(most, load(row + i));
  float result = reduce_max(most);
  for (; i < count; ++i) result = result < row[i] ? row[i] : result;
  return result;
}

// row <- exp(row - most); returns the sum.
inline float exponentiate(float* row, int64_t count, float most) {
  Floats total{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats e = exp_negative(load(row + i) - most);
    store(row + i, e);
    total += e;
  }
  float result = reduce_add(total);
  if (i < count) {
    float rest[kLanes];
    store(rest, exp_negative(load_part(row + i, count - i) - most));
    for (int64_t j = 0; i + j < count; ++j) {
      row[i + j] = rest[j];
      result += rest[j];
    }
  }
  return result;
}

inline void add_scaled(float* out, const float* row, int64_t count, float factor, bool first) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats term = load(row + i) * factor;
    store(out + i, first ? term : load(out + i) + term);
  }
  for (; i < count; ++i) out[i] = first ? row[i] * factor : out[i] + row[i] * factor;
}

}  // namespace

void cls_logits(const ClsSaliencyArgs& args, int64_t begin, int64_t end, float* scratch) {
  switch (args.dtype) {
    case DType::bf16:
      return logits<Bf16>(args, begin, end, scratch);
    case DType::f16:
      return logits<Half>(args, begin, end, scratch);
    default:
      return logits<float>(args, begin, end, scratch);
  }
}

void cls_softmax(const ClsSaliencyArgs& args, int64_t begin, int64_t end) {
  const int64_t keys = softmax_keys(args);
  const int64_t skipped = keys - args.patches;
  const float share = args.include_prefix ? 1.0f / static_cast<float>(args.heads) : 1.0f;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t h = 0; h < args.heads; ++h) {
      float* row = args.logits + (b * args.heads + h) * keys;
      const float sum = exponentiate(row, keys, row_max(row, keys));
      add_scaled(args.out + b * args.patches, row + skipped, args.patches, share / sum, h == 0);
    }
  }
}

}  // namespace fastmkd::FASTMKD_ISA
