// SPDX-License-Identifier: Apache-2.0
// Products with rows of a Hadamard matrix by half a fast transform: sums and differences over a block's vectors,
// then the chosen rows' signs over the lanes. At 8 of 64 that is a third of the plain product's work.
//
//     A[r][b] = s H[i_r][b] sign[b],   b = v L + l:   H[i][b] = H[i / L][v] H[i % L][l]
#pragma once
#include "plan.h"
#include "simd.h"

// L: as wide as there is. On Zen 4, whose 512 bits are two times 256, it is neither faster nor slower than AVX2.
#if defined(__AVX512F__)
#define FLORA_WIDTH 16
#else
#define FLORA_WIDTH FLORA_LANES
#endif

namespace flora {
namespace {

constexpr int64_t kWidth = FLORA_WIDTH;
constexpr int64_t kMostRows = 32, kMostBlock = FLORA_WIDTH == 4 ? 64 : 128;
typedef float Long __attribute__((vector_size(4 * FLORA_WIDTH)));
typedef float LongAnywhere __attribute__((vector_size(4 * FLORA_WIDTH), aligned(4)));
typedef int32_t LongLanes __attribute__((vector_size(4 * FLORA_WIDTH)));

FLORA_INLINE Long load_long(const float* p) { return *reinterpret_cast<const LongAnywhere*>(p); }
FLORA_INLINE void store_long(float* p, Long v) { *reinterpret_cast<LongAnywhere*>(p) = v; }

#if FLORA_WIDTH == 16
FLORA_INLINE Long rounded(Long v) { __asm__("" : "+v"(v)); return v; }
#endif

// Whether there are fast products for these sizes.
FLORA_INLINE bool has_fast_product(int64_t block, int64_t rank) {
  const bool is_power = block == 16 || block == 32 || block == 64 || block == 128;
  return is_power && block <= kMostBlock && up(rank, 8) <= kMostRows;
}

// by_block(block, [&](auto own) { some_fast<own.value>(...); }): the elements of a block as a constant.
template <int kValue>
struct Count {
  static constexpr int value = kValue;
};
template <class Body>
FLORA_INLINE void by_block(int64_t block, const Body& body) {
  switch (block) {
    case 16: return body(Count<16>{});
    case 32: return body(Count<32>{});
#if FLORA_WIDTH > 4
    case 128: return body(Count<128>{});
#endif
    default: return body(Count<64>{});
  }
}

struct Hadamard {
  int64_t block;
  int64_t padded;                         // rows, up to a multiple of 8
  alignas(64) float sign[kMostBlock];
  alignas(64) float lanes[kMostRows * kWidth];        // H[i % L]; 0 beyond the rank
  float scale;                            // s
  int32_t vector_of[kMostRows];           // i / L, times L
  int32_t order[kMostRows];               // rows by i / L
  int32_t first[kMostBlock / kWidth + 1]; // where in `order` those of each i / L begin

