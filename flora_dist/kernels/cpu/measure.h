// SPDX-License-Identifier: Apache-2.0
// Messages 1 and 2 of a tile of a matrix: sums of squares by row and column, what RMS(U) follows from, partial
// sketches of cut blocks.
#pragma once
#include "lines.h"

namespace flora {
namespace {

// Rows as fp32, and where those that are read next lie in memory.
template <int kRows>
struct Lines {
  const float* g[kRows];
  const char* next[kRows];
  int64_t bytes;  // of an element there
};

// Column sums of kRows rows: of G^2, and of G^2 / R where kScaled. Memory would rest meanwhile: the next rows are
// asked for.
template <int kRows, bool kScaled>
FLORA_CALLED void add_columns(float* plain, const Lines<kRows>& lines, const float* inverse, int64_t width) {
  const Lines<kRows> own = lines;
  const float* const* g = own.g;
  Vec over[kRows];
  float* scaled = plain + width;
  for (int r = 0; r < kRows; r++) {
    over[r] = spread(inverse[r]);
  }
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    if (j % 16 == 0)
      for (int r = 0; r < kRows; r++) __builtin_prefetch(own.next[r] + own.bytes * j);
    Vec sum = load(plain + j), sum_over = kScaled ? load(scaled + j) : Vec{};
    for (int r = 0; r < kRows; r++) {
      const Vec a = load(g[r] + j), square = a * a;
      sum += square;
      if (kScaled) sum_over += square * over[r];
    }
    store(plain + j, sum);
    if (kScaled) store(scaled + j, sum_over);
  }
  for (; j < width; j++)
    for (int r = 0; r < kRows; r++) {
      const float square = g[r][j] * g[r][j];
      plain[j] += square;
      if (kScaled) scaled[j] += square * inverse[r];
    }
}

// |G_i|^2 of kRows rows side by side, each a stream of its own for the prefetcher.
template <int kRows>
FLORA_INLINE void add_rows(float* squares, const float* const* rows, int64_t width) {
  const float* g[kRows];
  Vec sums[kRows][2] = {};
  for (int r = 0; r < kRows; r++) g[r] = rows[r];
  int64_t j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes)
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < 2; v++) {
        const Vec a = load(g[r] + j + v * kLanes);
        sums[r][v] += a * a;
      }
  for (int r = 0; r < kRows; r++) {
    float rest = 0;
    for (int64_t i = j; i < width; i++) rest += g[r][i] * g[r][i];
    squares[r] = rest + sum_of(sums[r][0] + sums[r][1]);
  }
}

template <int kRows>
FLORA_INLINE void measure_lines(const Header& size, const Tile& tile, const Now& now, const int64_t* at,
                                const Lines<kRows>& lines, const MeasureSums& sums) {
  const int64_t width = tile.last - tile.first;
  float squares[kRows], inverse[kRows];
  add_rows<kRows>(squares, lines.g, width);
  for (int r = 0; r < kRows; r++) {
    inverse[r] = 0;
    if (tile.is_cut) {
      if (sums.elements == nullptr) {
        sums.cut_rows[tile.row_slot + at[r]] = squares[r];
        continue;
      }
      float* line = sums.elements + (tile.row_slot + at[r]) * size.num_columns + tile.first;
      for (int64_t j = 0; j < width; j++) line[j] = now.sign * lines.g[r][j];
      continue;
    }
    // R <- b2 R + (1-b2) rowmean(G^2 + eps)
    const float old = reinterpret_cast<const float*>(tile.row)[at[r]];
    const float fresh = now.beta2 * old + now.fresh2 * (squares[r] / size.num_columns + now.eps);
    sums.rows[tile.new_row + at[r]] = fresh;
    inverse[r] = size.normalise == kColumns ? 1 : 1 / fresh;
  }
  float* columns = sums.partial + tile.partial;
  if (size.num_sums > 1 && !tile.is_cut)
    add_columns<kRows, true>(columns, lines, inverse, width);
  else
    add_columns<kRows, false>(columns, lines, inverse, width);
}

FLORA_INLINE void add_products(float* to, float scale, const float* x, const float* y, int64_t count) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, load(to + j) + scale * load(x + j) * load(y + j));
  for (; j < count; j++) to[j] += scale * x[j] * y[j];
}

// The same of a block by fast products; it may be one that a row's end cuts.
template <int kBlock>
FLORA_INLINE void add_history_block(Long& squares, float* cross, const float* placed, const float* g, float scale,
                                    int64_t columns, const Hadamard& h) {
  Long e[kBlock / kWidth];
  load_transform<kBlock>(e, placed);
#pragma GCC unroll 16
  for (int v = 0; v < kBlock / kWidth; v++) {
    if (v * kWidth >= columns) break;
    squares += e[v] * e[v];
    const Long scaled = scale * load_long(g + v * kWidth) * load_long(h.sign + v * kWidth);
    store_long(cross + v * kWidth, load_long(cross + v * kWidth) + scaled * e[v]);
  }
}

// And of a row.
template <int kBlock>
FLORA_CALLED float add_history_fast(float* cross, const float* momentum, const float* g, float scale, int64_t width,
                                    const Hadamard& h) {
  alignas(64) float placed[kChunk];
  Long squares = {};
  for (int64_t start = 0; start < width; start += kChunk) {
    const int64_t stop = smaller(start + kChunk, width), blocks = up(stop - start, kBlock) / kBlock;
    place_rows<kBlock>(placed, momentum, blocks, h);
    momentum += blocks * h.padded;
    int64_t j = start;
    for (; j + kBlock <= stop; j += kBlock)
      add_history_block<kBlock>(squares, cross + j, placed + (j - start), g + j, scale, kBlock, h);
    if (j < stop) add_history_block<kBlock>(squares, cross + j, placed + (j - start), g + j, scale, stop - j, h);
  }
  float parts[kWidth], sum = 0;
  store_long(parts, squares);
  for (int64_t l = 0; l < kWidth; l++) sum += parts[l];
  return sum;
}

