// The CPU kernels: raw pointers and strides in, no torch, no allocation, no exception, no thread.
//
// Every kernel takes a range [begin, end) of independent work items, so that the caller's thread pool decides how to
// split it; a result never depends on the split. Each is compiled once per instruction set into its own namespace.
#pragma once

#include <stdint.h>

#include "core/tap_axis.h"

namespace fastmkd {

enum class DType : int { f32, bf16, f16, f64 };

struct ClsSaliencyArgs {
  DType dtype;           // of q and k: f32, bf16 or f16
  const void* q;         // (batch, heads, head_dim), last dimension contiguous
  const void* k;         // (batch, heads, prefix + patches, head_dim), last dimension contiguous
  int64_t q_strides[2];  // batch, head; in elements
  int64_t k_strides[3];  // batch, head, token; in elements
  int64_t batch, heads, prefix, patches, head_dim;
  float scale;
  bool include_prefix;
  float* logits;  // scratch, (batch, heads, keys)
  float* out;     // (batch, patches)
};

struct SelectTokensArgs {
  const float* saliency;  // (batch, grid_h * grid_w), contiguous
  int64_t k;
  int64_t grid_h, grid_w, target_h, target_w;
  float ratio_h, ratio_w;  // grid / target, rounded once from double
  int64_t* out;            // (batch, k)
};

struct PatchArgs {
  DType dtype;         // of the images
  const void* images;  // (batch, channels, height, width), contiguous
  int64_t channels, height, width;
  int64_t patch_h, patch_w, stride_h, stride_w;
  int64_t grid_w;       // patches in one row of the grid
  const int64_t* keep;  // (batch, kept)
  int64_t kept;
  DType row_dtype;  // f32, or the images' own
  void* rows;       // (batch * kept, channels * patch_h * patch_w)
};

struct EpilogueArgs {
  DType bias_dtype, pos_dtype;
  const void* bias;     // (width) or null
  const void* pos;      // (positions, width) or null
  const int64_t* keep;  // one index into pos per row
  int64_t width;
  DType out_dtype;  // f32 or f64
  void* out;        // (rows, width)
};

struct StitchArgs {
  DType dtype;          // of all but the mask: f32, bf16 or f16
  const void* student;  // (batch * tokens, width), contiguous
  const void* teacher;
  const bool* from_teacher;  // (batch * tokens)
  const void* position;      // (tokens, width)
  int64_t tokens, width;
  void* out;  // (batch * tokens, width)
};

// Kept tokens back at their places: out[r] = (source[r] < 0 ? mask_token : tokens[source[r]]) + positions[r % places].
struct UnshuffleArgs {
  DType dtype;             // of tokens: f32, bf16 or f16
  const void* tokens;      // (rows of all images, width), contiguous
  const int64_t* source;   // (batch * places), rows of tokens or -1
  DType out_dtype;         // of the rest: f32, or that of tokens
  const void* mask_token;  // (width)
  const void* positions;   // (places, width)
  int64_t places, width;
  void* out;  // (batch * places, width)
};

// A masked autoencoder's loss: rows are hidden patches, their values in the order row, column, channel.
struct PatchLossArgs {
  DType dtype;             // of prediction: f32, bf16 or f16
  const void* prediction;  // (batch * hidden_count, patch_h * patch_w * channels)
  DType image_dtype;       // f32, or that of prediction
  const void* images;      // (batch, channels, height, width)
  int64_t channels, height, width;
  int64_t patch_h, patch_w;  // divide height and width
  const int64_t* hidden;     // (batch, hidden_count)
  int64_t hidden_count;
  bool normalize;
  float* stats;  // (rows, 2), what the pixels are shifted and scaled by: written by the loss, read by its gradient
  double* sums;  // (rows), squared differences of a patch
  float scale;   // of the gradient
  void* out;     // like prediction, the gradient
};

// Cells of a map as rows, and rows as a map whose hidden cells are zeros.
struct CellArgs {
  DType dtype;         // of the map: f32, bf16 or f16
  void* map;           // (batch, channels, grid_h * patch, grid_w * patch); gather_cells only reads it
  bool channels_last;  // its memory is (batch, height, width, channels)
  int64_t channels, grid_h, grid_w, patch;
  const int64_t* slots;  // (batch, grid_h, grid_w), the row of a cell or -1 where it is hidden
  DType row_dtype;       // f32, or that of the map
  void* rows;            // (visible cells, patch, patch, channels); scatter_cells only reads it
};

// What a spatial recovery module predicts against the teacher's map, both normalised over the channels of a position.
// Rows of floats are `padded` long, zeros behind the channels; index 0 of a pair is the student, 1 the teacher.
struct RecoveredArgs {
  DType dtype;          // of rows: f32, bf16 or f16
  const void* rows;     // (batch, grid_h * grid_w, patch, patch, channels), contiguous
  DType teacher_dtype;  // f32, or that of rows
  const void* teacher;  // (batch, channels, grid_h * patch, grid_w * patch)
  bool channels_last;   // its memory is (batch, height, width, channels)
  int64_t batch, channels, padded, grid_h, grid_w, patch;
  const float* queries;  // (2, padded)
  // The loss writes, for each row of cells of an image:
  double* squares;  // sum of squared differences
  float* parts;     // recovered_parts: difference, contexts relative to the greatest logits, these and the denominators
  // The gradient reads and writes:
  const float* log_sums;         // (2, batch)
  const float* shifts;           // (2, batch)
  const float* grad_difference;  // (batch, padded)
  const float* grad_contexts;    // (2, batch, padded)
  float scale;                   // of the squared differences
  void* out;                     // like rows
  float* query_sums;             // (units, 2, padded), the queries' gradients
};

// Where the neighbours of visible pixels lie: table[r, t] is the row under tap t of row r, -1 if there is none.
struct TapTableArgs {
  const int64_t* cells;  // (num_cells), numbers of the visible cells in (batch, grid_h, grid_w)
  const int64_t* rank;   // (batch, grid_h, grid_w), position of a cell in `cells`, -1 if it is hidden
  int64_t num_cells, grid_h, grid_w;
  TapAxis vertical, horizontal;
  int32_t* table;    // (num_cells * pixels, taps)
  int64_t* pattern;  // (num_cells * pixels), bit t is set where tap t of the first kPatternTaps is present
};

// Masked convolution: out[o] = bias + sum over taps t of values[taps[o, t]] @ weight[:, :, t]^T; -1 adds nothing.
struct MaskedConvArgs {
  DType dtype;                // of values: the plan says which one the kernel reads
  const void* values;         // (n_in, cin), contiguous
  DType weight_dtype;         // f32, bf16 or f16
  const void* weight;         // (cout, cin / groups, num_taps)
  int64_t weight_strides[3];  // in elements
  const float* bias;          // (cout) or null
  const int32_t* taps;        // (n_out, num_taps), rows of values or -1
  int64_t n_out, cin, cout, groups, num_taps;
  float* out;  // (n_out, cout)
};

// Its gradient in the weight: out[:, :, t] = sum over rows o of grad[o]^T values[taps[o, t]].
struct MaskedConvWeightArgs {
  DType dtype;          // of values and grad: the plan says which one the kernel reads
  const void* values;   // (n_in, cin), contiguous
  const void* grad;     // (n_out, cout), contiguous
  const int32_t* taps;  // (n_out, num_taps)
  int64_t n_out, cin, cout, groups, num_taps;
  float* sums;  // scratch that all units share
  float* out;   // (cout, cin / groups, num_taps)
};

// U-centred Gram matrices of layers of different widths over the same images.
struct GramLayer {
  const void* features;  // (batch, width), last dimension contiguous
  int64_t stride;        // of a row, in elements
  int64_t width;
};
struct GramArgs {
  DType dtype;  // f32, bf16 or f16
  const GramLayer* layers;
  int64_t num_layers, batch;  // batch >= 4
  float* sums;                // scratch that all units share
  float* out;                 // (num_layers, batch, batch)
};

// Softmax attention within each image of a packed batch.
struct PackedAttentionArgs {
  DType dtype;            // f32, bf16 or f16
  const void* qkv;        // (tokens, 3, heads, head_dim), contiguous
  const int32_t* starts;  // (images + 1), never descending, from 0 to tokens
  int64_t images, heads, head_dim;
  float scale;
  void* out;  // (tokens, heads, head_dim)
};

// How an attention is cut for this instruction set; a function of lengths and shapes alone.
struct AttentionPlan {
  int64_t units;    // independent work items
  int64_t scratch;  // floats that each thread needs
};

// How a convolution or a Gram is cut for this instruction set; a function of shapes and dtypes alone.
struct ConvPlan {
  DType dtype;      // in which a convolution reads rows: f32, or the caller's bf16 where the processor multiplies it
  int64_t units;    // independent work items
  int64_t scratch;  // floats that each thread needs
  int64_t sums;     // floats that all threads share (weight gradient)
  int64_t reduce_units;  // work items of the second pass, 0 when there is none (weight gradient)
};

// The helpers below are `static` because the instruction-set translation units must not export inline functions.

// Keys of one head that enter the softmax.
static inline int64_t softmax_keys(const ClsSaliencyArgs& args) {
  return args.include_prefix ? args.prefix + args.patches : args.patches;
}

// Per-thread scratch that cls_logits needs, in floats.
static inline int64_t cls_logits_scratch(const ClsSaliencyArgs& args) { return args.heads * args.head_dim; }

// Values of a patch, and the per-thread scratch that both of its kernels need: a patch, and a line of each channel.
static inline int64_t patch_values(const PatchLossArgs& args) { return args.patch_h * args.patch_w * args.channels; }
static inline int64_t patch_loss_scratch(const PatchLossArgs& args) {
  return patch_values(args) + args.patch_w * args.channels;
}

// Positions that the kernels of a recovered map hold at once, the floats that a thread needs for them, and the floats
// that the loss writes for a unit: three rows and four numbers.
constexpr int64_t kRecoveredTile = 16;
static inline int64_t recovered_scratch(const RecoveredArgs& args) { return 2 * kRecoveredTile * args.padded; }
static inline int64_t recovered_parts(const RecoveredArgs& args) { return 3 * args.padded + 4; }

static inline bool resizes(const SelectTokensArgs& args) {
  return args.target_h != args.grid_h || args.target_w != args.grid_w;
}

// Per-thread scratch that select_tokens needs, in 4-byte words: the keys padded to the widest vector, the map resized
// along its rows, and the row's interpolation table.
static inline int64_t select_tokens_scratch(const SelectTokensArgs& args) {
  const int64_t keys = args.target_h * args.target_w + 16;
  return resizes(args) ? keys + args.grid_h * args.target_w + 4 * args.target_w : keys;
}

static inline int64_t tap_table_pixels(const TapTableArgs& args) {
  return int64_t{args.vertical.row_side} * args.horizontal.row_side;
}

static inline int64_t tap_table_taps(const TapTableArgs& args) {
  return int64_t{args.vertical.kernel} * args.horizontal.kernel;
}

// Per-thread scratch that tap_table needs, in 4-byte words.
static inline int64_t tap_table_scratch(const TapTableArgs& args) {
  const int64_t neighbours =
      int64_t{tap_span(args.vertical, args.grid_h).count} * tap_span(args.horizontal, args.grid_w).count;
  const int64_t pixels = tap_table_pixels(args), across = int64_t{args.horizontal.row_side} * args.horizontal.kernel;
  return 2 * neighbours * pixels + neighbours + 1 + 2 * pixels * tap_table_taps(args) + 2 * across;
}

struct Kernels {
  // logits[b, h, i] = scale * q[b, h] . k[b, h, i] for the flattened (batch, keys) tokens [begin, end).
  void (*cls_logits)(const ClsSaliencyArgs& args, int64_t begin, int64_t end, float* scratch);
  // Softmax of the logits and its sum or mean over heads, for images [begin, end). Overwrites the logits.
  void (*cls_softmax)(const ClsSaliencyArgs& args, int64_t begin, int64_t end);
  // Images [begin, end); returns the first one that holds a NaN or an infinity, or -1.
  int64_t (*select_tokens)(const SelectTokensArgs& args, int64_t begin, int64_t end, void* scratch);
  // Copies (and widens to float32 when row_dtype asks for it) the pixels of the flattened kept patches [begin, end).
  void (*gather_patches)(const PatchArgs& args, int64_t begin, int64_t end);
  // out[r] = bias + pos[keep[r]], absent terms count as zero, for rows [begin, end).
  void (*prefill)(const EpilogueArgs& args, int64_t begin, int64_t end);
  // Elements [begin, end): bf16 or f16 to float32 and back (round to nearest even).
  void (*widen)(DType from, const void* in, float* out, int64_t begin, int64_t end);
  void (*narrow)(DType to, const float* in, void* out, int64_t begin, int64_t end);
  // out[r] = (from_teacher[r] ? teacher[r] : student[r]) + position[r % tokens] for rows [begin, end).
  void (*stitch_tokens)(const StitchArgs& args, int64_t begin, int64_t end);
  // Rows of the result [begin, end).
  void (*unshuffle_tokens)(const UnshuffleArgs& args, int64_t begin, int64_t end);
  // Lines [begin, end) of all images: the map's visible cells into the rows, and the rows into the map.
  void (*gather_cells)(const CellArgs& args, int64_t begin, int64_t end);
  void (*scatter_cells)(const CellArgs& args, int64_t begin, int64_t end);
  // Rows [begin, end): the sums and statistics of the loss, and the gradient.
  void (*masked_patch_loss)(const PatchLossArgs& args, int64_t begin, int64_t end, float* scratch);
  void (*masked_patch_loss_grad)(const PatchLossArgs& args, int64_t begin, int64_t end, float* scratch);
  // Units [begin, end), which are rows of cells of all images.
  void (*recovered_loss)(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch);
  void (*recovered_loss_grad)(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch);
  // Cells [begin, end).
  void (*tap_table)(const TapTableArgs& args, int64_t begin, int64_t end, void* scratch);
  // Units [begin, end) of the plan.
  ConvPlan (*masked_conv2d_plan)(const MaskedConvArgs& args);
  void (*masked_conv2d)(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch);
  // Units [begin, end) of the plan, and when it has a second pass that pass, once all units are done.
  ConvPlan (*masked_conv2d_weight_plan)(const MaskedConvWeightArgs& args);
  void (*masked_conv2d_weight)(const MaskedConvWeightArgs& args, int64_t begin, int64_t end, float* scratch);
  void (*masked_conv2d_weight_reduce)(const MaskedConvWeightArgs& args, int64_t begin, int64_t end);
  // The same for groups == cin == cout.
  ConvPlan (*masked_depthwise_plan)(const MaskedConvArgs& args);
  void (*masked_depthwise)(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch);
  ConvPlan (*masked_depthwise_weight_plan)(const MaskedConvWeightArgs& args);
  void (*masked_depthwise_weight)(const MaskedConvWeightArgs& args, int64_t begin, int64_t end, float* scratch);
  void (*masked_depthwise_weight_reduce)(const MaskedConvWeightArgs& args, int64_t begin, int64_t end);
  // Units [begin, end) of the plan, and once all are done the second pass, whose units are layers.
  ConvPlan (*centred_gram_plan)(const GramArgs& args);
  void (*centred_gram)(const GramArgs& args, int64_t begin, int64_t end, float* scratch);
  void (*centred_gram_reduce)(const GramArgs& args, int64_t begin, int64_t end, float* scratch);
  // Units [begin, end) of the plan.
  AttentionPlan (*packed_attention_plan)(const PackedAttentionArgs& args);
  void (*packed_attention)(const PackedAttentionArgs& args, int64_t begin, int64_t end, float* scratch);
};

#define FASTMKD_DECLARE_KERNELS(isa)                                                                          \
  namespace isa {                                                                                             \
  void cls_logits(const ClsSaliencyArgs& args, int64_t begin, int64_t end, float* scratch);                   \
  void cls_softmax(const ClsSaliencyArgs& args, int64_t begin, int64_t end);                                  \
  int64_t select_tokens(const SelectTokensArgs& args, int64_t begin, int64_t end, void* scratch);             \
  void gather_patches(const PatchArgs& args, int64_t begin, int64_t end);                                     \
  void prefill(const EpilogueArgs& args, int64_t begin, int64_t end);                                         \
  void widen(DType from, const void* in, float* out, int64_t begin, int64_t end);                             \
  void narrow(DType to, const float* in, void* out, int64_t begin, int64_t end);                              \
  void stitch_tokens(const StitchArgs& args, int64_t begin, int64_t end);                                     \
  void unshuffle_tokens(const UnshuffleArgs& args, int64_t begin, int64_t end);                               \
  void gather_cells(const CellArgs& args, int64_t begin, int64_t end);                                        \
  void scatter_cells(const CellArgs& args, int64_t begin, int64_t end);                                       \
  void masked_patch_loss(const PatchLossArgs& args, int64_t begin, int64_t end, float* scratch);              \
  void masked_patch_loss_grad(const PatchLossArgs& args, int64_t begin, int64_t end, float* scratch);         \
  void recovered_loss(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch);                 \
  void recovered_loss_grad(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch);            \
  void tap_table(const TapTableArgs& args, int64_t begin, int64_t end, void* scratch);                        \
  ConvPlan masked_conv2d_plan(const MaskedConvArgs& args);                                                    \
  void masked_conv2d(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch);                 \
  ConvPlan masked_conv2d_weight_plan(const MaskedConvWeightArgs& args);                                       \
  void masked_conv2d_weight(const MaskedConvWeightArgs& args, int64_t begin, int64_t end, float* scratch);    \
  void masked_conv2d_weight_reduce(const MaskedConvWeightArgs& args, int64_t begin, int64_t end);             \
  ConvPlan masked_depthwise_plan(const MaskedConvArgs& args);                                                 \
  void masked_depthwise(const MaskedConvArgs& args, int64_t begin, int64_t end, float* scratch);              \
  ConvPlan masked_depthwise_weight_plan(const MaskedConvWeightArgs& args);                                    \
  void masked_depthwise_weight(const MaskedConvWeightArgs& args, int64_t begin, int64_t end, float* scratch); \
  void masked_depthwise_weight_reduce(const MaskedConvWeightArgs& args, int64_t begin, int64_t end);          \
  ConvPlan centred_gram_plan(const GramArgs& args);                                                           \
  void centred_gram(const GramArgs& args, int64_t begin, int64_t end, float* scratch);                        \
  void centred_gram_reduce(const GramArgs& args, int64_t begin, int64_t end, float* scratch);                 \
  AttentionPlan packed_attention_plan(const PackedAttentionArgs& args);                                       \
  void packed_attention(const PackedAttentionArgs& args, int64_t begin, int64_t end, float* scratch);         \
  }

#define FASTMKD_KERNEL_TABLE(isa)                                                                                     \
  ::fastmkd::Kernels {                                                                                                \
    ::fastmkd::isa::cls_logits, ::fastmkd::isa::cls_softmax, ::fastmkd::isa::select_tokens,                           \
        ::fastmkd::isa::gather_patches, ::fastmkd::isa::prefill, ::fastmkd::isa::widen, ::fastmkd::isa::narrow,       \
        ::fastmkd::isa::stitch_tokens, ::fastmkd::isa::unshuffle_tokens, ::fastmkd::isa::gather_cells,                \
        ::fastmkd::isa::scatter_cells, ::fastmkd::isa::masked_patch_loss, ::fastmkd::isa::masked_patch_loss_grad,     \
        ::fastmkd::isa::recovered_loss, ::fastmkd::isa::recovered_loss_grad, ::fastmkd::isa::tap_table,               \
        ::fastmkd::isa::masked_conv2d_plan, ::fastmkd::isa::masked_conv2d, ::fastmkd::isa::masked_conv2d_weight_plan, \
        ::fastmkd::isa::masked_conv2d_weight, ::fastmkd::isa::masked_conv2d_weight_reduce,                            \
        ::fastmkd::isa::masked_depthwise_plan, ::fastmkd::isa::masked_depthwise,                                      \
        ::fastmkd::isa::masked_depthwise_weight_plan, ::fastmkd::isa::masked_depthwise_weight,                        \
        ::fastmkd::isa::masked_depthwise_weight_reduce, ::fastmkd::isa::centred_gram_plan,                            \
        ::fastmkd::isa::centred_gram, ::fastmkd::isa::centred_gram_reduce, ::fastmkd::isa::packed_attention_plan,     \
        ::fastmkd::isa::packed_attention                                                                              \
  }

}  // namespace fastmkd
