// SPDX-License-Identifier: Apache-2.0
// The numbers of blocks in few bits: flora_dist/core/sketch/quantise.py has the formulas and says what a record is.
// Some blocks are in work together, a pass for each step of the formula: what one waits for, others fill. Their
// numbers stand a room apart. Every product that a sum follows is rounded by itself, and a block is summed in
// halves: the bits are torch's.
#pragma once
#include "hadamard.h"
#include "octets.h"
#include "philox.h"
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

// A thread's buffers for blocks that are in work together.
struct RecordRoom {
  float* numbers;
  float* others;      // what is added to them; random numbers; products
  float* parts;       // eight numbers of each block, that its sum or its largest one follows from
  float* first;       // a number of each block; and another
  float* second;
  uint16_t* scales;   // of each block
  uint8_t* codes;
  uint8_t* packed;
  uint16_t* bits;

  FLORA_INLINE RecordRoom in(float* scratch, const Code& code) {
    const int64_t span = record_span(code);
    RecordRoom own;
    own.numbers = scratch;
    own.others = own.numbers + span;
    own.parts = own.others + span;
    own.first = own.parts + kChunk;
    own.second = own.first + kMostBlocks;
    own.scales = reinterpret_cast<uint16_t*>(own.second + kMostBlocks);
    own.codes = reinterpret_cast<uint8_t*>(own.scales + 2 * kMostBlocks);
    own.packed = own.codes + span;
    own.bits = reinterpret_cast<uint16_t*>(own.packed + span);
    memset(own.numbers, 0, sizeof(float) * span);
    return own;
  }
};

// Zeros after blocks' numbers, up to the room: blocks before may have left NaN there.
FLORA_INLINE void clear_beyond(const Code& code, float* x, int64_t blocks) {
  if (code.numbers == code.room) return;
  for (int64_t k = 0; k < blocks; k++)
    for (int64_t i = code.numbers; i < code.room; i++) x[k * code.room + i] = 0;
}

// body(room) with the room of a block as a constant, where it is one of those that most have; else 0.
template <class Body>
FLORA_INLINE void by_room(int64_t room, const Body& body) {
  if (room == 64) return body(Count<64>{});
  if (room == 16) return body(Count<16>{});
  return body(Count<0>{});
}

// |x| of the largest of each block: bits of NaN are above those of infinity.
FLORA_INLINE void find_largest(float* largest, const float* x, int64_t blocks, int64_t given, float* parts) {
  by_room(given, [&](auto constant) {
    const int64_t room = constant.value == 0 ? given : constant.value;
    for (int64_t k = 0; k < blocks; k++)
      for (int64_t h = 0; h < 8; h += kLanes) {
        VecLanes most = lanes_of(load(x + k * room + h)) & 0x7FFFFFFF;
        for (int64_t i = 8 + h; i < room; i += 8) {
          const VecLanes own = lanes_of(load(x + k * room + i)) & 0x7FFFFFFF;
          most = own > most ? own : most;
        }
        store(parts + 8 * k + h, (Vec)most);
      }
  });
  for (int64_t k = 0; k < blocks; k += 8)
    store8(largest + k, fold_eights(parts + 8 * k, [](Eight a, Eight b) {
             const EightLanes m = (EightLanes)a, n = (EightLanes)b;
             return (Eight)(m > n ? m : n);
           }));
}

// Sums of a power of two of numbers, halves on halves, down to eight; the numbers are overwritten.
template <int kRoom>
FLORA_INLINE void halve_some(float* parts, const float* x) {
  constexpr int kVectors = kRoom / kLanes, kLast = 8 / kLanes;
  Vec sums[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v++) sums[v] = load(x + v * kLanes);
#pragma GCC unroll 4
  for (int half = kVectors / 2; half >= kLast; half /= 2)
#pragma GCC unroll 8
    for (int v = 0; v < half; v++) sums[v] += sums[v + half];
  for (int v = 0; v < kLast; v++) store(parts + v * kLanes, sums[v]);
}

