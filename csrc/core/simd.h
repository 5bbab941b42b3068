// One vector of floats for the instruction set this file is compiled for, on the compiler's portable vector types.
//
// Everything here has internal linkage and nothing comes from the C++ standard library: a copy of an inline function
// compiled for AVX-512 must never be the one that the linker keeps for the whole program.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/kernels.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Vector, class Scalar>
inline Vector load_raw(const Scalar* from) {
  Vector to;
  __builtin_memcpy(&to, from, sizeof(Vector));
  return to;
}

template <class Vector, class Scalar>
inline void store_raw(Scalar* to, Vector from) {
  __builtin_memcpy(to, &from, sizeof(Vector));
}

inline Floats splat(float x) { return Floats{} + x; }
inline Words splat_word(uint32_t x) { return Words{} + x; }

inline Floats load(const float* from) { return load_raw<Floats>(from); }

// Four floats in every quarter of AVX-512, every half of AVX2.
inline Floats repeat4(const float* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(from));  // GCC 12 warns about the plain form
#elif defined(__AVX2__)
  return (Floats)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
#else
  return load(from);
#endif
}

inline Floats load(const Bf16* from) {
  return bit_cast<Floats>(__builtin_convertvector(load_raw<Shorts>(from), Words) << 16);
}

// Exact for every half, subnormals included: the exponent is rebased by a multiplication.
inline Floats load(const Half* from) {
  const Words half = __builtin_convertvector(load_raw<Shorts>(from), Words);
  const Words sign = (half & 0x8000u) << 16;
  const Words magnitude = (half & 0x7fffu) << 13;
  const Words rebased = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
  const Words special = magnitude | 0x7f800000u;  // infinity or NaN
  return bit_cast<Floats>((magnitude >= 0x0f800000u ? special : rebased) | sign);
}

inline void store(float* to, Floats x) { store_raw(to, x); }

inline bool is_aligned(const float* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Floats) == 0; }

// Writes past the caches, for aligned results larger than those. `end_streams` makes them visible to other threads.
inline void stream(float* to, Floats x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, x);
#else
  store(to, x);
#endif
}

inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Round to nearest even; a NaN becomes the quiet NaN.
inline void store(Bf16* to, Floats x) {
  const Words bits = bit_cast<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = splat_word(0x7fc0u);
  store_raw(to, __builtin_convertvector(x != x ? quiet : rounded, Shorts));
}

inline void store(Half* to, Floats x) {
  const Words bits = bit_cast<Words>(x);
  const Words sign = (bits >> 16) & 0x8000u;
  const Words magnitude = bits & 0x7fffffffu;
  // Exponent bias 127 -> 15, then the 13 bits that do not fit are rounded off.
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14, adding 0.5 lets the adder round to a multiple of 2^-24.
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words finite = magnitude < 0x38800000u ? subnormal : normal;
  const Words infinite = splat_word(0x7c00u);
  const Words quiet = splat_word(0x7e00u);
  const Words overflow = magnitude > 0x7f800000u ? quiet : infinite;
  store_raw(to, __builtin_convertvector((magnitude >= 0x47800000u ? overflow : finite) | sign, Shorts));
}

// The first `count` < kLanes elements; the others are zero, or left alone.
template <class T>
inline Floats load_part(const T* from, int64_t count) {
  T buffer[kLanes] = {};
  __builtin_memcpy(buffer, from, static_cast<uint64_t>(count) * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_part(T* to, Floats x, int64_t count) {
  T buffer[kLanes];
  store(buffer, x);
  __builtin_memcpy(to, buffer, static_cast<uint64_t>(count) * sizeof(T));
}

// x < y ? y : x, in one instruction where there is one.
inline Floats maximum(Floats x, Floats y) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)y, (__m512)x);  // GCC 12 warns about the plain form
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)y, (__m256)x);
#elif defined(__x86_64__)
  return (Floats)_mm_max_ps((__m128)y, (__m128)x);
#else
  return x < y ? y : x;
#endif
}

// Adds the upper half to the lower one; compilers turn the copy into a register extract.
template <class Part, class Vector>
inline Part fold(Vector x) {
  static_assert(2 * sizeof(Part) == sizeof(Vector), "a part is one half");
  Part parts[2];
  __builtin_memcpy(parts, &x, sizeof x);
  return parts[0] + parts[1];
}

inline float reduce_add(Floats x) {
#if defined(__AVX512F__)
  const Floats4 sum = fold<Floats4>(fold<Floats8>(x));
#elif defined(__AVX2__)
  const Floats4 sum = fold<Floats4>(x);
#else
  const Floats4 sum = x;
#endif
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

inline float reduce_max(Floats x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) {
    if (result < x[i]) result = x[i];
  }
  return result;
}

// exp(x) for x <= 0 to about 1 ulp; 0 below the smallest normal float, NaN for NaN.
inline Floats exp_negative(Floats x) {
  constexpr float kSmallest = -87.33654f;  // log(2^-126)
  constexpr float kRound = 0x1.8p23f;      // adding it rounds to an integer and leaves that integer in the low bits
  const Floats clamped = x < kSmallest ? splat(kSmallest) : x;
  const Floats shifted = clamped * 0x1.715476p0f + kRound;
  const Floats n = shifted - kRound;
  // log(2) in two parts, the first short enough for n * part to be exact without a fused multiply-add.
  const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  // Taylor to r^7 / 7!: with |r| <= log(2) / 2 the rest is 5e-9.
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // A product with 2^n, so that any NaN stays one: added to its bits, n can make it a number.
  const Floats result = p * bit_cast<Floats>((bit_cast<Words>(shifted) << 23) + 0x3f800000u);
  return x < kSmallest ? Floats{} : result;
}

#if defined(__AVX512BF16__) || defined(FASTMKD_EMULATE_AVX512_BF16)
#define FASTMKD_DOT_PAIRS 1

// sum += a * b over the two bf16 numbers of each 32-bit lane.
#ifdef FASTMKD_EMULATE_AVX512_BF16
// What VDPBF16PS does (Intel SDM, volume 2), for processors without it: two fused multiply-adds per lane, the odd
// element first, subnormals read and written as zero. Only the tests compile this.
inline __m512 flush_subnormals(__m512 x) {
  const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f800000));
  const __mmask16 tiny = _mm512_testn_epi32_mask(exponent, exponent);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_castps_si512(x), tiny, sign));
}

inline __m512 odd_elements(__m512i x) { return flush_subnormals((__m512)((Words)x & 0xffff0000u)); }
inline __m512 even_elements(__m512i x) { return flush_subnormals((__m512)((Words)x << 16)); }

inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  sum = flush_subnormals(_mm512_fmadd_ps(odd_elements(a), odd_elements(b), flush_subnormals(sum)));
  return flush_subnormals(_mm512_fmadd_ps(even_elements(a), even_elements(b), sum));
}
#else
inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

#endif

}  // namespace
