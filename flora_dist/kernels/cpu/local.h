// SPDX-License-Identifier: Apache-2.0
// A whole step where this process holds everything: no message is waited for, so the phases of a matrix follow
// each other while its gradient is in the cache still. The phases are those of phases.h, with the same bits.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "plan.h"
#include "settle.h"
#include "sums.h"

namespace flora {

// A batch at its step.
struct Job {
  Plan plan;
  Gradients given;
  Now now;
  Basis basis;
  FinishOptions options;
  bool is_vector;
  int64_t scratch;  // floats that a tile needs
};

// One matrix between its phases. Its numbers stand in memory of its own; phases find them by a place among those
// of the batch, so they are handed pointers to where the batch's would begin.
class MatrixStep {
 public:
  static int64_t floats(const Job& job, int64_t matrix) {
    const Header& size = *job.plan.header;
    const Matrix& own = job.plan.matrices[matrix];
    const int64_t tiles = own.last_tile - own.first_tile;
    return 2 * (3 * tiles + kSettledSums) + up(rows_of(job, own), 16) + up(partials_of(job, own), 16) +
           5 * up(size.num_columns, 16) + 64;
  }

  MatrixStep(const Job& job, const Kernels& kernels, int64_t matrix, float* memory)
      : job_(job), kernels_(kernels), matrix_(matrix), own_(job.plan.matrices[matrix]) {
    const Header& size = *job.plan.header;
    const int64_t tiles = own_.last_tile - own_.first_tile, columns = up(size.num_columns, 16);
    factor_ = memory;
    column_ = factor_ + columns;
    partial_ = column_ + columns;
    rows_ = partial_ + up(partials_of(job, own_), 16);
    scalars_ = reinterpret_cast<double*>(rows_ + up(rows_of(job, own_), 16));
    squares_ = scalars_ + kMatrixSums * tiles;
    sums_ = squares_ + tiles;
    terms_ = MeasureTerms::in(reinterpret_cast<float*>(sums_ + kSettledSums), size, 1);
  }

  void measure(int64_t tile, float* scratch) const {
    const Tile& first = job_.plan.tiles[own_.first_tile];
    const MeasureSums sums = {rows_ - first.new_row, nullptr, nullptr, nullptr, partial_ - first.partial,
                              scalars_ - kMatrixSums * own_.first_tile};
    kernels_.measure(job_.plan, tile, job_.given, job_.basis, job_.now, sums, scratch);
  }

  // Sums of all tiles, C, and what bounds the update where that follows from sums.
  void settle() {
    const Header& size = *job_.plan.header;
    const Tile& first = job_.plan.tiles[own_.first_tile];
    for (int64_t j = 0; j < size.num_columns; j += kChunk)
      add_partials(job_.plan, matrix_, j, partial_ - first.partial, terms_, 0);
    add_numbers(job_.plan, matrix_, scalars_ - kMatrixSums * own_.first_tile, terms_, 0);
    const int64_t summed = size.first_summed + matrix_, before = summed * size.num_columns;
    const auto shifted = [](float* p, int64_t by) { return p == nullptr ? nullptr : p - by; };
    const Totals totals = {terms_.columns - before, shifted(terms_.squares, before), shifted(terms_.cross, before),
                           shifted(terms_.history, summed), nullptr, nullptr};
    const int64_t here = matrix_ * size.num_columns;
    settle_matrix(job_.plan, matrix_, job_.now, totals,
                  {nullptr, column_ - here, factor_ - here, sums_ - kSettledSums * matrix_});
    Clipping given = {sums_ - kSettledSums * matrix_, nullptr, nullptr, nullptr, shifted(terms_.weight, summed)};
    rate_ = take_rate(job_.plan, matrix_, job_.now, given);
    if (!asks_update()) bound_ = bound_of(job_.plan, matrix_, job_.now, given);
  }

  // Whether |U|^2 has to be summed before anything is written.
  bool asks_update() const { return sums_update(*job_.plan.header); }

  void tally(int64_t tile, float* scratch) const {
    run(tile, scratch, {nullptr, nullptr, squares_ - own_.first_tile});
  }

