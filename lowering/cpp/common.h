// Shared by every kernel: element conversion, rounding to a grid, scratch memory.
// QUARK_AVX512 is defined when the target has AVX512F/BW/VL/VNNI; without it the portable code below is used.
#ifndef QUARK_COMMON_H
#define QUARK_COMMON_H
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#if defined(QUARK_AVX512)
#include <immintrin.h>
#endif

namespace quark {

// Round to the precision of T, as torch does after every operation on a T.
template <typename T>
inline float rounded(float v) { return float(T(v)); }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// 64-byte aligned memory, owned by the caller.
inline std::unique_ptr<uint8_t, Free> scratch(int64_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(p));
}

// 64-byte aligned memory that the calling thread keeps from call to call, each SLOT its own; it only grows.
template <int SLOT>
inline uint8_t* kept_memory(int64_t bytes) {
  thread_local std::unique_ptr<uint8_t, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    memory = scratch(bytes);
    size = bytes;
  }
  return memory.get();
}

inline constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

// E8M0 byte to 2^(e - 127): 0 is the subnormal 2^-127, 255 is NaN.
inline float e8m0(uint8_t e) {
  return from_bits(e == 0 ? 0x00400000u : (uint32_t(e) << 23) | (uint32_t(e == 255) << 22));
}

// Half to even on the grid of a small float format: 2^man_bits steps an octave, `least` the subnormal step.
// |v| must be far below 2^127 and already saturated; NaN stays NaN.
inline float round_to_grid(float v, int man_bits, float least) {
  const float octave = from_bits(to_bits(v) & 0x7f800000u);
  const float step = std::max(octave * from_bits(uint32_t(127 - man_bits) << 23), least);
  const float magic = step * 12582912.0f;  // 1.5 * 2^23: adding it leaves multiples of step
  return (v + magic) - magic;
}

#if defined(QUARK_AVX512)
inline __m512 round_to_grid(__m512 v, int man_bits, float least) {
  const __m512 octave = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7f800000)));
  const __m512 scaled = _mm512_mul_ps(octave, _mm512_set1_ps(from_bits(uint32_t(127 - man_bits) << 23)));
  const __m512 step = _mm512_max_ps(scaled, _mm512_set1_ps(least));
  const __m512 magic = _mm512_mul_ps(step, _mm512_set1_ps(12582912.0f));
  return _mm512_sub_ps(_mm512_add_ps(v, magic), magic);
}

// 16 elements as float32; only the first n are read, the rest are 0.
inline __m512 load16(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(n < 16 ? (1u << n) - 1 : 0xffffu, p); }
inline __m512 load16(const at::BFloat16* p, int64_t n) {
  const __m256i h = _mm256_maskz_loadu_epi16(n < 16 ? (1u << n) - 1 : 0xffffu, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline __m512 load16(const at::Half* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(n < 16 ? (1u << n) - 1 : 0xffffu, p));
}

// rounded() of 16.
template <typename T>
inline __m512 rounded_to(__m512 v);
template <>
inline __m512 rounded_to<float>(__m512 v) { return v; }
template <>
inline __m512 rounded_to<at::Half>(__m512 v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <>
inline __m512 rounded_to<at::BFloat16>(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i kept = _mm512_and_si512(up, _mm512_set1_epi32(0xffff0000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(kept, nan, _mm512_set1_epi32(0x7fc00000)));
}
#endif

}  // namespace quark

#endif  // QUARK_COMMON_H
