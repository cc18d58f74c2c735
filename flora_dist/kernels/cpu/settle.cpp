// SPDX-License-Identifier: Apache-2.0
// Compiled without contraction: R of cut rows and C have the bits that torch's operators give them, so that ranks
// which share them agree whichever of the two each one runs.
#include "settle.h"

#include <algorithm>
#include <cmath>

namespace flora {
namespace {

// Floor of RMS(weight) under scale_parameter; SMALLEST_SCALE in Python.
constexpr double kSmallestScale = 1e-3;
// Bounds of a relative lr; MOST_GROWN in Python.
constexpr float kMostGrown = 2;

// S <- b2 S + (1-b2) (sum / count + eps)
float moving_mean(float old, float sum, float count, const Now& now) {
  const float mean = sum / count + now.eps;
  return now.beta2 * old + now.fresh2 * mean;
}

// In four sums, so that none waits for the one before it.
template <class Value>
double sum(int64_t count, const Value& value) {
  double sums[4] = {};
  int64_t j = 0;
  for (; j + 4 <= count; j += 4)
    for (int64_t i = 0; i < 4; i++) sums[i] += value(j + i);
  for (; j < count; j++) sums[0] += value(j);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

float square_sum(int64_t count, const float* x) {
  return static_cast<float>(sum(count, [&](int64_t j) { return static_cast<double>(x[j]) * x[j]; }));
}

// What columns are multiplied by, from the new C.
void scale_columns(const Header& size, const float* column, float* factor) {
  const int64_t columns = size.num_columns;
  if (size.normalise == kRows || size.normalise == kRaw) {
    std::fill(factor, factor + columns, 1.0f);
    return;
  }
  // mean(R) = mean(C). Roots first: their quotient would overflow for a large gradient beside an empty column.
  float root = 1;
  if (size.normalise == kFactored)
    root = std::sqrt(static_cast<float>(sum(columns, [&](int64_t j) { return column[j]; }) / columns));
  for (int64_t j = 0; j < columns; j++) factor[j] = root * (1 / std::sqrt(column[j]));
}

// Squared norm of what is bounded, of one matrix.
double square_sum_of(const Header& size, int64_t index, const Now& now, const Clipping& given) {
  const int64_t summed = size.first_summed + index;
  if (given.update != nullptr) return given.update[summed];
  const double* sums = given.sums + kSettledSums * index;
  const double squares = sums[0] + (given.squares == nullptr ? 0 : given.squares[summed]);
  if (size.rule != kFlora) return squares;
  const double cross = sums[1] + (given.cross == nullptr ? 0 : given.cross[summed]);
  const double b = now.beta1;
  // |(1-b) X + b M A|^2, term by term
  return (1 - b) * (1 - b) * squares + 2 * b * (1 - b) * cross + b * b * sums[2];
}

// As core/step/elements.py has it: below, the last update was zero but for rounding.
constexpr float kLeastNorm = 1e-4f;

// min(1, growth last / norm), and the norm that this leaves; 1 where the last update was zero.
Bound limit_growth(float last, float norm, float growth) {
  const float largest = last > kLeastNorm ? growth * last : norm, factor = largest / norm;
  // 0 / 0 and inf / inf limit nothing. NaN stays in the norm.
  return {factor < 1 ? factor : 1, largest < norm ? largest : norm};
}

double elements(const Header& size) { return static_cast<double>(size.num_rows) * size.num_columns; }

}  // namespace

void settle_rows(const Plan& plan, int64_t index, const Now& now, const Totals& totals, const Settling& out) {
  const Tile& tile = plan.tiles[index];
  if (!tile.is_cut) return;
  const auto* old = reinterpret_cast<const float*>(tile.row);
  const int64_t columns = plan.header->num_columns;
  for (int64_t i = 0; i < tile.num_rows; i++) {
    const int64_t slot = tile.row_slot + i;
    const float own = totals.elements == nullptr ? totals.cut_rows[slot]
                                                 : square_sum(columns, totals.elements + slot * columns);
    out.rows[tile.new_row + i] = moving_mean(old[i], own, columns, now);
  }
}

void add_norms(const Plan& plan, int64_t index, const float* rows, const Whole& whole) {
  const Tile& tile = plan.tiles[index];
  if (!tile.is_cut || whole.elements == nullptr) return;
  const int64_t columns = plan.header->num_columns, place = (plan.header->first_summed + tile.matrix) * columns;
  for (int64_t i = 0; i < tile.num_rows; i++) {
    const float scale = row_scale(*plan.header, rows[tile.new_row + i]);
    const int64_t line = (tile.row_slot + i) * columns;
    for (int64_t j = 0; whole.squares != nullptr && j < columns; j++) {
      const float x = whole.elements[line + j] * scale;
      whole.squares[place + j] += x * x;
    }
    for (int64_t j = 0; whole.cross != nullptr && j < columns; j++)
      whole.cross[place + j] += whole.products[line + j] * scale;
  }
}

void sketch_cut_blocks(const Plan& plan, int64_t index, const float* rows, const float* factor, const Whole& whole) {
  const Header& size = *plan.header;
  const Tile& tile = plan.tiles[index];
  const int64_t edges[2] = {tile.first / size.block, (tile.last - 1) / size.block};
  const int64_t slots[2] = {tile.head_slot, tile.tail_slot};
  const float* own_factor = factor + tile.matrix * size.num_columns;
  const float* sketch = whole.new_HRB + tile.matrix * size.rank * size.block;
  for (int e = 0; e < 2; e++) {
    if (!tile.is_cut || slots[e] < 0) continue;
    const int64_t start = edges[e] * size.block, stop = std::min(start + size.block, size.num_columns);
    for (int64_t i = 0; i < tile.num_rows; i++) {
      const float* line = whole.elements + (tile.row_slot + i) * size.num_columns;
      const float scale = row_scale(size, rows[tile.new_row + i]);
      for (int64_t r = 0; r < size.rank; r++)
        whole.blocks[(slots[e] + i) * size.rank + r] = static_cast<float>(sum(stop - start, [&](int64_t j) {
          return sketch[r * size.block + j] * (line[start + j] * scale * own_factor[start + j]);
        }));
    }
  }
}

void settle_matrix(const Plan& plan, int64_t index, const Now& now, const Totals& totals, const Settling& out) {
  const Header& size = *plan.header;
  const int64_t columns = size.num_columns, summed = size.first_summed + index;
  const auto* old = reinterpret_cast<const float*>(plan.matrices[index].column);
  float* column = out.column + index * columns;
  float* factor = out.factor + index * columns;
  const float* fresh = totals.columns + summed * columns;
  for (int64_t j = 0; j < columns; j++) column[j] = moving_mean(old[j], fresh[j], size.num_rows, now);
  scale_columns(size, column, factor);
  double squares = 0, cross = 0;
  // |X|^2 = mean(R) sum_j S1_j / C_j;  <X, M A> = sqrt(mean(R)) sum_j S2_j / sqrt(C_j)
  if (totals.squares != nullptr) {
    const float* own = totals.squares + summed * columns;
    squares = sum(columns, [&](int64_t j) { return static_cast<double>(own[j] * factor[j]) * factor[j]; });
  }
  if (totals.cross != nullptr) {
    const float* own = totals.cross + summed * columns;
    cross = sum(columns, [&](int64_t j) { return static_cast<double>(own[j]) * factor[j]; });
  }
  double* sums = out.sums + kSettledSums * index;
  sums[0] = squares;
  sums[1] = cross;
  sums[2] = totals.history == nullptr ? 0 : totals.history[summed];
}

Bound bound_of(const Plan& plan, int64_t index, const Now& now, const Clipping& given) {
  const Header& size = *plan.header;
  const auto* last = reinterpret_cast<const float*>(plan.matrices[index].norm);
  if (last == nullptr && !size.clips) return {1, 0};
  const double found = square_sum_of(size, index, now, given);
  // Sums over shards can round a true zero to just below it. NaN stays.
  const double square_sum = found < 0 ? 0 : found;
  if (last != nullptr) return limit_growth(*last, static_cast<float>(std::sqrt(square_sum)), now.growth);
  const double ratio = std::sqrt(square_sum / elements(size)) / now.clip;
  return {static_cast<float>(1 / (ratio < 1 ? 1 : ratio)), 0};
}

void write_norm(const Plan& plan, int64_t index, const Bound& bound) {
  if (plan.matrices[index].norm != 0) *reinterpret_cast<float*>(plan.matrices[index].norm) = bound.norm;
}

float take_rate(const Plan& plan, int64_t index, const Now& now, const Clipping& given) {
  const Header& size = *plan.header;
  if (given.weight == nullptr) return now.lr;
  const double rms = std::sqrt(given.weight[size.first_summed + index] / elements(size));
  const float own = static_cast<float>(rms < kSmallestScale ? kSmallestScale : rms);
  auto* start = reinterpret_cast<float*>(plan.matrices[index].start);
  if (start == nullptr) return now.lr * own;
  if (!(*start > 0)) *start = own;
  // A matrix that has started below the floor keeps lr: its size says nothing.
  if (!(*start > static_cast<float>(kSmallestScale))) return now.lr;
  return now.lr * std::min(kMostGrown, std::max(1 / kMostGrown, own / *start));
}

}  // namespace flora
