// The kernels' definitions in plain C++ with float64 sums: slow, obvious, what the fast ones are checked against.
#pragma once

#include <cstddef>
#include <vector>

#include "core/kernels.h"

namespace fastmkd::reference {

// Scalar conversions, written apart from the vector ones.
double decode(DType dtype, const void* data, int64_t index);
void encode(DType dtype, double value, void* data, int64_t index);
size_t size_of(DType dtype);

// (batch, patches)
std::vector<double> cls_saliency(const ClsSaliencyArgs& args);

// (batch, k); the resize in float32, each operation rounded on its own.
std::vector<int64_t> select_tokens(const SelectTokensArgs& args, int64_t batch);

// (batch * kept, channels * patch_h * patch_w)
std::vector<double> gather_patches(const PatchArgs& args, int64_t batch);

// (num_layers, batch, batch)
std::vector<double> centred_gram(const GramArgs& args);

// (tokens, heads, head_dim)
std::vector<double> packed_attention(const PackedAttentionArgs& args);
// (batch * tokens, width)
std::vector<double> stitch_tokens(const StitchArgs& args, int64_t batch);

// (batch * places, width)
std::vector<double> unshuffle_tokens(const UnshuffleArgs& args, int64_t batch);

struct PatchLoss {
  std::vector<double> differences;  // (batch * hidden_count, patch_h * patch_w * channels), prediction - target
  std::vector<double> sums, stats;  // as in PatchLossArgs
};
PatchLoss masked_patch_loss(const PatchLossArgs& args, int64_t batch);

// (num_cells * pixels, taps), by looking every tap up at its place in the image.
std::vector<int32_t> tap_table(const TapTableArgs& args);

// (n_out, cout)
std::vector<double> masked_conv2d(const MaskedConvArgs& args);

// (cout, cin / groups, num_taps)
std::vector<double> masked_conv2d_weight(const MaskedConvWeightArgs& args);

}  // namespace fastmkd::reference
