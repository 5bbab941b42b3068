// The plain-C++ core on every instruction set of this machine; run by ctest, needs neither Python nor torch.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/self_test.h"

namespace {

using namespace fastmkd;

int failures = 0;

void expect(bool ok, const std::string& what) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", what.c_str());
  failures += !ok;
}

void expect(const check::Outcome& outcome, const std::string& what) {
  expect(outcome.ok, what + ": " + outcome.detail);
}

std::string refusal(const std::string& isa) {
  try {
    set_isa(isa);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void test_isa_override() {
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    expect(active_isa() == isa, std::string("set_isa(") + isa_name(isa) + ")");
  }
  expect(refusal("sse9").find("does not exist") != std::string::npos, "an unknown instruction set is refused");
#if defined(__x86_64__)
  expect(refusal("neon").find("not compiled") != std::string::npos,
         "another architecture's instruction set is refused");
#endif
}

// A default of FASTMKD_ISA=nonsense must be an error, not a silent choice. Runs before anything reads the setting.
void test_isa_environment() {
  setenv("FASTMKD_ISA", "nonsense", 1);
  std::string message;
  try {
    active_isa();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  expect(message.find("nonsense") != std::string::npos, "FASTMKD_ISA=nonsense is refused: " + message);
  setenv("FASTMKD_ISA", "generic", 1);
  expect(active_isa() == Isa::generic, "FASTMKD_ISA=generic");
}

void test_masked_autoencoder(const Kernels& table, DType dtype, const std::string& name) {
  for (DType other : {dtype, DType::f32}) {
    for (int64_t width : {1, 37, 512}) {
      expect(check::unshuffle_tokens(table, dtype, other, {3, 2, 7, 3, width}),
             name + "unshuffle_tokens width " + std::to_string(width));
    }
    expect(check::unshuffle_tokens(table, dtype, other, {2, 0, 4, 4, 8}), name + "unshuffle_tokens, nothing hidden");
    // Gray, RGB at 16 and 14 pixels, more channels than pixels in a line, one line.
    for (const check::PatchLossShape& shape :
         {check::PatchLossShape{2, 1, 3, 2, 5, 4, 3}, check::PatchLossShape{2, 3, 2, 3, 16, 16, 4},
          check::PatchLossShape{1, 3, 2, 2, 14, 14, 4}, check::PatchLossShape{1, 7, 2, 2, 3, 2, 1},
          check::PatchLossShape{1, 3, 2, 1, 1, 40, 2}}) {
      for (bool normalize : {false, true}) {
        expect(check::masked_patch_loss(table, dtype, other, shape, normalize),
               name + "masked_patch_loss " + std::to_string(shape.patch_h) + "x" + std::to_string(shape.patch_w));
      }
    }
  }
}

void test_recovered_loss(Isa isa) {
  // One channel, one position, lines longer than a tile, patches that no tile divides, whole tiles and vectors, one
  // channel beyond a vector, many channels.
  for (const check::RecoveredShape& shape :
       {check::RecoveredShape{2, 1, 2, 2, 2}, check::RecoveredShape{3, 5, 1, 1, 1},
        check::RecoveredShape{1, 37, 2, 7, 3}, check::RecoveredShape{2, 64, 1, 6, 4},
        check::RecoveredShape{2, 16, 1, 16, 2}, check::RecoveredShape{1, 17, 2, 4, 4},
        check::RecoveredShape{1, 300, 3, 17, 1}}) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (DType teacher : {dtype, DType::f32}) {
        for (bool channels_last : {false, true}) {
          expect(check::recovered_loss(kernels(isa), dtype, teacher, shape, channels_last),
                 std::string(isa_name(isa)) + " recovered_loss of " + std::to_string(shape.channels) + " channels");
        }
      }
    }
  }
}

