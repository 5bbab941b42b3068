// A recovered map against a teacher's, and the gradient: a tile of positions of both stays in the nearest caches from
// the first sum to the last product. A teacher's map whose channels lie far apart is turned while it is read.
#include "core/conv_tile.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int64_t kTile = kRecoveredTile;
constexpr float kEps = 1e-5f;  // on the variance
static_assert(kTile % kLanes == 0, "numbers of a tile's positions fill vectors");

// Channels in whole vectors: where the last one begins, and what of it exists.
struct Channels {
  int64_t count, last;
  Floats tail;  // ones and zeros

  explicit Channels(int64_t channels) : count(channels), last((channels - 1) / kLanes * kLanes), tail{} {
    for (int64_t i = 0; i < channels - last; ++i) tail[i] = 1.0f;
  }
};

// `count` positions of a line, from column x of line y of a row of cells on.
struct Tile {
  int64_t unit, y, x, count;
};

template <class T>
inline T* position_of(const RecoveredArgs& args, T* rows, const Tile& tile, int64_t i) {
  const int64_t x = tile.x + i, cell = tile.unit * args.grid_w + x / args.patch;
  return rows + ((cell * args.patch + tile.y) * args.patch + x % args.patch) * args.channels;
}

template <class T>
inline void widen_row(const T* from, const Channels& channels, float* to) {
  for (int64_t c = 0; c < channels.last; c += kLanes) store(to + c, load(from + c));
  const int64_t left = channels.count - channels.last;
  store(to + channels.last, left == kLanes ? load(from + channels.last) : load_part(from + channels.last, left));
}

template <class T>
void read_student(const RecoveredArgs& args, const Tile& tile, const Channels& channels, float* to) {
  const T* rows = static_cast<const T*>(args.rows);
  for (int64_t i = 0; i < tile.count; ++i) {
    widen_row(position_of(args, rows, tile, i), channels, to + i * args.padded);
  }
}

template <class T>
void read_teacher(const RecoveredArgs& args, const Tile& tile, const Channels& channels, float* to) {
  const int64_t width = args.grid_w * args.patch, plane = args.grid_h * args.patch * width;
  const int64_t b = tile.unit / args.grid_h, y = tile.unit % args.grid_h * args.patch + tile.y;
  const T* map = static_cast<const T*>(args.teacher) + b * args.channels * plane;
  if (args.channels_last) {
    for (int64_t i = 0; i < tile.count; ++i) {
      widen_row(map + (y * width + tile.x + i) * args.channels, channels, to + i * args.padded);
    }
    return;
  }
  // Each channel is a line of its own, too many for a processor to guess the next tile's: they are asked for.
  const T* from = map + y * width + tile.x;
  for (int64_t c = 0; c < args.channels; c += kLanes) {
    for (int64_t i = 0; i < tile.count; i += kLanes) {
      Floats block[kLanes]{};
      for (int64_t k = 0; k < kLanes && c + k < args.channels; ++k) {
        const T* line = from + (c + k) * plane + i;
        __builtin_prefetch(line + kTile);
        block[k] = tile.count - i >= kLanes ? load(line) : load_part(line, tile.count - i);
      }
      transpose(block);
      for (int64_t k = 0; k < kLanes; ++k) store(to + (i + k) * args.padded + c, block[k]);
    }
  }
}

// Takes the mean off a position; returns 1 / standard deviation and the normalised position's products with `others`.
template <int kOthers>
inline float centre(float* row, const Channels& channels, const float* const (&others)[kOthers],
                    float (&products)[kOthers]) {
  const auto n = static_cast<float>(channels.count);
  Floats sum{};
  for (int64_t c = 0; c <= channels.last; c += kLanes) sum += load(row + c);
  const Floats mean = splat(reduce_add(sum) / n);
  Floats squares{}, along[kOthers]{};
  const auto add = [&](int64_t c, Floats x) {
    store(row + c, x);
    squares += x * x;
    for (int k = 0; k < kOthers; ++k) along[k] += x * load(others[k] + c);
  };
  for (int64_t c = 0; c < channels.last; c += kLanes) add(c, load(row + c) - mean);
  add(channels.last, (load(row + channels.last) - mean) * channels.tail);
  const float rstd = 1.0f / __builtin_sqrtf(reduce_add(squares) / n + kEps);
  for (int k = 0; k < kOthers; ++k) products[k] = rstd * reduce_add(along[k]);
  return rstd;
}

