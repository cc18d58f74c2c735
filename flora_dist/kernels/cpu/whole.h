// SPDX-License-Identifier: Apache-2.0
// The step of rows that are whole here, by fast products: the common case, and one pass over a tile in registers. A
// row's last block may be cut by its end. What else there is takes the way of finish.h, with the same formulas.
//
// The sketch's signs s stand in two tables, for x A^T = (x s) H^T and d A = s (d H): X is made with them, and what
// is taken off W is scaled by them.
#pragma once
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

// Elements in memory as vectors of floats, and back.
struct Single {
  typedef float Element;
  static constexpr bool kHasBits = false;
  FLORA_INLINE Long load(const float* p) { return load_long(p); }
  FLORA_INLINE void store(float* p, Long v, const uint16_t*) { store_long(p, v); }
};

typedef uint16_t Halves __attribute__((vector_size(2 * FLORA_WIDTH), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(4 * FLORA_WIDTH)));

FLORA_INLINE Words words_of(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
}
FLORA_INLINE void store_upper(uint16_t* p, Long v, Words rounded) {
  const Words kept = v == v ? rounded >> 16 : Words{} + 0x7FC0u;
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(kept, Halves);
}

struct Nearest {
  typedef uint16_t Element;
  static constexpr bool kHasBits = false;
  FLORA_INLINE Long load(const uint16_t* p) { return (Long)(words_of(p) << 16); }
  FLORA_INLINE void store(uint16_t* p, Long v, const uint16_t*) {
    const Words bits = (Words)v;
    store_upper(p, v, bits + 0x7FFFu + ((bits >> 16) & 1u));
  }
};

struct Stochastic {
  typedef uint16_t Element;
  static constexpr bool kHasBits = true;
  FLORA_INLINE Long load(const uint16_t* p) { return (Long)(words_of(p) << 16); }
  FLORA_INLINE void store(uint16_t* p, Long v, const uint16_t* random) {
    store_upper(p, v, (Words)v + words_of(random));
  }
};

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

// Reads one block, of which the row has so many columns, and advances its momentum; x is left with signs.
template <int kBlock, int kRule, class Kind>
FLORA_INLINE void take_block(const Whole& w, const typename Kind::Element* g, const float* signed_factor, float row,
                             int64_t columns, float* momentum, float* x, float* difference) {
  constexpr int kVectors = kBlock / kWidth;
  Long y[kVectors];
  for (int v = 0; v < kVectors; v++) {
    y[v] = Long{};
    if (v * kWidth < columns) y[v] = row * Kind::load(g + v * kWidth) * load_long(signed_factor + v * kWidth);
    store_long(x + v * kWidth, y[v]);
  }
  compress_signed<kBlock>(y, w.fast, [&](int64_t r, Eight compressed) {
    const Eight old = load8(momentum + r);
    Eight d;
    store8(momentum + r, advance_eight<kRule>(compressed, old, old, w.now, d));
    store8(difference + r, d);
  });
}

// W <- (1 - lr wd) W - rate U of some blocks, up to a column.
template <int kBlock, int kBlocks, class Kind>
FLORA_INLINE void step_blocks(const Whole& w, typename Kind::Element* weight, const float* x, float keep,
                              const float* difference, const float* signed_rate, const uint16_t* bits,
                              int64_t columns) {
  constexpr int kVectors = kBlock / kWidth;
  Long e[kBlocks][kVectors];
  expand_signed<kBlock, kBlocks>(e, difference, w.fast);
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; b++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) {
      const int64_t j = b * kBlock + v * kWidth;
      if (j >= columns) break;
      const Long update = keep * load_long(x + j) + e[b][v];
      const Long kept = rounded(w.now.keep * Kind::load(weight + j));
      Kind::store(weight + j, kept - load_long(signed_rate + v * kWidth) * update, bits + j);
    }
}

template <int kBytes>
FLORA_INLINE void prefetch(const void* from) {
  for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(static_cast<const char*>(from) + line);
}

