// The k largest of each row, in ascending order of index, after an optional bilinear resize. One block per row.
//
// Scores become unsigned integers in the same order; four passes over 8-bit digits find the k-th largest; a prefix sum
// over the row then writes the kept indices in order, ties to the lower index. Nothing depends on the order in which
// threads run: the only atomics count integers.
//
// Holds no torch and no CUDA runtime call, so that tests/native can run this very source on a CPU.
#pragma once

#include <cstdint>

#include "cuda/shim.cuh"

namespace fastmkd::cuda {

constexpr int kSelectThreads = 256;  // one per value of a digit
constexpr int kWarp = 32;

// Rows up to this length keep their keys in shared memory (40 of the 48 KiB every device grants), longer ones in a
// workspace of (batch, count) words.
constexpr int kMostSharedKeys = 10240;

struct SelectParams {
  const float* saliency;  // (batch, grid_h * grid_w)
  int64_t* out;           // (batch, k)
  uint32_t* workspace;    // (batch, target_h * target_w), or null for rows that fit into shared memory
  int k;
  int grid_h, grid_w, target_h, target_w;
  float ratio_h, ratio_w;  // grid / target, rounded once from double
};

inline bool select_needs_workspace(int64_t count) { return count > kMostSharedKeys; }

inline int select_shared_bytes(int64_t count) {
  return select_needs_workspace(count) ? 0 : static_cast<int>(count) * static_cast<int>(sizeof(uint32_t));
}

// One target position along one axis: two source positions and their weights.
struct SelectTap {
  int first, second;
  float first_weight, second_weight;
};

__device__ inline SelectTap select_tap(int target, int size, float ratio) {
  const float exact = __fsub_rn(__fmul_rn(__fadd_rn(static_cast<float>(target), 0.5f), ratio), 0.5f);
  const float source = exact > 0.0f ? exact : 0.0f;
  int first = static_cast<int>(source);
  first = first < size - 1 ? first : size - 1;
  const int second = first + 1 < size - 1 ? first + 1 : size - 1;
  const float weight = first == second ? 0.0f : __fsub_rn(source, static_cast<float>(first));
  return {first, second, __fsub_rn(1.0f, weight), weight};
}

// a * x + b * y, each operation rounded on its own.
__device__ inline float select_blend(float a, float x, float b, float y) {
  return __fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y));
}

__device__ inline float select_score(const SelectParams& p, const float* map, int i) {
  if (p.target_h == p.grid_h && p.target_w == p.grid_w) return map[i];
  const SelectTap v = select_tap(i / p.target_w, p.grid_h, p.ratio_h);
  const SelectTap h = select_tap(i % p.target_w, p.grid_w, p.ratio_w);
  const float* upper = map + static_cast<int64_t>(v.first) * p.grid_w;
  const float* lower = map + static_cast<int64_t>(v.second) * p.grid_w;
  return select_blend(v.first_weight, select_blend(h.first_weight, upper[h.first], h.second_weight, upper[h.second]),
                      v.second_weight, select_blend(h.first_weight, lower[h.first], h.second_weight, lower[h.second]));
}

// Unsigned integers in the order of the floats; adding +0 makes -0 equal to it.
__device__ inline uint32_t select_key(float score) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum of `value` over this thread and all before it. Every thread of the block must call it.
__device__ inline int select_scan(int value) {
  __shared__ int warp_totals[kSelectThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += before;
  }
  if (lane == kWarp - 1) warp_totals[thread / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < thread / kWarp; ++warp) value += warp_totals[warp];
  __syncthreads();  // the totals may be written again
  return value;
}

// The k-th largest key; `ties` becomes how many keys equal to it belong to the k largest.
__device__ inline uint32_t select_threshold(const uint32_t* keys, int count, int k, int* ties) {
  __shared__ int histogram[kSelectThreads];
  __shared__ int digit, left;
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t prefix = 0, known = 0;
  int remaining = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[thread] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += kSelectThreads) {
      if ((keys[i] & known) == prefix) atomicAdd(&histogram[(keys[i] >> shift) & 255u], 1);
    }
    __syncthreads();
    // Thread 0 takes the largest digit, so its scan counts the keys from the top down.
    const int mine = histogram[255 - thread];
    const int from_top = select_scan(mine);
    if (from_top >= remaining && from_top - mine < remaining) {
      digit = 255 - thread;
      left = remaining - (from_top - mine);
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(digit) << shift;
    known |= 255u << shift;
    remaining = left;
  }
  *ties = remaining;
  return prefix;
}

__global__ void __launch_bounds__(kSelectThreads) select_tokens_kernel(SelectParams p) {
  FASTMKD_DYNAMIC_SHARED(uint32_t, shared_keys);
  __shared__ int chunk_total;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  const int count = p.target_h * p.target_w;
  const float* map = p.saliency + row * p.grid_h * p.grid_w;
  uint32_t* keys = p.workspace == nullptr ? shared_keys : p.workspace + row * count;
  for (int i = thread; i < count; i += kSelectThreads) keys[i] = select_key(select_score(p, map, i));
  __syncthreads();

  int ties;
  const uint32_t threshold = select_threshold(keys, count, p.k, &ties);

  int64_t* out = p.out + row * p.k;
  int larger_before = 0, equal_before = 0;  // in the chunks already written
  for (int start = 0; start < count; start += kSelectThreads) {
    const int i = start + thread;
    const bool larger = i < count && keys[i] > threshold;
    const bool equal = i < count && keys[i] == threshold;
    // Both counts in one scan: a chunk holds at most 256 of either, so 16 bits each are enough.
    const int here = (larger ? 1 : 0) + (equal ? 1 << 16 : 0);
    const int upto = select_scan(here);
    const int larger_rank = larger_before + ((upto - here) & 0xffff);
    const int equal_rank = equal_before + ((upto - here) >> 16);
    if (larger || (equal && equal_rank < ties)) {
      out[larger_rank + (equal_rank < ties ? equal_rank : ties)] = i;
    }
    if (thread == kSelectThreads - 1) chunk_total = upto;
    __syncthreads();
    larger_before += chunk_total & 0xffff;
    equal_before += chunk_total >> 16;
    __syncthreads();  // the total may be written again
  }
}

}  // namespace fastmkd::cuda
