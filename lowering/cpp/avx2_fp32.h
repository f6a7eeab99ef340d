// Needs common.h, generic.h, panels.h, avx2.h and portable.h before it.
// Any activation by any packed weight: what portable.h computes, with codes decoded 8 at a time and a product of 6 rows
// and 16 channels that fits in AVX2's registers.
#ifndef QUARK_AVX2_FP32_H
#define QUARK_AVX2_FP32_H
#if defined(QUARK_AVX2)

namespace quark::avx2::fp32 {

constexpr int64_t MOST_ROWS = 6;  // of a microkernel
constexpr int64_t AT_ONCE = 64;   // columns decoded at a time: 16 KB

// --- codes: of a chunk of 16 channels x 8 k, f(k, i, the values of channels 8 i to 8 i + 7)

// Signed bytes of 8 channels, each of 4 k, times `unit`.
template <typename F>
__attribute__((always_inline)) inline void each_of_bytes(
    __m256i v, int i, int k0, int k1, int k2, int k3, float unit, F f) {
  auto value = [&](__m256i top) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24)), _mm256_set1_ps(unit));
  };
  f(k0, i, value(_mm256_slli_epi32(v, 24)));
  f(k1, i, value(_mm256_slli_epi32(v, 16)));
  f(k2, i, value(_mm256_slli_epi32(v, 8)));
  f(k3, i, value(v));
}

template <typename F>
__attribute__((always_inline)) inline void each_of_nibbles(const uint8_t* in, const int8_t* values, float unit, F f) {
  const __m256i table = _mm256_broadcastsi128_si256(bytes16(values)), nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m256i both = bytes32(in + 32 * i), high = _mm256_srli_epi16(both, 4);
    each_of_bytes(_mm256_shuffle_epi8(table, _mm256_and_si256(both, nibble)), i, 0, 4, 1, 5, unit, f);
    each_of_bytes(_mm256_shuffle_epi8(table, _mm256_and_si256(high, nibble)), i, 2, 6, 3, 7, unit, f);
  }
}

template <typename F>
__attribute__((always_inline)) inline void each(portable::Fp4, const uint8_t* in, F f) {
  alignas(16) static constexpr int8_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  each_of_nibbles(in, doubled, 0.5f, f);
}
template <bool SIGNED, typename F>
__attribute__((always_inline)) inline void each(portable::Integer<4, SIGNED>, const uint8_t* in, F f) {
  alignas(16) static constexpr int8_t values[2][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1}};
  each_of_nibbles(in, values[SIGNED], 1.0f, f);
}

template <bool SIGNED, typename F>
__attribute__((always_inline)) inline void each(portable::Integer<8, SIGNED>, const uint8_t* in, F f) {
  // Bytes less 128, to which 128 is added again where it was not part of the code.
  const __m256i flip = _mm256_set1_epi8(-128);
  const __m256 add = _mm256_set1_ps(SIGNED ? 0.0f : 128.0f);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const int k = j / 2 * 4;
    each_of_bytes(
        _mm256_xor_si256(bytes32(in + j * 32), flip), j % 2, k, k + 1, k + 2, k + 3, 1.0f,
        [&](int at, int i, __m256 v) { f(at, i, _mm256_add_ps(v, add)); });
  }
}

// What a code in the upper bits of 16 becomes: shifted, it is a half but for the bias.
template <typename E>
struct InHalf;
template <>
struct InHalf<generic::Fp8E5M2> {
  static constexpr int SHIFT = 0, MASK = 0xff00;
  static constexpr float UNIT = 1.0f;
};
template <>
struct InHalf<generic::Fp8E4M3> {
  static constexpr int SHIFT = 1, MASK = 0xbf80;
  static constexpr float UNIT = 0x1p8f;
};
template <>
struct InHalf<generic::Fp6E3M2> {
  static constexpr int SHIFT = 2, MASK = 0x9f00;
  static constexpr float UNIT = 0x1p12f;
};
template <>
struct InHalf<generic::Fp6E2M3> {
  static constexpr int SHIFT = 3, MASK = 0x8f80;
  static constexpr float UNIT = 0x1p14f;
};

// 32 codes of 6 bits, 16 in the first 12 bytes that `order` takes of each half, to the upper bits of bytes.
inline __m256i sixes(__m256i packed, __m256i order) {
  const __m256i four = _mm256_shuffle_epi8(packed, order);  // of each 3 bytes, in a lane
  auto one = [](__m256i v, uint32_t mask) { return _mm256_and_si256(v, _mm256_set1_epi32(int32_t(mask))); };
  const __m256i low = _mm256_or_si256(
      one(_mm256_slli_epi32(four, 2), 0xfc), one(_mm256_slli_epi32(four, 4), 0xfc00));
  return _mm256_or_si256(
      low, _mm256_or_si256(one(_mm256_slli_epi32(four, 6), 0xfc0000), one(_mm256_slli_epi32(four, 8), 0xfc000000)));
}

