// SPDX-License-Identifier: Apache-2.0
// Products with any rows of a Hadamard matrix by a whole fast transform of a block: where most rows are kept, as in
// few bits, choosing among all of its numbers costs less than making some. Sums and differences alone: every
// instruction set has the same bits.
//
//     A[r][b] = s H[i_r][b] sign[b];   a row of A is known by the signs at powers of two.
#pragma once
#include "hadamard.h"
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

struct Rotation {
  int64_t block, rank;
  float scale;           // s
  float* sign;           // (B)
  float* numbers;        // (B): a block between transform and choice
  int32_t* rows;         // (R): i_r

  // From A (R, B) itself. Its row 0 is taken for that of ones: any i can be shifted into the signs.
  FLORA_CALLED void read(Rotation& o, const float* sketch_RB, int64_t block, int64_t rank, float* scratch) {
    o.block = block, o.rank = rank, o.scale = __builtin_fabsf(sketch_RB[0]);
    o.sign = scratch;
    o.numbers = o.sign + up(block, 16);
    o.rows = reinterpret_cast<int32_t*>(o.numbers + up(block, 16));
    for (int64_t b = 0; b < block; b++) o.sign[b] = sketch_RB[b] < 0 ? -1.0f : 1.0f;
    for (int64_t r = 0; r < rank; r++) {
      int32_t row = 0;
      for (int64_t b = 1; b < block; b *= 2)
        if (sketch_RB[r * block + b] * o.sign[b] < 0) row += static_cast<int32_t>(b);
      o.rows[r] = row;
    }
  }
};

// Distances 4, 2 and 1 within eight numbers.
FLORA_INLINE Eight transform_within(Eight v) {
  constexpr Eight first = {1, 1, 1, 1, -1, -1, -1, -1}, second = {1, 1, -1, -1, 1, 1, -1, -1},
                  third = {1, -1, 1, -1, 1, -1, 1, -1};
  typedef int32_t EightLanes __attribute__((vector_size(32)));
  v = FLORA_SHUFFLE(EightLanes, v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * first;
  v = FLORA_SHUFFLE(EightLanes, v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * second;
  return FLORA_SHUFFLE(EightLanes, v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * third;
}

// H diag(sign) x of a block of 8 kVectors numbers; kBack: diag(sign) H x.
template <int kVectors, bool kBack>
FLORA_INLINE void transform_some(float* to, const float* x, const float* sign) {
  Eight y[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v++) y[v] = kBack ? load8(x + 8 * v) : load8(x + 8 * v) * load8(sign + 8 * v);
#pragma GCC unroll 16
  for (int step = kVectors / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      if (i & step) continue;
      const Eight a = y[i], b = y[i + step];
      y[i] = a + b;
      y[i + step] = a - b;
    }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v++) {
    const Eight done = transform_within(y[v]);
    store8(to + 8 * v, kBack ? done * load8(sign + 8 * v) : done);
  }
}

// The same of any power of two.
template <bool kBack>
FLORA_CALLED void transform_any(float* to, const float* x, const float* sign, int64_t block) {
  for (int64_t b = 0; b < block; b++) to[b] = kBack ? x[b] : x[b] * sign[b];
  const int64_t least = block < 8 ? 1 : 8;
  for (int64_t step = block / 2; step >= least; step /= 2)
    for (int64_t start = 0; start < block; start += 2 * step)
      for (int64_t b = start; b < start + step; b++) {
        const float first = to[b], second = to[b + step];
        to[b] = first + second;
        to[b + step] = first - second;
      }
  for (int64_t b = 0; b + 8 <= block; b += 8) store8(to + b, transform_within(load8(to + b)));
  for (int64_t b = 0; kBack && b < block; b++) to[b] *= sign[b];
}

template <bool kBack>
FLORA_INLINE void transform_block(float* to, const float* x, const float* sign, int64_t block) {
  switch (block) {
    case 16: return transform_some<2, kBack>(to, x, sign);
    case 32: return transform_some<4, kBack>(to, x, sign);
    case 64: return transform_some<8, kBack>(to, x, sign);
    case 128: return transform_some<16, kBack>(to, x, sign);
    default: return transform_any<kBack>(to, x, sign, block);
  }
}

// c = x A^T of one block.
FLORA_INLINE void rotate(const Rotation& o, float* c, const float* x) {
  transform_block<false>(o.numbers, x, o.sign, o.block);
  for (int64_t r = 0; r < o.rank; r++) c[r] = o.numbers[o.rows[r]] * o.scale;
}

// x = c A of one block.
FLORA_INLINE void rotate_back(const Rotation& o, float* x, const float* c) {
  if (o.rank < o.block) memset(o.numbers, 0, sizeof(float) * o.block);
  for (int64_t r = 0; r < o.rank; r++) o.numbers[o.rows[r]] = c[r] * o.scale;
  transform_block<true>(x, o.numbers, o.sign, o.block);
}

}  // namespace
}  // namespace flora
