// SPDX-License-Identifier: Apache-2.0
// Products with any rows of a Hadamard matrix by a whole fast transform of a block: where most rows are kept, as in
// few bits, choosing among all of its numbers costs less than making some. Sums and differences alone: every
// instruction set has the same bits.
//
//     A[r][b] = s H[i_r][b] sign[b];   a row of A is known by the signs at powers of two.
#pragma once
#include "hadamard.h"
#include "philox.h"
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

struct Rotation {
  int64_t block, rank;
  float scale;           // s
  float* sign;           // (B)
  float* numbers;        // (blocks that are in work together, B): between transform and choice
  int32_t* rows;         // (R): i_r
  int32_t* places;       // (B): r of each i_r

  // From A (R, B) itself. Its row 0 is taken for that of ones: any i can be shifted into the signs.
  FLORA_CALLED void read(Rotation& o, const float* sketch_RB, int64_t block, int64_t rank, float* scratch) {
    o.block = block, o.rank = rank, o.scale = __builtin_fabsf(sketch_RB[0]);
    o.sign = scratch;
    o.numbers = o.sign + up(block, 16);
    o.rows = reinterpret_cast<int32_t*>(o.numbers + up(larger(block, kChunk), 16));
    o.places = o.rows + up(rank, 16);
    for (int64_t b = 0; b < block; b++) o.sign[b] = sketch_RB[b] < 0 ? -1.0f : 1.0f;
    for (int64_t r = 0; r < rank; r++) {
      int32_t row = 0;
      for (int64_t b = 1; b < block; b *= 2)
        if (sketch_RB[r * block + b] * o.sign[b] < 0) row += static_cast<int32_t>(b);
      o.rows[r] = row;
      o.places[row] = static_cast<int32_t>(r);
    }
  }
};

// Distances 4, 2 and 1 within eight numbers.
FLORA_INLINE Eight transform_within(Eight v) {
  constexpr Eight first = {1, 1, 1, 1, -1, -1, -1, -1}, second = {1, 1, -1, -1, 1, 1, -1, -1},
                  third = {1, -1, 1, -1, 1, -1, 1, -1};
  v = FLORA_SHUFFLE(EightLanes, v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * first;
  v = FLORA_SHUFFLE(EightLanes, v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * second;
  return FLORA_SHUFFLE(EightLanes, v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * third;
}

// s H diag(sign) x of a block of 8 kVectors numbers; kBack: diag(sign) H s x.
template <int kVectors, bool kBack>
FLORA_INLINE void transform_some(float* to, const float* x, const float* sign, float scale) {
  Eight y[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v++) y[v] = load8(x + 8 * v) * (kBack ? scale - Eight{} : load8(sign + 8 * v));
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
    store8(to + 8 * v, done * (kBack ? load8(sign + 8 * v) : scale - Eight{}));
  }
}

// The same of any power of two.
template <bool kBack>
FLORA_CALLED void transform_any(float* to, const float* x, const float* sign, float scale, int64_t block) {
  for (int64_t b = 0; b < block; b++) to[b] = x[b] * (kBack ? scale : sign[b]);
  const int64_t least = block < 8 ? 1 : 8;
  for (int64_t step = block / 2; step >= least; step /= 2)
    for (int64_t start = 0; start < block; start += 2 * step)
      for (int64_t b = start; b < start + step; b++) {
        const float first = to[b], second = to[b + step];
        to[b] = first + second;
        to[b + step] = first - second;
      }
  for (int64_t b = 0; b + 8 <= block; b += 8) store8(to + b, transform_within(load8(to + b)));
  for (int64_t b = 0; b < block; b++) to[b] *= kBack ? sign[b] : scale;
}

// Of some blocks.
template <bool kBack>
FLORA_INLINE void transform_blocks(const Rotation& o, float* to, const float* x, int64_t blocks) {
  const int64_t block = o.block;
  for (int64_t k = 0; k < blocks; k++, to += block, x += block) switch (block) {
      case 16: transform_some<2, kBack>(to, x, o.sign, o.scale); break;
      case 32: transform_some<4, kBack>(to, x, o.sign, o.scale); break;
      case 64: transform_some<8, kBack>(to, x, o.sign, o.scale); break;
      case 128: transform_some<16, kBack>(to, x, o.sign, o.scale); break;
      default: transform_any<kBack>(to, x, o.sign, o.scale, block);
    }
}

// to[r] = from[at[r]] of a block. By integers: CPUs store two of these at a time, and one float.
FLORA_INLINE void gather(float* to, const float* from, const int32_t* at, int64_t count) {
#pragma GCC unroll 8
  for (int64_t r = 0; r < count; r++) {
    uint32_t bits;
    memcpy(&bits, from + at[r], sizeof bits);
    memcpy(to + r, &bits, sizeof bits);
  }
}

// The same in any order of a block of 64, as most are.
FLORA_INLINE void gather_64(float* to, const float* from, const int32_t* at) {
#if defined(__AVX512F__)
  const Long a = load_long(from), b = load_long(from + 16), c = load_long(from + 32), d = load_long(from + 48);
  for (int r = 0; r < 64; r += 16) {
    LongLanes own;
    memcpy(&own, at + r, sizeof own);
    const Long low = (Long)_mm512_permutex2var_ps((__m512)a, (__m512i)own, (__m512)b);
    const Long high = (Long)_mm512_permutex2var_ps((__m512)c, (__m512i)own, (__m512)d);
    store_long(to + r, own > 31 ? high : low);
  }
#else
  gather(to, from, at, 64);
#endif
}

// c = x A^T of some blocks, whose numbers stand so far apart.
FLORA_CALLED void rotate(const Rotation& o, float* c, const float* x, int64_t blocks, int64_t apart) {
  const int64_t block = o.block, rank = o.rank;
  const float* from = o.numbers;
  transform_blocks<false>(o, o.numbers, x, blocks);
  for (int64_t k = 0; k < blocks; k++, c += apart, from += block)
    if (block == 64 && rank == 64)
      gather_64(c, from, o.rows);
    else
      gather(c, from, o.rows, rank);
}

// x = c A of some blocks.
FLORA_CALLED void rotate_back(const Rotation& o, float* x, const float* c, int64_t blocks, int64_t apart) {
  const int64_t block = o.block, rank = o.rank;
  float* to = o.numbers;
  if (rank < block) memset(to, 0, sizeof(float) * blocks * block);
  for (int64_t k = 0; k < blocks; k++, c += apart, to += block)
    if (block == 64 && rank == 64)
      gather_64(to, c, o.places);
    else
      for (int64_t r = 0; r < rank; r++) to[o.rows[r]] = c[r];
  transform_blocks<true>(o, x, o.numbers, blocks);
}

}  // namespace
}  // namespace flora
