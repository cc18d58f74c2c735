// SPDX-License-Identifier: Apache-2.0
// The kernels as operators of torch, on its stable ABI: one library for every Python, and for every torch from
// the version on that TORCH_TARGET_VERSION names.
//
// flora_dist/kernels/native.py calls them, and says what each is for. Memory that stands in a table by its address
// is kept alive there.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <string>

#include "chosen.h"
#include "local.h"
#include "parallel.h"
#include "plan.h"
#include "settle.h"
#include "sums.h"

#define FLORA_QUOTE(text) #text
#define FLORA_TEXT(text) FLORA_QUOTE(text)

namespace flora {
namespace {

Plan checked(const Plan& plan) {
  STD_TORCH_CHECK(plan.header->version == kTableVersion, "a table of version ", plan.header->version,
                  " was given to kernels of version ", kTableVersion);
  return plan;
}

Plan read_plan(const Tensor& table) { return checked(plan_of(data<const int64_t>(table))); }

Now read_now(const Numbers& n) {
  STD_TORCH_CHECK(n.size() == 9, "the numbers of a step must be 9; got ", n.size());
  auto at = [&](int i) { return static_cast<float>(n[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
}

// kind, block, rank, then addresses by member (and source), then those of sketches by member.
Gradients read_gradients(const Plan& plan, const Integers& given) {
  const int64_t* addresses = given.data() + 3;
  const int64_t members = plan.header->num_members;
  const int64_t many = given[0] == kSketched ? members * plan.header->num_sources : members;
  const int64_t expected = 3 + many + (given[0] == kSketched ? members : 0);
  STD_TORCH_CHECK(static_cast<int64_t>(given.size()) == expected, "a step must be given ", expected,
                  " numbers on its gradients; got ", given.size());
  return {given[0], addresses, addresses + many, given[1], given[2]};
}

Basis read_basis(const Plan& plan, const Maybe& old_HRB, const Maybe& new_HRB, const Maybe& columns_HBP,
                 const Maybe& move_HRP, int64_t move) {
  return {data<const float>(old_HRB),  data<const float>(new_HRB),  data<const float>(columns_HBP),
          data<const float>(move_HRP), up(plan.header->rank, 8), move};
}

int64_t width_of(const Plan& plan) {
  int64_t width = 1;
  for (int64_t t = 0; t < plan.header->num_tiles; t++)
    width = std::max(width, plan.tiles[t].last - plan.tiles[t].first);
  return width;
}

int64_t elements_of(const Plan& plan) {
  int64_t elements = 0;
  for (int64_t t = 0; t < plan.header->num_tiles; t++)
    elements += plan.tiles[t].num_rows * (plan.tiles[t].last - plan.tiles[t].first);
  return elements;
}

int64_t scratch_of(const Plan& plan, const Gradients& given) {
  const Header& size = *plan.header;
  const int64_t gradient_block = given.kind == kSketched ? given.block : 0;
  return scratch_floats(width_of(plan), size.block, gradient_block, up(size.rank, 8));
}

// What every phase does: body(tile, scratch) by all threads.
template <class Body>
void each_tile(const Plan& plan, const Gradients& given, const Body& body) {
  const Header& size = *plan.header;
  const int64_t floats = scratch_of(plan, given);
  each(size.num_tiles, elements_of(plan), [&](int64_t tile) { body(tile, scratch(floats)); });
}

// ---- message 1

void measure(Tensor table, Integers gradients, Numbers numbers, Maybe old_HRB, Tensor rows, Tensor terms_S) {
  const Plan plan = read_plan(table);
  const Header& size = *plan.header;
  const Gradients given = read_gradients(plan, gradients);
  const Now now = read_now(numbers);
  const Basis basis = read_basis(plan, old_HRB, {}, {}, {}, kStays);
  const MeasureTerms terms = MeasureTerms::in(data<float>(terms_S) + size.num_members, size, size.num_summed);
  const std::unique_ptr<float[]> partial(new float[size.num_partials]);  // each tile clears its own
  std::vector<double> scalars(kMatrixSums * size.num_tiles);
  const MeasureSums sums = {data<float>(rows), terms.rows, partial.get(), scalars.data()};
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

void settle(Tensor table, Numbers numbers, Tensor columns, Maybe squares, Maybe cross, Maybe history, Maybe cut_rows,
            Tensor rows, Tensor column, Tensor factor, Tensor sums) {
  const Plan plan = read_plan(table);
  const Header& size = *plan.header;
  const Now now = read_now(numbers);
  const Totals totals = {data<const float>(columns), data<const float>(squares), data<const float>(cross),
                         data<const float>(history), data<const float>(cut_rows)};
  const Settling out = {data<float>(rows), data<float>(column), data<float>(factor), data<double>(sums)};
  if (totals.cut_rows != nullptr)
    for (int64_t t = 0; t < size.num_tiles; t++) settle_rows(plan, t, now, totals, out);
  each(size.num_matrices, size.num_matrices * size.num_columns,
       [&](int64_t m) { settle_matrix(plan, m, now, totals, out); });
}

// ---- message 2

void couple(Tensor table, Integers gradients, Numbers numbers, Maybe old_HRB, Maybe new_HRB, Maybe columns_HBP, Tensor rows,
            Tensor factor, bool asks_squares, bool asks_cross, bool asks_blocks, Tensor terms_S) {
  const Plan plan = read_plan(table);
  const Header& size = *plan.header;
  const Gradients given = read_gradients(plan, gradients);
  const Now now = read_now(numbers);
  const Basis basis = read_basis(plan, old_HRB, new_HRB, columns_HBP, {}, kStays);
  const Settled settled = {data<const float>(factor), data<const float>(rows), nullptr, nullptr, nullptr};
  std::vector<double> scalars(kMatrixSums * size.num_tiles, 0.0);
  float* squares = data<float>(terms_S);
  float* cross = squares + (asks_squares ? size.num_summed : 0);
  float* blocks = cross + (asks_cross ? size.num_summed : 0);
  const CoupleSums sums = {scalars.data(), blocks, asks_blocks, asks_cross};
  each_tile(plan, given, [&](int64_t tile, float* own) {
    if (plan.tiles[tile].is_cut) kernels().couple(plan, tile, given, basis, now, settled, sums, own);
  });
  for (int64_t m = 0; m < size.num_matrices; m++) {
    const int64_t summed = size.first_summed + m;
    if (asks_squares) squares[summed] = static_cast<float>(add_scalars(plan, m, scalars.data(), kMatrixSums));
    if (asks_cross) cross[summed] = static_cast<float>(add_scalars(plan, m, scalars.data() + 1, kMatrixSums));
  }
}

// ---- the step itself

struct Scaling {
  std::vector<float> clip, rate;

  Scaling(const Plan& plan, const Now& now, const Clipping& given) : clip(plan.header->num_matrices), rate(clip) {
    for (size_t m = 0; m < clip.size(); m++) {
      clip[m] = clip_factor(plan, m, now, given);
      rate[m] = flora::rate(plan, m, now, given);
    }
  }
};

// |U|^2 of the strict rule, which reads what is to become the momentum; changes nothing.
void tally(Tensor table, Integers gradients, Numbers numbers, Maybe old_HRB, Maybe new_HRB, Maybe columns_HBP,
           Maybe move_HRP, int64_t move, Tensor rows, Tensor factor, Maybe blocks, Tensor update) {
  const Plan plan = read_plan(table);
  const Header& size = *plan.header;
  const Gradients given = read_gradients(plan, gradients);
  const Now now = read_now(numbers);
  const Basis basis = read_basis(plan, old_HRB, new_HRB, columns_HBP, move_HRP, move);
  const std::vector<float> ones(size.num_matrices, 1.0f);
  const Settled settled = {data<const float>(factor), data<const float>(rows), ones.data(), ones.data(),
                           data<const float>(blocks)};
  std::vector<double> squares(size.num_tiles);
  const FinishOptions options = {nullptr, nullptr, squares.data()};
  each_tile(plan, given, [&](int64_t tile, float* own) {
    kernels().finish(plan, tile, given, basis, now, settled, options, own);
  });
  for (int64_t m = 0; m < size.num_matrices; m++)
    data<float>(update)[size.first_summed + m] = static_cast<float>(add_scalars(plan, m, squares.data(), 1));
}

// Keys by member, of weights and then of momenta; empty where nothing is rounded with bits.
FinishOptions read_keys(const Plan& plan, const Integers& keys) {
  const int64_t members = plan.header->num_members;
  STD_TORCH_CHECK(keys.empty() || static_cast<int64_t>(keys.size()) == 2 * members, "a step must be given ",
                  2 * members, " keys or none; got ", keys.size());
  if (keys.empty()) return {nullptr, nullptr, nullptr};
  return {keys.data(), keys.data() + members, nullptr};
}

void finish(Tensor table, Integers gradients, Numbers numbers, Maybe old_HRB, Maybe new_HRB, Maybe columns_HBP,
            Maybe move_HRP, int64_t move, Tensor rows, Tensor column, Tensor factor, Tensor sums, Maybe squares,
            Maybe cross, Maybe update, Maybe weight, Maybe blocks, Integers keys) {
  const Plan plan = read_plan(table);
  const Header& size = *plan.header;
  const Gradients given = read_gradients(plan, gradients);
  const Now now = read_now(numbers);
  const Basis basis = read_basis(plan, old_HRB, new_HRB, columns_HBP, move_HRP, move);
  const Scaling scaling(plan, now, {data<const double>(sums), data<const float>(squares), data<const float>(cross),
                                    data<const float>(update), data<const float>(weight)});
  const Settled settled = {data<const float>(factor), data<const float>(rows), scaling.clip.data(),
                           scaling.rate.data(), data<const float>(blocks)};
  const FinishOptions options = read_keys(plan, keys);
  each_tile(plan, given, [&](int64_t tile, float* own) {
    // Backwards: what was measured last is in the cache still.
    kernels().finish(plan, size.num_tiles - 1 - tile, given, basis, now, settled, options, own);
  });
  for (int64_t m = 0; m < size.num_matrices; m++)
    memcpy(reinterpret_cast<float*>(plan.matrices[m].column), data<const float>(column) + m * size.num_columns,
           sizeof(float) * size.num_columns);
}

// ---- vectors

void measure_vector(Tensor table, Integers gradients, Numbers numbers, Tensor scalars, Tensor terms_S) {
  const Plan plan = read_plan(table);
  const Header& size = *plan.header;
  const Gradients given = read_gradients(plan, gradients);
  const Now now = read_now(numbers);
  const VectorSums sums = {data<double>(scalars)};
  each_tile(plan, given, [&](int64_t tile, float* own) {
    kernels().measure_vector(plan, tile, given, now, sums, own);
  });
  float* update = data<float>(terms_S) + size.num_members;
  for (int64_t m = 0; m < size.num_matrices; m++) {
    update[m] = static_cast<float>(add_scalars(plan, m, sums.scalars, kVectorSums));
    if (size.sums_weight)
      update[size.num_members + m] = static_cast<float>(add_scalars(plan, m, sums.scalars + 1, kVectorSums));
  }
}

void finish_vector(Tensor table, Integers gradients, Numbers numbers, Tensor update, Maybe weight, Integers keys) {
  const Plan plan = read_plan(table);
  const Gradients given = read_gradients(plan, gradients);
  const Now now = read_now(numbers);
  const Scaling scaling(plan, now, {nullptr, nullptr, nullptr, data<const float>(update), data<const float>(weight)});
  const Settled settled = {nullptr, nullptr, scaling.clip.data(), scaling.rate.data(), nullptr};
  const FinishOptions options = read_keys(plan, keys);
  each_tile(plan, given, [&](int64_t tile, float* own) {
    kernels().finish_vector(plan, tile, given, now, settled, options, own);
  });
}

// ---- all phases at once

// `batches`: 9 numbers of each: the table's address, whether it holds vectors, addresses of A_old, A_new, A_new
// transposed and the move, what moves, and how many of `gradients` and `keys` are its own.
void step(Integers batches, Integers gradients, Numbers numbers, Integers keys) {
  constexpr size_t kNumbers = 9;
  std::vector<Job> jobs;
  std::vector<Integers> lists;  // what jobs point into
  lists.reserve(2 * batches.size() / kNumbers);
  auto gradient = gradients.begin();
  auto key = keys.begin();
  for (size_t b = 0; b < batches.size() / kNumbers; b++) {
    const int64_t* n = batches.data() + kNumbers * b;
    const Plan plan = checked(plan_of(reinterpret_cast<const int64_t*>(n[0])));
    const auto at = [&](int i) { return reinterpret_cast<const float*>(n[i]); };
    const Integers& own = lists.emplace_back(gradient, gradient + n[7]);
    const Integers& own_keys = lists.emplace_back(key, key + n[8]);
    gradient += n[7], key += n[8];
    const Gradients given = read_gradients(plan, own);
    const Basis basis = {at(2), at(3), at(4), at(5), up(plan.header->rank, 8), n[6]};
    const Now now = read_now(Numbers(numbers.begin() + 9 * b, numbers.begin() + 9 * (b + 1)));
    jobs.push_back({plan, given, now, basis, read_keys(plan, own_keys), n[1] != 0, scratch_of(plan, given)});
  }
  LocalStep(jobs, kernels(), torch::stable::get_num_threads()).run();
}

std::string instruction_set() { return kernels().name; }

// A digest of the sources that this was compiled from.
std::string source() { return FLORA_TEXT(FLORA_SOURCE); }

}  // namespace
}  // namespace flora

STABLE_TORCH_LIBRARY(flora_dist_kernels, library) {
  library.def("instruction_set() -> str");
  library.def("source() -> str");
  library.def("measure(Tensor table, int[] gradients, float[] now, Tensor? old, Tensor(a!) rows, Tensor(b!) terms) -> ()");
  library.def(
      "settle(Tensor table, float[] now, Tensor columns, Tensor? squares, Tensor? cross, Tensor? history, "
      "Tensor? cut_rows, Tensor(a!) rows, Tensor(b!) column, Tensor(c!) factor, Tensor(d!) sums) -> ()");
  library.def(
      "couple(Tensor table, int[] gradients, float[] now, Tensor? old, Tensor? new, Tensor? columns, Tensor rows, "
      "Tensor factor, bool asks_squares, bool asks_cross, bool asks_blocks, Tensor(a!) terms) -> ()");
  library.def(
      "tally(Tensor table, int[] gradients, float[] now, Tensor? old, Tensor? new, Tensor? columns, Tensor? move, "
      "int moves, Tensor rows, Tensor factor, Tensor? blocks, Tensor(a!) update) -> ()");
  library.def(
      "finish(Tensor table, int[] gradients, float[] now, Tensor? old, Tensor? new, Tensor? columns, Tensor? move, "
      "int moves, Tensor rows, Tensor column, Tensor factor, Tensor sums, Tensor? squares, Tensor? cross, "
      "Tensor? update, Tensor? weight, Tensor? blocks, int[] keys) -> ()");
  library.def(
      "measure_vector(Tensor table, int[] gradients, float[] now, Tensor(a!) scalars, Tensor(b!) terms) -> ()");
  library.def(
      "finish_vector(Tensor table, int[] gradients, float[] now, Tensor update, Tensor? weight, int[] keys) -> ()");
  library.def("step(int[] batches, int[] gradients, float[] now, int[] keys) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora_dist_kernels, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&flora::instruction_set));
  library.impl("source", TORCH_BOX(&flora::source));
  library.impl("step", TORCH_BOX(&flora::step));  // given addresses alone, of memory of this CPU
}

STABLE_TORCH_LIBRARY_IMPL(flora_dist_kernels, CPU, library) {
  library.impl("measure", TORCH_BOX(&flora::measure));
  library.impl("settle", TORCH_BOX(&flora::settle));
  library.impl("couple", TORCH_BOX(&flora::couple));
  library.impl("tally", TORCH_BOX(&flora::tally));
  library.impl("finish", TORCH_BOX(&flora::finish));
  library.impl("measure_vector", TORCH_BOX(&flora::measure_vector));
  library.impl("finish_vector", TORCH_BOX(&flora::finish_vector));
}
