// SPDX-License-Identifier: Apache-2.0
// Rows of a tile as fp32 in a cache: the gradient's, the normalised gradient's, the old momentum's.
#pragma once
#include "philox.h"
#include "plan.h"
#include "products.h"
#include "records.h"
#include "rotation.h"
#include "simd.h"

namespace flora {
namespace {

FLORA_INLINE int64_t bytes_of(const Gradients& given) {
  return given.kind == kBFloat16 || given.kind == kFloat16 ? 2 : 4;
}

// Where the row below one of a dense gradient lies; the row itself where there is nothing to wait for.
FLORA_INLINE const char* next_line(const Tile& tile, const Gradients& given, int64_t i, const float* line) {
  if (given.kind == kMissing || is_sketched(given)) return reinterpret_cast<const char*>(line);
  const int64_t at = tile.gradient + (i + 1) * (tile.last - tile.first);
  return reinterpret_cast<const char*>(given.addresses[tile.member]) + bytes_of(given) * at;
}

// Blocks of a row that are in work together, and their columns.
struct Chunk {
  int64_t k0, k1;     // blocks of the whole row
  int64_t start;      // first column of block k0: where buffers of the chunk begin
  int64_t stop;
  int64_t lo, hi;     // columns of the tile among them
};

FLORA_INLINE Chunk chunk_at(const Tile& tile, int64_t k0, int64_t k1, int64_t block) {
  return {k0, k1, k0 * block, k1 * block, larger(tile.first, k0 * block), smaller(tile.last, k1 * block)};
}

// X = G row factor, with row times what X is clipped by; zeros up to whole blocks.
FLORA_CALLED void normalise(float* x, const Chunk& chunk, const Tile& tile, const float* gradient, float row,
                            const float* factor) {
  for (int64_t j = chunk.start; j < chunk.lo; j++) x[j - chunk.start] = 0;
  const float* g = gradient + (chunk.lo - tile.first);
  const float* f = factor + chunk.lo;
  float* to = x + (chunk.lo - chunk.start);
  const int64_t count = chunk.hi - chunk.lo;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, row * load(g + j) * load(f + j));
  for (; j < count; j++) to[j] = row * g[j] * f[j];
  for (int64_t t = chunk.hi; t < chunk.stop; t++) x[t - chunk.start] = 0;
}

FLORA_CALLED float square_sum(const float* x, int64_t count) {
  Vec sums[2] = {};
  int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes)
    for (int v = 0; v < 2; v++) {
      const Vec a = load(x + j + v * kLanes);
      sums[v] += a * a;
    }
  float sum = 0;
  for (; j < count; j++) sum += x[j] * x[j];
  return sum + sum_of(sums[0] + sums[1]);
}

FLORA_CALLED float dot(const float* x, const float* y, int64_t count) {
  Vec sums = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) sums += load(x + j) * load(y + j);
  float sum = 0;
  for (; j < count; j++) sum += x[j] * y[j];
  return sum + sum_of(sums);
}

// The stored momentum of a chunk of row i as it is kept: numbers from its first block, or element, on.
struct Stored {
  int64_t dtype;
  void* at;
  int64_t count;
  const Header* size;

  // Of records, writes up to eight numbers more.
  FLORA_INLINE void read(const Stored& s, float* to) {
    if (s.dtype == kFloat32)
      memcpy(to, s.at, sizeof(float) * s.count);
    else if (s.dtype == kOctets)
      read_records(momentum_code(*s.size), to, static_cast<const uint8_t*>(s.at), s.count / s.size->rank, s.size->rank);
    else
      widen(to, static_cast<const uint16_t*>(s.at), s.dtype, s.count);
  }
};

FLORA_INLINE Stored stored_momentum(const Header& size, const Tile& tile, const Chunk& chunk, int64_t i) {
  char* line = reinterpret_cast<char*>(tile.momentum);
  const int64_t before = chunk.k0 - tile.first / size.block, each = size.rank * size.moments,
                numbers = (chunk.k1 - chunk.k0) * each;
  if (size.momentum_dtype == kOctets)
    return {kOctets, line + i * tile.momentum_stride + before * momentum_code(size).bytes, numbers, &size};
  const int64_t bytes = size.momentum_dtype == kFloat32 ? 4 : 2;
  line += bytes * i * tile.momentum_stride;
  if (size.is_dense) return {size.momentum_dtype, line + bytes * (chunk.lo - tile.first), chunk.hi - chunk.lo, &size};
  return {size.momentum_dtype, line + bytes * before * each, numbers, &size};
}

