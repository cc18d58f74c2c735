// SPDX-License-Identifier: Apache-2.0
// Messages 1 and 2 of a tile of a matrix: sums of squares by row and column, what RMS(U) follows from, partial
// sketches of cut blocks.
#pragma once
#include "lines.h"

namespace flora {
namespace {

// kRows rows side by side, each a stream of its own for the prefetcher: |G_i|^2, then the columns' sums.
template <int kRows>
FLORA_INLINE void measure_lines(const Header& size, const Tile& tile, const Now& now, const int64_t* at,
                                const float* const* g, const MeasureSums& sums) {
  const int64_t width = tile.last - tile.first;
  float squares[kRows], inverse[kRows];
  Vec t[kRows][2] = {};
  int64_t j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes)
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < 2; v++) {
        const Vec a = load(g[r] + j + v * kLanes);
        t[r][v] += a * a;
      }
  for (int r = 0; r < kRows; r++) {
    float rest = 0;
    for (int64_t i = j; i < width; i++) rest += g[r][i] * g[r][i];
    squares[r] = rest + sum_of(t[r][0] + t[r][1]);
    inverse[r] = 0;
    if (tile.is_cut) {
      sums.cut_rows[tile.row_slot + at[r]] = squares[r];
      continue;
    }
    // R <- b2 R + (1-b2) rowmean(G^2 + eps)
    const float old = reinterpret_cast<const float*>(tile.row)[at[r]];
    const float fresh = now.beta2 * old + now.fresh2 * (squares[r] / size.num_columns + now.eps);
    sums.rows[tile.new_row + at[r]] = fresh;
    inverse[r] = 1 / fresh;
  }
  float* columns = sums.partial + tile.partial;
  float* scaled = columns + width;
  const bool asks_scaled = size.num_sums > 1 && !tile.is_cut;
  for (j = 0; j + kLanes <= width; j += kLanes) {
    Vec plain = load(columns + j), over = asks_scaled ? load(scaled + j) : Vec{};
    for (int r = 0; r < kRows; r++) {
      const Vec a = load(g[r] + j), square = a * a;
      plain += square;
      over += square * inverse[r];
    }
    store(columns + j, plain);
    if (asks_scaled) store(scaled + j, over);
  }
  for (; j < width; j++)
    for (int r = 0; r < kRows; r++) {
      const float square = g[r][j] * g[r][j];
      columns[j] += square;
      if (asks_scaled) scaled[j] += square * inverse[r];
    }
}

// history: |M A|^2; cross: sum_i G (M A) / sqrt(R_i), of whole rows.
FLORA_CALLED double add_history(const Header& size, const Tile& tile, const Now& now, const Basis& basis, int64_t i,
                                const float* g, const MeasureSums& sums, const Room& room) {
  const int64_t width = tile.last - tile.first;
  float* cross = sums.partial + tile.partial + 2 * width;
  const float scale = tile.is_cut ? 0 : now.sign / __builtin_sqrtf(sums.rows[tile.new_row + i]);
  double history = 0;
  each_chunk(size, tile, [&](const Chunk& chunk) {
    old_elements(room.old, room.numbers, size, tile, chunk, i, matrix_of(basis.old_HRB, size, tile));
    const float* old = room.old + (chunk.lo - chunk.start);
    const int64_t count = chunk.hi - chunk.lo, offset = chunk.lo - tile.first;
    history += square_sum(old, count);
    if (tile.is_cut) return;
    for (int64_t j = 0; j < count; j++) cross[offset + j] += scale * g[offset + j] * old[j];
  });
  return history;
}

FLORA_CALLED double weight_square_sum(const Header& size, const Tile& tile, float* buffer) {
  const int64_t count = tile.num_rows * (tile.last - tile.first);
  double sum = 0;
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t some = smaller(kChunk, count - start);
    const float* w = reinterpret_cast<const float*>(tile.weight) + start;
    if (size.weight_dtype != kFloat32) {
      widen(buffer, reinterpret_cast<const uint16_t*>(tile.weight) + start, size.weight_dtype, some);
      w = buffer;
    }
    sum += square_sum(w, some);
  }
  return sum;
}

