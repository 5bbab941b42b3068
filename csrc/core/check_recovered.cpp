// A recovered map against the teacher's, and the gradient, position by position in float64.
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/check_tools.h"
#include "core/reference.h"

namespace fastmkd::check {
namespace {

using Doubles = std::vector<double>;

double dot(const Doubles& x, const Doubles& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// Where position (y, x) of image b begins in the rows.
int64_t row_index(const RecoveredArgs& args, int64_t b, int64_t y, int64_t x) {
  const int64_t p = args.patch, cell = (b * args.grid_h + y / p) * args.grid_w + x / p;
  return ((cell * p + y % p) * p + x % p) * args.channels;
}

struct Position {
  Doubles student, teacher;  // normalised
  double rstd;               // of the student
};

Doubles normalised(Doubles x, double* rstd) {
  const auto n = static_cast<double>(x.size());
  const double mean = dot(x, Doubles(x.size(), 1)) / n;
  for (double& value : x) value -= mean;
  *rstd = 1 / std::sqrt(dot(x, x) / n + 1e-5);
  for (double& value : x) value *= *rstd;
  return x;
}

Position position(const RecoveredArgs& args, int64_t b, int64_t y, int64_t x) {
  const int64_t height = args.grid_h * args.patch, width = args.grid_w * args.patch;
  Doubles student(as_size(args.channels)), teacher(as_size(args.channels));
  for (int64_t c = 0; c < args.channels; ++c) {
    const int64_t place = args.channels_last ? ((b * height + y) * width + x) * args.channels + c
                                             : ((b * args.channels + c) * height + y) * width + x;
    student[as_size(c)] = reference::decode(args.dtype, args.rows, row_index(args, b, y, x) + c);
    teacher[as_size(c)] = reference::decode(args.teacher_dtype, args.teacher, place);
  }
  Position found{};
  double unused = 0;
  found.student = normalised(student, &found.rstd);
  found.teacher = normalised(teacher, &unused);
  return found;
}

Doubles row_of(const float* rows, int64_t index, const RecoveredArgs& args) {
  const float* row = rows + index * args.padded;
  return Doubles(row, row + args.channels);
}

// Rows of floats with zeros behind the channels.
std::vector<float> padded_rows(const RecoveredArgs& args, int64_t rows, unsigned seed, float scale) {
  const Bytes values = random_values(DType::f32, rows * args.channels, seed);
  std::vector<float> out(as_size(rows * args.padded));
  for (int64_t i = 0; i < rows * args.channels; ++i) {
    const double value = reference::decode(DType::f32, values.data(), i);
    out[as_size(i / args.channels * args.padded + i % args.channels)] = scale * static_cast<float>(value);
  }
  return out;
}

Outcome loss_is_right(const RecoveredArgs& args) {
  for (int64_t unit = 0; unit < args.batch * args.grid_h; ++unit) {
    Doubles difference(as_size(args.channels)), context[2] = {difference, difference};
    double squares = 0, sums[2] = {0, 0};
    const float* parts = args.parts + unit * recovered_parts(args);
    const float* numbers = parts + 3 * args.padded;
    const int64_t p = args.patch, b = unit / args.grid_h, top = unit % args.grid_h * p;
    for (int64_t i = 0; i < p * p * args.grid_w; ++i) {
      const Position at = position(args, b, top + i / (p * args.grid_w), i % (p * args.grid_w));
      for (size_t side = 0; side < 2; ++side) {
        const Doubles& x = side == 0 ? at.student : at.teacher;
        const double logit = dot(x, row_of(args.queries, static_cast<int64_t>(side), args));
        const double weight = std::exp(logit - static_cast<double>(numbers[side]));
        sums[side] += weight;
        for (size_t c = 0; c < x.size(); ++c) context[side][c] += weight * x[c];
      }
      for (size_t c = 0; c < difference.size(); ++c) {
        const double apart = at.student[c] - at.teacher[c];
        difference[c] += apart;
        squares += apart * apart;
      }
    }
    // Each normalised number is rounded, which shows where student and teacher agree: roots are what is compared.
    const double rounding = 5e-7 * std::sqrt(static_cast<double>(p * p * args.grid_w * args.channels));
    const double root = std::sqrt(squares);
    if (!(std::fabs(std::sqrt(args.squares[unit]) - root) <= 5e-6 * root + rounding)) {
      return {false, text("squares ", unit, " are ", args.squares[unit], ", not ", squares)};
    }
    for (size_t side = 0; side < 2; ++side) {
      if (!close(static_cast<double>(numbers[2 + side]), sums[side], 1e-4)) {
        return {false, text("denominator ", unit, " is ", numbers[2 + side], ", not ", sums[side])};
      }
    }
    const double largest = static_cast<double>(p * p * args.grid_w) * 4;
    for (int64_t row = 0; row < 3; ++row) {
      const Doubles got = row_of(parts, row, args), &want = row == 0 ? difference : context[row - 1];
      for (size_t c = 0; c < got.size(); ++c) {
        if (!(std::fabs(got[c] - want[c]) <= 1e-5 * largest)) {
          return {false, text("row ", row, " of unit ", unit, " is ", got[c], " at ", c, ", not ", want[c])};
        }
      }
    }
  }
  return {true, "right"};
}

Outcome gradient_is_right(const RecoveredArgs& args) {
  const int64_t p = args.patch, width = args.grid_w * p;
  const double unit_in_last_place = args.dtype == DType::f32 ? 1e-5 : args.dtype == DType::f16 ? 2e-3 : 1.6e-2;
  for (int64_t unit = 0; unit < args.batch * args.grid_h; ++unit) {
    const int64_t b = unit / args.grid_h;
    Doubles d_query[2] = {Doubles(as_size(args.channels)), Doubles(as_size(args.channels))};
    for (int64_t i = 0; i < p * width; ++i) {
      const int64_t y = unit % args.grid_h * p + i / width, x = i % width;
      const Position at = position(args, b, y, x);
      Doubles d = row_of(args.grad_difference, b, args);
      for (int64_t side = 0; side < 2; ++side) {
        const Doubles &features = side == 0 ? at.student : at.teacher, query = row_of(args.queries, side, args);
        const Doubles pooled = row_of(args.grad_contexts, side * args.batch + b, args);
        const int64_t at_side = side * args.batch + b;
        const double weight = std::exp(dot(features, query) - static_cast<double>(args.log_sums[at_side]));
        const double d_logit = weight * (dot(features, pooled) - static_cast<double>(args.shifts[at_side]));
        for (size_t c = 0; c < d.size(); ++c) {
          d_query[side][c] += d_logit * features[c];
          if (side == 0) d[c] += weight * pooled[c] + d_logit * query[c];
        }
      }
      for (size_t c = 0; c < d.size(); ++c) d[c] += static_cast<double>(args.scale) * (at.student[c] - at.teacher[c]);
      const double n = static_cast<double>(d.size()), mean = dot(d, Doubles(d.size(), 1)) / n;
      const double slope = dot(d, at.student) / n;
      for (size_t c = 0; c < d.size(); ++c) {
        const double want = at.rstd * (d[c] - mean - at.student[c] * slope);
        const int64_t place = row_index(args, b, y, x) + static_cast<int64_t>(c);
        const double error = std::fabs(reference::decode(args.dtype, args.out, place) - want);
        if (!(error <= unit_in_last_place * (std::fabs(want) + at.rstd))) {
          return {false, text("gradient ", place, " is off by ", error, " from ", want)};
        }
      }
    }
    for (int64_t side = 0; side < 2; ++side) {
      const Doubles got = row_of(args.query_sums, 2 * unit + side, args);
      for (size_t c = 0; c < got.size(); ++c) {
        const double error = std::fabs(got[c] - d_query[side][c]);
        if (!(error <= 1e-4 * (1 + std::fabs(d_query[side][c])))) {
          return {false, text("query ", side, " of unit ", unit, " is off by ", error)};
        }
      }
    }
  }
  return {true, "right"};
}

}  // namespace

Outcome recovered_loss(const Kernels& kernels, DType dtype, DType teacher_dtype, const RecoveredShape& shape,
                       bool channels_last) {
  RecoveredArgs args{};
  args.dtype = dtype;
  args.teacher_dtype = teacher_dtype;
  args.channels_last = channels_last;
  args.batch = shape.batch;
  args.channels = shape.channels;
  args.padded = (shape.channels + 15) / 16 * 16;
  args.grid_h = shape.grid_h;
  args.grid_w = shape.grid_w;
  args.patch = shape.patch;
  const int64_t units = args.batch * args.grid_h;
  const int64_t values = units * args.grid_w * args.patch * args.patch * args.channels;
  const Bytes rows = random_values(dtype, values, 25), teacher = random_values(teacher_dtype, values, 26);
  const std::vector<float> queries = padded_rows(args, 2, 27, 0.5f);
  std::vector<double> squares(as_size(units), kNaN);
  std::vector<float> parts(as_size(units * recovered_parts(args)), kNaN);
  args.rows = rows.data();
  args.teacher = teacher.data();
  args.queries = queries.data();
  args.squares = squares.data();
  args.parts = parts.data();
  for (int64_t unit = units; unit-- > 0;) {
    std::vector<float> scratch(as_size(recovered_scratch(args)), kNaN);
    kernels.recovered_loss(args, unit, unit + 1, scratch.data());
  }
  const Outcome outcome = loss_is_right(args);
  if (!outcome.ok) return outcome;

  const std::vector<float> difference = padded_rows(args, args.batch, 28, 1), shifts(as_size(2 * args.batch), 0.3f);
  const std::vector<float> contexts = padded_rows(args, 2 * args.batch, 29, 1);
  std::vector<float> log_sums, query_sums(as_size(2 * units * args.padded), kNaN);
  for (int64_t i = 0; i < 2 * args.batch; ++i) {  // greater than any logit of that image and side
    const int64_t side = i / args.batch, first = i % args.batch * args.grid_h;
    float most = 0;
    for (int64_t unit = first; unit < first + args.grid_h; ++unit) {
      most = std::fmax(most, parts[as_size(unit * recovered_parts(args) + 3 * args.padded + side)]);
    }
    log_sums.push_back(most + 1);
  }
  Bytes out(rows.size(), std::byte{0xff});
  args.grad_difference = difference.data();
  args.grad_contexts = contexts.data();
  args.log_sums = log_sums.data();
  args.shifts = shifts.data();
  args.scale = 0.75f;
  args.out = out.data();
  args.query_sums = query_sums.data();
  std::vector<float> scratch(as_size(recovered_scratch(args)), kNaN);
  kernels.recovered_loss_grad(args, units / 2, units, scratch.data());
  kernels.recovered_loss_grad(args, 0, units / 2, scratch.data());
  return gradient_is_right(args);
}

}  // namespace fastmkd::check
