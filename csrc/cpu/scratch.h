// Scratch that a thread keeps from call to call, so that a layer does not pay for fresh pages each time.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace fastmkd {

// At least `floats` floats, aligned to a cache line; valid until this thread asks again.
inline float* thread_scratch(int64_t floats) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t size = 0;
  if (size < floats) {
    buffer.reset();
    size = 0;
    buffer.reset(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), kLine)));
    size = floats;
  }
  return buffer.get();
}

}  // namespace fastmkd
