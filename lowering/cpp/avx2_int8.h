// Needs common.h, generic.h, panels.h and avx2.h before it.
// INT8 and UINT8 by INT8 and UINT8: one exact integer dot product a result.
#ifndef QUARK_AVX2_INT8_H
#define QUARK_AVX2_INT8_H
#if defined(QUARK_AVX2)

namespace quark::avx2 {

// generic::integer_grid of a row.
template <int LOW, int HIGH, bool SYMMETRIC, typename T>
inline generic::Grid integer_grid(const T* x, int64_t k) {
  __m256 smallest = _mm256_setzero_ps(), largest = smallest, nan = smallest;
  for (int64_t i = 0; i < k; i += 8) {
    const __m256 v = load8(x + i, k - i);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    smallest = _mm256_min_ps(smallest, v);
    largest = _mm256_max_ps(largest, v);
  }
  alignas(32) float least[8], most[8];
  _mm256_store_ps(least, smallest);
  _mm256_store_ps(most, largest);
  const float quiet = std::numeric_limits<float>::quiet_NaN();
  const bool any = _mm256_movemask_ps(nan);
  const T ends[2] = {
      T(any ? quiet : *std::min_element(least, least + 8)), T(any ? quiet : *std::max_element(most, most + 8))};
  return generic::integer_grid<LOW, HIGH, SYMMETRIC>(ends, 2);
}

namespace int8 {

// As vnni_int8.h: weights are unsigned in the panel (signed codes + 128), activations signed (unsigned codes - 128).
constexpr int64_t TILE = 64 * TILE_K;
constexpr int64_t MOST_ROWS = 6;         // of a microkernel
constexpr int64_t CHUNK = 256 / TILE_K;  // tiles of a part of a panel that stays in L1

// A product of bytes has 16 bits: without a dot product of 32, activations are held as such, and each 4 in the order
// 0, 2, 1, 3, to be multiplied by the even and the odd bytes of weights.
#if defined(__AVXVNNI__)
using Code = int8_t;
inline void store8(__m128i words, Code* to) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}
inline __m256i add_products(__m256i sum, __m256i w, const Code* x) { return _mm256_dpbusd_avx_epi32(sum, w, quad(x)); }
#else
using Code = int16_t;
inline void store8(__m128i words, Code* to) {
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(words, order));
}
inline __m256i add_products(__m256i sum, __m256i w, const Code* x) {
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(w, 8);
  sum = in_this_order(_mm256_add_epi32(sum, _mm256_madd_epi16(even, quad(x))));
  return in_this_order(_mm256_add_epi32(sum, _mm256_madd_epi16(odd, quad(x + 2))));
}
#endif

// Of prepared rows, in bytes: tile by tile of r rows, codes [K / 32][r][32].
struct Layout {
  RowTiles tiles;
  int64_t steps, scales, sums, zeros, bytes;  // steps of 32 k

  Layout(int64_t count, int64_t k) : tiles(count, MOST_ROWS), steps((k + TILE_K - 1) / TILE_K) {
    const int64_t of_rows = round_up(count * 4, 64);
    scales = round_up(count * steps * TILE_K * int64_t(sizeof(Code)), 64);  // floats; NaN for a row with a NaN
    sums = scales + of_rows;                                                // of the codes
    zeros = sums + of_rows;                                                 // zero points
    bytes = zeros + of_rows;
  }
};

inline int64_t rows_bytes(int64_t count, int64_t k) { return Layout(count, k).bytes; }
inline constexpr int64_t scratch_bytes(int64_t) { return 64 * 4; }

// Row i: of(at) are the 8 codes from k = at on; those beyond k do not count.
template <typename Of>
inline void store_row(
    int64_t k, uint8_t* rows, int64_t i, int64_t count, float scale, int32_t zero, Of of) {
  const Layout l(count, k);
  const int64_t tile = l.tiles.of(i), first = l.tiles.first(tile), step = l.tiles.size(tile) * TILE_K;
  Code* codes = reinterpret_cast<Code*>(rows) + (first * l.steps + i - first) * TILE_K;
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t at = 0; at < l.steps * TILE_K; at += 8) {
    __m256i eight = _mm256_setzero_si256();
    if (at < k) eight = _mm256_and_si256(of(at), _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(k - at)), places));
    sum = _mm256_add_epi32(sum, eight);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(eight, eight), 0xd8);
    store8(_mm256_castsi256_si128(words), codes + at / TILE_K * step + at % TILE_K);
  }
  floats(rows + l.scales)[i] = scale;
  ints(rows + l.sums)[i] = sum_of(sum);
  ints(rows + l.zeros)[i] = zero;
}