// A softmax over positions as far as it has got.
struct Softmax {
  float most = -__builtin_inff(), sum = 0;

  // Logits become weights relative to the greatest logit so far; returns what earlier weights are multiplied by.
  float add(float (&logits)[kTile], int64_t count) {
    Floats greatest = splat(most);
    for (int64_t i = count; i < kTile; ++i) logits[i] = -__builtin_inff();
    for (int64_t i = 0; i < kTile; i += kLanes) greatest = maximum(greatest, load(logits + i));
    const float before = most;
    most = reduce_max(greatest);
    Floats added{};
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const Floats weight = exp_negative(load(logits + i) - most);
      store(logits + i, weight);
      added += weight;
    }
    const float rescale = exp_negative(splat(before - most))[0];
    sum = sum * rescale + reduce_add(added);
    return rescale;
  }
};

template <class Fn>
inline void for_each_tile(const RecoveredArgs& args, int64_t unit, Fn fn) {
  const int64_t width = args.grid_w * args.patch;
  for (int64_t y = 0; y < args.patch; ++y) {
    for (int64_t x = 0; x < width; x += kTile) fn(Tile{unit, y, x, width - x < kTile ? width - x : kTile});
  }
}

template <class T, class Teacher>
void loss(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch) {
  const Channels channels(args.channels);
  float *student = scratch, *teacher = scratch + kTile * args.padded;
  const float* const query_s[1] = {args.queries};
  const float* const query_t[1] = {args.queries + args.padded};
  for (int64_t unit = begin; unit < end; ++unit) {
    float* difference = args.parts + unit * recovered_parts(args);
    float *context_s = difference + args.padded, *context_t = context_s + args.padded;
    for (int64_t c = 0; c < recovered_parts(args); ++c) difference[c] = 0;
    Softmax softmax_s, softmax_t;
    double squares = 0;
    for_each_tile(args, unit, [&](const Tile& tile) {
      read_student<T>(args, tile, channels, student);
      read_teacher<Teacher>(args, tile, channels, teacher);
      float rstd_s[kTile], rstd_t[kTile], weight_s[kTile], weight_t[kTile], product[1];
      for (int64_t i = 0; i < tile.count; ++i) {
        rstd_s[i] = centre(student + i * args.padded, channels, query_s, product);
        weight_s[i] = product[0];
        rstd_t[i] = centre(teacher + i * args.padded, channels, query_t, product);
        weight_t[i] = product[0];
      }
      const float rescale_s = softmax_s.add(weight_s, tile.count), rescale_t = softmax_t.add(weight_t, tile.count);
      Floats error{};
      for (int64_t c = 0; c <= channels.last; c += kLanes) {
        Floats apart{}, pooled_s{}, pooled_t{};
        for (int64_t i = 0; i < tile.count; ++i) {
          const Floats s = load(student + i * args.padded + c) * rstd_s[i];
          const Floats t = load(teacher + i * args.padded + c) * rstd_t[i];
          error += (s - t) * (s - t);
          apart += s - t;
          pooled_s += weight_s[i] * s;
          pooled_t += weight_t[i] * t;
        }
        store(difference + c, load(difference + c) + apart);
        store(context_s + c, load(context_s + c) * rescale_s + pooled_s);
        store(context_t + c, load(context_t + c) * rescale_t + pooled_t);
      }
      squares += static_cast<double>(reduce_add(error));
    });
    float* numbers = context_t + args.padded;
    numbers[0] = softmax_s.most;
    numbers[1] = softmax_t.most;
    numbers[2] = softmax_s.sum;
    numbers[3] = softmax_t.sum;
    args.squares[unit] = squares;
  }
}

// Logits to weights of a finished softmax, and the gradient of the logits from the products with the context's.
inline void weigh(float (&logits)[kTile], float (&products)[kTile], float log_sum, float shift) {
  constexpr float kLargest = 0x1.62e42ep+6f;  // above it exp is infinite, as it is where log_sum is of other logits
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const Floats x = load(logits + i) - log_sum;
    const Floats weight = x > kLargest ? splat(__builtin_inff()) : exp_negative(x);
    store(logits + i, weight);
    store(products + i, weight * (load(products + i) - shift));
  }
}