void test_cell_rows(Isa isa) {
  // One of everything, single positions, lines longer than a vector, sides that no vector divides, whole vectors.
  for (const check::CellShape& shape : {check::CellShape{1, 1, 1, 1, 1, 0}, check::CellShape{2, 5, 3, 4, 1, 3},
                                        check::CellShape{2, 37, 2, 9, 3, 5}, check::CellShape{1, 64, 2, 8, 4, 1},
                                        check::CellShape{2, 17, 3, 2, 5, 8}, check::CellShape{1, 16, 2, 2, 2, 10}}) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (bool channels_last : {false, true}) {
        expect(check::cell_rows(kernels(isa), dtype, shape, channels_last),
               std::string(isa_name(isa)) + " cell_rows of " + std::to_string(shape.channels) + " channels");
      }
    }
  }
}

void test_kernels(Isa isa) {
  const Kernels& table = kernels(isa);
  const std::string name = std::string(isa_name(isa)) + " ";
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (bool prefix : {false, true}) {
      for (int64_t dim : {1, 8, 31, 64, 80}) {
        for (int64_t patches : {1, 15, 49, 196}) {
          expect(check::cls_saliency(table, dtype, {2, 3, 1 + patches % 3, patches, dim}, prefix),
                 name + "cls_saliency dim " + std::to_string(dim) + " patches " + std::to_string(patches));
        }
      }
    }
    for (int64_t width : {1, 8, 37, 512}) {
      expect(check::stitch_tokens(table, dtype, {3, 7, width}), name + "stitch_tokens width " + std::to_string(width));
    }
    test_masked_autoencoder(table, dtype, name);
    expect(check::gather_patches(table, dtype, {3, 3, 32, 48, 16, 16, 6}), name + "gather_patches 16x16");
    expect(check::gather_patches(table, dtype, {2, 1, 20, 33, 7, 3, 11}), name + "gather_patches overlapping");
  }
  expect(check::gather_patches(table, DType::f64, {2, 3, 12, 12, 4, 4, 5}), name + "gather_patches f64");
  for (int64_t side : {1, 4, 7, 14, 24, 64}) {
    const int64_t patches = side * side;
    for (int64_t k : {int64_t{1}, patches / 2, patches - 1, patches}) {
      if (k < 1) continue;
      expect(check::select_tokens(table, {2, side, side, side, side, k}),
             name + "select_tokens " + std::to_string(k) + " of " + std::to_string(patches));
    }
    expect(check::select_tokens(table, {2, side, side, 16, 10, 80}), name + "select_tokens to 16 x 10");
    expect(check::select_tokens(table, {2, 5, 11, side, side + 1, side}), name + "select_tokens from 5 x 11");
  }
  expect(check::conversions(table), name + "conversions");
  expect(check::prefill(table), name + "prefill");
}

void test_centred_gram(Isa isa) {
  const Kernels& table = kernels(isa);
  // The least batch, one feature, odd widths, several panels, several parts of a layer.
  for (const check::GramShape& shape :
       {check::GramShape{4, 1, 0}, check::GramShape{5, 17, 2}, check::GramShape{33, 129, 1},
        check::GramShape{64, 48, 0}, check::GramShape{97, 200, 5}, check::GramShape{9, 9000, 0}}) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      expect(check::centred_gram(table, dtype, shape), std::string(isa_name(isa)) + " centred_gram of " +
                                                           std::to_string(shape.batch) + " x " +
                                                           std::to_string(shape.width));
    }
  }
}

void test_masked_convolutions(Isa isa) {
  const Kernels& table = kernels(isa);
  // Several blocks of rows, several panels, narrow inputs, odd widths, grouped, depthwise, one row.
  const check::ConvShape shapes[] = {
      {300, 2100, 17, 5, 1, 9},   {90, 140, 64, 64, 1, 9},  {50, 60, 130, 144, 1, 4}, {80, 700, 3, 37, 1, 49},
      {70, 90, 37, 24, 1, 1},     {60, 50, 24, 12, 4, 9},   {60, 50, 80, 160, 2, 3},  {60, 50, 8, 16, 8, 9},
      {200, 1300, 40, 40, 40, 9}, {60, 90, 97, 97, 97, 49}, {1, 1, 16, 16, 1, 9},     {9, 7, 1, 1, 1, 9},
  };
  for (const check::ConvShape& shape : shapes) {
    const std::string name = std::string(isa_name(isa)) + " masked_conv2d " + std::to_string(shape.cin) + " to " +
                             std::to_string(shape.cout) + " in " + std::to_string(shape.groups);
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      expect(check::masked_conv2d(table, dtype, shape, check::WeightLayout::contiguous), name);
    }
    expect(check::masked_conv2d(table, DType::f32, shape, check::WeightLayout::channels_last), name + " channels-last");
    if (shape.groups == 1) {
      expect(check::masked_conv2d(table, DType::f32, shape, check::WeightLayout::transposed), name + " transposed");
      expect(check::masked_conv2d(table, DType::bf16, shape, check::WeightLayout::transposed),
             name + " transposed bf16");
    }
    for (DType dtype : {DType::f32, DType::bf16}) {
      expect(check::masked_conv2d_weight(table, dtype, shape), name + " weight");
    }
  }
}