// Row i of `count`, to be quantized as generic::quantize_integers does it. With a given scale infinity is the last code
// and NaN makes the row NaN; a scale that is no finite number makes it NaN too.
template <int LOW, int HIGH, typename T>
inline void quantize(const T* x, int64_t k, generic::Grid grid, uint8_t* rows, int64_t i, int64_t count) {
  constexpr int SHIFT = LOW + 128;  // unsigned codes become signed
  const bool usable = std::isfinite(grid.scale) && std::isfinite(grid.zero_point);
  const float zero_point = usable ? grid.zero_point : 0.0f;
  const __m256 inverse = _mm256_set1_ps(1.0f / grid.scale);
  // Saturated before it is rounded: integers are the bounds.
  const __m256 low = _mm256_set1_ps(float(LOW) - zero_point), high = _mm256_set1_ps(float(HIGH) - zero_point);
  const __m256i add = _mm256_set1_epi32(int(zero_point) - SHIFT);
  __m256 nan = _mm256_setzero_ps();
  store_row(k, rows, i, count, grid.scale, int(zero_point) - SHIFT, [&](int64_t at) {
    const __m256 v = _mm256_mul_ps(load8(x + at, k - at), inverse);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high)), add);
  });
  if (!usable || _mm256_movemask_ps(nan))
    floats(rows + Layout(count, k).scales)[i] = std::numeric_limits<float>::quiet_NaN();
}

// Row i of `count`, already quantized: int8 or uint8 codes.
template <typename C>
inline void load(
    const C* codes, int64_t k, float scale, int32_t zero_point, uint8_t* rows, int64_t i, int64_t count) {
  constexpr int SHIFT = std::is_signed_v<C> ? 0 : 128;
  store_row(k, rows, i, count, scale, zero_point - SHIFT, [&](int64_t at) {
    C some[8] = {};
    std::memcpy(some, codes + at, std::min<int64_t>(8, k - at));
    const __m256i eight = std::is_signed_v<C> ? _mm256_cvtepi8_epi32(bytes8(some)) : _mm256_cvtepu8_epi32(bytes8(some));
    return _mm256_sub_epi32(eight, _mm256_set1_epi32(SHIFT));
  });
}

// Sums over k of the codes as they are in the panel, of 16 * GROUPS channels.
template <int GROUPS>
__attribute__((noinline)) void channel_sums(const uint8_t* panel, int64_t first_group, int64_t k, int32_t* sums) {
  for (int e = 0; e < 2 * GROUPS; e++) {
    const uint8_t* w = panel + first_group * 512 + e / 2 * 512 + e % 2 * 32;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t q = 0; q * 4 < k; q++) {
      const __m256i counts = _mm256_set1_epi32(k - q * 4 < 4 ? 0x010101 >> (8 * (3 - k % 4)) : 0x01010101);
      const __m256i pairs = _mm256_maddubs_epi16(bytes32(w + q / 8 * TILE + q % 8 * 64), counts);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + e * 8), sum);
  }
}

// out[m * ld + c] += the products of `steps` tiles for 16 channels, as integers.
template <int MR>
__attribute__((noinline)) void multiply(
    const Code* x, const uint8_t* w, int64_t steps, float* out, int64_t ld, Prefetch& next) {
  __m256i sum[MR][2];
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) sum[m][v] = bytes32(out + m * ld + v * 8);
  for (int64_t s = 0; s < steps; s++, x += MR * TILE_K, w += TILE) {
    next.step();
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const __m256i codes = bytes32(w + q * 64 + v * 32);
#pragma GCC unroll 6
        for (int m = 0; m < MR; m++) sum[m][v] = add_products(sum[m][v], codes, x + m * TILE_K + q * 4);
        if constexpr (MR > 1) asm volatile("" ::: "memory");  // else gcc keeps the rows' quads and spills
      }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + m * ld + v * 8), sum[m][v]);
}

// How the sums of products become results. The arrays have 16 * GROUPS entries, for channels beyond N too.
struct Epilogue {
  int offset;            // what 0 is in the panel: 128 for signed codes, 0 for unsigned ones
  const float* scales;
  const int32_t* zeros;  // zero points of the codes, or null: all 0
  const int32_t* sums;   // channel_sums, or null: the activation has no zero points
};

