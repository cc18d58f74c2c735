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
    const float scale = 1 / std::sqrt(rows[tile.new_row + i]);
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
      const float scale = 1 / std::sqrt(rows[tile.new_row + i]);
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
  const double total = sum(columns, [&](int64_t j) { return column[j]; });
  // mean(R) = mean(C). Roots first: their quotient would overflow for a large gradient beside an empty column.
  const float root = std::sqrt(static_cast<float>(total / columns));
  for (int64_t j = 0; j < columns; j++) factor[j] = root * (1 / std::sqrt(column[j]));
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

float clip_factor(const Plan& plan, int64_t index, const Now& now, const Clipping& given) {
  const Header& size = *plan.header;
  if (!size.clips) return 1;
  const int64_t summed = size.first_summed + index;
  double square_sum;
  if (given.update != nullptr) {
    square_sum = given.update[summed];
  } else {
    const double* sums = given.sums + kSettledSums * index;
    const double squares = sums[0] + (given.squares == nullptr ? 0 : given.squares[summed]);
    const double cross = sums[1] + (given.cross == nullptr ? 0 : given.cross[summed]);
    const double b = now.beta1;
    square_sum = squares;
    if (size.rule == kFlora)  // |(1-b) X + b M A|^2, term by term
      square_sum = (1 - b) * (1 - b) * squares + 2 * b * (1 - b) * cross + b * b * sums[2];
  }
  // Sums over shards can round a true zero to just below it. NaN stays.
  const double ratio = std::sqrt((square_sum < 0 ? 0 : square_sum) / elements(size)) / now.clip;
  return static_cast<float>(1 / (ratio < 1 ? 1 : ratio));
}

float rate(const Plan& plan, int64_t index, const Now& now, const Clipping& given) {
  const Header& size = *plan.header;
  if (given.weight == nullptr) return now.lr;
  const double rms = std::sqrt(given.weight[size.first_summed + index] / elements(size));
  return static_cast<float>(now.lr * (rms < kSmallestScale ? kSmallestScale : rms));
}

}  // namespace flora
