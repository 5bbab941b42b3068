// Index arguments, every one of them looked at: the kernels trust them.
#pragma once

#include "checks.h"

namespace fastmkd {

inline void require_numbers(const Tensor& numbers, const char* name, int64_t low, int64_t end) {
  const int64_t* data = numbers.const_data_ptr<int64_t>();
  for (int64_t i = 0, count = numbers.numel(); i < count; ++i) {
    require(data[i] >= low && data[i] < end, name, " holds ", data[i], "; expected ", low, " to ", end - 1, ".");
  }
}

}  // namespace fastmkd
