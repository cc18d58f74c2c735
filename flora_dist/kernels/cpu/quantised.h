// SPDX-License-Identifier: Apache-2.0
// Sketches that are kept and sent in few bits: records that gradients are added to, and sums of records.
#pragma once
#include "gradients.h"
#include "philox.h"
#include "plan.h"
#include "records.h"
#include "rotation.h"

namespace flora {
namespace {

FLORA_INLINE void add_numbers(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(to + i) + load(from + i));
}

// Lines [first, last), all of one matrix. Scratch: floats_for(a).
FLORA_CALLED void add_records(const Adding& a, int64_t first, int64_t last, float* scratch) {
  const Sketching& s = a.given;
  const Code code = a.code;
  float* row = scratch;
  Rotation rotation;
  float* own = row + up(s.blocks * s.block, 16);
  Rotation::read(rotation, s.sketch_ERB + first / s.num_rows * s.rank * s.block, s.block, s.rank, own);
  const RecordRoom room = RecordRoom::in(own + rotation_floats(s.block, s.rank), code);
  const int64_t together = blocks_together(larger(s.block, code.room));
  for (int64_t line = first; line < last; line++) {
    const float* x = whole_blocks(s, line, row);
    uint8_t* records = a.records + line * s.blocks * code.bytes;
    each_group(a.draws, line, s.blocks, code, together, !a.is_fresh, room.bits,
               [&](int64_t k, int64_t count, const uint16_t* bits) {
                 uint8_t* to = records + k * code.bytes;
                 rotate(rotation, room.numbers, x + k * s.block, count, code.room);
                 if (a.is_fresh) return level_records(code, to, room.numbers, count, room);
                 read_records(code, room.others, to, count, code.room);
                 add_numbers(room.numbers, room.others, count * code.room);
                 round_records(code, to, room.numbers, count, bits, room);
               });
  }
}

// The sum over ranks of some blocks, in their order, over the divisor.
FLORA_CALLED void sum_records(const Merging& m, int64_t block, int64_t blocks, const RecordRoom& room) {
  const int64_t count = blocks * m.code.room;
  for (int64_t n = 0; n < m.num_sources; n++) {
    const auto* source = reinterpret_cast<const uint8_t*>(m.sources[n]) + block * m.from.bytes;
    float* to = n == 0 ? room.numbers : room.others;
    if (m.from.bits < 32)
      read_records(m.from, to, source, blocks, m.code.room);
    else
      for (int64_t k = 0; k < blocks; k++) memcpy(to + k * m.code.room, source + k * m.from.bytes, m.from.bytes);
    if (n > 0) add_numbers(room.numbers, room.others, count);
  }
  if (m.divisor == 1) return;
  const Vec divisor = spread(m.divisor);
  for (int64_t i = 0; i < count; i += kLanes) store(room.numbers + i, load(room.numbers + i) / divisor);
}

// Lines [first, last) of all sources. Scratch: rounding_floats of both codes' larger room.
FLORA_CALLED void merge_records(const Merging& m, int64_t first, int64_t last, float* scratch) {
  const Code code = m.code;
  const RecordRoom room = RecordRoom::in(scratch, code);
  const bool rounds = !m.puts_at_levels && code.bits < 32;
  for (int64_t line = first; line < last; line++)
    each_group(m.draws, line, m.blocks, code, blocks_together(code.room), rounds, room.bits,
               [&](int64_t k, int64_t count, const uint16_t* bits) {
                 const int64_t block = line * m.blocks + k;
                 uint8_t* to = m.to + block * code.bytes;
                 sum_records(m, block, count, room);
                 if (m.puts_at_levels) return level_records(code, to, room.numbers, count, room);
                 if (rounds) return round_records(code, to, room.numbers, count, bits, room);
                 for (int64_t n = 0; n < count; n++)
                   memcpy(to + n * code.bytes, room.numbers + n * code.room, code.bytes);
               });
}

}  // namespace
}  // namespace flora
