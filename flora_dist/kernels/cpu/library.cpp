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
#include "phases.h"

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
  STD_TORCH_CHECK(n.size() == kNowNumbers, "the numbers of a step must be ", kNowNumbers, "; got ", n.size());
  auto at = [&](int i) { return static_cast<float>(n[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10)};
}

// kind, block, rank, of records their bits and the address of their values' table, then addresses by member (and
// source), of records those of their factors, then those of sketches by member.
Gradients read_gradients(const Plan& plan, const Integers& given) {
  const int64_t members = plan.header->num_members, kind = given[0];
  const bool sketched = kind == kSketched || kind == kRecords;
  const int64_t many = sketched ? members * plan.header->num_sources : members;
  const int64_t before = kind == kRecords ? 5 : 3;
  const int64_t expected = before + (kind == kRecords ? 2 : 1) * many + (sketched ? members : 0);
  STD_TORCH_CHECK(static_cast<int64_t>(given.size()) == expected, "a step must be given ", expected,
                  " numbers on its gradients; got ", given.size());
  const int64_t* addresses = given.data() + before;
  const int64_t* factors = addresses + (kind == kRecords ? many : 0);
  Code code = {};
  if (kind == kRecords)
    code = code_of(given[3], given[2], reinterpret_cast<const float*>(given[4]), nullptr, nullptr);
  return {kind, addresses, factors + many, given[1], given[2], code, factors};
}

Basis read_basis(const Plan& plan, const Maybe& old_HRB, const Maybe& new_HRB, const Maybe& columns_HBP,
                 const Maybe& move_HRP, int64_t move) {
  return {data<const float>(old_HRB),  data<const float>(new_HRB),  data<const float>(columns_HBP),
          data<const float>(move_HRP), up(plan.header->rank, 8), move};
}

// ---- message 1

void measure(Tensor table, Integers gradients, Numbers numbers, Maybe old_HRB, Tensor rows, Tensor terms_S) {
  const Plan plan = read_plan(table);
  const Gradients given = read_gradients(plan, gradients);
  const Basis basis = read_basis(plan, old_HRB, {}, {}, {}, kStays);
  measure_batch(plan, given, read_now(numbers), basis, data<float>(rows), data<float>(terms_S));
}

void take_rows(Tensor table, Numbers numbers, Tensor elements, Maybe products, Tensor rows, Maybe squares, Maybe cross) {
  const Whole whole = {data<const float>(elements), data<const float>(products), data<float>(squares),
                       data<float>(cross), nullptr, nullptr};
  take_rows_of(read_plan(table), read_now(numbers), whole, data<float>(rows));
}

// `adds_norms`: those of whole cut rows are not in the sums yet.
void settle(Tensor table, Numbers numbers, Tensor columns, Maybe squares, Maybe cross, Maybe history, Maybe cut_rows,
            Maybe elements, Maybe products, bool adds_norms, Maybe new_HRB, Maybe blocks, Tensor rows, Tensor column,
            Tensor factor, Tensor sums) {
  const Plan plan = read_plan(table);
  const Totals totals = {data<const float>(columns), data<const float>(squares),  data<const float>(cross),
                         data<const float>(history), data<const float>(cut_rows), data<const float>(elements)};
  const Settling out = {data<float>(rows), data<float>(column), data<float>(factor), data<double>(sums)};
  const Whole whole = {data<const float>(elements),
                       data<const float>(products),
                       adds_norms ? data<float>(squares) : nullptr,
                       adds_norms ? data<float>(cross) : nullptr,
                       data<const float>(new_HRB),
                       data<float>(blocks)};
  settle_batch(plan, read_now(numbers), totals, whole, out);
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

// |U|^2 of flora_strict and apollo, which read what is to become the momentum; changes nothing.
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
  const Gradients given = read_gradients(plan, gradients);
  const Basis basis = read_basis(plan, old_HRB, new_HRB, columns_HBP, move_HRP, move);
  const Clipping clipping = {data<const double>(sums), data<const float>(squares), data<const float>(cross),
                             data<const float>(update), data<const float>(weight)};
  const Settled known = {data<const float>(factor), data<const float>(rows), nullptr, nullptr,
                         data<const float>(blocks)};
  finish_batch(plan, given, read_now(numbers), basis, clipping, known, data<const float>(column),
               read_keys(plan, keys));
}