FLORA_INLINE void halve_any(float* parts, float* x, int64_t room) {
  for (int64_t half = room / 2; half >= 8; half /= 2)
    for (int64_t i = 0; i < half; i += kLanes) store(x + i, load(x + i) + load(x + half + i));
  memcpy(parts, x, sizeof(float) * 8);
}

// The sum of each block.
FLORA_INLINE void sum_blocks(float* sums, float* x, int64_t blocks, int64_t room, float* parts) {
  for (int64_t k = 0; k < blocks; k++, x += room) {
    float* own = parts + 8 * k;
    switch (room) {
      case 16: halve_some<16>(own, x); break;
      case 64: halve_some<64>(own, x); break;
      default: halve_any(own, x, room);
    }
  }
  for (int64_t k = 0; k < blocks; k += 8)
    store8(sums + k, fold_eights(parts + 8 * k, [](Eight a, Eight b) { return a + b; }));
}

FLORA_INLINE void write_records(const Code& code, uint8_t* to, int64_t blocks, const RecordRoom& room) {
  for (int64_t k = 0; k < blocks && code.numbers != code.room; k++)
    memset(room.codes + k * code.room + code.numbers, 0, code.room - code.numbers);
  const uint8_t* packed = pack(code.bits, room.packed, room.codes, blocks * code.room);
  const int64_t apart = code.room * code.bits / 8;
  for (int64_t k = 0; k < blocks; k++, to += code.bytes) {
    copy_octets(to, packed + k * apart, code.octets);
    memcpy(to + code.octets, room.scales + k, 2);
  }
}

FLORA_CALLED void round_to_halves(const Code& code, uint8_t* to, const float* x, int64_t blocks, const uint16_t* bits,
                                  uint16_t* halves) {
  for (int64_t k = 0; k < blocks; k++, x += code.room, bits += code.numbers, to += code.bytes) {
    for (int64_t i = 0; i < code.numbers; i++) halves[i] = to_bf16_stochastic(x[i], bits[i]);
    memcpy(to, halves, code.bytes);
  }
}

// y = s (2 k / L - 1), k = floor((x / s + 1) L / 2 + u). `bits` of a block follow those of the one before.
FLORA_CALLED void round_records(const Code& given, uint8_t* to, float* x, int64_t blocks, const uint16_t* bits,
                                const RecordRoom& room) {
  const Code code = given;  // a copy that no store can reach
  if (code.bits == 16) return round_to_halves(code, to, x, blocks, bits, reinterpret_cast<uint16_t*>(room.others));
  clear_beyond(code, x, blocks);
  float *largest = room.first, *divisors = room.second, *uniform = room.others;
  find_largest(largest, x, blocks, code.room, room.parts);
  for (int64_t k = 0; k < blocks; k++) {
    const uint32_t own = bits_of(largest[k]);
    // The smallest bfloat16 that is not below: a number above its scale would be cut.
    const uint32_t scale = own > 0x7F800000u ? 0x7FC0u : (own + 0xFFFF) >> 16;
    room.scales[k] = static_cast<uint16_t>(scale);
    divisors[k] = scale == 0 ? 1.0f : float_of(scale << 16);
  }
  for (int64_t i = 0; i < blocks * code.numbers; i++) uniform[i] = (bits[i] + 0.5f) * (1.0f / 65536);
  const Vec top = spread(static_cast<float>((1 << code.bits) - 1)), half = top * 0.5f, zero = {};
  by_room(code.numbers, [&](auto constant) {
    const int64_t numbers = constant.value == 0 ? code.numbers : constant.value;
    const int64_t apart = constant.value == 0 ? code.room : constant.value;
    for (int64_t k = 0; k < blocks; k++) {
      const Vec divisor = spread(divisors[k]);
      for (int64_t i = 0; i < numbers; i += kLanes) {
        const Vec y = rounded((load(x + k * apart + i) / divisor + 1.0f) * half) + load(uniform + k * numbers + i);
        const Vec above = y > zero ? y : zero;  // NaN: 0
        store_codes(room.codes + k * apart + i, __builtin_convertvector(above < top ? above : top, VecLanes));
      }
    }
  });
  write_records(code, to, blocks, room);
}

// The positive levels, ascending, and the edges between them.
struct Levels {
  alignas(32) float values[8];
  alignas(32) float edges[8];