void measure(const Plan& plan, int64_t index, const Gradients& given, const Basis& basis, const Now& now,
             const MeasureSums& sums, float* scratch) {
  const Header& size = *plan.header;
  const Tile& tile = plan.tiles[index];
  const Room room = room_for(scratch, size, tile, given, basis);
  const int64_t width = tile.last - tile.first, stride = tile.num_rows / kLineRows;
  memset(sums.partial + tile.partial, 0, sizeof(float) * size.num_sums * width);
  double history = 0;
  const float* g[kLineRows];
  int64_t at[kLineRows];
  for (int64_t i = 0; i < stride; i++) {  // rows a quarter of the tile apart
    for (int64_t r = 0; r < kLineRows; r++) {
      at[r] = r * stride + i;
      g[r] = gradient_line(plan, tile, given, at[r], room.lines[r]);
    }
    measure_lines<kLineRows>(size, tile, now, at, g, sums);
    if (size.num_sums == 3)
      for (int64_t r = 0; r < kLineRows; r++) history += add_history(size, tile, now, basis, at[r], g[r], sums, room);
  }
  for (int64_t i = kLineRows * stride; i < tile.num_rows; i++) {
    at[0] = i;
    g[0] = gradient_line(plan, tile, given, i, room.lines[0]);
    measure_lines<1>(size, tile, now, at, g, sums);
    if (size.num_sums == 3) history += add_history(size, tile, now, basis, i, g[0], sums, room);
  }
  sums.scalars[kMatrixSums * index] = history;
  sums.scalars[kMatrixSums * index + 1] = size.sums_weight ? weight_square_sum(size, tile, room.weights) : 0;
}

// What of a cut tile is summed once the normalisation is known.
void couple(const Plan& plan, int64_t index, const Gradients& given, const Basis& basis, const Now& now,
            const Settled& settled, const CoupleSums& sums, float* scratch) {
  const Header& size = *plan.header;
  const Tile& tile = plan.tiles[index];
  const Room room = room_for(scratch, size, tile, given, basis);
  const float* factor = settled.factor + tile.matrix * size.num_columns;
  double squares = 0, cross = 0;
  for (int64_t i = 0; i < tile.num_rows; i++) {
    const float* g = gradient_line(plan, tile, given, i, room.lines[0]);
    const float row = now.sign / __builtin_sqrtf(settled.rows[tile.new_row + i]);
    each_chunk(size, tile, [&](const Chunk& chunk) {
      const int64_t skip = chunk.lo - chunk.start, count = chunk.hi - chunk.lo;
      normalise(room.x, chunk, tile, g, row, factor);
      squares += square_sum(room.x + skip, count);
      if (sums.asks_cross) {
        old_elements(room.old, room.numbers, size, tile, chunk, i, matrix_of(basis.old_HRB, size, tile));
        cross += dot(room.x + skip, room.old + skip, count);
      }
      if (!sums.asks_blocks) return;
      const float* columns = basis.columns_HBP + tile.matrix * size.block * basis.padded;
      const int64_t edges[2] = {tile.first / size.block, (tile.last - 1) / size.block};
      const int64_t slots[2] = {tile.head_slot, tile.tail_slot};
      for (int e = 0; e < 2; e++) {
        if (slots[e] < 0 || edges[e] < chunk.k0 || edges[e] >= chunk.k1) continue;
        compress(room.compressed, room.x + (edges[e] - chunk.k0) * size.block, 1, columns, size.block, basis.padded);
        memcpy(sums.blocks + (slots[e] + i) * size.rank, room.compressed, sizeof(float) * size.rank);
      }
    });
  }
  sums.scalars[kMatrixSums * index] = squares;
  sums.scalars[kMatrixSums * index + 1] = cross;
}

}  // namespace
}  // namespace flora
