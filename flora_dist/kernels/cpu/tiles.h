// SPDX-License-Identifier: Apache-2.0
// The singular values of a square tile made alike, by three steps Y <- Y (a I + b S + c S^2), S = Y^T Y, of a tile
// that stays in a core's caches; the formulas and their source are in flora_dist/core/step/orthogonal.py.
//
// Y has the smaller side of the tile as its columns, S theirs. S, S^2 and so a I + b S + c S^2 are symmetric: only
// blocks on and below the diagonal are multiplied, and mirrored. Every sum is one thread's and in one order.
#pragma once
#include "hadamard.h"
#include "plan.h"
#include "simd.h"

namespace flora {
namespace {

// A block of a product in registers: so many rows, and vectors beside one another.
#if FLORA_WIDTH == 16
constexpr int kBlockRows = 8, kBlockVectors = 2;
#else
constexpr int kBlockRows = 4, kBlockVectors = 2;
#endif
constexpr int64_t kSquare = 8;  // rows and columns that are mirrored at a time

struct Polynomial {
  float a, b, c;
};
// POLYNOMIALS in orthogonal.py.
constexpr Polynomial kPolynomials[] = {
    {8.3837f, -24.7659f, 18.3571f}, {4.0434f, -3.0114f, 0.5695f}, {3.5056f, -2.6267f, 0.5257f}};
constexpr float kTiny = 1.17549435e-38f;  // the least normal number, and the least that anything is divided by

// A tile at work.
struct Square {
  float* y;        // (rows up to a multiple of 8, stride): zeros beyond the tile
  float* gram;     // (columns, stride): S
  float* factor;   // (columns, stride): a I + b S + c S^2
  float* panel;    // (kBlockRows, stride)
  int64_t rows;    // the larger side
  int64_t columns; // the smaller one
  int64_t padded;  // columns up to a multiple of 16
  int64_t stride;

