// In which order a map lies in memory.
#pragma once

#include "checks.h"

namespace fastmkd {

inline bool is_channels_last(const Tensor& map) {
  int64_t stride = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (map.size(dim) > 1 && map.stride(dim) != stride) return false;
    stride *= map.size(dim);
  }
  return true;
}

}  // namespace fastmkd
