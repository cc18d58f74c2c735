// SPDX-License-Identifier: Apache-2.0
// The phases of a batch: its tiles by all threads, then what follows from their sums.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "chosen.h"
#include "parallel.h"
#include "plan.h"
#include "settle.h"
#include "sums.h"

namespace flora {

inline int64_t width_of(const Plan& plan) {
  int64_t width = 1;
  for (int64_t t = 0; t < plan.header->num_tiles; t++)
    width = std::max(width, plan.tiles[t].last - plan.tiles[t].first);
  return width;
}

inline int64_t elements_of(const Plan& plan) {
  int64_t elements = 0;
  for (int64_t t = 0; t < plan.header->num_tiles; t++)
    elements += plan.tiles[t].num_rows * (plan.tiles[t].last - plan.tiles[t].first);
  return elements;
}

inline int64_t scratch_of(const Plan& plan, const Gradients& given) {
  const Header& size = *plan.header;
  const int64_t gradient_block = is_sketched(given) ? given.block : 0;
  const int64_t width = width_of(plan);
  return scratch_floats(width, size.block, gradient_block, up(size.rank, 8)) + record_floats(size, given) +
         squares_floats(size, width);
}

// What every phase does: body(tile, scratch) by all threads.
template <class Body>
void each_tile(const Plan& plan, const Gradients& given, const Body& body) {
  const Header& size = *plan.header;
  const int64_t floats = scratch_of(plan, given);
  each(size.num_tiles, elements_of(plan), [&](int64_t tile) { body(tile, scratch(floats)); });
}

// ``rows`` and ``terms_S``: outputs; terms are zeros before, but for presence.
inline void measure_batch(const Plan& plan, const Gradients& given, const Now& now, const Basis& basis, float* rows,
                   float* terms_S) {
  const Header& size = *plan.header;
  const MeasureTerms terms = MeasureTerms::in(terms_S + size.num_members, size, size.num_summed);
  const std::unique_ptr<float[]> partial(new float[size.num_partials]);  // each tile clears its own
  std::vector<double> scalars(kMatrixSums * size.num_tiles);
  const MeasureSums sums = {rows, terms.rows, terms.elements, terms.products, partial.get(), scalars.data()};
  each_tile(plan, given, [&](int64_t tile, float* own) {
    kernels().measure(plan, tile, given, basis, now, sums, own);
  });
  const int64_t stretches = (size.num_columns + kChunk - 1) / kChunk;
  each(size.num_matrices * stretches, size.num_partials, [&](int64_t index) {
    const int64_t matrix = index / stretches;
    add_partials(plan, matrix, index % stretches * kChunk, partial.get(), terms, size.first_summed + matrix);
  });
  for (int64_t m = 0; m < size.num_matrices; m++) add_numbers(plan, m, scalars.data(), terms, size.first_summed + m);
}

// Before message 1: a row's norm is added by the rank that has its beginning.
inline void take_rows_of(const Plan& plan, const Now& now, const Whole& whole, float* rows) {
  const Totals known = {nullptr, nullptr, nullptr, nullptr, nullptr, whole.elements};
  for (int64_t t = 0; t < plan.header->num_tiles; t++) {
    if (plan.tiles[t].first != 0) continue;
    settle_rows(plan, t, now, known, {rows, nullptr, nullptr, nullptr});
    add_norms(plan, t, rows, whole);
  }
}

inline void settle_batch(const Plan& plan, const Now& now, const Totals& totals, const Whole& whole,
                         const Settling& out) {
  const Header& size = *plan.header;
  for (int64_t t = 0; t < size.num_tiles; t++) {
    settle_rows(plan, t, now, totals, out);
    add_norms(plan, t, out.rows, whole);
  }
  each(size.num_matrices, size.num_matrices * size.num_columns,
       [&](int64_t m) { settle_matrix(plan, m, now, totals, out); });
  if (whole.blocks != nullptr)
    for (int64_t t = 0; t < size.num_tiles; t++) sketch_cut_blocks(plan, t, out.rows, out.factor, whole);
}

struct Scaling {
  std::vector<float> clip, rate;
  std::vector<Bound> bounds;

  Scaling(const Plan& plan, const Now& now, const Clipping& given) : clip(plan.header->num_matrices), rate(clip) {
    for (size_t m = 0; m < clip.size(); m++) {
      bounds.push_back(bound_of(plan, m, now, given));
      clip[m] = bounds.back().factor;
      rate[m] = take_rate(plan, m, now, given);
    }
  }
};

inline void finish_batch(const Plan& plan, const Gradients& given, const Now& now, const Basis& basis, const Clipping& clipping,
                  const Settled& known, const float* column, const FinishOptions& options) {
  const Header& size = *plan.header;
  const Scaling scaling(plan, now, clipping);
  const Settled settled = {known.factor, known.rows, scaling.clip.data(), scaling.rate.data(), known.blocks};
  each_tile(plan, given, [&](int64_t tile, float* own) {
    // Backwards: what was measured last is in the cache still.
    kernels().finish(plan, size.num_tiles - 1 - tile, given, basis, now, settled, options, own);
  });
  for (int64_t m = 0; m < size.num_matrices; m++) {
    memcpy(reinterpret_cast<float*>(plan.matrices[m].column), column + m * size.num_columns,
           sizeof(float) * size.num_columns);
    write_norm(plan, m, scaling.bounds[m]);
  }
}

inline void measure_vectors(const Plan& plan, const Gradients& given, const Now& now, const VectorSums& sums, float* terms_S) {
  const Header& size = *plan.header;
  each_tile(plan, given, [&](int64_t tile, float* own) {
    kernels().measure_vector(plan, tile, given, now, sums, own);
  });
  float* update = terms_S + size.num_members;
  for (int64_t m = 0; m < size.num_matrices; m++) {
    update[m] = static_cast<float>(add_scalars(plan, m, sums.scalars, kVectorSums));
    if (size.sums_weight)
      update[size.num_members + m] = static_cast<float>(add_scalars(plan, m, sums.scalars + 1, kVectorSums));
  }
}

inline void finish_vectors(const Plan& plan, const Gradients& given, const Now& now, const float* update, const float* weight,
                    const FinishOptions& options) {
  const Scaling scaling(plan, now, {nullptr, nullptr, nullptr, update, weight});
  const Settled settled = {nullptr, nullptr, scaling.clip.data(), scaling.rate.data(), nullptr};
  each_tile(plan, given, [&](int64_t tile, float* own) {
    kernels().finish_vector(plan, tile, given, now, settled, options, own);
  });
}

}  // namespace flora
