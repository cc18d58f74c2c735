// SPDX-License-Identifier: Apache-2.0
// Message 1 of a matrix from its tiles' sums, always in their order: equal bits for any number of threads.
#pragma once
#include <algorithm>

#include "plan.h"

namespace flora {

// Where the terms of message 1 stand, one after the other; null where the rule asks for none.
struct MeasureTerms {
  float *columns, *squares, *cross, *history, *weight, *rows, *elements, *products;

  static MeasureTerms in(float* at, const Header& size, int64_t matrices) {
    const int64_t many = matrices * size.num_columns;
    MeasureTerms terms = {at, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    at += many;
    if (size.num_sums > 1) terms.squares = at, at += many;
    if (size.num_sums > 2) terms.cross = at, at += many, terms.history = at, at += matrices;
    if (size.sums_weight) terms.weight = at, at += matrices;
    if (!size.sends_elements) {
      terms.rows = at;
      return terms;
    }
    terms.elements = at;
    if (size.num_sums > 2) terms.products = at + size.num_row_slots * size.num_columns;
    return terms;
  }
};

// Adds some columns of a matrix's tiles into its place among the terms.
inline void add_partials(const Plan& plan, int64_t index, int64_t first, const float* partial,
                         const MeasureTerms& terms, int64_t place) {
  const Header& size = *plan.header;
  const Matrix& matrix = plan.matrices[index];
  const int64_t last = std::min(size.num_columns, first + kChunk);
  float* const to[3] = {terms.columns, terms.squares, terms.cross};
  for (int64_t s = 0; s < size.num_sums; s++) {
    double sums[kChunk] = {};
    for (int64_t t = matrix.first_tile; t < matrix.last_tile; t++) {
      const Tile& tile = plan.tiles[t];
      const int64_t lo = std::max(first, tile.first), hi = std::min(last, tile.last), width = tile.last - tile.first;
      const float* from = partial + tile.partial + s * width - tile.first;
      for (int64_t j = lo; j < hi; j++) sums[j - first] += from[j];
    }
    float* own = to[s] + place * size.num_columns;
    for (int64_t j = first; j < last; j++) own[j] = static_cast<float>(sums[j - first]);
  }
}

// One number of each tile, added in their order.
inline double add_scalars(const Plan& plan, int64_t index, const double* scalars, int64_t stride) {
  double sum = 0;
  for (int64_t t = plan.matrices[index].first_tile; t < plan.matrices[index].last_tile; t++)
    sum += scalars[stride * t];
  return sum;
}

// What of the terms is one number for each matrix.
inline void add_numbers(const Plan& plan, int64_t index, const double* scalars, const MeasureTerms& terms,
                        int64_t place) {
  if (terms.history != nullptr)
    terms.history[place] = static_cast<float>(add_scalars(plan, index, scalars, kMatrixSums));
  if (terms.weight != nullptr)
    terms.weight[place] = static_cast<float>(add_scalars(plan, index, scalars + 1, kMatrixSums));
}

}  // namespace flora