template <class T, class Teacher>
void gradient(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch) {
  const Channels channels(args.channels);
  float *student = scratch, *teacher = scratch + kTile * args.padded;
  const auto n = static_cast<float>(args.channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / args.grid_h;
    const float* query = args.queries;
    const float* shared = args.grad_difference + b * args.padded;
    const float* pooled = args.grad_contexts + b * args.padded;
    const float* const with_s[2] = {query, pooled};
    const float* const with_t[2] = {query + args.padded, pooled + args.batch * args.padded};
    float *d_query_s = args.query_sums + 2 * unit * args.padded, *d_query_t = d_query_s + args.padded;
    for (int64_t c = 0; c < 2 * args.padded; ++c) d_query_s[c] = 0;
    for_each_tile(args, unit, [&](const Tile& tile) {
      read_student<T>(args, tile, channels, student);
      read_teacher<Teacher>(args, tile, channels, teacher);
      float rstd_s[kTile], rstd_t[kTile], weight_s[kTile]{}, weight_t[kTile]{}, logit_s[kTile]{}, logit_t[kTile]{};
      for (int64_t i = 0; i < tile.count; ++i) {
        float products[2];
        rstd_s[i] = centre(student + i * args.padded, channels, with_s, products);
        weight_s[i] = products[0];
        logit_s[i] = products[1];
        rstd_t[i] = centre(teacher + i * args.padded, channels, with_t, products);
        weight_t[i] = products[0];
        logit_t[i] = products[1];
      }
      weigh(weight_s, logit_s, args.log_sums[b], args.shifts[b]);
      weigh(weight_t, logit_t, args.log_sums[args.batch + b], args.shifts[args.batch + b]);
      for (int64_t i = 0; i < tile.count; ++i) {
        float *s_row = student + i * args.padded, *t_row = teacher + i * args.padded;
        Floats sum{}, along{};
        for (int64_t c = 0; c <= channels.last; c += kLanes) {
          const Floats s = load(s_row + c) * rstd_s[i], t = load(t_row + c) * rstd_t[i];
          const Floats d =
              args.scale * (s - t) + load(shared + c) + weight_s[i] * load(pooled + c) + logit_s[i] * load(query + c);
          store(d_query_s + c, load(d_query_s + c) + logit_s[i] * s);
          store(d_query_t + c, load(d_query_t + c) + logit_t[i] * t);
          store(s_row + c, s);
          store(t_row + c, d);
          sum += d;
          along += d * s;
        }
        // Through the layer norm; the teacher's row holds the gradient by now.
        const Floats mean = splat(reduce_add(sum) / n), slope = splat(reduce_add(along) / n);
        T* out = position_of(args, static_cast<T*>(args.out), tile, i);
        const auto through = [&](int64_t c) { return (load(t_row + c) - mean - load(s_row + c) * slope) * rstd_s[i]; };
        for (int64_t c = 0; c < channels.last; c += kLanes) store(out + c, through(c));
        store_part(out + channels.last, through(channels.last), channels.count - channels.last);
      }
    });
  }
}

}  // namespace

void recovered_loss(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch) {
  const bool wide = args.teacher_dtype == DType::f32;
  if (args.dtype == DType::f32) return loss<float, float>(args, begin, end, scratch);
  if (args.dtype == DType::bf16) return (wide ? loss<Bf16, float> : loss<Bf16, Bf16>)(args, begin, end, scratch);
  return (wide ? loss<Half, float> : loss<Half, Half>)(args, begin, end, scratch);
}

void recovered_loss_grad(const RecoveredArgs& args, int64_t begin, int64_t end, float* scratch) {
  const bool wide = args.teacher_dtype == DType::f32;
  if (args.dtype == DType::f32) return gradient<float, float>(args, begin, end, scratch);
  if (args.dtype == DType::bf16) {
    return (wide ? gradient<Bf16, float> : gradient<Bf16, Bf16>)(args, begin, end, scratch);
  }
  return (wide ? gradient<Half, float> : gradient<Half, Half>)(args, begin, end, scratch);
}

}  // namespace fastmkd::FASTMKD_ISA