  // From A (R, B) itself. Its row 0 is taken for that of ones: any i can be shifted into the signs.
  FLORA_CALLED void read(Hadamard& h, const float* sketch_RB, int64_t block, int64_t rank) {
    const int64_t vectors = block / kWidth;
    h.block = block;
    h.padded = up(rank, 8);
    h.scale = sketch_RB[0] < 0 ? -sketch_RB[0] : sketch_RB[0];
    for (int64_t b = 0; b < block; b++) h.sign[b] = sketch_RB[b] < 0 ? -1.0f : 1.0f;
    for (int64_t r = 0; r < h.padded; r++) {
      int32_t high = 0;
      for (int64_t v = 1; v < vectors && r < rank; v *= 2)
        if (sketch_RB[r * block + v * kWidth] * h.sign[v * kWidth] < 0) high += static_cast<int32_t>(v);
      h.vector_of[r] = high * static_cast<int32_t>(kWidth);
      for (int64_t l = 0; l < kWidth; l++)
        h.lanes[r * kWidth + l] = r >= rank ? 0.0f : sketch_RB[r * block + l] * h.sign[l] < 0 ? -1.0f : 1.0f;
    }
    int32_t at = 0;
    for (int64_t v = 0; v < vectors; v++) {
      h.first[v] = at;
      for (int32_t r = 0; r < rank; r++)
        if (h.vector_of[r] == v * kWidth) h.order[at++] = r;
    }
    h.first[vectors] = at;
  }
};

template <int kVectors>
FLORA_INLINE void transform(Long* y) {
#pragma GCC unroll 16
  for (int step = 1; step < kVectors; step *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      if (i & step) continue;
      const Long a = y[i], b = y[i + step];
      y[i] = a + b;
      y[i + step] = a - b;
    }
}

// The sums over the lanes of eight vectors: first within 128 bits, where shuffles are cheap, then across.
FLORA_INLINE Eight lane_sums(const Long* t) {
#if FLORA_WIDTH == 16
  Long pairs[4], fours[2];
  for (int i = 0; i < 4; i++) {
    const Long a = t[2 * i], b = t[2 * i + 1];
    pairs[i] = FLORA_SHUFFLE(LongLanes, a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               FLORA_SHUFFLE(LongLanes, a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; i++) {
    const Long a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = FLORA_SHUFFLE(LongLanes, a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
               FLORA_SHUFFLE(LongLanes, a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  }
  const Long halves =
      FLORA_SHUFFLE(LongLanes, fours[0], fours[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
      FLORA_SHUFFLE(LongLanes, fours[0], fours[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const Long sums = FLORA_SHUFFLE(LongLanes, halves, halves, 0, 1, 2, 3, 8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11) +
                    FLORA_SHUFFLE(LongLanes, halves, halves, 4, 5, 6, 7, 12, 13, 14, 15, 4, 5, 6, 7, 12, 13, 14, 15);
  Eight out;
  memcpy(&out, &sums, sizeof out);
  return out;
#elif FLORA_WIDTH == 8
  Long pairs[4], fours[2];
  for (int i = 0; i < 4; i++)
    pairs[i] = FLORA_SHUFFLE(LongLanes, t[2 * i], t[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               FLORA_SHUFFLE(LongLanes, t[2 * i], t[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 2; i++) {
    const Long a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = FLORA_SHUFFLE(LongLanes, a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
               FLORA_SHUFFLE(LongLanes, a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  }
  return FLORA_SHUFFLE(LongLanes, fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         FLORA_SHUFFLE(LongLanes, fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  Long sums[2];
  for (int i = 0; i < 2; i++) {
    const Long* q = t + 4 * i;
    const Long ab = FLORA_SHUFFLE(LongLanes, q[0], q[1], 0, 1, 4, 5) + FLORA_SHUFFLE(LongLanes, q[0], q[1], 2, 3, 6, 7);
    const Long cd = FLORA_SHUFFLE(LongLanes, q[2], q[3], 0, 1, 4, 5) + FLORA_SHUFFLE(LongLanes, q[2], q[3], 2, 3, 6, 7);
    sums[i] = FLORA_SHUFFLE(LongLanes, ab, cd, 0, 2, 4, 6) + FLORA_SHUFFLE(LongLanes, ab, cd, 1, 3, 5, 7);
  }
  Eight out;
  memcpy(&out, sums, sizeof out);
  return out;
#endif
}

// y A^T comes in two steps, some blocks at a time. What the first one stores the second one reads at places that only A
// knows, and such a load waits where the store is still under way. Here, the transform of a block.
template <int kBlock>
FLORA_INLINE void store_transform(float* to, Long* y) {
  constexpr int kVectors = kBlock / kWidth;
  transform<kVectors>(y);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v++) store_long(to + v * kWidth, y[v]);
}

// And the sums over lanes of some transformed blocks: eight numbers of a block are handed to `take` at a time. They are
// scaled last, so that what cancels leaves nothing: rules with two moments divide by such numbers.
template <int kBlock, class Take>
FLORA_INLINE void sum_rows(const float* transformed, int64_t blocks, const Hadamard& h, const Take& take) {
  for (int64_t r = 0; r < h.padded; r += 8) {
    int64_t at[8];
    for (int i = 0; i < 8; i++) at[i] = h.vector_of[r + i];
    const float* lanes = h.lanes + r * kWidth;
    for (int64_t b = 0; b < blocks; b++) {
      Long t[8];
      for (int i = 0; i < 8; i++) t[i] = load_long(transformed + b * kBlock + at[i]) * load_long(lanes + i * kWidth);
      take(b, r, h.scale * lane_sums(t));
    }
  }
}

// Blocks that go through these steps together: their numbers stay in the first-level cache.
template <int kBlock>
constexpr int64_t kGroup = kChunk / kBlock;

// c = x A^T of some blocks.
template <int kBlock>
FLORA_CALLED void compress_fast(float* c, const float* x, int64_t blocks, const Hadamard& h) {
  alignas(64) float transformed[kChunk];
  for (int64_t start = 0; start < blocks; start += kGroup<kBlock>) {
    const int64_t count = smaller(kGroup<kBlock>, blocks - start);
    for (int64_t k = 0; k < count; k++, x += kBlock) {
      Long y[kBlock / kWidth];
      for (int v = 0; v < kBlock / kWidth; v++) y[v] = load_long(x + v * kWidth) * load_long(h.sign + v * kWidth);
      store_transform<kBlock>(transformed + k * kBlock, y);
    }
    float* to = c + start * h.padded;
    sum_rows<kBlock>(transformed, count, h, [&](int64_t k, int64_t r, Eight sums) {
      store8(to + k * h.padded + r, sums);
    });
  }
}

// d A comes in two steps too. Here each row's number times its lanes, added at its place; blocks side by side share
// what is read of A and the loops over its rows, which cost more than the sums.
template <int kBlock, int kBlocks>
FLORA_INLINE void place_some(float* to, const float* d, const Hadamard& h) {
  for (int v = 0; v < kBlock / kWidth; v++) {
    Long sums[kBlocks] = {};
    for (int32_t i = h.first[v]; i < h.first[v + 1]; i++) {
      const int32_t r = h.order[i];
      const Long lanes = load_long(h.lanes + r * kWidth);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; b++) sums[b] += d[b * h.padded + r] * lanes;
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; b++) store_long(to + b * kBlock + v * kWidth, h.scale * sums[b]);
  }
}

template <int kBlock>
FLORA_INLINE void place_rows(float* to, const float* d, int64_t blocks, const Hadamard& h) {
  constexpr int kMany = kGroup<kBlock> < 8 ? kGroup<kBlock> : 8;
  int64_t b = 0;
  for (; b + kMany <= blocks; b += kMany) place_some<kBlock, kMany>(to + b * kBlock, d + b * h.padded, h);
  for (; b + 2 <= blocks; b += 2) place_some<kBlock, 2>(to + b * kBlock, d + b * h.padded, h);
  for (; b < blocks; b++) place_some<kBlock, 1>(to + b * kBlock, d + b * h.padded, h);
}

// And a block's transform, which leaves it without its signs.
template <int kBlock>
FLORA_INLINE void load_transform(Long* e, const float* placed) {
#pragma GCC unroll 16
  for (int v = 0; v < kBlock / kWidth; v++) e[v] = load_long(placed + v * kWidth);
  transform<kBlock / kWidth>(e);
}

// x <- keep x + d A of some blocks.
template <int kBlock>
FLORA_CALLED void add_expanded_fast(float* x, float keep, const float* d, int64_t blocks, const Hadamard& h) {
  alignas(64) float placed[kChunk];
  for (int64_t start = 0; start < blocks; start += kGroup<kBlock>) {
    const int64_t count = smaller(kGroup<kBlock>, blocks - start);
    place_rows<kBlock>(placed, d + start * h.padded, count, h);
    for (int64_t k = 0; k < count; k++, x += kBlock) {
      Long e[kBlock / kWidth];
      load_transform<kBlock>(e, placed + k * kBlock);
      for (int v = 0; v < kBlock / kWidth; v++)
        store_long(x + v * kWidth, keep * load_long(x + v * kWidth) + e[v] * load_long(h.sign + v * kWidth));
    }
  }
}

}  // namespace
}  // namespace flora