template <typename E, typename F>
__attribute__((always_inline)) inline void each(portable::Minifloat<E>, const uint8_t* in, F f) {
  constexpr int BITS = portable::Minifloat<E>::BITS;
  using H = InHalf<E>;
  auto values = [&](__m256i top, int k) {
    __m256i half = _mm256_and_si256(_mm256_srai_epi16(top, H::SHIFT), _mm256_set1_epi16(int16_t(H::MASK)));
    if (std::is_same_v<E, generic::Fp8E4M3>) {
      const __m256i most = _mm256_set1_epi16(0x3f80), magnitude = _mm256_and_si256(half, most);
      half = _mm256_or_si256(half, _mm256_srli_epi16(_mm256_cmpeq_epi16(magnitude, most), 1));
    }
    f(k, 0, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_set1_ps(H::UNIT)));
    f(k, 1, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), _mm256_set1_ps(H::UNIT)));
  };
#pragma GCC unroll 2
  for (int k = 0; k < 8; k += 4, in += 8 * BITS) {
    // 16 bytes are 4 channels: 8 of their first two k, 8 of the others.
    __m256i even, odd;  // channels 0 to 3 and 8 to 11, 4 to 7 and 12 to 15
    if constexpr (BITS == 8) {
      even = _mm256_set_m128i(bytes16(in + 32), bytes16(in));
      odd = _mm256_set_m128i(bytes16(in + 48), bytes16(in + 16));
    } else {
      // Nothing is read beyond the last of the 48 bytes.
      const __m256i order = _mm256_setr_epi8(
          0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
      const __m256i last = _mm256_add_epi8(
          order, _mm256_setr_epi32(0, 0, 0, 0, 0x040404, 0x040404, 0x040404, 0x040404));
      even = sixes(_mm256_set_m128i(bytes16(in + 24), bytes16(in)), order);
      odd = sixes(_mm256_set_m128i(bytes16(in + 32), bytes16(in + 12)), last);
    }
    const __m256i first = _mm256_unpacklo_epi64(even, odd), second = _mm256_unpackhi_epi64(even, odd);
    values(_mm256_slli_epi16(first, 8), k);
    values(first, k + 1);
    values(_mm256_slli_epi16(second, 8), k + 2);
    values(second, k + 3);
  }
}

// --- (code - zero) * scale * second, rounded to T

template <typename T>
inline __m256 rounded(__m256 v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, at::Half>) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 kept = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int32_t(0xffff0000))));
    return _mm256_blendv_ps(
        kept, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
}

// Of 8 blocks.
inline __m256 block_scales(generic::E8M0, const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi32(bytes8(p)), half = _mm256_set1_epi32(0x400000);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(bytes, _mm256_set1_epi32(255)), half);
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_or_si256(_mm256_slli_epi32(bytes, 23), nan), half));
}
inline __m256 block_scales(generic::E4M3, const uint8_t* p) {
  alignas(32) float values[8];
  for (int i = 0; i < 8; i++) values[i] = generic::E4M3::value(p[i]);
  return _mm256_load_ps(values);
}
inline __m256 block_scales(generic::E5M3, const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi32(bytes8(p));
  const __m256 normal =
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bytes, 20), _mm256_set1_epi32(112 << 23)));
  const __m256 tiny = _mm256_mul_ps(_mm256_cvtepi32_ps(bytes), _mm256_set1_ps(0x1p-17f));
  const __m256i is_tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), bytes);
  const __m256i nan = _mm256_cmpeq_epi32(bytes, _mm256_set1_epi32(255));
  return _mm256_or_ps(_mm256_blendv_ps(normal, tiny, _mm256_castsi256_ps(is_tiny)), _mm256_castsi256_ps(nan));
}

template <typename S, int SIZE>
inline void fill(const portable::InTile<S, SIZE>& scales, const uint8_t* tile, int64_t k, float* scale, float*) {
  const uint8_t* bytes = tile + k % TILE_K / SIZE * 64;
  for (int c = 0; c < 64; c += 8)
    _mm256_store_ps(scale + c, _mm256_mul_ps(block_scales(S(), bytes + c), _mm256_set1_ps(scales.global)));
}
template <typename Fill>
inline void fill(const portable::Beside<Fill>& scales, const uint8_t* tile, int64_t k, float* scale, float* zero) {
  scales(tile, k, scale, zero);
}