// ---- vectors

void measure_vector(Tensor table, Integers gradients, Numbers numbers, Tensor scalars, Tensor terms_S) {
  const Plan plan = read_plan(table);
  const Gradients given = read_gradients(plan, gradients);
  measure_vectors(plan, given, read_now(numbers), {data<double>(scalars)}, data<float>(terms_S));
}

void finish_vector(Tensor table, Integers gradients, Numbers numbers, Tensor update, Maybe weight, Integers keys) {
  const Plan plan = read_plan(table);
  const Gradients given = read_gradients(plan, gradients);
  finish_vectors(plan, given, read_now(numbers), data<const float>(update), data<const float>(weight),
                 read_keys(plan, keys));
}

// ---- all batches

// Batches at their step, from 9 numbers of each: the table's address, whether it holds vectors, addresses of A_old,
// A_new, A_new transposed and the move, what moves, and how many of `gradients` and `keys` are its own.
struct Jobs {
  std::vector<Job> all;
  std::vector<Integers> lists;  // what jobs point into

  Jobs(const Integers& batches, const Integers& gradients, const Numbers& numbers, const Integers& keys) {
    constexpr size_t kNumbers = 9;
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
      const Now now = read_now(Numbers(numbers.begin() + kNowNumbers * b, numbers.begin() + kNowNumbers * (b + 1)));
      all.push_back({plan, given, now, basis, read_keys(plan, own_keys), n[1] != 0, scratch_of(plan, given)});
    }
  }
};

void step(Integers batches, Integers gradients, Numbers numbers, Integers keys) {
  const Jobs jobs(batches, gradients, numbers, keys);
  LocalStep(jobs.all, kernels(), torch::stable::get_num_threads()).run();
}

// The same in two calls, where one message of sums travels between them. `places`: 4 numbers of each batch: addresses
// of its terms (how many floats: the next number) and of its rows' R, and whether few ranks exchange cut rows.
constexpr size_t kPlaces = 4;

void measure_all(Integers batches, Integers gradients, Numbers numbers, Integers keys, Integers places) {
  const Jobs jobs(batches, gradients, numbers, keys);
  for (size_t b = 0; b < jobs.all.size(); b++) {
    const Job& job = jobs.all[b];
    const int64_t* n = places.data() + kPlaces * b;
    auto* terms = reinterpret_cast<float*>(n[0]);
    const int64_t members = job.plan.header->num_members;
    std::fill(terms, terms + members, 1.0f);
    memset(terms + members, 0, sizeof(float) * (n[1] - members));
    if (!job.is_vector) {
      measure_batch(job.plan, job.given, job.now, job.basis, reinterpret_cast<float*>(n[2]), terms);
      continue;
    }
    std::vector<double> scalars(kVectorSums * job.plan.header->num_tiles);
    measure_vectors(job.plan, job.given, job.now, {scalars.data()}, terms);
  }
}

// Between the two, once cut rows have been exchanged.
void take_rows_all(Integers batches, Integers gradients, Numbers numbers, Integers keys, Integers places) {
  const Jobs jobs(batches, gradients, numbers, keys);
  for (size_t b = 0; b < jobs.all.size(); b++) {
    const Job& job = jobs.all[b];
    const Header& size = *job.plan.header;
    const int64_t* n = places.data() + kPlaces * b;
    if (job.is_vector || n[3] == 0) continue;
    const MeasureTerms terms =
        MeasureTerms::in(reinterpret_cast<float*>(n[0]) + size.num_members, size, size.num_summed);
    const Whole whole = {terms.elements, terms.products, terms.squares, terms.cross, nullptr, nullptr};
    take_rows_of(job.plan, job.now, whole, reinterpret_cast<float*>(n[2]));
  }
}

