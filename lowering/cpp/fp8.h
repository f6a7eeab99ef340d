// Needs common.h before it.
// FP8 E4M3 x FP8 E4M3, accumulated in float32; the scales are applied to the sum.
//
// A prepared activation row is 16 floats of which the first is the row's scale, then the codes' values as floats, K padded
// with zeros to a multiple of 32.
#ifndef QUARK_FP8_H
#define QUARK_FP8_H

namespace quark::fp8 {

constexpr int64_t CHUNK = 32;
constexpr float MAX = 448.0f;
constexpr float LEAST = 0x1p-9f;       // the smallest subnormal
constexpr float ZERO_SCALE = 0x1p-23f; // what amd-quark puts in place of a zero scale

inline constexpr int64_t row_bytes(int64_t k) { return (16 + round_up(k, CHUNK)) * 4; }

inline void zero_row(uint8_t* row, int64_t k) { std::memset(row, 0, row_bytes(k)); }

// amax / 448 in the precision of T; NaN and infinity pass through.
template <typename T>
inline float dynamic_scale(const T* x, int64_t k) {
  float amax = 0.0f;
#if defined(QUARK_AVX512)
  __m512 best = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t i = 0; i < k; i += 16) {
    const __m512 v = load16(x + i, k - i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    best = _mm512_max_ps(best, _mm512_abs_ps(v));
  }
  amax = nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(best);
#else
  for (int64_t i = 0; i < k && !std::isnan(amax); i++) {
    const float a = std::abs(float(x[i]));
    amax = (a > amax || std::isnan(a)) ? a : amax;
  }
#endif
  const float scale = rounded<T>(amax / MAX);
  return scale == 0.0f ? rounded<T>(ZERO_SCALE) : scale;
}

// The quotient is rounded to T, saturated, then rounded half to even to E4M3.
template <typename T>
inline void quantize_row(const T* x, int64_t k, float scale, uint8_t* row) {
  float* out = reinterpret_cast<float*>(row);
  out[0] = scale;
  out += 16;
#if defined(QUARK_AVX512)
  for (int64_t i = 0; i < round_up(k, CHUNK); i += 16) {
    const int64_t n = std::max<int64_t>(k - i, 0);
    __m512 v = rounded_to<T>(_mm512_div_ps(load16(x + i, n), _mm512_set1_ps(scale)));
    // The second operand is the result where one is NaN: this order keeps a NaN.
    v = _mm512_max_ps(_mm512_set1_ps(-MAX), _mm512_min_ps(_mm512_set1_ps(MAX), v));
    v = round_to_grid(v, 3, LEAST);
    // Padding is 0 even where 0 / scale is not.
    _mm512_store_ps(out + i, n < 16 ? _mm512_maskz_mov_ps((1u << n) - 1, v) : v);
  }
#else
  for (int64_t i = 0; i < k; i++) {
    const float v = rounded<T>(float(x[i]) / scale);
    out[i] = std::isnan(v) ? v : round_to_grid(std::max(-MAX, std::min(MAX, v)), 3, LEAST);
  }
  for (int64_t i = k; i < round_up(k, CHUNK); i++) out[i] = 0.0f;
#endif
}

// A row that is already quantized.
inline void load_row(const at::Float8_e4m3fn* codes, int64_t k, float scale, uint8_t* row) {
  float* out = reinterpret_cast<float*>(row);
  out[0] = scale;
  for (int64_t i = 0; i < round_up(k, CHUNK); i++) out[16 + i] = i < k ? float(codes[i]) : 0.0f;
}

// A prepared row's values times its scale, rounded to T as the emulation rounds them; its scale becomes 1.
template <typename T>
inline void dequantize_row(int64_t k, uint8_t* row) {
  float* x = reinterpret_cast<float*>(row);
  for (int64_t i = 0; i < k; i++) x[16 + i] = rounded<T>(x[16 + i] * x[0]);
  x[0] = 1.0f;
}

// How a tile treats a weight: as its exact value, with the scale applied to the sum, or (Rounded, for a T) as the
// emulation does: the weight times its scale, rounded to T.
struct Exact {};
template <typename T>
struct Rounded {};

#if defined(QUARK_AVX512)
inline __m512 weight_value(Exact, __m512 w, float) { return w; }
template <typename T>
inline __m512 weight_value(Rounded<T>, __m512 w, float scale) {
  return rounded_to<T>(_mm512_mul_ps(_mm512_mul_ps(w, _mm512_set1_ps(256.0f)), _mm512_set1_ps(scale)));
}
inline double sum_scale(Exact, float scale) { return 256.0 * scale; }
#else
inline float weight_value(Exact, float w, float) { return w; }
template <typename T>
inline float weight_value(Rounded<T>, float w, float scale) { return rounded<T>(w * scale); }
inline double sum_scale(Exact, float scale) { return scale; }
#endif
template <typename T>
inline double sum_scale(Rounded<T>, float) { return 1.0; }

// A sum times both its scales. In double, where no order of the three overflows or loses bits to a subnormal.
inline float scaled(float sum, float row_scale, double weight_scale) {
  return float(double(sum) * double(row_scale) * weight_scale);
}

// out[m * ld + n] for MT prepared rows and `channels` output channels, whose scales are weight_scale[n * scale_stride].
template <int MT, typename Mode, typename S>
__attribute__((noinline)) void tile(
    const uint8_t* rows, int64_t k, const at::Float8_e4m3fn* weight, const S* weight_scale, int64_t scale_stride,
    int64_t channels, float* out, int64_t ld) {
  const int64_t stride = row_bytes(k);
  for (int64_t n = 0; n < channels; n++) {
    const uint8_t* w = reinterpret_cast<const uint8_t*>(weight) + n * k;
    const float scale = float(weight_scale[n * scale_stride]);
#if defined(QUARK_AVX512)
    __m512 sum[MT];
    for (int m = 0; m < MT; m++) sum[m] = _mm512_setzero_ps();
    __mmask32 nan = 0;
    for (int64_t i = 0; i < k; i += CHUNK) {
      const __mmask32 valid = k - i < CHUNK ? (1u << (k - i)) - 1 : 0xffffffffu;
      const __m256i codes = _mm256_maskz_loadu_epi8(valid, w + i);
      const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
      nan |= _mm256_cmpeq_epi8_mask(magnitude, _mm256_set1_epi8(0x7f));
      // E4M3 seeemmm.. placed in a half has its value times 2^-8, subnormals included: sign in bits 15 and 14, clear 14.
      const __m512i halves =
          _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7), _mm512_set1_epi16(int16_t(0xbfff)));
      const __m512 w0 = weight_value(Mode(), _mm512_cvtph_ps(_mm512_castsi512_si256(halves)), scale);
      const __m512 w1 = weight_value(Mode(), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), scale);
#pragma GCC unroll 8
      for (int m = 0; m < MT; m++) {
        const float* x = reinterpret_cast<const float*>(rows + m * stride) + 16 + i;
        sum[m] = _mm512_fmadd_ps(_mm512_load_ps(x), w0, sum[m]);
        sum[m] = _mm512_fmadd_ps(_mm512_load_ps(x + 16), w1, sum[m]);
      }
    }
    for (int m = 0; m < MT; m++) {
      const float total = nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_add_ps(sum[m]);
      out[m * ld + n] = scaled(total, *reinterpret_cast<const float*>(rows + m * stride), sum_scale(Mode(), scale));
    }
#else
    for (int m = 0; m < MT; m++) {
      const float* x = reinterpret_cast<const float*>(rows + m * stride);
      float sum = 0.0f;
      for (int64_t i = 0; i < k; i++) {
        const float value = float(at::Float8_e4m3fn(w[i], at::Float8_e4m3fn::from_bits()));
        sum += x[16 + i] * weight_value(Mode(), value, scale);
      }
      out[m * ld + n] = scaled(sum, x[0], sum_scale(Mode(), scale));
    }
#endif
  }
}

}  // namespace quark::fp8

#endif  // QUARK_FP8_H
