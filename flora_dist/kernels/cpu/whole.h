// SPDX-License-Identifier: Apache-2.0
// The step of rows that are whole here, by fast products: the common case, and one pass over a tile, whose blocks go in
// groups through four short loops: X and its transform, the new momentum, what it adds to U, W. A row's last block may
// be cut by its end. What else there is takes the way of finish.h, with the same formulas.
//
// The sketch's signs s stand in two tables, for x A^T = (x s) H^T and d A = s (d H): X is made with them, and what
// is taken off W is scaled by them.
#pragma once
#include "elements.h"
#include "lines.h"

namespace flora {
namespace {

// The new momentum of eight numbers, and D: what of U the sketch sees.
template <int kRule>
FLORA_INLINE Eight advance_eight(Eight compressed, Eight old, Eight moved, const Now& now, Eight& difference) {
  const Eight fresh = (1 - now.beta1) * compressed + now.beta1 * moved;
  difference = kRule == kBlend ? now.gain * (fresh - compressed)
               : kRule == kMix   ? now.gain * fresh
               : kRule == kFlora ? now.beta1 * old
                                 : fresh;
  return fresh;
}

// The part of X in U.
FLORA_INLINE float kept_of(int64_t rule, const Now& now) {
  return rule == kFlora ? 1 - now.beta1 : rule == kStrict ? 0 : 1;
}

struct Whole {
  const Header& size;
  const Tile& tile;
  const Now now;
  const Hadamard fast;
  const void* gradient;
  const float* rows;           // the new R
  const float* factor;         // of the tile's columns
  float input;                 // what X is scaled by
  float rate;
  uint64_t key;                // of the rounding bits
  uint64_t momentum_key;
  const Room& room;
};

// The momentum of some blocks of a tile as fp32: where it lies, or from records and back, a chunk of numbers at a
// time.
struct Page {
  float* numbers;
  int64_t first, stop;         // blocks of the tile
  int64_t last, together;
  uint8_t* records;            // of the tile; null where it is fp32
  Code code;
  uint64_t key, counter;       // of the rounding bits of the tile's first number
  RecordRoom room;

  FLORA_INLINE Page of(const Whole& w, int64_t blocks) {
    Page page = {reinterpret_cast<float*>(w.tile.momentum), 0, blocks, blocks, blocks, nullptr, {}, 0, 0, {}};
    if (w.size.momentum_dtype == kFloat32) return page;
    page.code = momentum_code(w.size);
    page.room = RecordRoom::in(w.room.rounding, page.code);
    page.numbers = page.room.numbers;
    page.stop = 0;
    page.together = blocks_together(page.code.room);
    page.records = reinterpret_cast<uint8_t*>(w.tile.momentum);
    page.key = w.momentum_key;
    const int64_t per_line = blocks_of_row(w.size) * w.size.rank;
    page.counter = static_cast<uint64_t>(w.tile.line * per_line / kIntegersPerCounter);
    return page;
  }

  // Rounds what has been advanced, with the bits of its place in the whole parameter.
  FLORA_CALLED void write(const Page& p) {
    const int64_t blocks = p.stop - p.first, before = p.first * p.code.numbers;
    if (p.records == nullptr || blocks == 0) return;
    philox(p.key, p.counter + before / kIntegersPerCounter, blocks * p.code.numbers / kIntegersPerCounter, 0,
           reinterpret_cast<uint32_t*>(p.room.bits));
    round_records(p.code, p.records + p.first * p.code.bytes, p.numbers, blocks, p.room.bits, p.room);
  }

