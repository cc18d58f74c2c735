// SPDX-License-Identifier: Apache-2.0
// Products with a sketch matrix A that lies in a cache: blocks of elements to R numbers each, and back.
#pragma once
#include "hadamard.h"
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

// c = x A^T of some blocks, from A^T (B, P): each element is spread over the R lanes of its block's sum.
// Eight sums at a time hide each other's latency: of eight blocks, which share what is read of A^T, or of every
// so-manieth element of fewer.
template <int kBlocks>
FLORA_INLINE void compress_some(float* c, const float* x, const float* columns_BP, int64_t block, int64_t padded) {
  constexpr int kParts = 8 / kBlocks;
  for (int64_t r = 0; r < padded; r += 8) {
    Eight sums[kBlocks][kParts] = {};
    const float* a = columns_BP + r;
    int64_t b = 0;
    for (; b + kParts <= block; b += kParts)
      for (int p = 0; p < kParts; p++, a += padded)
        for (int k = 0; k < kBlocks; k++) sums[k][p] += x[k * block + b + p] * load8(a);
    for (; b < block; b++, a += padded)
      for (int k = 0; k < kBlocks; k++) sums[k][0] += x[k * block + b] * load8(a);
    for (int k = 0; k < kBlocks; k++) {
      for (int p = 1; p < kParts; p++) sums[k][0] += sums[k][p];
      store8(c + k * padded + r, sums[k][0]);
    }
  }
}

FLORA_CALLED void compress(float* c, const float* x, int64_t blocks, const float* columns_BP, int64_t block,
                           int64_t padded) {
  int64_t k = 0;
  for (; k + 8 <= blocks; k += 8) compress_some<8>(c + k * padded, x + k * block, columns_BP, block, padded);
  for (; k + 2 <= blocks; k += 2) compress_some<2>(c + k * padded, x + k * block, columns_BP, block, padded);
  for (; k < blocks; k++) compress_some<1>(c + k * padded, x + k * block, columns_BP, block, padded);
}

// x <- keep x + d A of one block, from A (R, B).
template <int kVectors>
FLORA_INLINE void expand_some(float* x, float keep, const float* d, const float* a, int64_t block, int64_t rank) {
  Vec sums[kVectors];
  for (int v = 0; v < kVectors; v++) sums[v] = keep * load(x + v * kLanes);
  for (int64_t r = 0; r < rank; r++)
    for (int v = 0; v < kVectors; v++) sums[v] += d[r] * load(a + r * block + v * kLanes);
  for (int v = 0; v < kVectors; v++) store(x + v * kLanes, sums[v]);
}

FLORA_CALLED void expand(float* x, float keep, const float* d, const float* sketch_RB, int64_t block, int64_t rank) {
  constexpr int kMany = 64 / FLORA_LANES;
  int64_t b = 0;
  for (; b + kMany * kLanes <= block; b += kMany * kLanes)
    expand_some<kMany>(x + b, keep, d, sketch_RB + b, block, rank);
  for (; b + kLanes <= block; b += kLanes) expand_some<1>(x + b, keep, d, sketch_RB + b, block, rank);
  for (; b < block; b++) {
    float sum = keep * x[b];
    for (int64_t r = 0; r < rank; r++) sum += d[r] * sketch_RB[r * block + b];
    x[b] = sum;
  }
}

// A sketch matrix, and the better of two ways to multiply by it.
struct Sketch {
  const float* sketch_RB;
  const float* columns_BP;  // null where nothing is compressed with it
  int64_t block, rank, padded;
  bool is_fast;
  Hadamard fast;

  FLORA_CALLED void read(Sketch& s, const float* sketch_RB, const float* columns_BP, const Header& size) {
    s.sketch_RB = sketch_RB;
    s.columns_BP = columns_BP;
    s.block = size.block;
    s.rank = size.rank;
    s.padded = up(size.rank, 8);
    s.is_fast = size.is_hadamard && has_fast_product(size.block, size.rank);
    if (s.is_fast) Hadamard::read(s.fast, sketch_RB, size.block, size.rank);
  }
};

// c = x A^T of some blocks; a block's numbers stand P apart.
FLORA_INLINE void compress_with(const Sketch& s, float* c, const float* x, int64_t blocks) {
  if (!s.is_fast) return compress(c, x, blocks, s.columns_BP, s.block, s.padded);
  by_block(s.block, [&](auto count) { compress_fast<count.value>(c, x, blocks, s.fast); });
}

// x <- keep x + d A of some blocks.
FLORA_INLINE void add_expanded(const Sketch& s, float* x, float keep, const float* d, int64_t blocks) {
  if (!s.is_fast) {
    for (int64_t k = 0; k < blocks; k++)
      expand(x + k * s.block, keep, d + k * s.padded, s.sketch_RB, s.block, s.rank);
    return;
  }
  by_block(s.block, [&](auto count) { add_expanded_fast<count.value>(x, keep, d, blocks, s.fast); });
}

}  // namespace
}  // namespace flora
