// SPDX-License-Identifier: Apache-2.0
// Codes of numbers in octets: what a record's stand for, and octets made of codes.
#pragma once
#include "plan.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flora {
namespace {

typedef int32_t VecLanes __attribute__((vector_size(4 * FLORA_LANES)));
typedef uint8_t VecOctets __attribute__((vector_size(4 * FLORA_LANES)));
typedef int64_t VecPairs __attribute__((vector_size(4 * FLORA_LANES)));

FLORA_INLINE VecLanes lanes_of(Vec v) { return (VecLanes)v; }

// table[index] of eight numbers, in each lane.
FLORA_INLINE Vec pick(const float* table, VecLanes index) {
#if defined(__AVX2__)
  return (Vec)_mm256_permutevar8x32_ps((__m256)load(table), (__m256i)index);
#else
  Vec found;
  for (int l = 0; l < kLanes; l++) found[l] = table[index[l]];
  return found;
#endif
}

// Values of some octets, from a table that has those of each, times a size.
template <int kPerOctet>
FLORA_INLINE void look_up(float* to, const uint8_t* octets, int64_t count, const float* table, float size) {
  constexpr int kTogether = kPerOctet < kLanes ? kLanes / kPerOctet : 1;
  int64_t i = 0;
  if constexpr (kPerOctet >= kLanes) {
    for (; i < count; i++)
      for (int h = 0; h < kPerOctet; h += kLanes)
        store(to + i * kPerOctet + h, load(table + octets[i] * kPerOctet + h) * spread(size));
  } else {
    for (; i + kTogether <= count; i += kTogether) {
      VecPairs values;  // two numbers each
#pragma GCC unroll 4
      for (int pair = 0; pair < kLanes / 2; pair++) {
        const int octet = 2 * pair / kPerOctet;
        int64_t own;
        memcpy(&own, table + octets[i + octet] * kPerOctet + (2 * pair - octet * kPerOctet), sizeof own);
        values[pair] = own;
      }
      store(to + i * kPerOctet, (Vec)values * spread(size));
    }
    for (; i < count; i++)
      for (int n = 0; n < kPerOctet; n++) to[i * kPerOctet + n] = table[octets[i] * kPerOctet + n] * size;
  }
}

// The value of an octet k at 8 bits, (2 k - 255) / 255, times a size. The first product is exact and the second's
// error far below what a rounding of the sum could notice: it is the quotient as float32.
FLORA_INLINE void read_octets(float* to, const uint8_t* octets, int64_t count, float size) {
  constexpr float kCoarse = 0x1.01p-8f, kFine = static_cast<float>(1.0 / 255 - 0x1.01p-8);
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; i++) {
    const float odd = static_cast<float>(2 * octets[i] - 255);
    to[i] = (odd * kCoarse + odd * kFine) * size;
  }
}

// What records of so many octets stand for, blocks so far apart; 0: as many as the code says.
template <int kPerOctet, int kOctets>
FLORA_INLINE void read_some(const Code& given, float* to, const uint8_t* from, int64_t blocks, int64_t apart) {
  const Code code = given;  // a copy that no store can reach
  const int64_t octets = kOctets == 0 ? code.octets : kOctets;
  for (int64_t k = 0; k < blocks; k++, to += apart, from += code.bytes) {
    uint16_t half;
    memcpy(&half, from + octets, 2);
    const float scale = from_bf16(half), size = __builtin_fabsf(scale);
    // Levels stand in the second half of the table.
    if constexpr (kPerOctet == 1)
      read_octets(to, from, octets, size);
    else
      look_up<kPerOctet>(to, from, octets, code.table + (scale < 0 ? 256 * code.per_octet : 0), size);
  }
}

// Numbers that most blocks have are constants to the compiler.
template <int kPerOctet>
FLORA_INLINE void read_blocks(const Code& code, float* to, const uint8_t* from, int64_t blocks, int64_t apart) {
  if (code.numbers == 64) return read_some<kPerOctet, 64 / kPerOctet>(code, to, from, blocks, apart);
  if (code.numbers == 16) return read_some<kPerOctet, 16 / kPerOctet>(code, to, from, blocks, apart);
  return read_some<kPerOctet, 0>(code, to, from, blocks, apart);
}

// What records stand for, blocks so far apart; writes up to eight numbers more.
FLORA_CALLED void read_records(const Code& code, float* to, const uint8_t* from, int64_t blocks, int64_t apart) {
  switch (code.bits) {
    case 8: return read_blocks<1>(code, to, from, blocks, apart);
    case 4: return read_blocks<2>(code, to, from, blocks, apart);
    case 2: return read_blocks<4>(code, to, from, blocks, apart);
    case 1: return read_blocks<8>(code, to, from, blocks, apart);
  }
  for (int64_t k = 0; k < blocks; k++)
    for (int64_t i = 0; i < code.numbers; i++) {
      uint16_t half;
      memcpy(&half, from + k * code.bytes + 2 * i, 2);
      to[k * apart + i] = from_bf16(half);
    }
}

// Codes as octets.
FLORA_INLINE void store_codes(uint8_t* to, VecLanes codes) {
#if FLORA_LANES == 8
  // Of a conversion of vectors GCC makes one element after the other.
  const VecOctets all = (VecOctets)codes;
  const VecOctets lowest = FLORA_SHUFFLE(VecOctets, all, all, 0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28,
                                         0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
#else
  typedef uint8_t Lowest __attribute__((vector_size(FLORA_LANES)));
  const Lowest lowest = __builtin_convertvector(codes, Lowest);
#endif
  memcpy(to, &lowest, kLanes);
}

// Several codes in an octet, the first lowest.
template <class Word, int kBits>
FLORA_INLINE void pack_some(uint8_t* to, const uint8_t* codes, int64_t octets) {
  for (int64_t i = 0; i < octets; i++) {
    Word word;
    memcpy(&word, codes + i * sizeof(Word), sizeof(Word));
    for (size_t half = sizeof(Word) / 2; half > 0; half /= 2) word |= word >> half * (8 - kBits);
    to[i] = static_cast<uint8_t>(word);
  }
}

// Octets of a multiple of eight codes, and where they stand.
FLORA_INLINE const uint8_t* pack(int64_t bits, uint8_t* to, const uint8_t* codes, int64_t count) {
  switch (bits) {
    case 8: return codes;
    case 4: pack_some<uint16_t, 4>(to, codes, count / 2); break;
    case 2: pack_some<uint32_t, 2>(to, codes, count / 4); break;
    default: pack_some<uint64_t, 1>(to, codes, count / 8);
  }
  return to;
}

// A call for so few would cost more.
FLORA_INLINE void copy_octets(uint8_t* to, const uint8_t* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) memcpy(to + i, from + i, 8);
  for (; i < count; i++) to[i] = from[i];
}

}  // namespace
}  // namespace flora