// --- the product

// out[m * ld + c] += for MR prepared rows and 16 channels of `columns` decoded columns.
template <int MR>
__attribute__((noinline)) void dot(
    const float* rows, int64_t stride, const float* weight, int64_t columns, float* out, int64_t ld) {
  constexpr int PARTS = MR <= 2 ? 4 / MR : 1;  // sums of a row: one alone waits for itself
  __m256 sum[MR][PARTS][2];
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) sum[m][p][v] = p ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * ld + 8 * v);
  for (int64_t k = 0; k < columns; k += PARTS)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
      const __m256 low = _mm256_load_ps(weight + (k + p) * 16), high = _mm256_load_ps(weight + (k + p) * 16 + 8);
#pragma GCC unroll 6
      for (int m = 0; m < MR; m++) {
        const __m256 x = _mm256_broadcast_ss(rows + m * stride + k + p);
        sum[m][p][0] = _mm256_fmadd_ps(x, low, sum[m][p][0]);
        sum[m][p][1] = _mm256_fmadd_ps(x, high, sum[m][p][1]);
      }
    }
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      __m256 all = sum[m][0][v];
#pragma GCC unroll 4
      for (int p = 1; p < PARTS; p++) all = _mm256_add_ps(all, sum[m][p][v]);
      _mm256_storeu_ps(out + m * ld + 8 * v, all);
    }
}

inline constexpr int64_t scratch_bytes() { return AT_ONCE * 64 * 4; }

// See portable::tile.
template <int GROUPS, int MOST, typename Code, typename T, typename Scales>
inline void tile(
    const uint8_t* prepared, int64_t count, int64_t k, const uint8_t* panel, int first, int64_t step, float second,
    const Scales& scales, uint8_t* scratch, float* out, int64_t ld) {
  constexpr int64_t CHUNK = 16 * Code::BITS, TILE = Scales::BYTES + 16 * CHUNK;
  const RowTiles tiles(count, MOST_ROWS);
  const int64_t stride = generic::padded(k), columns = round_up(k, 8);
  alignas(64) float scale[64], zero[64] = {};
  float* decoded = reinterpret_cast<float*>(scratch);
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, 64 * GROUPS);
  for (int64_t begin = 0; begin < columns; begin += AT_ONCE) {
    const int64_t end = std::min(columns, begin + AT_ONCE);
    const int64_t ahead = GROUPS == 4 ? round_up(std::min(AT_ONCE, columns - end), TILE_K) : 0;
    Prefetch next(panel + end / TILE_K * TILE, ahead / TILE_K * TILE, (end - begin) / 8);
    for (int64_t c = begin; c < end; c += 8) {
      const uint8_t* at = panel + c / TILE_K * TILE;
      if (c % step == 0) fill(scales, at, c, scale, zero);
      next.step();
      for (int g = 0; g < GROUPS; g++) {
        const float *s = scale + (first + g) * 16, *z = zero + (first + g) * 16;
        float* to = decoded + (g * AT_ONCE + c - begin) * 16;
        const __m256 of[2] = {_mm256_load_ps(s), _mm256_load_ps(s + 8)};
        const __m256 zeros[2] = {_mm256_load_ps(z), _mm256_load_ps(z + 8)};
        each(Code(), at + Scales::BYTES + ((first + g) * 4 + c % TILE_K / 8) * CHUNK, [&](int i, int half, __m256 v) {
          const __m256 scaled = _mm256_mul_ps(_mm256_sub_ps(v, zeros[half]), of[half]);
          _mm256_store_ps(to + i * 16 + half * 8, rounded<T>(_mm256_mul_ps(scaled, _mm256_set1_ps(second))));
        });
      }
    }
    for (int64_t t = 0; t < tiles.tiles; t++) {
      const float* x = floats(prepared) + tiles.first(t) * stride + begin;
      for (int g = 0; g < GROUPS; g++)
        with_rows<1, std::min<int>(MOST, MOST_ROWS)>(tiles.size(t), [&](auto mr) {
          float* to = out + tiles.first(t) * ld + g * 16;
          dot<mr>(x, stride, decoded + g * AT_ONCE * 16, end - begin, to, ld);
        });
    }
  }
}

}  // namespace quark::avx2::fp32

#endif  // QUARK_AVX2
#endif  // QUARK_AVX2_FP32_H