// The old M of a chunk, a block's R numbers P apart with zeros between; `narrow` is room for them without.
FLORA_CALLED void read_padded(float* to, const Stored& stored, int64_t blocks, const Sketch& sketch, float* narrow) {
  const int64_t rank = sketch.rank, padded = sketch.padded;
  if (rank == padded) return Stored::read(stored, to);
  Stored::read(stored, narrow);
  for (int64_t k = 0; k < blocks; k++) {
    memcpy(to + k * padded, narrow + k * rank, sizeof(float) * rank);
    memset(to + k * padded + rank, 0, sizeof(float) * (padded - rank));
  }
}

FLORA_INLINE const float* matrix_of(const float* sketches_HRB, const Header& size, const Tile& tile) {
  return sketches_HRB == nullptr ? nullptr : sketches_HRB + tile.matrix * size.rank * size.block;
}

FLORA_INLINE const float* columns_of(const Basis& basis, const Header& size, const Tile& tile) {
  return basis.columns_HBP == nullptr ? nullptr : basis.columns_HBP + tile.matrix * size.block * basis.padded;
}

template <class Body>
FLORA_INLINE void each_chunk(const Header& size, const Tile& tile, const Body& body) {
  const int64_t first = tile.first / size.block, last = (tile.last + size.block - 1) / size.block;
  const int64_t together = chunk_blocks(size.block);
  for (int64_t k = first; k < last; k += together)
    body(chunk_at(tile, k, smaller(last, k + together), size.block));
}

FLORA_INLINE int64_t blocks_of_row(const Header& size) { return (size.num_columns + size.block - 1) / size.block; }

// Whether rows are whole, end with a vector, and their momentum has the numbers that fast products make.
FLORA_INLINE bool is_regular(const Header& size, const Tile& tile, const Sketch& sketch) {
  return !tile.is_cut && !size.is_dense && size.moments == 1 && sketch.is_fast && size.rank == sketch.padded &&
         size.num_columns % 16 == 0 && size.num_columns >= size.block;
}

// Whether that is fp32 which can be worked on as it lies.
FLORA_INLINE bool is_plain(const Header& size, const Tile& tile, const Sketch& sketch) {
  return is_regular(size, tile, sketch) && size.momentum_dtype == kFloat32 &&
         tile.momentum_stride == blocks_of_row(size) * size.rank;
}

// Whether it is records that can be read without gaps between the blocks.
FLORA_INLINE bool has_plain_records(const Header& size, const Tile& tile, const Sketch& sketch) {
  if (!is_regular(size, tile, sketch) || size.momentum_dtype != kOctets) return false;
  const Code code = momentum_code(size);
  return code.room == size.rank && tile.momentum_stride == blocks_of_row(size) * code.bytes;
}

// A thread's buffers for a tile.
struct Room {
  float* lines[kLineRows];
  float* x;
  float* old;
  float* compressed;
  float* numbers;
  float* moved;
  float* difference;
  float* second;
  float* fresh;       // of two moments where the rule keeps them
  float* weights;
  Rotation rotation;  // of a gradient in records, and room for a block's numbers
  float* record;
  float* rounding;    // of a momentum in records
  float* strip;       // rows of U that squares are cut from, and one of them
  float* square;

  FLORA_INLINE Room of(float* scratch, int64_t width, int64_t block, int64_t gradient_block, int64_t padded) {
    const int64_t line = up(width + 2 * gradient_block, 16), blocks = chunk_blocks(block);
    const int64_t elements = up(blocks * block, kChunk), numbers = blocks * padded;
    Room room;
    for (int64_t r = 0; r < kLineRows; r++, scratch += line) room.lines[r] = scratch;
    room.x = scratch;
    room.old = room.x + elements;
    room.compressed = room.old + elements;
    room.numbers = room.compressed + numbers;
    room.moved = room.numbers + numbers;
    room.difference = room.moved + numbers;
    room.second = room.difference + numbers;
    room.fresh = room.second + numbers;
    room.weights = room.fresh + 2 * numbers;
    return room;
  }
};

