// SPDX-License-Identifier: Apache-2.0
// The numbers of a block in few bits: flora_dist/core/sketch/quantise.py has the formulas and says what a record is.
// Every product that a sum follows is rounded by itself, and a block is summed in halves: the bits are torch's.
#pragma once
#include "philox.h"
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

typedef int32_t VecLanes __attribute__((vector_size(4 * FLORA_LANES)));
typedef uint16_t VecShorts __attribute__((vector_size(2 * FLORA_LANES)));
typedef uint8_t VecOctets __attribute__((vector_size(FLORA_LANES)));

FLORA_INLINE VecLanes lanes_of(Vec v) { return (VecLanes)v; }

template <int kPerOctet>
FLORA_INLINE void look_up(float* to, const uint8_t* octets, int64_t count, const float* table) {
  for (int64_t i = 0; i < count; i++) memcpy(to + i * kPerOctet, table + octets[i] * kPerOctet, 4 * kPerOctet);
}

// What a record stands for; writes up to eight numbers more.
FLORA_INLINE void read_record(const Code& code, float* to, const uint8_t* from) {
  if (code.bits == 16) {
    for (int64_t i = 0; i < code.numbers; i++) {
      uint16_t half;
      memcpy(&half, from + 2 * i, 2);
      to[i] = from_bf16(half);
    }
    return;
  }
  uint16_t half;
  memcpy(&half, from + code.octets, 2);
  const float scale = from_bf16(half);
  // Levels stand in the second half of the table.
  const float* table = code.table + (scale < 0 ? 256 * code.per_octet : 0);
  switch (code.bits) {
    case 8: look_up<1>(to, from, code.octets, table); break;
    case 4: look_up<2>(to, from, code.octets, table); break;
    case 2: look_up<4>(to, from, code.octets, table); break;
    default: look_up<8>(to, from, code.octets, table);
  }
  const Vec size = spread(__builtin_fabsf(scale));
  for (int64_t i = 0; i < code.numbers; i += kLanes) store(to + i, load(to + i) * size);
}

// |x| of the largest, as its bits: those of NaN are above those of infinity.
FLORA_INLINE uint32_t largest_bits(const float* x, int64_t room) {
  VecLanes largest = {};
  for (int64_t i = 0; i < room; i += kLanes) {
    const VecLanes own = lanes_of(load(x + i)) & 0x7FFFFFFF;
    largest = own > largest ? own : largest;
  }
  int32_t found = 0;
  for (int l = 0; l < kLanes; l++) found = largest[l] > found ? largest[l] : found;
  return static_cast<uint32_t>(found);
}