  void bound_update() {
    const int64_t summed = job_.plan.header->first_summed + matrix_;
    const auto update = static_cast<float>(add_scalars(job_.plan, matrix_, squares_ - own_.first_tile, 1));
    bound_ = bound_of(job_.plan, matrix_, job_.now, {nullptr, nullptr, nullptr, &update - summed, nullptr});
  }

  void finish(int64_t tile, float* scratch) const { run(tile, scratch, job_.options); }

  void write_state() const {
    memcpy(reinterpret_cast<float*>(own_.column), column_, sizeof(float) * job_.plan.header->num_columns);
    write_norm(job_.plan, matrix_, bound_);
  }

  int64_t first_tile() const { return own_.first_tile; }
  int64_t last_tile() const { return own_.last_tile; }
  int64_t scratch_floats() const { return job_.scratch; }

 private:
  static int64_t rows_of(const Job& job, const Matrix& own) {
    const Tile &first = job.plan.tiles[own.first_tile], &last = job.plan.tiles[own.last_tile - 1];
    return last.new_row + last.num_rows - first.new_row;
  }
  static int64_t partials_of(const Job& job, const Matrix& own) {
    const Tile &first = job.plan.tiles[own.first_tile], &last = job.plan.tiles[own.last_tile - 1];
    return last.partial - first.partial + job.plan.header->num_sums * (last.last - last.first);
  }

  void run(int64_t tile, float* scratch, const FinishOptions& options) const {
    const Tile& first = job_.plan.tiles[own_.first_tile];
    const int64_t here = matrix_ * job_.plan.header->num_columns;
    const Settled settled = {factor_ - here, rows_ - first.new_row, &bound_.factor - matrix_, &rate_ - matrix_, nullptr};
    kernels_.finish(job_.plan, tile, job_.given, job_.basis, job_.now, settled, options, scratch);
  }