  FLORA_INLINE Square in(float* memory, int64_t high, int64_t wide) {
    Square s;
    s.rows = larger(high, wide);
    s.columns = smaller(high, wide);
    s.padded = up(s.columns, 16);
    s.stride = square_stride(s.columns);
    s.y = memory;
    s.gram = s.y + up(s.rows, 8) * s.stride;
    s.factor = s.gram + s.padded * s.stride;
    s.panel = s.factor + s.padded * s.stride;
    return s;
  }
};

FLORA_INLINE void load_as(Long& v, const float* p) { v = load_long(p); }
FLORA_INLINE void store_as(float* p, Long v) { store_long(p, v); }
#if FLORA_WIDTH != 8
FLORA_INLINE void load_as(Eight& v, const float* p) { v = load8(p); }
FLORA_INLINE void store_as(float* p, Eight v) { store8(p, v); }
#endif

// sum_k a[i][k] b[k][v] of some rows and vectors, a's rows and numbers so far apart; take(i, v, sum) of each.
template <int kRows, int kVectors, class V, class Take>
FLORA_INLINE void multiply(const float* a, int64_t row, int64_t next, const float* b, int64_t stride, int64_t depth,
                           const Take& take) {
  constexpr int64_t kOwn = sizeof(V) / sizeof(float);
  V sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; k++, a += next, b += stride) {
    V own[kVectors];
    for (int v = 0; v < kVectors; v++) load_as(own[v], b + v * kOwn);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
      for (int v = 0; v < kVectors; v++) sums[i][v] += a[i * row] * own[v];
  }
  for (int i = 0; i < kRows; i++)
    for (int v = 0; v < kVectors; v++) take(i, v * kOwn, sums[i][v]);
}

FLORA_INLINE void transpose(Eight* r) {
  Eight t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = FLORA_SHUFFLE(EightLanes, r[2 * i], r[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    t[2 * i + 1] = FLORA_SHUFFLE(EightLanes, r[2 * i], r[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      r[4 * i + j] = FLORA_SHUFFLE(EightLanes, t[4 * i + j], t[4 * i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[4 * i + j + 2] = FLORA_SHUFFLE(EightLanes, t[4 * i + j], t[4 * i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    const Eight upper = r[i], lower = r[i + 4];
    r[i] = FLORA_SHUFFLE(EightLanes, upper, lower, 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = FLORA_SHUFFLE(EightLanes, upper, lower, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// What is above the diagonal, from what is below it.
FLORA_CALLED void mirror(float* matrix, int64_t padded, int64_t stride) {
  for (int64_t i = kSquare; i < padded; i += kSquare)
    for (int64_t j = 0; j < i; j += kSquare) {
      Eight r[kSquare];
      for (int n = 0; n < kSquare; n++) r[n] = load8(matrix + (i + n) * stride + j);
      transpose(r);
      for (int n = 0; n < kSquare; n++) store8(matrix + (j + n) * stride + i, r[n]);
    }
}

// x^T x (columns, columns) of x (depth, columns), on and below the diagonal: take(place, sum) of each vector.
template <class Take>
FLORA_INLINE void square(const float* x, int64_t depth, const Square& s, const Take& take) {
  constexpr int kRows = kWidth == 16 ? 8 : 4, kVectors = 16 / kWidth;
  for (int64_t i = 0; i < s.padded; i += kSquare) {
    int64_t j = 0;
    for (; j + 16 <= i + kSquare; j += 16)
      for (int64_t r = i; r < i + kSquare; r += kRows)
        multiply<kRows, kVectors, Long>(x + r, 1, s.stride, x + j, s.stride, depth, [&](int64_t n, int64_t v, Long sum) {
          take((r + n) * s.stride + j + v, sum);
        });
    if (j < i + kSquare)
      multiply<kSquare, 1, Eight>(x + i, 1, s.stride, x + j, s.stride, depth, [&](int64_t n, int64_t v, Eight sum) {
        take((i + n) * s.stride + j + v, sum);
      });
  }
}

// S = Y^T Y.
FLORA_CALLED void make_gram(const Square& s) {
  square(s.y, s.rows, s, [&](int64_t at, auto sum) { store_as(s.gram + at, sum); });
  mirror(s.gram, s.padded, s.stride);
}

// a I + b S + c S^2, S being its own transpose.
FLORA_CALLED void make_factor(const Square& s, const Polynomial& p) {
  square(s.gram, s.columns, s, [&](int64_t at, auto sum) {
    auto own = sum;
    load_as(own, s.gram + at);
    store_as(s.factor + at, p.b * own + p.c * sum);
  });
  for (int64_t i = 0; i < s.columns; i++) s.factor[i * s.stride + i] += p.a;
  mirror(s.factor, s.padded, s.stride);
}

// Y <- Y factor, some rows after the others.
template <int kVectors>
FLORA_INLINE void apply_to(const Square& s, float* y, int64_t j) {
  multiply<kBlockRows, kVectors, Long>(
      s.panel, s.stride, 1, s.factor + j, s.stride, s.columns,
      [&](int64_t n, int64_t v, Long sum) { store_long(y + n * s.stride + j + v, sum); });
}
FLORA_CALLED void apply_factor(const Square& s) {
  for (int64_t i = 0; i < s.rows; i += kBlockRows) {
    float* y = s.y + i * s.stride;
    memcpy(s.panel, y, sizeof(float) * kBlockRows * s.stride);
    int64_t j = 0;
    for (; j + kBlockVectors * kWidth <= s.padded; j += kBlockVectors * kWidth) apply_to<kBlockVectors>(s, y, j);
    for (; j < s.padded; j += kWidth) apply_to<1>(s, y, j);
  }
}

FLORA_CALLED float matrix_square_sum(const float* x, int64_t rows, const Square& s) {
  Long sum = {};
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < s.padded; j += kWidth) {
      const Long v = load_long(x + i * s.stride + j);
      sum += v * v;
    }
  float parts[kWidth], whole = 0;
  store_long(parts, sum);
  for (int64_t l = 0; l < kWidth; l++) whole += parts[l];
  return whole;
}

FLORA_CALLED void scale_matrix(float* x, int64_t rows, float by, const Square& s) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < s.padded; j += kWidth)
      store_long(x + i * s.stride + j, by * load_long(x + i * s.stride + j));
}

// NaN stays.
FLORA_INLINE float at_least_tiny(float x) { return x < kTiny ? kTiny : x; }

// Reads a tile, or writes it back times a factor. Y is its transpose where it is wider than high.
FLORA_CALLED void read_tile(const Square& s, const float* from, int64_t pitch, int64_t high, int64_t wide) {
  memset(s.y, 0, sizeof(float) * up(s.rows, 8) * s.stride);
  if (high >= wide)
    for (int64_t i = 0; i < high; i++) memcpy(s.y + i * s.stride, from + i * pitch, sizeof(float) * wide);
  else
    for (int64_t i = 0; i < high; i++)
      for (int64_t j = 0; j < wide; j++) s.y[j * s.stride + i] = from[i * pitch + j];
}

FLORA_CALLED void write_tile(const Square& s, float* to, int64_t pitch, int64_t high, int64_t wide, float by) {
  for (int64_t i = 0; i < high; i++)
    for (int64_t j = 0; j < wide; j++)
      to[i * pitch + j] = by * (high >= wide ? s.y[i * s.stride + j] : s.y[j * s.stride + i]);
}

// One tile in place, of rows `pitch` apart; it keeps its root mean square.
FLORA_CALLED void orthogonalise(float* tile, int64_t pitch, int64_t high, int64_t wide, float* memory) {
  const Square s = Square::in(memory, high, wide);
  const float count = static_cast<float>(high * wide);
  read_tile(s, tile, pitch, high, wide);
  const float size = __builtin_sqrtf(matrix_square_sum(s.y, s.rows, s) / count);
  scale_matrix(s.y, s.rows, 1 / at_least_tiny(size), s);
  make_gram(s);
  // |Y Y^T|^(1/2): no singular value is larger.
  const float largest = at_least_tiny(__builtin_sqrtf(matrix_square_sum(s.gram, s.columns, s)));
  scale_matrix(s.y, s.rows, 1 / __builtin_sqrtf(largest), s);
  scale_matrix(s.gram, s.padded, 1 / largest, s);
  bool has_gram = true;
  for (const Polynomial& polynomial : kPolynomials) {
    if (!has_gram) make_gram(s);
    has_gram = false;
    make_factor(s, polynomial);
    apply_factor(s);
  }
  const float after = __builtin_sqrtf(matrix_square_sum(s.y, s.rows, s) / count);
  write_tile(s, tile, pitch, high, wide, size / at_least_tiny(after));
}

}  // namespace
}  // namespace flora
