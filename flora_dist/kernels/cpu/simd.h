// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as the instruction set that this is compiled for, and conversions of 16-bit floats.
//
// Nothing here may be an inline function of the standard library: its copies of all instruction sets would be
// merged at link time, and an old CPU could be given the newest one's.
#pragma once
#include <cstdint>
#include <cstring>

// 256 bits with AVX-512 too: 512 were slower in every pass on Zen 4, and no faster in memory's time elsewhere.
#if defined(__AVX__)
#define FLORA_LANES 8
#else
#define FLORA_LANES 4
#endif

#define FLORA_INLINE static inline __attribute__((always_inline))
// For what works on a chunk or a row: a call costs nothing there, and copies of it minutes of compiling.
#define FLORA_CALLED static __attribute__((noinline))

#if defined(__clang__) || __GNUC__ >= 12
#define FLORA_SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FLORA_SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

namespace flora {
namespace {

constexpr int64_t kLanes = FLORA_LANES;
typedef float Vec __attribute__((vector_size(4 * FLORA_LANES)));
typedef float VecAnywhere __attribute__((vector_size(4 * FLORA_LANES), aligned(4)));
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightLanes __attribute__((vector_size(32)));
typedef float EightAnywhere __attribute__((vector_size(32), aligned(4)));

FLORA_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
FLORA_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecAnywhere*>(p) = v; }
FLORA_INLINE Eight load8(const float* p) { return *reinterpret_cast<const EightAnywhere*>(p); }
FLORA_INLINE void store8(float* p, Eight v) { *reinterpret_cast<EightAnywhere*>(p) = v; }
FLORA_INLINE Vec spread(float x) { return x - Vec{}; }
// A product that is rounded by itself, as two operators of torch round it: contracted with what is taken off,
// the decay of a weight would part from theirs by half a step of the weight, which is much beside an update.
#if defined(__x86_64__)
#define FLORA_REGISTER "+x"
#elif defined(__aarch64__)
#define FLORA_REGISTER "+w"
#endif
#if defined(FLORA_REGISTER)
FLORA_INLINE Vec rounded(Vec v) { __asm__("" : FLORA_REGISTER(v)); return v; }
FLORA_INLINE float rounded(float v) { __asm__("" : FLORA_REGISTER(v)); return v; }
#else
FLORA_INLINE Vec rounded(Vec v) { volatile Vec t = v; return t; }
FLORA_INLINE float rounded(float v) { volatile float t = v; return t; }
#endif
FLORA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FLORA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

FLORA_INLINE float sum_of(Vec v) {
  float t[FLORA_LANES];
  store(t, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) t[i] += t[i + width];
  return t[0];
}

// Eight vectors of eight numbers to a number each: halves of them joined, then quarters, then pairs.
template <class Join>
FLORA_INLINE Eight fold_eights(const float* t, const Join& join) {
  Eight own[8], half[4], pairs[2];
  for (int i = 0; i < 8; i++) own[i] = load8(t + 8 * i);
  for (int i = 0; i < 4; i++)
    half[i] = join(FLORA_SHUFFLE(EightLanes, own[i], own[i + 4], 0, 1, 2, 3, 8, 9, 10, 11),
                   FLORA_SHUFFLE(EightLanes, own[i], own[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  for (int i = 0; i < 2; i++)
    pairs[i] = join(FLORA_SHUFFLE(EightLanes, half[2 * i], half[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13),
                    FLORA_SHUFFLE(EightLanes, half[2 * i], half[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15));
  return join(FLORA_SHUFFLE(EightLanes, pairs[0], pairs[1], 0, 2, 8, 10, 4, 6, 12, 14),
              FLORA_SHUFFLE(EightLanes, pairs[0], pairs[1], 1, 3, 9, 11, 5, 7, 13, 15));
}

FLORA_INLINE uint32_t bits_of(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}
FLORA_INLINE float float_of(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

FLORA_INLINE float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// Exponent and mantissa moved in place, then scaled by 2^112: exact, below the normal numbers too.
FLORA_INLINE float from_fp16(uint16_t h) {
  const uint32_t rest = static_cast<uint32_t>(h & 0x7FFF) << 13;
  const float scaled = float_of(rest) * float_of(0x77800000u);
  const uint32_t special = (h & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
  return float_of(bits_of(scaled) | special | (static_cast<uint32_t>(h & 0x8000) << 16));
}

FLORA_INLINE uint16_t to_bf16_nearest(float x) {
  const uint32_t b = bits_of(x);
  const uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
  return x != x ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

// A float32 is a bfloat16 followed by 16 bits: u added to these carries with the wanted probability.
FLORA_INLINE uint16_t to_bf16_stochastic(float x, uint16_t u) {
  return x != x ? 0x7FC0 : static_cast<uint16_t>((bits_of(x) + u) >> 16);
}

FLORA_INLINE uint16_t sign16(float x) { return static_cast<uint16_t>((bits_of(x) >> 16) & 0x8000); }

// From |x| whose bits below those of fp16 are decided: `carry` is what is added before they are cut off.
FLORA_INLINE uint16_t to_fp16_normal(uint32_t magnitude, uint32_t carry) {
  const uint32_t moved = (magnitude + carry) >> 13;
  return moved >= 0x23C00 ? 0x7C00 : static_cast<uint16_t>(moved - 0x1C000);
}

FLORA_INLINE uint16_t to_fp16_nearest(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(0x7E00 | sign16(x));
  if (magnitude < 0x38800000) {  // below 2^-14: adding 2^-1 leaves multiples of 2^-24, rounded to nearest
    const uint32_t steps = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    return static_cast<uint16_t>(steps | sign16(x));
  }
  return static_cast<uint16_t>(to_fp16_normal(magnitude, 0xFFF + ((magnitude >> 13) & 1)) | sign16(x));
}

// floor(|x| / spacing + u / 65536) spacings: 13 bits are cut off, so 13 bits of u decide.
FLORA_INLINE uint16_t to_fp16_stochastic(float x, uint16_t u) {
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(0x7E00 | sign16(x));
  if (magnitude < 0x38800000) {
    const double steps = static_cast<double>(float_of(magnitude)) * 16777216.0 + u * (1.0 / 65536.0);
    return static_cast<uint16_t>(static_cast<uint32_t>(steps) | sign16(x));
  }
  return static_cast<uint16_t>(to_fp16_normal(magnitude, u >> 3) | sign16(x));
}

}  // namespace
}  // namespace flora
