// Argument checks shared by the operator wrappers: each names the argument, what came and what was expected.
//
// The Python side has checked already when an op is called through fastmkd; these guard direct calls of the compiled
// entry points, whose kernels trust every pointer they are given.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/kernels.h"

namespace fastmkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python receives ValueError or RuntimeError, as the torch version has it, with this message.
template <class... Parts>
void require(bool ok, const Parts&... message) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

inline void require_dim(const Tensor& tensor, const char* name, int64_t dim, const char* layout) {
  require(tensor.dim() == dim, name, " has shape ", shape_text(tensor), "; expected ", layout, ".");
}

inline void require_cpu(const Tensor& tensor, const char* name) {
  require(tensor.is_cpu(), name, " is not on the CPU; move every argument to one device.");
}

inline void require_contiguous(const Tensor& tensor, const char* name) {
  require(tensor.is_contiguous(), name, " is not contiguous; call .contiguous() on it.");
}

inline void require_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  require(tensor.scalar_type() == expected, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
          "; expected ", torch::headeronly::toString(expected), ".");
}

// Checks of fastmkd_native::select_tokens that its CPU and CUDA entries share; returns what both kernels need.
inline SelectTokensArgs check_select_tokens(const Tensor& saliency, int64_t k, int64_t grid_h, int64_t grid_w,
                                            int64_t target_h, int64_t target_w) {
  require_dim(saliency, "saliency", 2, "(B, N)");
  require_dtype(saliency, "saliency", ScalarType::Float);
  require_contiguous(saliency, "saliency");
  require(grid_h > 0 && grid_w > 0, "grid is (", grid_h, ", ", grid_w, "); expected two positive numbers.");
  require(target_h > 0 && target_w > 0, "target_grid is (", target_h, ", ", target_w,
          "); expected two positive numbers.");
  constexpr int64_t kMostCells = int64_t{1} << 30;  // positions are 32-bit inside the kernels
  require(grid_h <= kMostCells / grid_w && target_h <= kMostCells / target_w, "grid (", grid_h, ", ", grid_w,
          ") or target_grid (", target_h, ", ", target_w, ") has more than ", kMostCells, " cells.");
  require(saliency.size(1) == grid_h * grid_w, "saliency has shape ", shape_text(saliency), "; expected (B, ",
          grid_h * grid_w, ") for a ", grid_h, " x ", grid_w, " grid.");
  require(k >= 1 && k <= target_h * target_w, "k is ", k, "; expected 1 to ", target_h * target_w, ".");
  SelectTokensArgs args{};
  args.saliency = saliency.const_data_ptr<float>();
  args.k = k;
  args.grid_h = grid_h;
  args.grid_w = grid_w;
  args.target_h = target_h;
  args.target_w = target_w;
  args.ratio_h = static_cast<float>(static_cast<double>(grid_h) / static_cast<double>(target_h));
  args.ratio_w = static_cast<float>(static_cast<double>(grid_w) / static_cast<double>(target_w));
  return args;
}

// Checks of fastmkd_native::tap_table that its CPU and CUDA entries share; returns what both kernels need.
inline TapTableArgs check_tap_table(const Tensor& cells, const Tensor& rank, const std::vector<int64_t>& cell,
                                    const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                    bool transposed) {
  require_dim(cells, "cells", 1, "(V,)");
  require_dim(rank, "rank", 3, "(B, gh, gw)");
  for (const auto& [tensor, name] : {std::pair{&cells, "cells"}, std::pair{&rank, "rank"}}) {
    require_dtype(*tensor, name, ScalarType::Long);
    require_contiguous(*tensor, name);
  }
  constexpr int64_t kMostSide = int64_t{1} << 14;  // so that no product or sum of two overflows inside the kernels
  require(rank.numel() > 0 && rank.size(1) <= kMostSide && rank.size(2) <= kMostSide, "rank has shape ",
          shape_text(rank), "; expected (B, gh, gw), grid sides from 1 to ", kMostSide, ".");
  const auto require_pair = [&](const std::vector<int64_t>& pair, const char* name, int64_t least) {
    require(pair.size() == 2, name, " holds ", pair.size(), " numbers; expected 2.");
    for (int64_t n : pair) {
      require(n >= least && n <= kMostSide, name, " is (", pair[0], ", ", pair[1], "); expected two numbers from ",
              least, " to ", kMostSide, ".");
    }
  };
  require_pair(cell, "cell", 1);
  require_pair(kernel, "kernel", 1);
  require_pair(stride, "stride", 1);
  require_pair(padding, "padding", 0);
  require_pair(dilation, "dilation", 1);
  const auto axis = [&](size_t a) {
    require(cell[a] % stride[a] == 0, "stride is (", stride[0], ", ", stride[1], "); expected divisors of cell, (",
            cell[0], ", ", cell[1], ").");
    const auto in_side = static_cast<int32_t>(cell[a]), out_side = static_cast<int32_t>(cell[a] / stride[a]);
    return TapAxis{transposed ? in_side : out_side,
                   transposed ? out_side : in_side,
                   static_cast<int32_t>(kernel[a]),
                   static_cast<int32_t>(stride[a]),
                   static_cast<int32_t>(padding[a]),
                   static_cast<int32_t>(dilation[a]),
                   transposed};
  };
  TapTableArgs args{};
  args.cells = cells.const_data_ptr<int64_t>();
  args.rank = rank.const_data_ptr<int64_t>();
  args.num_cells = cells.size(0);
  args.grid_h = rank.size(1);
  args.grid_w = rank.size(2);
  args.vertical = axis(0);
  args.horizontal = axis(1);
  constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;
  require(args.num_cells <= kMostRows / (cell[0] * cell[1]), "cells has ", args.num_cells, " cells of ", cell[0], " x ",
          cell[1], " pixels; expected at most ", kMostRows, " pixels.");
  return args;
}

// Checks of fastmkd_native::centred_gram that its CPU and CUDA entries share.
inline void check_centred_gram(const std::vector<Tensor>& features) {
  require(!features.empty(), "features is empty; expected at least one layer, a list of (n, d) tensors.");
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& x = features[i];
    const std::string name = "features[" + std::to_string(i) + "]";
    require_dim(x, name.c_str(), 2, "(n, d)");
    require_dtype(x, name.c_str(), features[0].scalar_type());
    require(x.size(0) >= 4 && x.size(0) == features[0].size(0), name, " has shape ", shape_text(x),
            "; expected the same n for every layer, at least 4.");
    require(x.size(1) >= 1, name, " has shape ", shape_text(x), "; expected at least one feature.");
    require(x.size(1) == 1 || x.stride(1) == 1, name, "'s last dimension has stride ", x.stride(1), "; expected 1.");
  }
}

}  // namespace fastmkd