  const Job& job_;
  const Kernels& kernels_;
  int64_t matrix_;
  const Matrix& own_;
  float *factor_, *column_, *partial_, *rows_;
  double *scalars_, *squares_, *sums_;
  MeasureTerms terms_;
  Bound bound_ = {1, 0};
  float rate_ = 0;
};

// From start to end by one thread.
inline void step_matrix(const Job& job, const Kernels& kernels, int64_t matrix) {
  const int64_t needed = up(MatrixStep::floats(job, matrix), 16);
  float* memory = scratch(needed + job.scratch);
  float* own = memory + needed;
  MatrixStep step(job, kernels, matrix, memory);
  for (int64_t t = step.first_tile(); t < step.last_tile(); t++) step.measure(t, own);
  step.settle();
  if (step.asks_update()) {
    for (int64_t t = step.first_tile(); t < step.last_tile(); t++) step.tally(t, own);
    step.bound_update();
  }
  // Backwards: what was measured last is nearest.
  for (int64_t t = step.last_tile() - 1; t >= step.first_tile(); t--) step.finish(t, own);
  step.write_state();
}

inline void step_vector(const Job& job, const Kernels& kernels, int64_t index) {
  const Matrix& own = job.plan.matrices[index];
  const int64_t tiles = own.last_tile - own.first_tile, needed = up(2 * kVectorSums * tiles, 16);
  float* memory = scratch(needed + job.scratch);
  double* scalars = reinterpret_cast<double*>(memory) - kVectorSums * own.first_tile;
  for (int64_t t = own.first_tile; t < own.last_tile; t++)
    kernels.measure_vector(job.plan, t, job.given, job.now, {scalars}, memory + needed);
  const auto update = static_cast<float>(add_scalars(job.plan, index, scalars, kVectorSums));
  const auto weight = static_cast<float>(add_scalars(job.plan, index, scalars + 1, kVectorSums));
  const int64_t summed = job.plan.header->first_summed + index;
  const Clipping given = {nullptr, nullptr, nullptr, &update - summed,
                          job.plan.header->sums_weight ? &weight - summed : nullptr};
  const float clip = bound_of(job.plan, index, job.now, given).factor, own_rate = take_rate(job.plan, index, job.now, given);
  const Settled settled = {nullptr, nullptr, &clip - index, &own_rate - index, nullptr};
  for (int64_t t = own.first_tile; t < own.last_tile; t++)
    kernels.finish_vector(job.plan, t, job.given, job.now, settled, job.options, memory + needed);
}

// Up to so many elements a matrix is stepped by one thread: its gradient is read from a cache the second time.
constexpr int64_t kMostTogether = 1 << 21;
// And to this share of a thread's work, or threads would wait for one.
constexpr int64_t kSharesOfThread = 4;

inline int64_t elements_of(const Job& job, int64_t matrix) {
  int64_t elements = 0;
  for (int64_t t = job.plan.matrices[matrix].first_tile; t < job.plan.matrices[matrix].last_tile; t++)
    elements += job.plan.tiles[t].num_rows * (job.plan.tiles[t].last - job.plan.tiles[t].first);
  return elements;
}

struct Unit {
  const Job* job;
  int64_t matrix;
};
struct SharedTile {
  MatrixStep* step;
  int64_t tile;
};

// All phases of all batches.
class LocalStep {
 public:
  LocalStep(const std::vector<Job>& jobs, const Kernels& kernels, int64_t threads) : kernels_(kernels) {
    std::vector<std::pair<Unit, int64_t>> all;
    for (const Job& job : jobs)
      for (int64_t m = 0; m < job.plan.header->num_matrices; m++) {
        all.push_back({{&job, m}, elements_of(job, m)});
        elements_ += all.back().second;
      }
    int64_t most = kMostTogether, floats = 0;
    if (threads > 1) most = std::min(most, elements_ / (kSharesOfThread * threads));
    for (const auto& [unit, elements] : all) {
      if (unit.job->is_vector || elements <= std::max(most, kElementsPerThread)) {
        units_.push_back(unit);
        continue;
      }
      large_.push_back(unit);
      floats += up(MatrixStep::floats(*unit.job, unit.matrix), 16);
    }
    memory_.reset(new float[floats]);  // each matrix clears its own
    float* at = memory_.get();
    for (const Unit& unit : large_) {
      shared_.emplace_back(*unit.job, kernels, unit.matrix, at);
      at += up(MatrixStep::floats(*unit.job, unit.matrix), 16);
    }
    for (MatrixStep& step : shared_)
      for (int64_t t = step.first_tile(); t < step.last_tile(); t++) tiles_.push_back({&step, t});
  }

  void run() {
    each(tiles_.size(), elements_, [&](int64_t n) {
      const SharedTile& own = tiles_[n];
      own.step->measure(own.tile, scratch(own.step->scratch_floats()));
    });
    each(shared_.size(), elements_, [&](int64_t n) { shared_[n].settle(); });
    each(tiles_.size(), elements_, [&](int64_t n) {
      const SharedTile& own = tiles_[n];
      if (own.step->asks_update()) own.step->tally(own.tile, scratch(own.step->scratch_floats()));
    });
    for (MatrixStep& step : shared_)
      if (step.asks_update()) step.bound_update();
    // Whole matrices first: tiles are smaller, and even out when threads come to the end.
    const int64_t units = units_.size(), tiles = tiles_.size();
    each(units + tiles, elements_, [&](int64_t n) {
      if (n >= units) {
        const SharedTile& own = tiles_[units + tiles - 1 - n];
        return own.step->finish(own.tile, scratch(own.step->scratch_floats()));
      }
      const Unit& unit = units_[n];
      if (unit.job->is_vector) return step_vector(*unit.job, kernels_, unit.matrix);
      step_matrix(*unit.job, kernels_, unit.matrix);
    });
    for (const MatrixStep& step : shared_) step.write_state();
  }

 private:
  const Kernels& kernels_;
  int64_t elements_ = 0;
  std::vector<Unit> units_, large_;
  std::unique_ptr<float[]> memory_;
  std::vector<MatrixStep> shared_;
  std::vector<SharedTile> tiles_;
};

}  // namespace flora
