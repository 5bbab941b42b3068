// Declares the compiled entry points. The CPU and the CUDA library both link this one, so each schema exists exactly
// once whichever of them is loaded, and in whichever order. A test compares the schemas with fastmkd/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastmkd_native, m) {
  m.def(
      "align_cells(Tensor level, Tensor weight, Tensor? bias, Tensor? visible, Tensor? mask_token, Tensor positions, "
      "int patch) -> Tensor");
  m.def("align_cells_grad(Tensor level, Tensor weight, Tensor? visible, Tensor grad, int patch) -> (Tensor, Tensor)");
  m.def("centred_gram(Tensor[] features) -> Tensor");
  m.def("cls_saliency(Tensor q, Tensor k, int num_prefix_tokens, float scale, bool include_prefix) -> Tensor");
  m.def(
      "masked_patch_loss(Tensor prediction, Tensor images, Tensor hidden, int patch_h, int patch_w, bool normalize) "
      "-> (Tensor, Tensor)");
  m.def(
      "masked_patch_loss_grad(Tensor prediction, Tensor images, Tensor hidden, Tensor stats, Tensor grad, int patch_h, "
      "int patch_w) -> Tensor");
  m.def("recovered_loss(Tensor rows, Tensor teacher, Tensor queries, int patch) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "recovered_loss_grad(Tensor rows, Tensor teacher, Tensor queries, Tensor log_sums, Tensor grad_error, "
      "Tensor grad_difference, Tensor grad_contexts, Tensor shifts, int patch) -> (Tensor, Tensor)");
  m.def("select_tokens(Tensor saliency, int k, int grid_h, int grid_w, int target_h, int target_w) -> Tensor");
  m.def("stitch_tokens(Tensor student, Tensor teacher, Tensor from_teacher, Tensor position) -> Tensor");
  m.def(
      "tap_table(Tensor cells, Tensor rank, int[] cell, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "bool transposed) -> (Tensor, Tensor)");
  m.def(
      "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos, Tensor keep, int stride_h, int stride_w) "
      "-> Tensor");
  m.def(
      "masked_conv2d(Tensor values, Tensor weight, Tensor? bias, Tensor taps, Tensor taps_back, Tensor order, "
      "Tensor order_back, int groups) -> Tensor");
  m.def(
      "masked_conv2d_weight(Tensor values, Tensor grad, Tensor taps, Tensor order, int kh, int kw, int groups) "
      "-> Tensor");
  m.def("packed_attention(Tensor qkv, Tensor starts, float scale) -> Tensor");
  m.def("unshuffle_tokens(Tensor tokens, Tensor keep, Tensor mask_token, Tensor positions) -> Tensor");
}
