// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011), bit for bit as flora_dist/sketch/philox.py, which says what the counter
// holds; and what is rounded with its bits.
#pragma once
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

constexpr int kCounters = 16;  // encrypted side by side
constexpr int kIntegersPerCounter = 8;

// Four words for each of 16 consecutive counters, counter after counter.
FLORA_CALLED void philox16(uint64_t key, uint64_t first, uint32_t stream, uint32_t* words) {
  uint32_t x0[kCounters], x1[kCounters], x2[kCounters], x3[kCounters];
  for (int i = 0; i < kCounters; i++) {
    const uint64_t index = first + i;
    x0[i] = static_cast<uint32_t>(index);
    x1[i] = static_cast<uint32_t>(index >> 32);
    x2[i] = stream;
    x3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < kCounters; i++) {
      const uint64_t p0 = static_cast<uint64_t>(x0[i]) * 0xD2511F53u;
      const uint64_t p1 = static_cast<uint64_t>(x2[i]) * 0xCD9E8D57u;
      x0[i] = static_cast<uint32_t>(p1 >> 32) ^ x1[i] ^ k0;
      x1[i] = static_cast<uint32_t>(p1);
      x2[i] = static_cast<uint32_t>(p0 >> 32) ^ x3[i] ^ k1;
      x3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kCounters; i++) {
    words[4 * i] = x0[i];
    words[4 * i + 1] = x1[i];
    words[4 * i + 2] = x2[i];
    words[4 * i + 3] = x3[i];
  }
}

FLORA_CALLED void philox(uint64_t key, uint64_t first, int64_t count, uint32_t stream, uint32_t* words) {
  int64_t i = 0;
  for (; i + kCounters <= count; i += kCounters) philox16(key, first + i, stream, words + 4 * i);
  if (i == count) return;
  uint32_t last[4 * kCounters];
  philox16(key, first + i, stream, last);
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
