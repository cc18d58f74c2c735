// SPDX-License-Identifier: Apache-2.0
// The step itself of a tile of a matrix: X, M, U, then W <- (1 - lr wd) W - rate U.
//
// Every rule is U = keep X + D A with one D per block:
//     blend   M <- b move(M) + (1-b) c;  U = X + gain (R/B) (M - c) A_new
//     mix     M <- b move(M) + (1-b) c;  U = X + gain (R/B) M A_new
//     flora   M <- b move(M) + (1-b) c;  U = (1-b) X + b M_old A_old
//     strict  M <- b move(M) + (1-b) c;  U = M A_new
// Those with a second moment stand in adam.h.
// A dense momentum has A = I and never moves: U is the new M in all of them but `mix`.
#pragma once
#include "adam.h"
#include "tiles.h"
#include "whole.h"

namespace flora {
namespace {

struct Update {
  const Header& size;
  const Tile& tile;
  const Basis& basis;
  const Now& now;
  const Settled& settled;
  const FinishOptions& options;
  const Room& room;
  const Sketch& old;
  const Sketch& fresh;
  float factor;   // what X was scaled by: whole sketches of cut blocks are not
};

FLORA_INLINE Rounding rounding_of(const Header& size, int64_t dtype, const int64_t* keys, int64_t member,
                                  int64_t num_columns) {
  const bool has_bits = size.is_stochastic && keys != nullptr;
  return {dtype, has_bits, has_bits ? static_cast<uint64_t>(keys[member]) : 0, num_columns};
}

// Replaces partial sketches by the sums of all holders.
FLORA_CALLED void fill_cut_blocks(const Update& u, const Chunk& chunk, int64_t i) {
  if (u.settled.blocks == nullptr) return;
  const int64_t block = u.size.block, rank = u.size.rank;
  const int64_t edges[2] = {u.tile.first / block, (u.tile.last - 1) / block};
  const int64_t slots[2] = {u.tile.head_slot, u.tile.tail_slot};
  for (int e = 0; e < 2; e++) {
    if (slots[e] < 0 || edges[e] < chunk.k0 || edges[e] >= chunk.k1) continue;
    const float* whole = u.settled.blocks + (slots[e] + i) * rank;
    float* to = u.room.compressed + (edges[e] - chunk.k0) * u.basis.padded;
    for (int64_t r = 0; r < rank; r++) to[r] = whole[r] * u.factor;
  }
}

FLORA_CALLED void move(float* to, const float* from, int64_t blocks, const Basis& basis, const float* move_RP,
                       int64_t rank) {
  const int64_t padded = basis.padded;
  if (basis.move == kResets) {
    memset(to, 0, sizeof(float) * blocks * padded);
    return;
  }
  for (int64_t k = 0; k < blocks; k++)
    for (int64_t p = 0; p < padded; p += 8) {
      Eight sum = {};
      for (int64_t r = 0; r < rank; r++) sum += from[k * padded + r] * load8(move_RP + r * padded + p);
      store8(to + k * padded + p, sum);
    }
}

FLORA_CALLED void write_records(const Update& u, const Stored& stored, const float* values, int64_t i, int64_t column,
                                int64_t num_columns) {
  const Code code = momentum_code(u.size);
  const RecordRoom room = RecordRoom::in(u.room.rounding, code);
  const int64_t line = u.tile.line + i, rank = u.size.rank;
  const Draws draws = {static_cast<uint64_t>(u.options.momentum_keys[u.tile.member]), &line, column, num_columns};
  each_group(draws, 0, stored.count / rank, code, blocks_together(code.room), true, room.bits,
             [&](int64_t k, int64_t count, const uint16_t* bits) {
               for (int64_t n = 0; n < count; n++)
                 memcpy(room.numbers + n * code.room, values + (k + n) * rank, sizeof(float) * rank);
               round_records(code, static_cast<uint8_t*>(stored.at) + k * code.bytes, room.numbers, count, bits, room);
             });
}

FLORA_CALLED void write_momentum(const Update& u, const Stored& stored, const float* values, int64_t i, int64_t column,
                                 int64_t num_columns) {
  if (u.options.squares != nullptr) return;
  if (stored.dtype == kFloat32) {
    memcpy(stored.at, values, sizeof(float) * stored.count);
    return;
  }
  if (stored.dtype == kOctets) return write_records(u, stored, values, i, column, num_columns);
  const Rounding rounding =
      rounding_of(u.size, stored.dtype, u.options.momentum_keys, u.tile.member, num_columns);
  auto* to = static_cast<uint16_t*>(stored.at);
  for (int64_t start = 0; start < stored.count; start += kChunk)
    Rounding::write(rounding, to + start, values + start, smaller(kChunk, stored.count - start), u.tile.line + i,
                    column + start);
}

FLORA_CALLED void write_sketch(const Update& u, const Chunk& chunk, const Stored& stored, const float* values,
                               int64_t i) {
  const int64_t rank = u.size.rank, padded = u.basis.padded;
  const float* narrow = values;
  if (rank != padded) {
    for (int64_t k = 0; k < chunk.k1 - chunk.k0; k++)
      memcpy(u.room.compressed + k * rank, values + k * padded, sizeof(float) * rank);
    narrow = u.room.compressed;  // which D has been made of
  }
  const int64_t per_row = (u.size.num_columns + u.size.block - 1) / u.size.block;
  write_momentum(u, stored, narrow, i, chunk.k0 * rank, per_row * rank);
}

// X of a chunk and its sketch.
FLORA_INLINE void take_sketch(const Update& u, const Chunk& chunk, const float* g, float row, const float* factor,
                              int64_t i) {
  const int64_t blocks = chunk.k1 - chunk.k0;
  normalise(u.room.x, chunk, u.tile, g, row, factor);
  compress_with(u.fresh, u.room.compressed, u.room.x, blocks);
  fill_cut_blocks(u, chunk, i);
}

// The new momentum of a chunk, and D.
template <int kRule>
FLORA_INLINE void advance_sketch(const Update& u, const Chunk& chunk, int64_t i) {
  const int64_t rank = u.size.rank, padded = u.basis.padded;
  const int64_t blocks = chunk.k1 - chunk.k0, count = blocks * padded;
  const Room& room = u.room;
  const Stored stored = stored_momentum(u.size, u.tile, chunk, i);
  read_padded(room.numbers, stored, blocks, u.fresh, room.fresh);
  const float* moved = room.numbers;
  if (u.basis.move != kStays) {
    const float* move_RP = u.basis.move_HRP == nullptr ? nullptr : u.basis.move_HRP + u.tile.matrix * rank * padded;
    move(room.moved, room.numbers, blocks, u.basis, move_RP, rank);
    moved = room.moved;
  }
  for (int64_t n = 0; n < count; n += 8) {
    Eight d;
    store8(room.fresh + n, advance_eight<kRule>(load8(room.compressed + n), load8(room.numbers + n),
                                                load8(moved + n), u.now, d));
    store8(room.difference + n, d);
  }
  write_sketch(u, chunk, stored, room.fresh, i);
}

// The same of rules that keep two moments; U itself where it is X, block by block times a number.
template <int kRule>
FLORA_INLINE void advance_moments_of(const Update& u, const Chunk& chunk, int64_t i) {
  const Room& room = u.room;
  const int64_t rank = u.size.rank, padded = u.basis.padded, blocks = chunk.k1 - chunk.k0;
  const Stored stored = stored_momentum(u.size, u.tile, chunk, i);
  const Moments own = {room.numbers, room.second, room.difference, blocks, rank, padded};
  Stored::read(stored, room.fresh);
  part(own, room.fresh);
  const float* moved = own.first;
  if (u.basis.move != kStays) {
    const float* move_RP = u.basis.move_HRP == nullptr ? nullptr : u.basis.move_HRP + u.tile.matrix * rank * padded;
    move(room.moved, own.first, blocks, u.basis, move_RP, rank);
    spread_second(own);
    moved = room.moved;
  }
  advance_moments(own, room.compressed, moved, u.now);
  join(own, room.fresh);
  const int64_t per_row = (u.size.num_columns + u.size.block - 1) / u.size.block;
  write_momentum(u, stored, room.fresh, i, chunk.k0 * 2 * rank, per_row * 2 * rank);
  const float ratio = static_cast<float>(u.size.block) / rank, root = __builtin_sqrtf(ratio);
  if (kRule == kSubspace)
    weigh(own, room.compressed, u.now.gain * root, 1 / ratio, room.difference);
  else
    scale_blocks(own, room.compressed, root, room.x, u.size.block);
}

FLORA_CALLED void advance_dense(const Update& u, const Chunk& chunk, int64_t i) {
  const Stored stored = stored_momentum(u.size, u.tile, chunk, i);
  float *x = u.room.x + (chunk.lo - chunk.start), *momentum = u.room.old;
  Stored::read(stored, momentum);
  const float beta = u.now.beta1;
  for (int64_t j = 0; j < stored.count; j++) momentum[j] = (1 - beta) * x[j] + beta * momentum[j];
  for (int64_t j = 0; j < stored.count; j++)
    x[j] = u.size.rule == kMix ? x[j] + u.now.gain * momentum[j] : momentum[j];
  write_momentum(u, stored, momentum, i, chunk.lo, u.size.num_columns);
}

// W <- (1 - lr wd) W - rate U of consecutive elements of a line; at most kChunk.
FLORA_CALLED void step_weights(void* weight, int64_t dtype, const float* update, int64_t count, float keep, float rate,
                               const Rounding& rounding, int64_t line, int64_t column, float* buffer) {
  float* w = static_cast<float*>(weight);
  if (dtype != kFloat32) {
    w = buffer;
    widen(w, static_cast<const uint16_t*>(weight), dtype, count);
  }
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(w + j, rounded(keep * load(w + j)) - rate * load(update + j));
  for (; j < count; j++) w[j] = rounded(keep * w[j]) - rate * update[j];
  if (dtype != kFloat32)
    Rounding::write(rounding, static_cast<uint16_t*>(weight), w, count, line, column);
}

// The same of any number of U's elements of row i, from a column on.
FLORA_CALLED void step_line(const Update& u, const float* update, int64_t i, int64_t column, int64_t count, float rate,
                            const Rounding& rounding) {
  const Tile& tile = u.tile;
  const int64_t bytes = u.size.weight_dtype == kFloat32 ? 4 : 2;
  char* w = reinterpret_cast<char*>(tile.weight) + bytes * (i * (tile.last - tile.first) + column - tile.first);
  for (int64_t j = 0; j < count; j += kChunk)
    step_weights(w + bytes * j, u.size.weight_dtype, update + j, smaller(kChunk, count - j), u.now.keep, rate,
                 rounding, tile.line + i, column + j, u.room.weights);
}

// Rows of U up to `last` that fill a strip: each square's singular values are made alike before weights are stepped.
FLORA_CALLED void step_strip(const Update& u, int64_t last, float rate, const Rounding& rounding) {
  const int64_t side = u.size.side, width = u.tile.last - u.tile.first, first = (last - 1) / side * side;
  for (int64_t j = 0; j < width; j += side)
    orthogonalise(u.room.strip + j, width, last - first, smaller(side, width - j), u.room.square);
  for (int64_t i = first; i < last; i++)
    step_line(u, u.room.strip + (i - first) * width, i, u.tile.first, width, rate, rounding);
}

// U of one row: take(update, column, count) of each chunk.
template <int kRule, class Take>
FLORA_INLINE void update_line(const Update& u, const float* g, int64_t i, float row, const Take& take) {
  const Header& size = u.size;
  const float* factor = u.settled.factor + u.tile.matrix * size.num_columns;
  const Sketch& sketch = kRule == kFlora ? u.old : u.fresh;
  const float keep = kept_of(kRule, u.now);
  each_chunk(size, u.tile, [&](const Chunk& chunk) {
    if (kRule == kNone || size.is_dense) {
      normalise(u.room.x, chunk, u.tile, g, row, factor);
      if (kRule != kNone) advance_dense(u, chunk, i);
    } else {
      take_sketch(u, chunk, g, row, factor, i);
      if constexpr (kRule == kSubspace || kRule == kApollo)
        advance_moments_of<kRule>(u, chunk, i);
      else
        advance_sketch<kRule>(u, chunk, i);
      if (kRule != kApollo) add_expanded(sketch, u.room.x, keep, u.room.difference, chunk.k1 - chunk.k0);
    }
    take(u.room.x + (chunk.lo - chunk.start), chunk.lo, chunk.hi - chunk.lo);
  });
}

// One row; returns |U|^2 where that alone is asked for.
template <int kRule>
FLORA_INLINE double finish_line(const Update& u, const float* g, int64_t i, float row, float rate,
                                const Rounding& rounding) {
  const int64_t side = u.size.side, width = u.tile.last - u.tile.first;
  float* strip = side == 0 ? nullptr : u.room.strip + i % side * width - u.tile.first;
  double squares = 0;
  update_line<kRule>(u, g, i, row, [&](const float* update, int64_t column, int64_t count) {
    if (u.options.squares != nullptr)
      squares += square_sum(update, count);
    else if (side != 0)
      memcpy(strip + column, update, sizeof(float) * count);
    else
      step_line(u, update, i, column, count, rate, rounding);
  });
  const bool ends_strip = side != 0 && ((i + 1) % side == 0 || i + 1 == u.tile.num_rows);
  if (ends_strip && u.options.squares == nullptr) step_strip(u, i + 1, rate, rounding);
  return squares;
}

template <int kRule>
void finish_rule(const Plan& plan, int64_t index, const Gradients& given, const Basis& basis, const Now& now,
                 const Settled& settled, const FinishOptions& options, float* scratch) {
  const Header& size = *plan.header;
  const Tile& tile = plan.tiles[index];
  const Room room = room_for(scratch, plan, tile, given, basis);
  const bool clips_input = kRule == kNone || kRule == kBlend || kRule == kMix || kRule == kSubspace;
  const float clip = settled.clip[tile.matrix], factor = clips_input ? clip : 1;
  const float rate = settled.rate[tile.matrix] * (clips_input ? 1 : clip);
  Sketch old, fresh;
  if (kRule != kNone && !size.is_dense) {
    Sketch::read(fresh, matrix_of(basis.new_HRB, size, tile), columns_of(basis, size, tile), size);
    if (kRule == kFlora) Sketch::read(old, matrix_of(basis.old_HRB, size, tile), nullptr, size);
  }
  if constexpr (kRule != kSubspace && kRule != kApollo) {  // which keep two moments
    if (options.squares == nullptr && steps_whole(size, tile, given, basis, fresh)) {
      const auto key_of = [&](const int64_t* keys) {
        return keys == nullptr ? 0 : static_cast<uint64_t>(keys[tile.member]);
      };
      const char* own = reinterpret_cast<const char*>(given.addresses[tile.member]);
      own += (size.weight_dtype == kFloat32 ? 4 : 2) * tile.gradient;
      return finish_tile<kRule>({size, tile, now, fresh.fast, own, settled.rows + tile.new_row,
                                 settled.factor + tile.matrix * size.num_columns, factor, rate,
                                 key_of(options.weight_keys), key_of(options.momentum_keys), room});
    }
  }
  const Update update = {size, tile, basis, now, settled, options, room, old, fresh, factor};
  const Rounding rounding =
      rounding_of(size, size.weight_dtype, options.weight_keys, tile.member, size.num_columns);
  double squares = 0;
  for (int64_t i = 0; i < tile.num_rows; i++) {
    const float* g = gradient_line(plan, tile, given, i, room, room.lines[0]);
    const float fresh = settled.rows[tile.new_row + i];
    const float row = now.sign * row_scale(size, fresh) * factor;
    squares += finish_line<kRule>(update, g, i, row, rate, rounding);
    if (options.squares == nullptr) reinterpret_cast<float*>(tile.row)[i] = fresh;
  }
  if (options.squares != nullptr) options.squares[index] = squares;
}

void finish(const Plan& plan, int64_t index, const Gradients& given, const Basis& basis, const Now& now,
            const Settled& settled, const FinishOptions& options, float* scratch) {
  switch (plan.header->rule) {
    case kNone: return finish_rule<kNone>(plan, index, given, basis, now, settled, options, scratch);
    case kBlend: return finish_rule<kBlend>(plan, index, given, basis, now, settled, options, scratch);
    case kMix: return finish_rule<kMix>(plan, index, given, basis, now, settled, options, scratch);
    case kFlora: return finish_rule<kFlora>(plan, index, given, basis, now, settled, options, scratch);
    case kSubspace: return finish_rule<kSubspace>(plan, index, given, basis, now, settled, options, scratch);
    case kApollo: return finish_rule<kApollo>(plan, index, given, basis, now, settled, options, scratch);
    default: return finish_rule<kStrict>(plan, index, given, basis, now, settled, options, scratch);
  }
}

}  // namespace
}  // namespace flora