void finish_all(Integers batches, Integers gradients, Numbers numbers, Integers keys, Integers places) {
  const Jobs jobs(batches, gradients, numbers, keys);
  for (size_t b = 0; b < jobs.all.size(); b++) {
    const Job& job = jobs.all[b];
    const Header& size = *job.plan.header;
    const int64_t* n = places.data() + kPlaces * b;
    const auto at = [&](int i) { return reinterpret_cast<float*>(n[i]); };
    float* sums = at(0) + size.num_members;
    if (job.is_vector) {
      const float* weight = size.sums_weight ? sums + size.num_members : nullptr;
      finish_vectors(job.plan, job.given, job.now, sums, weight, job.options);
      continue;
    }
    const MeasureTerms terms = MeasureTerms::in(sums, size, size.num_summed);
    const int64_t columns = size.num_matrices * size.num_columns;
    const std::unique_ptr<float[]> made(new float[2 * columns]);  // C, and the factor of columns
    std::vector<double> norms(kSettledSums * size.num_matrices);
    std::vector<float> blocks(job.basis.new_HRB == nullptr ? 0 : size.num_block_slots * size.rank);
    const bool adds_norms = n[3] == 0;
    const Totals totals = {terms.columns, terms.squares, terms.cross, terms.history, terms.rows, terms.elements};
    const Whole whole = {terms.elements,
                         terms.products,
                         adds_norms ? terms.squares : nullptr,
                         adds_norms ? terms.cross : nullptr,
                         job.basis.new_HRB,
                         blocks.empty() ? nullptr : blocks.data()};
    settle_batch(job.plan, job.now, totals, whole, {at(2), made.get(), made.get() + columns, norms.data()});
    finish_batch(job.plan, job.given, job.now, job.basis, {norms.data(), nullptr, nullptr, nullptr, terms.weight},
                 {made.get() + columns, at(2), nullptr, nullptr, whole.blocks}, made.get(), job.options);
  }
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
      "take_rows(Tensor table, float[] now, Tensor elements, Tensor? products, Tensor(a!) rows, Tensor(b!)? squares, "
      "Tensor(c!)? cross) -> ()");
  library.def(
      "settle(Tensor table, float[] now, Tensor columns, Tensor(e!)? squares, Tensor(f!)? cross, Tensor? history, "
      "Tensor? cut_rows, Tensor? elements, Tensor? products, bool adds_norms, Tensor? new, Tensor(g!)? blocks, "
      "Tensor(a!) rows, Tensor(b!) column, Tensor(c!) factor, Tensor(d!) sums) -> ()");
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
  library.def("measure_all(int[] batches, int[] gradients, float[] now, int[] keys, int[] places) -> ()");
  library.def("take_rows_all(int[] batches, int[] gradients, float[] now, int[] keys, int[] places) -> ()");
  library.def("finish_all(int[] batches, int[] gradients, float[] now, int[] keys, int[] places) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora_dist_kernels, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&flora::instruction_set));
  library.impl("source", TORCH_BOX(&flora::source));
  // Given addresses alone, of memory of this CPU.
  library.impl("step", TORCH_BOX(&flora::step));
  library.impl("measure_all", TORCH_BOX(&flora::measure_all));
  library.impl("take_rows_all", TORCH_BOX(&flora::take_rows_all));
  library.impl("finish_all", TORCH_BOX(&flora::finish_all));
}

STABLE_TORCH_LIBRARY_IMPL(flora_dist_kernels, CPU, library) {
  library.impl("measure", TORCH_BOX(&flora::measure));
  library.impl("take_rows", TORCH_BOX(&flora::take_rows));
  library.impl("settle", TORCH_BOX(&flora::settle));
  library.impl("couple", TORCH_BOX(&flora::couple));
  library.impl("tally", TORCH_BOX(&flora::tally));
  library.impl("finish", TORCH_BOX(&flora::finish));
  library.impl("measure_vector", TORCH_BOX(&flora::measure_vector));
  library.impl("finish_vector", TORCH_BOX(&flora::finish_vector));
}
