// Needs common.h, generic.h and panels.h before it.
// What the kernels for CPUs with AVX2, FMA and F16C have in common: small pieces.
//
// As in vnni.h there are, per pair of formats, prepare functions and tile(). Integer dot products (avx2_fp4.h and
// avx2_int8.h) have one microkernel for few rows and many: it multiplies up to MR rows by 8 or 16 channels of a part of
// a panel, which stays in L1, as it is. To decode it once for all rows was no faster: most loads are of rows' codes.
#ifndef QUARK_AVX2_H
#define QUARK_AVX2_H
#if defined(QUARK_AVX2)
#include <immintrin.h>

namespace quark::avx2 {

using namespace panels;

inline int32_t* ints(uint8_t* p) { return reinterpret_cast<int32_t*>(p); }
inline const int32_t* ints(const uint8_t* p) { return reinterpret_cast<const int32_t*>(p); }
inline float* floats(uint8_t* p) { return reinterpret_cast<float*>(p); }
inline const float* floats(const uint8_t* p) { return reinterpret_cast<const float*>(p); }
inline double* doubles(uint8_t* p) { return reinterpret_cast<double*>(p); }
inline const double* doubles(const uint8_t* p) { return reinterpret_cast<const double*>(p); }

inline __m256i bytes32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i bytes16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i bytes8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// 4 bytes, in every lane.
inline __m256i quad(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// Else gcc reorders additions of integers, keeps their terms and spills.
inline __m256i in_this_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// 8 elements as float32.
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const at::Half* p) { return _mm256_cvtph_ps(bytes16(p)); }
inline __m256 load8(const at::BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bytes16(p)), 16));
}
// Only the first n are read, the rest are 0.
template <typename T>
inline __m256 load8(const T* p, int64_t n) {
  if (n >= 8) return load8(p);
  T some[8] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load8(some);
}

inline int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// out[i] = float(double(out[i]) * factor): in double, only the result may overflow or be subnormal.
inline void multiply8(float* out, double factor) {
  auto half = [&](float* p) {
    const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(p));
    _mm_storeu_ps(p, _mm256_cvtpd_ps(_mm256_mul_pd(v, _mm256_set1_pd(factor))));
  };
  half(out);
  half(out + 4);
}

}  // namespace quark::avx2

#endif  // QUARK_AVX2
#endif  // QUARK_AVX2_H
