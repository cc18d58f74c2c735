// SPDX-License-Identifier: Apache-2.0
// Products with a sketch matrix A that lies in a cache: blocks of elements to R numbers each, and back.
#pragma once
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

// c = x A^T of some blocks, from A^T (B, P): each element is spread over the R lanes of its block's sum.
// Eight blocks at a time, so that eight sums hide each other's latency and share what is read of A^T.
template <int kBlocks>
FLORA_INLINE void compress_some(float* c, const float* x, const float* columns_BP, int64_t block, int64_t padded) {
  for (int64_t r = 0; r < padded; r += 8) {
    Eight sums[kBlocks] = {};
    for (int64_t b = 0; b < block; b++) {
      const Eight a = load8(columns_BP + b * padded + r);
      for (int k = 0; k < kBlocks; k++) sums[k] += x[k * block + b] * a;
    }
    for (int k = 0; k < kBlocks; k++) store8(c + k * padded + r, sums[k]);
  }
}

FLORA_CALLED void compress(float* c, const float* x, int64_t blocks, const float* columns_BP, int64_t block,
                           int64_t padded) {
  int64_t k = 0;
  for (; k + 8 <= blocks; k += 8) compress_some<8>(c + k * padded, x + k * block, columns_BP, block, padded);
  for (; k + 2 <= blocks; k += 2) compress_some<2>(c + k * padded, x + k * block, columns_BP, block, padded);
  for (; k < blocks; k++) compress_some<1>(c + k * padded, x + k * block, columns_BP, block, padded);
}

// to = keep x + d A of one block's elements, from A (R, B); `count` of its B columns are wanted.
template <int kVectors>
FLORA_INLINE void expand_some(float* to, const float* x, float keep, const float* d, const float* a, int64_t block,
                              int64_t rank) {
  Vec sums[kVectors];
  for (int v = 0; v < kVectors; v++) sums[v] = keep * load(x + v * kLanes);
  for (int64_t r = 0; r < rank; r++)
    for (int v = 0; v < kVectors; v++) sums[v] += d[r] * load(a + r * block + v * kLanes);
  for (int v = 0; v < kVectors; v++) store(to + v * kLanes, sums[v]);
}

FLORA_CALLED void expand(float* to, const float* x, float keep, const float* d, const float* sketch_RB, int64_t block,
                         int64_t rank) {
  constexpr int kMany = 64 / FLORA_LANES;
  int64_t b = 0;
  for (; b + kMany * kLanes <= block; b += kMany * kLanes)
    expand_some<kMany>(to + b, x + b, keep, d, sketch_RB + b, block, rank);
  for (; b + kLanes <= block; b += kLanes) expand_some<1>(to + b, x + b, keep, d, sketch_RB + b, block, rank);
  for (; b < block; b++) {
    float sum = keep * x[b];
    for (int64_t r = 0; r < rank; r++) sum += d[r] * sketch_RB[r * block + b];
    to[b] = sum;
  }
}

// to = d A alone; what stands there counts for nothing, whatever it is.
FLORA_CALLED void expand_new(float* to, const float* d, const float* sketch_RB, int64_t block, int64_t rank) {
  memset(to, 0, sizeof(float) * block);
  expand(to, to, 0.0f, d, sketch_RB, block, rank);
}

}  // namespace
}  // namespace flora