  FLORA_CALLED void turn(Page& p) {
    write(p);
    p.first = p.stop;
    p.stop = smaller(p.first + p.together, p.last);
    read_records(p.code, p.numbers, p.records + p.first * p.code.bytes, p.stop - p.first, p.code.numbers);
  }
};

// Reads one block, of which the row has so many columns: X with signs, and its transform.
template <int kBlock, class Kind>
FLORA_INLINE void take_block(const typename Kind::Element* g, const float* signed_factor, float row, int64_t columns,
                             float* x, float* transformed) {
  constexpr int kVectors = kBlock / kWidth;
  Long y[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v++) {
    y[v] = Long{};
    if (v * kWidth < columns) y[v] = row * Kind::load(g + v * kWidth) * load_long(signed_factor + v * kWidth);
    store_long(x + v * kWidth, y[v]);
  }
  store_transform<kBlock>(transformed, y);
}

// The new momentum of some blocks.
template <int kBlock, int kRule>
FLORA_INLINE void advance_blocks(const Whole& w, const float* transformed, int64_t blocks, float* momentum,
                                 float* difference) {
  const int64_t rank = w.size.rank;
  const Now now = w.now;
  sum_rows<kBlock>(transformed, blocks, w.fast, [&](int64_t b, int64_t r, Eight compressed) {
    const Eight old = load8(momentum + b * rank + r);
    Eight d;
    store8(momentum + b * rank + r, advance_eight<kRule>(compressed, old, old, now, d));
    store8(difference + b * rank + r, d);
  });
}

// W <- (1 - lr wd) W - rate U of one block, of which the row has so many columns.
template <int kBlock, class Kind>
FLORA_INLINE void step_block(typename Kind::Element* weight, const float* x, float keep, const float* placed,
                             const float* signed_rate, float decay, const uint16_t* bits, int64_t columns) {
  Long e[kBlock / kWidth];
  load_transform<kBlock>(e, placed);
#pragma GCC unroll 16
  for (int v = 0; v < kBlock / kWidth; v++) {
    const int64_t j = v * kWidth;
    if (j >= columns) break;
    const Long update = keep * load_long(x + j) + e[v];
    const Long kept = rounded(decay * Kind::load(weight + j));
    Kind::store(weight + j, kept - load_long(signed_rate + j) * update, bits + j);
  }
}

// A block that a row's end cuts, apart: what is asked of its columns costs the others nothing.
template <int kBlock, class Kind>
FLORA_CALLED void take_rest(const typename Kind::Element* g, const float* signed_factor, float row, int64_t columns,
                            float* x, float* transformed) {
  take_block<kBlock, Kind>(g, signed_factor, row, columns, x, transformed);
}
template <int kBlock, class Kind>
FLORA_CALLED void step_rest(typename Kind::Element* weight, const float* x, float keep, const float* placed,
                            const float* signed_rate, float decay, const uint16_t* bits, int64_t columns) {
  step_block<kBlock, Kind>(weight, x, keep, placed, signed_rate, decay, bits, columns);
}

// Into the caches from the second level on, or from the first.
template <int kBytes, int kLocality>
FLORA_INLINE void prefetch(const void* from) {
  for (int line = 0; line < kBytes; line += 64)
    __builtin_prefetch(static_cast<const char*>(from) + line, 0, kLocality);
}

// A tile in work, and how far it has come.
template <class Kind>
struct Course {
  typedef typename Kind::Element Element;
  const Element* g;
  Element* weight;
  float* signed_factor;  // of the tile's columns
  int64_t row, block;    // of the tile; the latter of its row
  float scale, coming;   // what X of this row is scaled by, and of the next one

  // Of a row ahead: its root and its quotient take as long as some blocks.
  FLORA_INLINE float scale_of(const Whole& w, int64_t row) {
    return row < w.tile.num_rows ? w.now.sign * row_scale(w.size, w.rows[row]) * w.input : 0.0f;
  }

