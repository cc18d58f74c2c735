// SPDX-License-Identifier: Apache-2.0
// Operators beside a step: sketches of gradients, and random bits.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "chosen.h"
#include "parallel.h"

namespace flora {
namespace {

// C += G A^T: (E, N, K, R), (E, N, W), (E, R, B). Each row is one thread's: bits do not depend on their number.
void accumulate(Tensor sums_ENKR, Tensor gradient_ENW, Tensor sketch_ERB, int64_t dtype, int64_t first_column,
                bool is_hadamard) {
  const Sketching s = {gradient_ENW.data_ptr(), dtype, data<float>(sums_ENKR), data<const float>(sketch_ERB),
                       gradient_ENW.size(1), gradient_ENW.size(2), first_column, sums_ENKR.size(2),
                       sketch_ERB.size(2), sketch_ERB.size(1), is_hadamard};
  const int64_t matrices = gradient_ENW.size(0), rows = s.num_rows;
  const int64_t together = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, s.width));
  const int64_t groups = (rows + together - 1) / together;
  each(matrices * groups, matrices * rows * s.width, [&](int64_t index) {
    const int64_t start = index % groups * together, before = index / groups * rows;
    kernels().accumulate(s, before + start, before + std::min(rows, start + together), scratch(floats_for(s)));
  });
}

// Four words for each of the counters that stand in `words` (keys, rows, counters, 4): `first` and on in the
// first row of each key, `stride` more in every further one.
void random_words(Integers keys, int64_t first, int64_t stride, int64_t stream, Tensor words) {
  const int64_t rows = words.size(1), counters = words.size(2);
  constexpr int64_t kTogether = 1 << 11;  // so that a row of many is shared too
  const int64_t parts = std::max<int64_t>(1, (counters + kTogether - 1) / kTogether);
  const int64_t lines = static_cast<int64_t>(keys.size()) * rows;
  each(lines * parts, 8 * lines * counters, [&](int64_t index) {
    const int64_t line = index / parts, start = index % parts * kTogether;
    const int64_t count = std::min(kTogether, counters - start);
    kernels().random_words(static_cast<uint64_t>(keys[line / rows]),
                           static_cast<uint64_t>(first + line % rows * stride + start), count,
                           static_cast<uint32_t>(stream), data<uint32_t>(words) + 4 * (line * counters + start));
  });
}

}  // namespace
}  // namespace flora

STABLE_TORCH_LIBRARY_FRAGMENT(flora_dist_kernels, library) {
  library.def(
      "accumulate(Tensor(a!) sums, Tensor gradient, Tensor sketch, int dtype, int first_column, bool is_hadamard) "
      "-> ()");
  library.def("random_words(int[] keys, int first, int stride, int stream, Tensor(a!) words) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora_dist_kernels, CPU, library) {
  library.impl("accumulate", TORCH_BOX(&flora::accumulate));
  library.impl("random_words", TORCH_BOX(&flora::random_words));
}
