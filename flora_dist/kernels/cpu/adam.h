// SPDX-License-Identifier: Apache-2.0
// Rules that step as Adam does inside the sketch; a block keeps R numbers of M and, behind them, R of V:
//     M <- b move(M) + (1-b) c;  V <- b2 V + (1-b2) (c^2 + eps), b corrected for its start
//     subspace  U = X + (gain sqrt(R/B) M / sqrt(V) - (R/B) c) A_new
//     apollo    U = sqrt(B/R) |M / sqrt(V)| / max(|c|, |sqrt(V)| / 10) X, block by block
#pragma once
#include "lines.h"

namespace flora {
namespace {

// Of a sketch's root mean square so far, that it counts for at least; LEAST_OF_USUAL in Python.
constexpr float kLeastOfUsual = 0.1f;

// A chunk's numbers while they are advanced, each block's R of them P apart.
struct Moments {
  float* first;       // M
  float* second;      // V
  float* whitened;    // M / sqrt(V)
  int64_t blocks;
  int64_t rank;
  int64_t padded;
};

// What is kept of a chunk, apart; zeros stand behind R numbers.
FLORA_CALLED void part(const Moments& m, const float* kept) {
  for (int64_t k = 0; k < m.blocks; k++, kept += 2 * m.rank) {
    memset(m.first + k * m.padded, 0, sizeof(float) * m.padded);
    memset(m.second + k * m.padded, 0, sizeof(float) * m.padded);
    memcpy(m.first + k * m.padded, kept, sizeof(float) * m.rank);
    memcpy(m.second + k * m.padded, kept + m.rank, sizeof(float) * m.rank);
  }
}

FLORA_CALLED void join(const Moments& m, float* kept) {
  for (int64_t k = 0; k < m.blocks; k++, kept += 2 * m.rank) {
    memcpy(kept, m.first + k * m.padded, sizeof(float) * m.rank);
    memcpy(kept + m.rank, m.second + k * m.padded, sizeof(float) * m.rank);
  }
}

// A turned block has another number in every place; its mean square is what stays.
FLORA_CALLED void spread_second(const Moments& m) {
  for (int64_t k = 0; k < m.blocks; k++) {
    float* v = m.second + k * m.padded;
    float sum = 0;
    for (int64_t r = 0; r < m.rank; r++) sum += v[r];
    for (int64_t r = 0; r < m.rank; r++) v[r] = sum / m.rank;
  }
}

// The new M and V, from the moved M and the sketch.
FLORA_CALLED void advance_moments(const Moments& m, const float* compressed, const float* moved, const Now& now) {
  const int64_t count = m.blocks * m.padded;
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vec c = load(compressed + n);
    store(m.first + n, (1 - now.beta1) * c + now.beta1 * load(moved + n));
    store(m.second + n, now.beta2 * load(m.second + n) + now.fresh2 * (c * c + now.sketch_eps));
  }
  for (int64_t n = 0; n < count; n++) m.whitened[n] = m.first[n] / __builtin_sqrtf(m.second[n]);
}

// D of `subspace`.
FLORA_CALLED void weigh(const Moments& m, const float* compressed, float gain, float share, float* difference) {
  for (int64_t n = 0; n < m.blocks * m.padded; n += kLanes)
    store(difference + n, gain * load(m.whitened + n) - share * load(compressed + n));
}

// U of `apollo`, in the place of X.
FLORA_CALLED void scale_blocks(const Moments& m, const float* compressed, float ratio, float* x, int64_t block) {
  for (int64_t k = 0; k < m.blocks; k++, x += block) {
    float steps = 0, sizes = 0, usual = 0;
    for (int64_t n = k * m.padded; n < k * m.padded + m.rank; n++) {
      steps += m.whitened[n] * m.whitened[n];
      sizes += compressed[n] * compressed[n];
      usual += m.second[n];
    }
    const float own = __builtin_sqrtf(sizes), least = kLeastOfUsual * __builtin_sqrtf(usual);
    const float scale = ratio * __builtin_sqrtf(steps) / (own < least ? least : own);
    for (int64_t j = 0; j < block; j++) x[j] *= scale;
  }
}

}  // namespace
}  // namespace flora