void test_tap_table(Isa isa) {
  // Batch, grid, cell, kernel, stride, padding, dilation, tenths hidden: a layer; one visible cell; all visible; a
  // stem; a stride without a kernel; a large kernel on single pixels; dilation beyond the grid; taps that all miss.
  const check::TapShape shapes[] = {
      {3, 4, 4, 2, 2, 3, 1, 1, 1, 5}, {1, 3, 3, 2, 1, 3, 1, 1, 1, 10}, {2, 2, 3, 3, 2, 3, 1, 1, 1, 0},
      {2, 2, 2, 8, 8, 7, 2, 3, 1, 5}, {2, 3, 2, 4, 2, 1, 2, 0, 1, 5},  {1, 9, 7, 1, 1, 9, 1, 4, 1, 3},
      {2, 3, 3, 2, 2, 3, 1, 9, 9, 3}, {1, 2, 2, 2, 2, 2, 1, 90, 1, 0}, {4, 1, 1, 4, 6, 4, 2, 1, 2, 0},
  };
  for (const check::TapShape& shape : shapes) {
    for (bool transposed : {false, true}) {
      expect(check::tap_table(kernels(isa), shape, transposed),
             std::string(isa_name(isa)) + " tap_table " + std::to_string(shape.kernel) + " on " +
                 std::to_string(shape.grid_h) + " x " + std::to_string(shape.grid_w));
    }
  }
}

void test_packed_attention(Isa isa) {
  const Kernels& table = kernels(isa);
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (int64_t dim : {1, 8, 31, 32, 64, 72, 80}) {
      const std::string name = std::string(isa_name(isa)) + " packed_attention dim " + std::to_string(dim);
      expect(check::packed_attention(table, dtype, {50}, 1, dim), name + " one image");
      expect(check::packed_attention(table, dtype, {1, 16, 17, 0, 99, 2}, 3, dim), name + " ragged");
    }
  }
  expect(check::packed_attention(table, DType::f32, {577, 3}, 2, 64), std::string(isa_name(isa)) + " 577 tokens");
}

// Two threads switch and run at once: what the thread sanitizer looks at.
void test_threads() {
  std::vector<std::thread> threads;
  std::vector<check::Outcome> outcomes(4);
  for (size_t i = 0; i < outcomes.size(); ++i) {
    threads.emplace_back([i, &outcomes] {
      set_isa(isa_name(available_isas()[i % available_isas().size()]));
      outcomes[i] = check::select_tokens(kernels(), {4, 14, 14, 16, 16, 100});
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const check::Outcome& outcome : outcomes) expect(outcome, "two threads");
}

}  // namespace

int main() {
  test_isa_environment();
  test_isa_override();
  for (Isa isa : available_isas()) test_kernels(isa);
  for (Isa isa : available_isas()) test_centred_gram(isa);
  for (Isa isa : available_isas()) test_recovered_loss(isa);
  for (Isa isa : available_isas()) test_cell_rows(isa);
  for (Isa isa : available_isas()) test_masked_convolutions(isa);
  for (Isa isa : available_isas()) test_packed_attention(isa);
  for (Isa isa : available_isas()) test_tap_table(isa);
  for (const SelfTestResult& result : self_test()) expect(result.ok, "self_test " + result.name + ": " + result.detail);
  test_threads();
  std::printf("%d failed\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
