// SPDX-License-Identifier: Apache-2.0
// Gradients that are kept as sketches: C += G A^T of some rows, read in the dtype in which they come.
#pragma once
#include "philox.h"
#include "plan.h"
#include "products.h"
#include "simd.h"

namespace flora {
namespace {

// One row in fp32 as whole blocks, zeros around its elements; where it lies if that is what it is already.
FLORA_INLINE const float* whole_blocks(const Sketching& s, int64_t line, float* buffer) {
  const int64_t at = line * s.width, before = s.first_column % s.block, total = s.blocks * s.block;
  if (s.dtype == kFloat32) {
    const float* from = static_cast<const float*>(s.gradient) + at;
    if (total == s.width) return from;
    memcpy(buffer + before, from, sizeof(float) * s.width);
  } else {
    widen(buffer + before, static_cast<const uint16_t*>(s.gradient) + at, s.dtype, s.width);
  }
  for (int64_t j = 0; j < before; j++) buffer[j] = 0;
  for (int64_t j = before + s.width; j < total; j++) buffer[j] = 0;
  return buffer;
}

// Lines [first, last), all of one matrix. Scratch: floats_for(s).
FLORA_CALLED void accumulate(const Sketching& s, int64_t first, int64_t last, float* scratch) {
  const int64_t padded = up(s.rank, 8);
  const float* sketch_RB = s.sketch_ERB + first / s.num_rows * s.rank * s.block;
  float* row = scratch;
  float* numbers = row + up(s.blocks * s.block, 16);
  float* columns_BP = numbers + s.blocks * padded;
  for (int64_t b = 0; b < s.block; b++)
    for (int64_t r = 0; r < padded; r++) columns_BP[b * padded + r] = r < s.rank ? sketch_RB[r * s.block + b] : 0;
  Header size = {};
  size.block = s.block, size.rank = s.rank, size.is_hadamard = s.is_hadamard;
  Sketch sketch;
  Sketch::read(sketch, sketch_RB, columns_BP, size);
  for (int64_t line = first; line < last; line++) {
    compress_with(sketch, numbers, whole_blocks(s, line, row), s.blocks);
    float* sums = s.sums + line * s.blocks * s.rank;
    for (int64_t k = 0; k < s.blocks; k++, sums += s.rank)
      for (int64_t r = 0; r < s.rank; r++) sums[r] += numbers[k * padded + r];
  }
}

// Four words of each of some counters that follow each other.
FLORA_CALLED void random_words(uint64_t key, uint64_t first, int64_t count, uint32_t stream, uint32_t* words) {
  philox(key, first, count, stream, words);
}

}  // namespace
}  // namespace flora
