// Needs common.h before it.
// MXFP4 x MXFP4: integer dot products of the codes (twice an FP4 value is a small integer), scaled in float32.
//
// A prepared activation row is, for each 64 elements (K padded up): 64 bytes 2 * value + 12, in each half of 32 the
// even elements first, then the odd ones (the order in which a packed weight decodes), then 16 floats, a quarter of each
// half's scale eight times over (a product of two doubled codes is four times too large).
#ifndef QUARK_MXFP4_H
#define QUARK_MXFP4_H

namespace quark::mxfp4 {

constexpr int64_t CHUNK = 64;
constexpr int64_t CHUNK_BYTES = 64 + 64;
constexpr int OFFSET = 12;

inline constexpr int64_t row_bytes(int64_t k) { return round_up(k, CHUNK) / CHUNK * CHUNK_BYTES; }

inline uint8_t* codes_of(uint8_t* row, int64_t block) { return row + block / 2 * CHUNK_BYTES + block % 2 * 32; }

inline void set_scale(uint8_t* row, int64_t block, float scale) {
  float* s = reinterpret_cast<float*>(row + block / 2 * CHUNK_BYTES + 64) + block % 2 * 8;
  for (int i = 0; i < 8; i++) s[i] = 0.25f * scale;
}

// A block of zeros: what pads K to a multiple of 64 and M to a multiple of the tile.
inline void zero_block(uint8_t* row, int64_t block) {
  std::memset(codes_of(row, block), OFFSET, 32);
  set_scale(row, block, 0.0f);
}

inline void zero_row(uint8_t* row, int64_t k) {
  for (int64_t b = 0; b < round_up(k, CHUNK) / 32; b++) zero_block(row, b);
}

// The scale of rule "even" for a block's largest magnitude. Where amax is infinite or NaN the scale is too, so that no
// finite result can come from such a block.
inline float scale_even(float amax) {
  if (!(amax <= std::numeric_limits<float>::max())) return amax;
  const int exponent = int((to_bits(amax) + (1u << 21)) >> 23);
  return e8m0(uint8_t(exponent >= 255 ? 254 : std::max(exponent - 2, 0)));
}

template <typename T>
inline void quantize_row(const T* x, int64_t k, uint8_t* row) {
  for (int64_t b = 0; b < k / 32; b++) {
    uint8_t* codes = codes_of(row, b);
    const T* block = x + b * 32;
#if defined(QUARK_AVX512)
    const __m512 lo = load16(block, 16), hi = load16(block + 16, 16);
    const __m512 magnitude = _mm512_max_ps(_mm512_abs_ps(lo), _mm512_abs_ps(hi));
    const __mmask16 nan = _mm512_cmp_ps_mask(lo, hi, _CMP_UNORD_Q);
    const float amax = nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(magnitude);
    const float scale = scale_even(amax);
    auto code = [&](__m512 v) {
      v = _mm512_div_ps(v, _mm512_set1_ps(scale));
      v = _mm512_max_ps(_mm512_set1_ps(-6.0f), _mm512_min_ps(_mm512_set1_ps(6.0f), v));
      v = round_to_grid(v, 1, 0.5f);
      return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_add_ps(v, v)), _mm512_set1_epi32(OFFSET)));
    };
    // Even elements to the front: of the 32 codes' bytes, those at even and at odd places.
    const __m256i natural = _mm256_set_m128i(code(hi), code(lo));
    const __m256i pairs = _mm256_shuffle_epi8(
        natural, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permute4x64_epi64(pairs, 0xd8));
#else
    float amax = 0.0f;
    for (int j = 0; j < 32; j++) {
      const float a = std::abs(float(block[j]));
      amax = (a > amax || std::isnan(a)) ? a : amax;
      if (std::isnan(amax)) break;
    }
    const float scale = scale_even(amax);
    for (int j = 0; j < 32; j++) {
      const float v = round_to_grid(std::max(-6.0f, std::min(6.0f, float(block[j]) / scale)), 1, 0.5f);
      codes[j % 2 * 16 + j / 2] = std::isnan(v) ? OFFSET : uint8_t(int(2.0f * v) + OFFSET);
    }