// Adds what zero points of the activation contribute: a difference of two int32.
inline __m256 less_zero(__m256i sum, int32_t row_zero, int64_t k, __m256i channel_sum, __m256i zero) {
  const __m256i of_channel = _mm256_sub_epi32(channel_sum, _mm256_mullo_epi32(_mm256_set1_epi32(int32_t(k)), zero));
  const __m256d factor = _mm256_set1_pd(double(row_zero));
  auto half = [&](__m128i minuend, __m128i subtrahend) {
    return _mm256_cvtpd_ps(_mm256_fnmadd_pd(factor, _mm256_cvtepi32_pd(subtrahend), _mm256_cvtepi32_pd(minuend)));
  };
  return _mm256_set_m128(
      half(_mm256_extracti128_si256(sum, 1), _mm256_extracti128_si256(of_channel, 1)),
      half(_mm256_castsi256_si128(sum), _mm256_castsi256_si128(of_channel)));
}

template <int GROUPS>
inline void finish(const Layout& l, const uint8_t* rows, int64_t count, int64_t k, Epilogue e, float* out, int64_t ld) {
  for (int64_t i = 0; i < count; i++) {
    const __m256 scale = _mm256_set1_ps(floats(rows + l.scales)[i]);
    const int32_t row_sum = ints(rows + l.sums)[i], row_zero = ints(rows + l.zeros)[i];
    for (int c = 0; c < 16 * GROUPS; c += 8) {
      float* to = out + i * ld + c;
      __m256i zero = _mm256_set1_epi32(e.offset);
      if (e.zeros) zero = _mm256_add_epi32(zero, bytes32(e.zeros + c));
      const __m256i sum = _mm256_sub_epi32(bytes32(to), _mm256_mullo_epi32(_mm256_set1_epi32(row_sum), zero));
      const __m256 centered =
          row_zero ? less_zero(sum, row_zero, k, bytes32(e.sums + c), zero) : _mm256_cvtepi32_ps(sum);
      _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_mul_ps(centered, _mm256_loadu_ps(e.scales + c)), scale));
    }
  }
}

// out[i * ld + c] of `count` prepared rows (at most MOST) and the 16 * GROUPS channels from group `first_group` of a
// panel on. The epilogue's arrays are those channels'; where an activation has zero points and it has no sums, they are
// computed here, which reads the weight once more.
template <int GROUPS, int MOST = 384>
inline void tile(
    const uint8_t* rows, int64_t count, int64_t k, const uint8_t* panel, int64_t first_group, Epilogue epilogue,
    uint8_t* scratch, float* out, int64_t ld) {
  const Layout l(count, k);
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, GROUPS * 64);
  for (int64_t s = 0; s < l.steps; s += CHUNK) {
    const int64_t steps = std::min(CHUNK, l.steps - s), ahead = std::min(CHUNK, l.steps - s - steps);
    const uint8_t* w = panel + s * TILE + first_group * 512;
    Prefetch next(panel + (s + steps) * TILE, GROUPS == 4 ? ahead * TILE : 0, l.tiles.tiles * steps * GROUPS);
    for (int64_t t = 0; t < l.tiles.tiles; t++) {
      const int64_t first = l.tiles.first(t), r = l.tiles.size(t);
      const Code* x = reinterpret_cast<const Code*>(rows) + (first * l.steps + s * r) * TILE_K;
      for (int g = 0; g < GROUPS; g++)
        with_rows<1, std::min<int>(MOST, MOST_ROWS)>(r, [&](auto mr) {
          multiply<mr>(x, w + g * 512, steps, out + first * ld + g * 16, ld, next);
        });
    }
  }
  bool zero_points = false;
  for (int64_t i = 0; i < count; i++) zero_points |= ints(rows + l.zeros)[i] != 0;
  if (zero_points && !epilogue.sums) {
    channel_sums<GROUPS>(panel, first_group, k, ints(scratch));
    epilogue.sums = ints(scratch);
  }
  finish<GROUPS>(l, rows, count, k, epilogue, out, ld);
}

}  // namespace int8
}  // namespace quark::avx2

#endif  // QUARK_AVX2
#endif  // QUARK_AVX2_INT8_H
