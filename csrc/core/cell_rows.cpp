// A map's cells as rows and back: for each visible cell its positions row by row, the channels of a position together.
//
// A map whose lines of a channel are contiguous is read a vector of positions by a vector of channels at a time and
// transposed in registers: every cache line is fetched once, whatever the side of a cell.
#include "core/conv_tile.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

// Places of rows that belong to `count` positions from (y, x) on, by position; null where the cell is hidden.
template <class Row>
inline bool find_rows(const CellArgs& args, int64_t image, int64_t y, int64_t x, int64_t count, Row** at) {
  const int64_t patch = args.patch, size = patch * patch * args.channels;
  const int64_t* slots = args.slots + (image * args.grid_h + y / patch) * args.grid_w;
  bool any = false;
  for (int64_t i = 0; i < count; ++i, ++x) {
    const int64_t slot = slots[x / patch], inner = y % patch * patch + x % patch;
    at[i] = slot < 0 ? nullptr : static_cast<Row*>(args.rows) + slot * size + inner * args.channels;
    any |= slot >= 0;
  }
  return any;
}

template <class To, class From>
inline void copy_channels(To* to, const From* from, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    store_some(to + c, from == nullptr ? Floats{} : load_some(from + c, channels - c), channels - c);
  }
}

// The line y of an image, `kGather` from the map to the rows, else back with zeros where a cell is hidden.
template <bool kGather, class T, class Row>
void move_line(const CellArgs& args, int64_t image, int64_t y) {
  const int64_t channels = args.channels, height = args.grid_h * args.patch, width = args.grid_w * args.patch;
  T* const map = static_cast<T*>(args.map) + image * channels * height * width;
  Row* at[kLanes];
  for (int64_t x = 0; x < width; x += kLanes) {
    const int64_t count = smaller(kLanes, width - x);
    if (!find_rows(args, image, y, x, count, at) && kGather) continue;
    if (args.channels_last) {
      T* const place = map + (y * width + x) * channels;
      for (int64_t i = 0; i < count; ++i) {
        if (!kGather) copy_channels(place + i * channels, at[i], channels);
        if (kGather && at[i] != nullptr) copy_channels(at[i], place + i * channels, channels);
      }
      continue;
    }
    T* line = map + y * width + x;
    for (int64_t c = 0; c < channels; c += kLanes, line += kLanes * height * width) {
      const int64_t deep = smaller(kLanes, channels - c);
      Floats block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        if constexpr (kGather) {
          block[i] = i < deep ? load_some(line + i * height * width, count) : Floats{};
        } else {
          block[i] = i < count && at[i] != nullptr ? load_some(at[i] + c, deep) : Floats{};
        }
      }
      transpose(block);
      for (int64_t i = 0; i < (kGather ? count : deep); ++i) {
        if constexpr (kGather) {
          if (at[i] != nullptr) store_some(at[i] + c, block[i], deep);
        } else {
          store_some(line + i * height * width, block[i], count);
        }
      }
    }
  }
}

template <bool kGather, class T, class Row>
void move_lines(const CellArgs& args, int64_t begin, int64_t end) {
  const int64_t height = args.grid_h * args.patch;
  for (int64_t line = begin; line < end; ++line) move_line<kGather, T, Row>(args, line / height, line % height);
}

template <bool kGather>
void move_typed(const CellArgs& args, int64_t begin, int64_t end) {
  const bool widens = args.row_dtype != args.dtype;
  if (args.dtype == DType::f32) return move_lines<kGather, float, float>(args, begin, end);
  if (args.dtype == DType::bf16) {
    return (widens ? move_lines<kGather, Bf16, float> : move_lines<kGather, Bf16, Bf16>)(args, begin, end);
  }
  return (widens ? move_lines<kGather, Half, float> : move_lines<kGather, Half, Half>)(args, begin, end);
}

}  // namespace

void gather_cells(const CellArgs& args, int64_t begin, int64_t end) { move_typed<true>(args, begin, end); }

void scatter_cells(const CellArgs& args, int64_t begin, int64_t end) { move_typed<false>(args, begin, end); }

}  // namespace fastmkd::FASTMKD_ISA