// history: |M A|^2; cross: sum_i G (M A) / sqrt(R_i), of whole rows, or the products of a cut one.
FLORA_CALLED double add_history(const Header& size, const Tile& tile, const Now& now, const Sketch& old, int64_t i,
                                const float* g, const MeasureSums& sums, const Room& room) {
  const int64_t width = tile.last - tile.first;
  float* cross = sums.partial + tile.partial + 2 * width;
  float scale = 0;
  if (!tile.is_cut) {
    scale = now.sign * row_scale(size, sums.rows[tile.new_row + i]);
  } else if (sums.products != nullptr) {
    cross = sums.products + (tile.row_slot + i) * size.num_columns + tile.first;
    scale = now.sign;
  }
  if (is_plain(size, tile, old)) {
    const float* momentum = reinterpret_cast<const float*>(tile.momentum) + i * tile.momentum_stride;
    float sum = 0;
    by_block(size.block, [&](auto block) {
      sum = add_history_fast<block.value>(cross, momentum, g, scale, width, old.fast);
    });
    return sum;
  }
  double history = 0;
  each_chunk(size, tile, [&](const Chunk& chunk) {
    old_elements(size, tile, chunk, i, old, room);
    const float* x = room.old + (chunk.lo - chunk.start);
    const int64_t count = chunk.hi - chunk.lo, offset = chunk.lo - tile.first;
    history += square_sum(x, count);
    if (scale != 0) add_products(cross + offset, scale, g + offset, x, count);
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
  const Room room = room_for(scratch, plan, tile, given, basis);
  const int64_t width = tile.last - tile.first, stride = tile.num_rows / kLineRows;
  memset(sums.partial + tile.partial, 0, sizeof(float) * size.num_sums * width);
  double history = 0;
  Sketch old;
  if (size.num_sums == 3 && !size.is_dense) Sketch::read(old, matrix_of(basis.old_HRB, size, tile), nullptr, size);
  Lines<kLineRows> lines;
  int64_t at[kLineRows];
  for (int64_t i = 0; i < stride; i++) {  // rows a quarter of the tile apart
    for (int64_t r = 0; r < kLineRows; r++) {
      at[r] = r * stride + i;
      lines.g[r] = gradient_line(plan, tile, given, at[r], room, room.lines[r]);
      lines.next[r] = next_line(tile, given, at[r], lines.g[r]);
    }
    lines.bytes = bytes_of(given);
    measure_lines<kLineRows>(size, tile, now, at, lines, sums);
    if (size.num_sums == 3)
      for (int64_t r = 0; r < kLineRows; r++) history += add_history(size, tile, now, old, at[r], lines.g[r], sums, room);
  }
  for (int64_t i = kLineRows * stride; i < tile.num_rows; i++) {
    const float* g = gradient_line(plan, tile, given, i, room, room.lines[0]);
    measure_lines<1>(size, tile, now, &i, {{g}, {next_line(tile, given, i, g)}, bytes_of(given)}, sums);
    if (size.num_sums == 3) history += add_history(size, tile, now, old, i, g, sums, room);
  }
  sums.scalars[kMatrixSums * index] = history;
  sums.scalars[kMatrixSums * index + 1] = size.sums_weight ? weight_square_sum(size, tile, room.weights) : 0;
}

// What of a cut tile is summed once the normalisation is known.
void couple(const Plan& plan, int64_t index, const Gradients& given, const Basis& basis, const Now& now,
            const Settled& settled, const CoupleSums& sums, float* scratch) {
  const Header& size = *plan.header;
  const Tile& tile = plan.tiles[index];
  const Room room = room_for(scratch, plan, tile, given, basis);
  const float* factor = settled.factor + tile.matrix * size.num_columns;
  double squares = 0, cross = 0;
  Sketch old, fresh;
  if (sums.asks_cross && !size.is_dense) Sketch::read(old, matrix_of(basis.old_HRB, size, tile), nullptr, size);
  if (sums.asks_blocks)
    Sketch::read(fresh, matrix_of(basis.new_HRB, size, tile), columns_of(basis, size, tile), size);
  for (int64_t i = 0; i < tile.num_rows; i++) {
    const float* g = gradient_line(plan, tile, given, i, room, room.lines[0]);
    const float row = now.sign * row_scale(size, settled.rows[tile.new_row + i]);
    each_chunk(size, tile, [&](const Chunk& chunk) {
      const int64_t skip = chunk.lo - chunk.start, count = chunk.hi - chunk.lo;
      normalise(room.x, chunk, tile, g, row, factor);
      squares += square_sum(room.x + skip, count);
      if (sums.asks_cross) {
        old_elements(size, tile, chunk, i, old, room);
        cross += dot(room.x + skip, room.old + skip, count);
      }
      if (!sums.asks_blocks) return;
      const int64_t edges[2] = {tile.first / size.block, (tile.last - 1) / size.block};
      const int64_t slots[2] = {tile.head_slot, tile.tail_slot};
      for (int e = 0; e < 2; e++) {
        if (slots[e] < 0 || edges[e] < chunk.k0 || edges[e] >= chunk.k1) continue;
        compress_with(fresh, room.compressed, room.x + (edges[e] - chunk.k0) * size.block, 1);
        memcpy(sums.blocks + (slots[e] + i) * size.rank, room.compressed, sizeof(float) * size.rank);
      }
    });
  }
  sums.scalars[kMatrixSums * index] = squares;
  sums.scalars[kMatrixSums * index + 1] = cross;
}

}  // namespace
}  // namespace flora