  FLORA_INLINE Levels of(const Code& code, int64_t half) {
    Levels own = {};
    memcpy(own.values, code.levels + half, sizeof(float) * half);
    memcpy(own.edges, code.edges + half, sizeof(float) * (half - 1));
    return own;
  }
};

// Codes of the nearest levels of y / RMS, and q y.
template <int kHalf>
FLORA_INLINE void level_some(const Levels& levels, const float* y, int64_t count, float rms, float* products,
                             uint8_t* codes) {
  for (int64_t i = 0; i < count; i += kLanes) {
    // The sign alone needs no quotient.
    const Vec own = load(y + i), over = kHalf == 1 ? own : own / spread(rms), zero = {};
    const Vec z = over == over ? over : zero;
    const VecLanes below = z < zero;
    // Magnitudes are compared as integers; one less where an edge itself belongs to the level nearer to zero.
    const VecLanes magnitude = (lanes_of(z) & 0x7FFFFFFF) + below;
    VecLanes steps = {};
    for (int step = kHalf / 2; step > 0; step /= 2)  // halves of what is left
      steps += (magnitude >= lanes_of(pick(levels.edges, steps + (step - 1)))) & step;
    const Vec level = pick(levels.values, steps);
    store_codes(codes + i, kHalf + (steps ^ below));
    store(products + i, rounded((below ? -level : level) * own));
  }
}

template <int kHalf>
FLORA_CALLED void level_blocks(const Code& code, const float* y, int64_t blocks, const float* rms,
                               const RecordRoom& room) {
  const Levels levels = Levels::of(code, kHalf);
  for (int64_t k = 0; k < blocks; k++)
    level_some<kHalf>(levels, y + k * code.room, code.room, rms[k], room.others + k * code.room,
                      room.codes + k * code.room);
}

// y = s q(x / RMS(x)), q the nearest level, s = |x|^2 / <x, q>.
FLORA_CALLED void level_records(const Code& given, uint8_t* to, float* x, int64_t blocks, const RecordRoom& room) {
  const Code code = given;
  clear_beyond(code, x, blocks);
  float *largest = room.first, *squares = room.second;
  find_largest(largest, x, blocks, code.room, room.parts);
  // Over the largest first: squares of small numbers would be zero.
  for (int64_t k = 0; k < blocks; k++) {
    const Vec divisor = spread(bits_of(largest[k]) == 0 ? 1.0f : largest[k]);
    for (int64_t i = k * code.room; i < (k + 1) * code.room; i += kLanes) {
      const Vec own = load(x + i) / divisor;
      store(x + i, own);
      store(room.others + i, rounded(own * own));
    }
  }
  sum_blocks(squares, room.others, blocks, code.room, room.parts);
  float rms[kMostBlocks], along[kMostBlocks];
  for (int64_t k = 0; k < blocks; k++) rms[k] = __builtin_sqrtf(squares[k] / code.numbers);
  switch (code.bits) {
    case 4: level_blocks<8>(code, x, blocks, rms, room); break;
    case 2: level_blocks<2>(code, x, blocks, rms, room); break;
    default: level_blocks<1>(code, x, blocks, rms, room);
  }
  sum_blocks(along, room.others, blocks, code.room, room.parts);
  for (int64_t k = 0; k < blocks; k++) {
    const float scale = largest[k] * (squares[k] / (along[k] == 0 ? 1.0f : along[k]));
    room.scales[k] = to_bf16_nearest(scale) ^ 0x8000;
  }
  write_records(code, to, blocks, room);
}

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

// body(k, count, bits) for some blocks of a line at a time, with the random bits that round their numbers.
template <class Body>
FLORA_INLINE void each_group(const Draws& draws, int64_t line, int64_t blocks, const Code& code, int64_t together,
                             bool draws_bits, uint16_t* bits, const Body& body) {
  for (int64_t k = 0; k < blocks; k += together) {
    const int64_t count = smaller(together, blocks - k);
    body(k, count, draws_bits ? draw(draws, line, k, count, code.numbers, bits) : bits);
  }
}

}  // namespace
}  // namespace flora
