// One kernel table against core/reference on random inputs: shared by self_test() and the C++ tests.
#pragma once

#include <string>
#include <vector>

#include "core/kernels.h"

namespace fastmkd::check {

struct Outcome {
  bool ok;
  std::string detail;  // the worst error found, or where the first difference is
};

struct SaliencyShape {
  int64_t batch, heads, prefix, patches, head_dim;
};

struct SelectShape {
  int64_t batch, grid_h, grid_w, target_h, target_w, k;
};

struct PatchShape {
  int64_t batch, channels, height, width, patch, stride, kept;
};

struct StitchShape {
  int64_t batch, tokens, width;
};

struct UnshuffleShape {
  int64_t batch, prefix, patches, kept, width;
};

struct CellShape {
  int64_t batch, channels, grid_h, grid_w, patch;
  int64_t hidden;  // of ten cells
};

struct PatchLossShape {
  int64_t batch, channels, grid_h, grid_w, patch_h, patch_w, hidden;
};

struct RecoveredShape {
  int64_t batch, channels, grid_h, grid_w, patch;
};

struct ConvShape {
  int64_t n_in, n_out, cin, cout, groups, taps;
};

struct TapShape {
  int64_t batch, grid_h, grid_w, cell_h, cell_w, kernel, stride, padding, dilation;
  int64_t hidden;  // of ten cells
};

struct GramShape {
  int64_t batch, width, padding;  // the second layer has 3 * width features; padding lies between rows
};

enum class WeightLayout { contiguous, channels_last, transposed };

Outcome cls_saliency(const Kernels& kernels, DType dtype, const SaliencyShape& shape, bool include_prefix);

// Values repeat often and include both zeros, so that ties are the rule.
Outcome select_tokens(const Kernels& kernels, const SelectShape& shape);

Outcome gather_patches(const Kernels& kernels, DType dtype, const PatchShape& shape);

// bf16 and f16, every 16-bit pattern to float32, and float32 back with halfway cases, overflow, infinities and NaN.
Outcome conversions(const Kernels& kernels);

// Bias and positions, alone, together and absent, in every type they may have.
Outcome prefill(const Kernels& kernels);

Outcome stitch_tokens(const Kernels& kernels, DType dtype, const StitchShape& shape);

Outcome unshuffle_tokens(const Kernels& kernels, DType dtype, DType out_dtype, const UnshuffleShape& shape);

// From the map to rows of both types, and back.
Outcome cell_rows(const Kernels& kernels, DType dtype, const CellShape& shape, bool channels_last);

// Sums, statistics and the gradient.
Outcome masked_patch_loss(const Kernels& kernels, DType dtype, DType image_dtype, const PatchLossShape& shape,
                          bool normalize);

// Sums of every row of cells, and the gradient.
Outcome recovered_loss(const Kernels& kernels, DType dtype, DType teacher_dtype, const RecoveredShape& shape,
                       bool channels_last);

// Forward with and without bias; a third of the taps are absent, and row 0 has none.
Outcome masked_conv2d(const Kernels& kernels, DType dtype, const ConvShape& shape, WeightLayout layout);
Outcome masked_conv2d_weight(const Kernels& kernels, DType dtype, const ConvShape& shape);

// Table and patterns of one direction.
Outcome tap_table(const Kernels& kernels, const TapShape& shape, bool transposed);

// Two layers far from zero.
Outcome centred_gram(const Kernels& kernels, DType dtype, const GramShape& shape);

// Images of these lengths.
Outcome packed_attention(const Kernels& kernels, DType dtype, const std::vector<int64_t>& lengths, int64_t heads,
                         int64_t head_dim);

}  // namespace fastmkd::check
