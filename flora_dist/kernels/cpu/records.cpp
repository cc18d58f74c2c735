// SPDX-License-Identifier: Apache-2.0
// Operators on sketches in few bits; flora_dist/kernels/records.py calls them and says what each is for.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "chosen.h"
#include "parallel.h"

namespace flora {
namespace {

// Half-open intervals of the whole parameter's lines, one after the other.
Integers lines_of(const Integers& runs, int64_t expected) {
  Integers lines;
  lines.reserve(expected);
  for (size_t i = 0; i + 1 < runs.size(); i += 2)
    for (int64_t line = runs[i]; line < runs[i + 1]; line++) lines.push_back(line);
  STD_TORCH_CHECK(static_cast<int64_t>(lines.size()) == expected, "records must have the numbers of their ", expected,
                  " lines; got ", lines.size());
  return lines;
}

// Bits, table, levels and edges; the latter where a number is put at levels.
Code read_code(int64_t bits, int64_t numbers, const Maybe& table, const Maybe& levels, const Maybe& edges) {
  return code_of(bits, numbers, data<const float>(table), data<const float>(levels), data<const float>(edges));
}

// `place`: key of the random bits, first number of a line that is here, numbers of a whole line.
Draws read_draws(const Integers& place, const Integers& lines) {
  return {static_cast<uint64_t>(place[0]), lines.data(), place[1], place[2]};
}

// C <- Q(C + G A^T): records (E, N, K, bytes), (E, N, W), (E, R, B). Levels are given for fresh records alone.
void add_records(Tensor records, Tensor gradient, Tensor sketch, int64_t dtype, int64_t first_column, int64_t bits,
                 Maybe table, Maybe levels, Maybe edges, Integers runs, Integers place) {
  const int64_t matrices = gradient.size(0), rows = gradient.size(1), rank = sketch.size(1);
  const Sketching given = {gradient.data_ptr(), dtype, nullptr, data<const float>(sketch), rows, gradient.size(2),
                           first_column, records.size(2), sketch.size(2), rank, 1};
  const Integers lines = lines_of(runs, matrices * rows);
  const Adding adding = {given, data<uint8_t>(records), read_code(bits, rank, table, levels, edges),
                         levels.has_value(), read_draws(place, lines)};
  const int64_t together = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, given.width));
  const int64_t groups = (rows + together - 1) / together;
  each(matrices * groups, matrices * rows * given.width, [&](int64_t index) {
    const int64_t start = index % groups * together, before = index / groups * rows;
    kernels().add_records(adding, before + start, before + std::min(rows, start + together),
                          scratch(floats_for(adding)));
  });
}

// to <- Q(sum of sources / divisor): (L, K, bytes) each. Levels are given where numbers are put at them.
void merge_records(Integers sources, int64_t from_bits, Maybe from_table, Tensor to, int64_t bits, int64_t numbers,
                   Maybe levels, Maybe edges, double divisor, Integers runs, Integers place) {
  const int64_t num_lines = to.size(0), blocks = to.size(1);
  const Code code = read_code(bits, numbers, {}, levels, edges);
  const bool rounds = bits < 32 && !levels.has_value();
  const Integers lines = lines_of(runs, rounds ? num_lines : 0);
  const Merging merging = {sources.data(), static_cast<int64_t>(sources.size()),
                           read_code(from_bits, numbers, from_table, {}, {}), data<uint8_t>(to), code,
                           levels.has_value(), static_cast<float>(divisor), blocks, read_draws(place, lines)};
  const int64_t width = std::max<int64_t>(1, blocks * numbers);
  const int64_t together = std::max<int64_t>(1, kElementsPerThread / width);
  each((num_lines + together - 1) / together, num_lines * width, [&](int64_t index) {
    const int64_t start = index * together;
    kernels().merge_records(merging, start, std::min(num_lines, start + together), scratch(rounding_floats(code)));
  });
}

}  // namespace
}  // namespace flora

STABLE_TORCH_LIBRARY_FRAGMENT(flora_dist_kernels, library) {
  library.def(
      "add_records(Tensor(a!) records, Tensor gradient, Tensor sketch, int dtype, int first_column, int bits, "
      "Tensor? table, Tensor? levels, Tensor? edges, int[] runs, int[] place) -> ()");
  library.def(
      "merge_records(int[] sources, int from_bits, Tensor? from_table, Tensor(a!) to, int bits, int numbers, "
      "Tensor? levels, Tensor? edges, float divisor, int[] runs, int[] place) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora_dist_kernels, CPU, library) {
  library.impl("add_records", TORCH_BOX(&flora::add_records));
  library.impl("merge_records", TORCH_BOX(&flora::merge_records));
}