FLORA_INLINE Room room_for(float* scratch, const Plan& plan, const Tile& tile, const Gradients& given,
                           const Basis& basis) {
  const Header& size = *plan.header;
  const int64_t gradient_block = is_sketched(given) ? given.block : 0;
  const int64_t width = tile.last - tile.first;
  float* strip = scratch + record_floats(size, given);
  Room room = Room::of(strip + squares_floats(size, width), width, size.block, gradient_block, basis.padded);
  room.strip = strip;
  room.square = strip + strip_floats(size, width);
  room.rounding = scratch + gradient_floats(given);
  if (given.kind != kRecords) return room;
  const int64_t matrix = tile.line / size.num_rows;
  const auto* sketch = reinterpret_cast<const float*>(given.sketches[tile.member]);
  Rotation::read(room.rotation, sketch + matrix * given.rank * given.block, given.block, given.rank, scratch);
  room.record = scratch + rotation_floats(given.block, given.rank);
  return room;
}

// One row of a gradient that is kept in few bits: G = C A, of its first block on.
FLORA_CALLED const float* recorded_line(const Plan& plan, const Tile& tile, const Gradients& given, int64_t i,
                                        const Room& room, float* buffer) {
  const int64_t block = given.block, k0 = tile.first / block, blocks = (tile.last + block - 1) / block - k0;
  const int64_t place = tile.member * plan.header->num_sources + tile.source;
  const auto* octets = reinterpret_cast<const uint8_t*>(given.addresses[place]);
  octets += (tile.source_line + i) * blocks * given.code.bytes;
  const auto* factor = reinterpret_cast<const float*>(given.factors[place]);
  const int64_t together = blocks_together(larger(block, given.code.room));
  for (int64_t k = 0; k < blocks; k += together) {
    const int64_t count = smaller(together, blocks - k), numbers = count * given.code.room;
    read_records(given.code, room.record, octets + k * given.code.bytes, count, given.code.room);
    for (int64_t r = 0; factor != nullptr && r < numbers; r++) room.record[r] *= *factor;
    rotate_back(room.rotation, buffer + k * block, room.record, count, given.code.room);
  }
  return buffer + (tile.first - k0 * block);
}

// One row of a gradient that is not read where it lies.
FLORA_CALLED const float* made_line(const Plan& plan, const Tile& tile, const Gradients& given, int64_t i,
                                    const Room& room, float* buffer) {
  const int64_t width = tile.last - tile.first;
  if (given.kind == kMissing) {
    memset(buffer, 0, sizeof(float) * width);
    return buffer;
  }
  if (given.kind == kRecords) return recorded_line(plan, tile, given, i, room, buffer);
  if (given.kind == kSketched) {  // G = C A
    const int64_t block = given.block, rank = given.rank, k0 = tile.first / block;
    const int64_t blocks = (tile.last + block - 1) / block - k0, matrix = tile.line / plan.header->num_rows;
    const auto* sums = reinterpret_cast<const float*>(
        given.addresses[tile.member * plan.header->num_sources + tile.source]);
    const auto* sketch = reinterpret_cast<const float*>(given.sketches[tile.member]) + matrix * rank * block;
    sums += (tile.source_line + i) * blocks * rank;
    memset(buffer, 0, sizeof(float) * blocks * block);
    for (int64_t k = 0; k < blocks; k++) expand(buffer + k * block, 0, sums + k * rank, sketch, block, rank);
    return buffer + (tile.first - k0 * block);
  }
  const int64_t at = tile.gradient + i * width;
  widen(buffer, reinterpret_cast<const uint16_t*>(given.addresses[tile.member]) + at, given.kind, width);
  return buffer;
}

// One row of the gradient; a row of fp32 is read where it lies, any other is made in the buffer.
FLORA_INLINE const float* gradient_line(const Plan& plan, const Tile& tile, const Gradients& given, int64_t i,
                                        const Room& room, float* buffer) {
  if (given.kind != kFloat32) return made_line(plan, tile, given, i, room, buffer);
  return reinterpret_cast<const float*>(given.addresses[tile.member]) + tile.gradient + i * (tile.last - tile.first);
}

// M A_old of a chunk of row i, from column chunk.start on.
FLORA_CALLED void old_elements(const Header& size, const Tile& tile, const Chunk& chunk, int64_t i,
                               const Sketch& old, const Room& room) {
  const Stored stored = stored_momentum(size, tile, chunk, i);
  if (size.is_dense) return Stored::read(stored, room.old + (chunk.lo - chunk.start));
  const int64_t blocks = chunk.k1 - chunk.k0;
  read_padded(room.numbers, stored, blocks, old, room.fresh);
  memset(room.old, 0, sizeof(float) * blocks * size.block);
  add_expanded(old, room.old, 0, room.numbers, blocks);
}

}  // namespace
}  // namespace flora