// The same of a group, whose blocks begin at these elements; it looks so far ahead as `next` for the coming one.
template <int kBlock, class Kind>
FLORA_INLINE void step_group(const Whole& w, typename Kind::Element* weights, const int64_t* at, int64_t count,
                             float keep, const float* signed_rate, const uint16_t* bits,
                             const typename Kind::Element* next) {
  constexpr int kMany = kTogether<kBlock>;
  for (int64_t b = 0; b < count;) {
    const float *x = w.room.x + b * kBlock, *difference = w.room.difference + b * w.size.rank;
    prefetch<kMany * kBlock * sizeof(*next)>(next + at[b]);
    const bool fills = b + kMany <= count && at[b + kMany] - at[b] == kMany * kBlock;
    if (fills)
      step_blocks<kBlock, kMany, Kind>(w, weights + at[b], x, keep, difference, signed_rate, bits + at[b],
                                       kMany * kBlock);
    else
      step_blocks<kBlock, 1, Kind>(w, weights + at[b], x, keep, difference, signed_rate, bits + at[b],
                                   at[b + 1] - at[b]);
    b += fills ? kMany : 1;
  }
}

template <int kBlock, int kRule, class Kind>
FLORA_CALLED void finish_whole(const Whole& given) {
  const Whole w = given;  // a copy that no store can reach: its numbers may stay in registers
  typedef typename Kind::Element Element;
  constexpr int64_t kGroup = kChunk / kBlock;
  const Tile& tile = w.tile;
  const int64_t width = tile.last - tile.first, per_row = blocks_of_row(w.size), blocks = tile.num_rows * per_row;
  const int64_t rank = w.size.rank;
  const float keep = kept_of(kRule, w.now);
  const auto* gradient = static_cast<const Element*>(w.gradient);
  auto* weights = reinterpret_cast<Element*>(tile.weight);
  Page page = Page::of(w, blocks);
  auto* state = reinterpret_cast<float*>(tile.row);
  float* signed_factor = w.room.lines[0];
  alignas(64) float signed_rate[kBlock];
  alignas(64) uint16_t bits[kChunk];
  for (int64_t j = 0; j < width; j++) signed_factor[j] = w.factor[j] * w.fast.sign[j % kBlock];
  for (int64_t j = 0; j < kBlock; j++) signed_rate[j] = w.rate * w.fast.sign[j];
  const uint64_t counter = static_cast<uint64_t>(tile.line) * width / kIntegersPerCounter;
  int64_t i = -1, k = per_row, done = 0, at[kGroup + 1];  // where the blocks of a group begin among its elements
  float row = 0;
  for (int64_t start = 0; start < blocks; start += kGroup) {
    const int64_t count = smaller(kGroup, blocks - start);
    if (start == page.stop) Page::turn(page);
    float* momentum = page.numbers + (start - page.first) * rank;
    const Element* g = gradient + done;
    Element* own = weights + done;
    at[0] = 0;
    for (int64_t b = 0; b < count; b++, k++) {
      if (k == per_row) {
        k = 0;
        i++;
        state[i] = w.rows[i];
        row = w.now.sign * row_scale(w.size, w.rows[i]) * w.input;
      }
      const int64_t columns = smaller(kBlock, width - k * kBlock);
      prefetch<kBlock * sizeof(Element)>(own + at[b]);
      const auto take = [&](int64_t some) {
        take_block<kBlock, kRule, Kind>(w, g + at[b], signed_factor + k * kBlock, row, some, momentum + b * rank,
                                        w.room.x + b * kBlock, w.room.difference + b * rank);
      };
      if (columns == kBlock)
        take(kBlock);  // a constant: of a whole block nothing is asked again
      else
        take(columns);
      at[b + 1] = at[b] + columns;
    }
    if (Kind::kHasBits)
      philox(w.key, counter + done / kIntegersPerCounter, at[count] / kIntegersPerCounter, 0,
             reinterpret_cast<uint32_t*>(bits));
    done += at[count];
    step_group<kBlock, Kind>(w, own, at, count, keep, signed_rate, bits, g + kGroup * kBlock);
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