// The sum of a power of two of numbers, halves on halves; they are overwritten.
FLORA_INLINE float sum_by_halves(float* x, int64_t room) {
  int64_t half = room / 2;
  for (; half >= kLanes; half /= 2)
    for (int64_t i = 0; i < half; i += kLanes) store(x + i, load(x + i) + load(x + half + i));
  for (; half >= 1; half /= 2)
    for (int64_t i = 0; i < half; i++) x[i] += x[half + i];
  return x[0];
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

FLORA_INLINE void write_record(const Code& code, uint8_t* to, uint8_t* codes, uint16_t scale) {
  memset(codes + code.numbers, 0, 8);
  switch (code.bits) {
    case 8: memcpy(to, codes, code.numbers); break;
    case 4: pack_some<uint16_t, 4>(to, codes, code.octets); break;
    case 2: pack_some<uint32_t, 2>(to, codes, code.octets); break;
    default: pack_some<uint64_t, 1>(to, codes, code.octets);
  }
  memcpy(to + code.octets, &scale, 2);
}

FLORA_INLINE void store_codes(uint8_t* to, VecLanes codes) {
  const VecOctets octets = __builtin_convertvector(codes, VecOctets);
  memcpy(to, &octets, sizeof octets);
}

// Zeros after a block's numbers, up to the room: a block before may have left NaN there.
FLORA_INLINE void clear_beyond(const Code& code, float* x) {
  for (int64_t i = code.numbers; i < code.room; i++) x[i] = 0;
}

// y = s (2 k / L - 1), k = floor((x / s + 1) L / 2 + u). `x` is a room.
FLORA_CALLED void round_record(const Code& code, uint8_t* to, float* x, const uint16_t* bits, uint8_t* codes) {
  if (code.bits == 16) {
    for (int64_t i = 0; i < code.numbers; i++) {
      const uint16_t half = to_bf16_stochastic(x[i], bits[i]);
      memcpy(to + 2 * i, &half, 2);
    }
    return;
  }
  clear_beyond(code, x);
  const uint32_t largest = largest_bits(x, code.room);
  // The smallest bfloat16 that is not below: a number above its scale would be cut.
  const uint16_t scale = largest > 0x7F800000u ? 0x7FC0 : static_cast<uint16_t>((largest + 0xFFFF) >> 16);
  const float size = from_bf16(scale);
  const Vec divisor = spread(size == 0 ? 1.0f : size), zero = {};
  const Vec top = spread(static_cast<float>((1 << code.bits) - 1)), half = top * 0.5f;
  for (int64_t i = 0; i < code.numbers; i += kLanes) {
    VecShorts own;
    memcpy(&own, bits + i, sizeof own);
    const Vec u = (__builtin_convertvector(__builtin_convertvector(own, VecLanes), Vec) + 0.5f) * (1.0f / 65536);
    const Vec y = rounded((load(x + i) / divisor + 1.0f) * half) + u;
    const Vec above = y > zero ? y : zero;  // NaN: 0
    store_codes(codes + i, __builtin_convertvector(above < top ? above : top, VecLanes));
  }
  write_record(code, to, codes, scale);
}

// y = s q(x / RMS(x)), q the nearest level, s = |x|^2 / <x, q>. `y` and `products` are rooms.
template <int kHalf>
FLORA_INLINE void level_some(const Code& code, uint8_t* to, float* y, float* products, uint8_t* codes) {
  clear_beyond(code, y);
  const uint32_t bits = largest_bits(y, code.room);
  const float largest = float_of(bits);
  // Over the largest first: squares of small numbers would be zero.
  const Vec divisor = spread(bits == 0 ? 1.0f : largest);
  for (int64_t i = 0; i < code.room; i += kLanes) {
    const Vec own = load(y + i) / divisor;
    store(y + i, own);
    store(products + i, rounded(own * own));
  }
  const float square = sum_by_halves(products, code.room);
  const Vec rms = spread(__builtin_sqrtf(square / code.numbers));
  const float *levels = code.levels + kHalf, *edges = code.edges + kHalf;  // the positive ones
  for (int64_t i = 0; i < code.room; i += kLanes) {
    const Vec own = load(y + i), over = own / rms, zero = {};
    const Vec z = over == over ? over : zero;
    const VecLanes below = z < zero;
    // Magnitudes are compared as integers; one less where an edge itself belongs to the level nearer to zero.
    const VecLanes magnitude = (lanes_of(z) & 0x7FFFFFFF) + below;
    VecLanes steps = {};
    Vec level = spread(levels[0]);
    for (int j = 0; j < kHalf - 1; j++) {
      const VecLanes beyond = magnitude >= static_cast<int32_t>(bits_of(edges[j]));
      steps -= beyond;
      level = beyond ? spread(levels[j + 1]) : level;
    }
    store_codes(codes + i, below ? kHalf - 1 - steps : kHalf + steps);
    store(products + i, rounded((below ? -level : level) * own));
  }
  const float along = sum_by_halves(products, code.room);
  const float scale = largest * (square / (along == 0 ? 1.0f : along));
  write_record(code, to, codes, to_bf16_nearest(scale) ^ 0x8000);
}

FLORA_CALLED void level_record(const Code& code, uint8_t* to, float* y, float* products, uint8_t* codes) {
  switch (code.bits) {
    case 4: return level_some<8>(code, to, y, products, codes);
    case 2: return level_some<2>(code, to, y, products, codes);
    default: return level_some<1>(code, to, y, products, codes);
  }
}

// A thread's buffers for the blocks of a line.
struct RecordRoom {
  float* numbers;     // of a block
  float* others;      // of what is added to them; products
  uint8_t* codes;
  uint16_t* bits;     // of some blocks

  FLORA_INLINE RecordRoom in(float* scratch, const Code& code) {
    const int64_t room = code.room + 16;
    RecordRoom own = {scratch, scratch + room, reinterpret_cast<uint8_t*>(scratch + 2 * room),
                      reinterpret_cast<uint16_t*>(scratch + 3 * room)};
    memset(own.numbers, 0, sizeof(float) * room);
    memset(own.others, 0, sizeof(float) * room);
    return own;
  }
};

// Random bits of some blocks of a line, from block k of those here; returns where they begin.
FLORA_INLINE const uint16_t* draw(const Draws& draws, int64_t line, int64_t k, int64_t blocks, int64_t rank,
                                  uint16_t* bits) {
  const int64_t per_line = (draws.count + kIntegersPerCounter - 1) / kIntegersPerCounter;
  const int64_t column = draws.first + k * rank, first = column / kIntegersPerCounter;
  const int64_t counters = (column + blocks * rank + kIntegersPerCounter - 1) / kIntegersPerCounter - first;
  philox(draws.key, static_cast<uint64_t>(draws.lines[line] * per_line + first), counters, 0,
         reinterpret_cast<uint32_t*>(bits));
  return bits + (column - first * kIntegersPerCounter);
}

// body(k, bits) for each block of a line, with the random bits that round its numbers.
template <class Body>
FLORA_INLINE void each_block(const Draws& draws, int64_t line, int64_t blocks, int64_t rank, bool draws_bits,
                             uint16_t* bits, const Body& body) {
  const int64_t together = rank >= kChunk ? 1 : kChunk / rank;
  const uint16_t* own = bits;
  for (int64_t k = 0; k < blocks; k++) {
    if (draws_bits && k % together == 0) own = draw(draws, line, k, smaller(together, blocks - k), rank, bits);
    body(k, own + k % together * rank);
  }
}

}  // namespace
}  // namespace flora