#endif
    set_scale(row, b, scale);
  }
  if (k % CHUNK) zero_block(row, k / 32);
}

constexpr int8_t DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// A row that is already quantized: packed codes [K / 2] and E8M0 scales [K / 32].
inline void load_row(const uint8_t* packed, const uint8_t* scales, int64_t k, uint8_t* row) {
  for (int64_t b = 0; b < k / 32; b++) {
    uint8_t* codes = codes_of(row, b);
    for (int j = 0; j < 16; j++) {
      codes[j] = uint8_t(DOUBLED[packed[b * 16 + j] & 15] + OFFSET);
      codes[16 + j] = uint8_t(DOUBLED[packed[b * 16 + j] >> 4] + OFFSET);
    }
    set_scale(row, b, e8m0(scales[b]));
  }
  if (k % CHUNK) zero_block(row, k / 32);
}

// out[m * ld + n] for MT prepared rows and `channels` output channels.
template <int MT>
__attribute__((noinline)) void tile(
    const uint8_t* rows, int64_t k, const uint8_t* weight, const uint8_t* weight_scale, int64_t channels, float* out,
    int64_t ld) {
  const int64_t stride = row_bytes(k), chunks = round_up(k, CHUNK) / CHUNK;
  for (int64_t n = 0; n < channels; n++) {
    const uint8_t* w = weight + n * (k / 2);
    const uint8_t* ws = weight_scale + n * (k / 32);
#if defined(QUARK_AVX512)
    const __m512i lut = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(DOUBLED)));
    const __m512i order = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);  // [low | high] nibbles to [block 0 | block 1]
    const __m512i offset = _mm512_set1_epi8(OFFSET);
    __m512 sum[MT];
    for (int m = 0; m < MT; m++) sum[m] = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; c++) {
      const bool half = c * CHUNK + 32 >= k;
      const __m256i packed =
          half ? _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + c * 32)))
               : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + c * 32));
      const __m256i nibble = _mm256_set1_epi8(15);
      const __m256i low = _mm256_and_si256(packed, nibble);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      const __m512i wv = _mm512_shuffle_epi8(lut, _mm512_permutexvar_epi64(order, both));
      // The activations' offset, taken back: -12 * sum of the weights.
      const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, wv));
      const __m512 wscale = _mm512_insertf32x8(
          _mm512_set1_ps(e8m0(ws[2 * c])), _mm256_set1_ps(half ? 0.0f : e8m0(ws[2 * c + 1])), 1);
#pragma GCC unroll 8
      for (int m = 0; m < MT; m++) {
        const uint8_t* chunk = rows + m * stride + c * CHUNK_BYTES;
        const __m512i dot = _mm512_dpbusd_epi32(start, _mm512_load_si512(chunk), wv);
        // First the activation's scale, then the weight's: their product alone could overflow where this does not.
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_load_ps(chunk + 64));
        sum[m] = _mm512_fmadd_ps(scaled, wscale, sum[m]);
      }
    }
    for (int m = 0; m < MT; m++) out[m * ld + n] = _mm512_reduce_add_ps(sum[m]);
#else
    for (int m = 0; m < MT; m++) {
      float sum = 0.0f;
      for (int64_t b = 0; b < k / 32; b++) {
        const uint8_t* chunk = rows + m * stride + b / 2 * CHUNK_BYTES;
        const uint8_t* codes = chunk + b % 2 * 32;
        int dot = 0;
        for (int j = 0; j < 16; j++) {
          const uint8_t byte = w[b * 16 + j];
          dot += (codes[j] - OFFSET) * DOUBLED[byte & 15] + (codes[16 + j] - OFFSET) * DOUBLED[byte >> 4];
        }
        sum += float(dot) * reinterpret_cast<const float*>(chunk + 64)[b % 2 * 8] * e8m0(ws[b]);
      }
      out[m * ld + n] = sum;
    }
#endif
  }
}

}  // namespace quark::mxfp4

#endif  // QUARK_MXFP4_H
