// SPDX-License-Identifier: Apache-2.0
// The step of a tile of a 1-D parameter: V <- b2 V + (1-b2) (G^2 + eps);  X = G / sqrt(V);  M and U as where A = I.
#pragma once
#include "finish.h"

namespace flora {
namespace {

struct VectorChunk {
  int64_t offset;  // in the tile
  int64_t count;
};

// The new V and X of a chunk; returns the gradient as fp32.
FLORA_CALLED const float* advance_second(const Tile& tile, const Gradients& given, const Now& now,
                                         const VectorChunk& chunk, float* second, float* x, float* buffer) {
  const auto* old = reinterpret_cast<const float*>(tile.row) + chunk.offset;
  const float* g = buffer;
  if (given.kind == kMissing) {
    memset(buffer, 0, sizeof(float) * chunk.count);
  } else {
    const int64_t at = tile.gradient + chunk.offset, address = given.addresses[tile.member];
    if (given.kind == kFloat32)
      g = reinterpret_cast<const float*>(address) + at;
    else
      widen(buffer, reinterpret_cast<const uint16_t*>(address) + at, given.kind, chunk.count);
  }
  for (int64_t j = 0; j < chunk.count; j++) {
    second[j] = now.beta2 * old[j] + now.fresh2 * (g[j] * g[j] + now.eps);
    x[j] = now.sign * g[j] * (1 / __builtin_sqrtf(second[j]));
  }
  return g;
}

FLORA_INLINE Stored stored_vector(const Header& size, const Tile& tile, const VectorChunk& chunk) {
  const int64_t bytes = size.momentum_dtype == kFloat32 ? 4 : 2;
  return {size.momentum_dtype, reinterpret_cast<char*>(tile.momentum) + bytes * chunk.offset, chunk.count, &size};
}

void measure_vector(const Plan& plan, int64_t index, const Gradients& given, const Now& now, const VectorSums& sums,
                    float* scratch) {
  const Header& size = *plan.header;
  const Tile& tile = plan.tiles[index];
  float *second = scratch, *x = second + kChunk, *old = x + kChunk, *buffer = old + kChunk;
  double clipped = 0, seconds = 0, sizes = 0;
  const int64_t width = tile.last - tile.first;
  for (VectorChunk chunk = {0, 0}; chunk.offset < width; chunk.offset += kChunk) {
    chunk.count = smaller(kChunk, width - chunk.offset);
    const float* g = advance_second(tile, given, now, chunk, second, x, buffer);
    if (size.rule == kFlora) {  // what is clipped is U
      Stored::read(stored_vector(size, tile, chunk), old);
      for (int64_t j = 0; j < chunk.count; j++) x[j] = (1 - now.beta1) * x[j] + now.beta1 * old[j];
    }
    clipped += square_sum(x, chunk.count);
    for (int64_t j = 0; j < chunk.count; j++) {
      seconds += second[j];
      sizes += __builtin_fabsf(g[j]);
    }
  }
  sums.scalars[kVectorSums * index] = clipped;
  sums.scalars[kVectorSums * index + 1] = size.sums_weight ? weight_square_sum(size, tile, buffer) : 0;
  sums.scalars[kVectorSums * index + 2] = seconds;
  sums.scalars[kVectorSums * index + 3] = sizes;
}

void finish_vector(const Plan& plan, int64_t index, const Gradients& given, const Now& now, const Settled& settled,
                   const FinishOptions& options, float* scratch) {
  const Header& size = *plan.header;
  const Tile& tile = plan.tiles[index];
  float *second = scratch, *x = second + kChunk, *old = x + kChunk, *buffer = old + kChunk;
  const bool clips_input = size.rule != kFlora;
  const float clip = settled.clip[tile.matrix], factor = clips_input ? clip : 1;
  const float rate = settled.rate[tile.matrix] * (clips_input ? 1 : clip);
  const Rounding of_weight = rounding_of(size, size.weight_dtype, options.weight_keys, tile.member, size.num_columns);
  const Rounding of_momentum =
      rounding_of(size, size.momentum_dtype, options.momentum_keys, tile.member, size.num_columns);
  const int64_t width = tile.last - tile.first, bytes = size.weight_dtype == kFloat32 ? 4 : 2;
  for (VectorChunk chunk = {0, 0}; chunk.offset < width; chunk.offset += kChunk) {
    chunk.count = smaller(kChunk, width - chunk.offset);
    const int64_t column = tile.first + chunk.offset;
    advance_second(tile, given, now, chunk, second, x, buffer);
    memcpy(reinterpret_cast<float*>(tile.row) + chunk.offset, second, sizeof(float) * chunk.count);
    if (size.rule == kNone) {
      for (int64_t j = 0; j < chunk.count; j++) x[j] *= factor;
    } else {
      const Stored stored = stored_vector(size, tile, chunk);
      Stored::read(stored, old);
      for (int64_t j = 0; j < chunk.count; j++)
        old[j] = (1 - now.beta1) * (x[j] * factor) + now.beta1 * old[j];
      if (stored.dtype == kFloat32)
        memcpy(stored.at, old, sizeof(float) * chunk.count);
      else
        Rounding::write(of_momentum, static_cast<uint16_t*>(stored.at), old, chunk.count, 0, column);
      for (int64_t j = 0; j < chunk.count; j++)
        x[j] = size.rule == kMix ? x[j] * factor + now.gain * old[j] : old[j];
    }
    step_weights(reinterpret_cast<char*>(tile.weight) + bytes * chunk.offset, size.weight_dtype, x, chunk.count,
                 now.keep, rate, of_weight, 0, column, buffer);
  }
}

}  // namespace
}  // namespace flora