  FLORA_INLINE Course of(const Whole& w) {
    const int64_t width = w.tile.last - w.tile.first;
    Course c = {static_cast<const Element*>(w.gradient), reinterpret_cast<Element*>(w.tile.weight), w.room.lines[0],
                -1, blocks_of_row(w.size), 0, scale_of(w, 0)};
    for (int64_t j = 0; j < width; j++) c.signed_factor[j] = w.factor[j] * w.fast.sign[j % w.size.block];
    return c;
  }
};

// X of a group, and its transform; `at` is where its blocks begin among its elements.
template <int kBlock, class Kind>
FLORA_INLINE void take_group(const Whole& w, Course<Kind>& c, int64_t count, int64_t* at, float* transformed) {
  const int64_t width = w.tile.last - w.tile.first, per_row = blocks_of_row(w.size);
  auto* state = reinterpret_cast<float*>(w.tile.row);
  float* x = w.room.x;
  for (int64_t b = 0; b < count; b++, x += kBlock, transformed += kBlock, c.block++) {
    if (c.block == per_row) {
      c.block = 0;
      c.row++;
      state[c.row] = w.rows[c.row];
      c.scale = c.coming;
      c.coming = Course<Kind>::scale_of(w, c.row + 1);
    }
    const int64_t columns = smaller(kBlock, width - c.block * kBlock);
    const float* factor = c.signed_factor + c.block * kBlock;
    prefetch<kBlock * sizeof(*c.weight), 3>(c.weight + at[b]);
    if (columns == kBlock)
      take_block<kBlock, Kind>(c.g + at[b], factor, c.scale, kBlock, x, transformed);
    else
      take_rest<kBlock, Kind>(c.g + at[b], factor, c.scale, columns, x, transformed);
    at[b + 1] = at[b] + columns;
  }
}

// W of a group.
template <int kBlock, class Kind>
FLORA_INLINE void step_group(const Whole& w, const Course<Kind>& c, int64_t count, const int64_t* at, float keep,
                             const float* placed, const float* signed_rate, const uint16_t* bits, bool fetches) {
  const float* x = w.room.x;
  const float decay = w.now.keep;
  for (int64_t b = 0; b < count; b++, x += kBlock, placed += kBlock) {
    const int64_t from = at[b], columns = at[b + 1] - from;
    if (fetches) prefetch<kBlock * sizeof(*c.g), 2>(c.g + 4 * kChunk + from);
    if (columns == kBlock)
      step_block<kBlock, Kind>(c.weight + from, x, keep, placed, signed_rate, decay, bits + from, kBlock);
    else
      step_rest<kBlock, Kind>(c.weight + from, x, keep, placed, signed_rate, decay, bits + from, columns);
  }
}

template <int kBlock, int kRule, class Kind>
FLORA_CALLED void finish_whole(const Whole& given) {
  const Whole w = given;  // a copy that no store can reach: its numbers may stay in registers
  const Tile& tile = w.tile;
  const int64_t blocks = tile.num_rows * blocks_of_row(w.size);
  const float keep = kept_of(kRule, w.now);
  Page page = Page::of(w, blocks);
  Course<Kind> course = Course<Kind>::of(w);
  // A CPU fetches the gradient ahead by itself, but loses its thread where records are read in between.
  const bool fetches = page.records != nullptr;
  float *difference = w.room.difference, *work = w.room.old;
  alignas(64) float signed_rate[kBlock];
  alignas(64) uint16_t bits[kChunk];
  for (int64_t j = 0; j < kBlock; j++) signed_rate[j] = w.rate * w.fast.sign[j];
  int64_t at[kGroup<kBlock> + 1] = {};
  uint64_t counter = static_cast<uint64_t>(tile.line) * (tile.last - tile.first) / kIntegersPerCounter;
  for (int64_t start = 0; start < blocks; start += kGroup<kBlock>) {
    const int64_t count = smaller(kGroup<kBlock>, blocks - start);
    if (start == page.stop) Page::turn(page);
    take_group<kBlock, Kind>(w, course, count, at, work);
    float* momentum = page.numbers + (start - page.first) * w.size.rank;
    advance_blocks<kBlock, kRule>(w, work, count, momentum, difference);
    const int64_t elements = at[count], counters = elements / kIntegersPerCounter;
    if (Kind::kHasBits) philox(w.key, counter, counters, 0, reinterpret_cast<uint32_t*>(bits));
    counter += static_cast<uint64_t>(counters);
    place_rows<kBlock>(work, difference, count, w.fast);
    step_group<kBlock, Kind>(w, course, count, at, keep, work, signed_rate, bits, fetches);
    course.g += elements;
    course.weight += elements;
  }
  Page::write(page);
}

// W <- (1 - lr wd) W - rate X, without a momentum.
template <class Kind>
FLORA_CALLED void finish_plain(const Whole& given) {
  const Whole w = given;
  typedef typename Kind::Element Element;
  const Tile& tile = w.tile;
  const int64_t width = tile.last - tile.first;
  auto* state = reinterpret_cast<float*>(tile.row);
  const auto* g = static_cast<const Element*>(w.gradient);
  auto* weight = reinterpret_cast<Element*>(tile.weight);
  alignas(64) uint16_t bits[kChunk];
  for (int64_t i = 0; i < tile.num_rows; i++, g += width, weight += width) {
    state[i] = w.rows[i];
    const float row = w.now.sign * row_scale(w.size, w.rows[i]) * w.input;
    for (int64_t start = 0; start < width;) {
      // Random bits come for so many elements at a time, whatever rows they lie in.
      const int64_t place = (i * width + start) % kChunk, count = smaller(kChunk - place, width - start);
      if (Kind::kHasBits && place == 0) {
        const int64_t rest = tile.num_rows * width - (i * width + start);
        philox(w.key, ((tile.line + i) * width + start) / kIntegersPerCounter,
               smaller(kChunk, rest) / kIntegersPerCounter, 0, reinterpret_cast<uint32_t*>(bits));
      }
      for (int64_t j = 0; j < count; j += kWidth) {
        const int64_t at = start + j;
        const Long update = row * Kind::load(g + at) * load_long(w.factor + at);
        const Long kept = rounded(w.now.keep * Kind::load(weight + at));
        Kind::store(weight + at, kept - w.rate * update, bits + place + j);
      }
      start += count;
    }
  }
}

// Whether a tile is such as the functions above step, with a dtype of weights that the gradient has too.
FLORA_INLINE bool steps_whole(const Header& size, const Tile& tile, const Gradients& given, const Basis& basis,
                              const Sketch& fresh) {
  if (tile.is_cut || size.side != 0 || given.kind != size.weight_dtype || size.weight_dtype == kFloat16) return false;
  if (size.rule == kNone) return size.num_columns % 16 == 0;
  return basis.move == kStays && (is_plain(size, tile, fresh) || has_plain_records(size, tile, fresh));
}

template <int kRule, class Kind>
FLORA_INLINE void finish_as(const Whole& w) {
  if constexpr (kRule == kNone)
    finish_plain<Kind>(w);
  else
    by_block(w.size.block, [&](auto block) { finish_whole<block.value, kRule, Kind>(w); });
}

template <int kRule>
FLORA_CALLED void finish_tile(const Whole& w) {
  if (w.size.weight_dtype == kFloat32) return finish_as<kRule, Single>(w);
  if (w.size.is_stochastic) return finish_as<kRule, Stochastic>(w);
  return finish_as<kRule, Nearest>(w);
}

}  // namespace
}  // namespace flora
