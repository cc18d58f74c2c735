// SPDX-License-Identifier: Apache-2.0
// Elements in memory as vectors of floats, and back: float32, or bfloat16 rounded to the nearest or by random bits.
#pragma once
#include "hadamard.h"
#include "philox.h"

namespace flora {
namespace {

struct Single {
  typedef float Element;
  static constexpr bool kHasBits = false;
  FLORA_INLINE Long load(const float* p) { return load_long(p); }
  FLORA_INLINE void store(float* p, Long v, const uint16_t*) { store_long(p, v); }
};

typedef uint16_t Halves __attribute__((vector_size(2 * FLORA_WIDTH), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(4 * FLORA_WIDTH)));

// By hand where compilers convert one half after the other (GCC 12).
FLORA_INLINE Words words_of(const uint16_t* p) {
#if FLORA_WIDTH == 8 && defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
#endif
}
FLORA_INLINE void store_upper(uint16_t* p, Long v, Words rounded) {
  const Words kept = v == v ? rounded >> 16 : Words{} + 0x7FC0u;
#if FLORA_WIDTH == 8 && defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
  const __m256i joined = _mm256_permute4x64_epi64(packed, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
#else
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(kept, Halves);
#endif
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

}  // namespace
}  // namespace flora
