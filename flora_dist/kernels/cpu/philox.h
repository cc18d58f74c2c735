// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011), bit for bit as flora_dist/sketch/philox.py, which says what the counter
// holds; and what is rounded with its bits.
#pragma once
#include "plan.h"
#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace flora {
namespace {

constexpr int kIntegersPerCounter = 8;

// 32-bit words in 64-bit lanes: what a product of two words needs.
#if defined(__AVX512F__)
constexpr int kWideLanes = 8;
#else
constexpr int kWideLanes = FLORA_LANES / 2;
#endif
typedef uint64_t Wide __attribute__((vector_size(8 * kWideLanes)));
constexpr int kMostSets = 4;  // so that one's products hide the others' latency

// Of the low words: compilers do not make it out of the plain product.
FLORA_INLINE Wide low_product(Wide a, Wide b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

#if defined(__AVX512F__)
#define FLORA_PLACES 0, 1, 2, 3, 4, 5, 6, 7
#define FLORA_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FLORA_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif FLORA_LANES == 8
#define FLORA_PLACES 0, 1, 2, 3
#define FLORA_LOW 0, 4, 1, 5
#define FLORA_HIGH 2, 6, 3, 7
#else
#define FLORA_PLACES 0, 1
#define FLORA_LOW 0, 2
#define FLORA_HIGH 1, 3
#endif
FLORA_INLINE Wide interleaved_low(Wide a, Wide b) { return FLORA_SHUFFLE(Wide, a, b, FLORA_LOW); }
FLORA_INLINE Wide interleaved_high(Wide a, Wide b) { return FLORA_SHUFFLE(Wide, a, b, FLORA_HIGH); }

// The key of each round, in every lane.
struct RoundKeys {
  Wide first[10], second[10];

  FLORA_INLINE RoundKeys of(uint64_t key) {
    RoundKeys keys;
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; round++) {
      keys.first[round] = Wide{} + static_cast<uint64_t>(k0);
      keys.second[round] = Wide{} + static_cast<uint64_t>(k1);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return keys;
  }
};

// Four words for each of some consecutive counters, counter after counter, by so many vectors at a time; returns how
// many it has done.
template <int kSets>
FLORA_CALLED int64_t philox_some(const RoundKeys& keys, uint64_t first, int64_t count, uint32_t stream,
                                 uint32_t* words) {
  constexpr int64_t kMany = kSets * kWideLanes;
  const Wide low = Wide{} + 0xFFFFFFFFu, m0 = Wide{} + 0xD2511F53u, m1 = Wide{} + 0xCD9E8D57u;
  int64_t i = 0;
  for (; i + kMany <= count; i += kMany, words += 4 * kMany) {
    Wide x0[kSets], x1[kSets], x2[kSets], x3[kSets];
#pragma GCC unroll 4
    for (int s = 0; s < kSets; s++) {
      x0[s] = Wide{FLORA_PLACES} + (first + i + s * kWideLanes);
      x1[s] = x0[s] >> 32;
      x2[s] = Wide{} + stream;
      x3[s] = Wide{};
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++)
      // The upper halves of x0 to x3 hold anything: only a product's low half and what is shifted down are read.
#pragma GCC unroll 4
      for (int s = 0; s < kSets; s++) {
        const Wide p0 = low_product(x0[s], m0), p1 = low_product(x2[s], m1);
        x0[s] = (p1 >> 32) ^ (x1[s] ^ keys.first[round]);
        x1[s] = p1;
        x2[s] = (p0 >> 32) ^ (x3[s] ^ keys.second[round]);
        x3[s] = p0;
      }
#pragma GCC unroll 4
    for (int s = 0; s < kSets; s++) {
      const Wide head = (x0[s] & low) | (x1[s] << 32), tail = (x2[s] & low) | (x3[s] << 32);
      const Wide pairs[2] = {interleaved_low(head, tail), interleaved_high(head, tail)};
      memcpy(words + 4 * s * kWideLanes, pairs, sizeof pairs);
    }
  }
  return i;
}

FLORA_CALLED void philox(uint64_t key, uint64_t first, int64_t count, uint32_t stream, uint32_t* words) {
  const RoundKeys keys = RoundKeys::of(key);
  int64_t i = philox_some<kMostSets>(keys, first, count, stream, words);
  i += philox_some<1>(keys, first + i, count - i, stream, words + 4 * i);
  if (i == count) return;
  uint32_t last[4 * kWideLanes];
  philox_some<1>(keys, first + i, kWideLanes, stream, last);
  memcpy(words + 4 * i, last, 16 * (count - i));
}

// Writes values to 16-bit floats, in the place of their grid that decides their random bits.
struct Rounding {
  int64_t dtype;
  bool is_stochastic;
  uint64_t key;
  int64_t num_columns;  // of the grid

  // `count` values of a line, from a column on; at most kChunk of them.
  FLORA_CALLED void write(const Rounding& r, uint16_t* to, const float* from, int64_t count, int64_t line,
                          int64_t column) {
    if (!r.is_stochastic) {
      if (r.dtype == kBFloat16)
        for (int64_t j = 0; j < count; j++) to[j] = to_bf16_nearest(from[j]);
      else
        for (int64_t j = 0; j < count; j++) to[j] = to_fp16_nearest(from[j]);
      return;
    }
    const int64_t per_line = (r.num_columns + kIntegersPerCounter - 1) / kIntegersPerCounter;
    const int64_t first = column / kIntegersPerCounter;
    const int64_t counters = (column + count + kIntegersPerCounter - 1) / kIntegersPerCounter - first;
    uint32_t words[4 * (kChunk / kIntegersPerCounter + 2)];
    philox(r.key, static_cast<uint64_t>(line * per_line + first), counters, 0, words);
    // The low half of a word comes first: so it lies on little-endian machines, which are all that are built for.
    uint16_t bits[kChunk + 16];
    memcpy(bits, words, 16 * counters);
    const uint16_t* u = bits + (column - first * kIntegersPerCounter);
    if (r.dtype == kBFloat16)
      for (int64_t j = 0; j < count; j++) to[j] = to_bf16_stochastic(from[j], u[j]);
    else
      for (int64_t j = 0; j < count; j++) to[j] = to_fp16_stochastic(from[j], u[j]);
  }
};

FLORA_CALLED void widen(float* to, const uint16_t* from, int64_t dtype, int64_t count) {
  if (dtype == kBFloat16)
    for (int64_t j = 0; j < count; j++) to[j] = from_bf16(from[j]);
  else
    for (int64_t j = 0; j < count; j++) to[j] = from_fp16(from[j]);
}

}  // namespace
}  // namespace flora
