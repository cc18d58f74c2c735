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

// Lines [first, last), all of one matrix. Scratch: floats_for(a).
FLORA_CALLED void add_records(const Adding& a, int64_t first, int64_t last, float* scratch) {
  const Sketching& s = a.given;
  const Code code = a.code;
  float* row = scratch;
  Rotation rotation;
  float* own = row + up(s.blocks * s.block, 16);
  Rotation::read(rotation, s.sketch_ERB + first / s.num_rows * s.rank * s.block, s.block, s.rank, own);
  const RecordRoom room = RecordRoom::in(own + rotation_floats(s.block, s.rank), code);
  for (int64_t line = first; line < last; line++) {
    const float* x = whole_blocks(s, line, row);
    uint8_t* records = a.records + line * s.blocks * code.bytes;
    each_block(a.draws, line, s.blocks, s.rank, !a.is_fresh, room.bits, [&](int64_t k, const uint16_t* bits) {
      uint8_t* to = records + k * code.bytes;
      rotate(rotation, room.numbers, x + k * s.block);
      if (a.is_fresh) return level_record(code, to, room.numbers, room.others, room.codes);
      read_record(code, room.others, to);
      for (int64_t r = 0; r < code.numbers; r++) room.numbers[r] += room.others[r];
      round_record(code, to, room.numbers, bits, room.codes);
    });
  }
}

// Lines [first, last) of all sources. Scratch: rounding_floats of both codes' larger room.
FLORA_CALLED void merge_records(const Merging& m, int64_t first, int64_t last, float* scratch) {
  const RecordRoom room = RecordRoom::in(scratch, m.code);
  const int64_t numbers = m.code.numbers, from_bytes = m.from.bytes;
  const bool rounds = !m.puts_at_levels && m.code.bits < 32;
  for (int64_t line = first; line < last; line++)
    each_block(m.draws, line, m.blocks, numbers, rounds, room.bits, [&](int64_t k, const uint16_t* bits) {
      const int64_t at = (line * m.blocks + k) * from_bytes;
      // The sum over ranks, in their order
      for (int64_t n = 0; n < m.num_sources; n++) {
        const auto* source = reinterpret_cast<const uint8_t*>(m.sources[n]) + at;
        float* to = n == 0 ? room.numbers : room.others;
        if (m.from.bits == 32)
          memcpy(to, source, from_bytes);
        else
          read_record(m.from, to, source);
        for (int64_t r = 0; n > 0 && r < numbers; r++) room.numbers[r] += room.others[r];
      }
      for (int64_t r = 0; r < numbers; r++) room.numbers[r] /= m.divisor;
      uint8_t* to = m.to + (line * m.blocks + k) * m.code.bytes;
      if (m.code.bits == 32)
        memcpy(to, room.numbers, m.code.bytes);
      else if (m.puts_at_levels)
        level_record(m.code, to, room.numbers, room.others, room.codes);
      else
        round_record(m.code, to, room.numbers, bits, room.codes);
    });
}

}  // namespace
}  // namespace flora
