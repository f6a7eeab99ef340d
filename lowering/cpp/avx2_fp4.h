// Needs common.h, generic.h, panels.h and avx2.h before it.
// MXFP4 x MXFP4 and NVFP4 x NVFP4: exact integer dot products of blocks, each scaled in float32.
#ifndef QUARK_AVX2_FP4_H
#define QUARK_AVX2_FP4_H
#if defined(QUARK_AVX2)

namespace quark::avx2::fp4 {

// y = sum of (dot * activation scale / 2^E * weight scale) * 2^E / 4: dot is of doubled values, and E, a row's largest
// exponent, keeps products in the range of float32. Weights are decoded to 2 * value + 12, unsigned, activations to
// 2 * value; sums of products start at -12 * (sum of the activations).
constexpr int OFFSET = 12;
constexpr int64_t MOST_ROWS = 4;         // of a microkernel
constexpr int64_t CHUNK = 512 / TILE_K;  // tiles of a part of a panel that stays in L1
// Blocks of a row this much smaller than the largest are computed in double, the whole row.
constexpr double DEEP = 0x1p-62;

alignas(16) constexpr int8_t DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct Mx {
  static constexpr int64_t SIZE = 32;
  // Of 8 blocks, times 2^40: then those of all bytes up to 190, which is the largest in a panel, are normal, and their
  // products with integers and with DEEP are exact.
  static __m256 scales(const uint8_t* p) {
    const __m256i exponents = _mm256_add_epi32(_mm256_cvtepu8_epi32(bytes8(p)), _mm256_set1_epi32(40));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponents, 23));
  }
  static double unit(float) { return 0x1p-40; }
  static float scale(uint8_t byte, float) { return e8m0(byte); }
  static bool odd(float) { return false; }
};

struct Nv {
  static constexpr int64_t SIZE = 16;
  // E4M3 / 2^8: in a half, an E4M3 one place up is right but for the bias.
  static __m256 scales(const uint8_t* p) {
    const __m128i wide = _mm_cvtepi8_epi16(bytes8(p)), magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xbfff)));
    return _mm256_cvtph_ps(_mm_or_si128(half, nan));
  }
  static double unit(float global) { return 0x1p8 * double(global); }
  static float scale(uint8_t byte, float global) { return generic::E4M3::value(byte) * global; }
  // Whether products of a scale and the global one are not normal: they are rounded first then.
  static bool odd(float global) { return !(global >= 0x1p-100f && global <= 0x1p100f); }
};

template <typename F>
constexpr int64_t BLOCKS = TILE_K / F::SIZE;  // of a channel in a tile
template <typename F>
constexpr int64_t TILE = 64 * BLOCKS<F> + 1024;

// Of prepared rows, in bytes: tile by tile of r rows. Codes are [K / 32][r][32], what is per block is [block][r].
template <typename F>
struct Layout {
  RowTiles tiles;
  int64_t steps, scales, starts, powers, odd, bytes;  // steps of 32 k

  Layout(int64_t count, int64_t k) : tiles(count, MOST_ROWS), steps((k + TILE_K - 1) / TILE_K) {
    const int64_t of_blocks = round_up(count * steps * BLOCKS<F> * 4, 64);
    scales = round_up(count * steps * TILE_K, 64);  // floats
    starts = scales + of_blocks;                    // of sums
    powers = starts + of_blocks;                    // doubles: 2^E; NaN for a row with NaN or infinity
    odd = powers + round_up(count * 8, 64);         // whether the row is one for in_double
    bytes = odd + round_up(count * 4, 64);
  }
};

template <typename F>
inline int64_t rows_bytes(int64_t count, int64_t k) { return Layout<F>(count, k).bytes; }

// Where a row's parts are.
template <typename F>
struct Row {
  int64_t r;  // rows of its tile, the step of everything
  int8_t* codes;
  float* scales;
  int32_t* starts;

  Row(const Layout<F>& l, uint8_t* rows, int64_t i) {
    const int64_t tile = l.tiles.of(i), first = l.tiles.first(tile), place = i - first;
    r = l.tiles.size(tile);
    codes = reinterpret_cast<int8_t*>(rows) + (first * l.steps + place) * TILE_K;
    scales = floats(rows + l.scales) + first * l.steps * BLOCKS<F> + place;
    starts = ints(rows + l.starts) + first * l.steps * BLOCKS<F> + place;
  }
  int8_t* block(int64_t b) const { return codes + b / BLOCKS<F> * r * TILE_K + b % BLOCKS<F> * F::SIZE; }
};

// --- sums of products of 4 neighbouring codes

#if defined(__AVXVNNI__)
inline int32_t start_of(int32_t sum) { return sum; }
inline __m256i add_products(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline __m256i total(__m256i sum) { return sum; }
#else
// In 16 bits, of two each: 32 products of at most 24 * 12, and the start.
inline int32_t start_of(int32_t sum) { return sum & 0xffff; }
inline __m256i add_products(__m256i sum, __m256i w, __m256i x) {
  return in_this_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)));
}
inline __m256i total(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

// --- activation rows

// 16 codes into a place of a row, in the panel's order. Returns their sum.
inline int32_t store_codes(__m128i codes, int8_t* to) {
  const __m128i sums = _mm_sad_epu8(_mm_add_epi8(codes, _mm_set1_epi8(OFFSET)), _mm_setzero_si128());
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(codes, order));
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * OFFSET;
}

// A block: pieces(i) are codes 16 i to 16 i + 15. A scale of a block of zeros does not count.
template <typename F, typename Pieces>
inline void store_block(const Row<F>& row, int64_t b, float scale, Pieces pieces) {
  int32_t sum = 0;
  __m128i any = _mm_setzero_si128();
  for (int i = 0; i < F::SIZE / 16; i++) {
    const __m128i codes = pieces(i);
    any = _mm_or_si128(any, codes);
    sum += store_codes(codes, row.block(b) + 16 * i);
  }
  row.starts[b * row.r] = start_of(-OFFSET * sum);
  row.scales[b * row.r] = _mm_testz_si128(any, any) && std::isfinite(scale) ? 0.0f : scale;
}

// From the blocks' scales.
template <typename F>
inline void finish_row(const Layout<F>& l, const Row<F>& row, int64_t k, uint8_t* rows, int64_t i) {
  const int64_t blocks = l.steps * BLOCKS<F>;
  for (int64_t b = k / F::SIZE; b < blocks; b++) store_block(row, b, 0.0f, [](int) { return _mm_setzero_si128(); });
  float largest = 0.0f, least = std::numeric_limits<float>::infinity();
  bool finite = true;
  for (int64_t b = 0; b < blocks; b++) {
    const float scale = std::abs(row.scales[b * row.r]);
    finite &= std::isfinite(scale);
    largest = std::max(largest, scale);
    if (scale != 0.0f) least = std::min(least, scale);
  }
  const bool odd = double(least) < DEEP * double(largest);
  const int exponent = odd || !finite || largest == 0.0f ? 0 : std::ilogb(largest);
  const double factor = finite ? std::ldexp(1.0, -exponent) : 0.0;
  for (int64_t b = 0; b < blocks; b++) {
    float& scale = row.scales[b * row.r];
    scale = finite ? float(double(scale) * factor) : 0.0f;
  }
  doubles(rows + l.powers)[i] = finite ? std::ldexp(1.0, exponent) : std::numeric_limits<double>::quiet_NaN();
  ints(rows + l.odd)[i] = finite && odd;
}

// The bits of the largest magnitude; NaN are above infinity.
template <int SIZE, typename T>
inline uint32_t amax_bits(const T* x) {
  __m256i most = _mm256_setzero_si256();
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int i = 0; i < SIZE; i += 8)
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load8(x + i)), magnitude));
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}

// Doubled values of 8 quotients: generic::nearest.
inline __m256i rounded(__m256 v) {
  v = _mm256_max_ps(_mm256_set1_ps(-generic::Fp4::max), _mm256_min_ps(_mm256_set1_ps(generic::Fp4::max), v));
  const __m256 octave = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));
  const __m256 step =
      _mm256_max_ps(_mm256_mul_ps(octave, _mm256_set1_ps(0.5f)), _mm256_set1_ps(generic::Fp4::least));
  const __m256 magic = _mm256_mul_ps(step, _mm256_set1_ps(12582912.0f));
  v = _mm256_sub_ps(_mm256_add_ps(v, magic), magic);
  return _mm256_cvtps_epi32(_mm256_add_ps(v, v));
}

// Row i of `count`, to be quantized by generic.h's Rule; infinity makes a row NaN.
template <typename F, typename Rule, typename T>
inline void quantize(const T* x, int64_t k, float global, uint8_t* rows, int64_t i, int64_t count) {
  const Layout<F> l(count, k);
  const Row<F> row(l, rows, i);
  for (int64_t b = 0; b < k / F::SIZE; b++) {
    const T* block = x + b * F::SIZE;
    const uint32_t amax = amax_bits<F::SIZE>(block);
    const float scale = amax < 0x7f800000u ? Rule::template scale<generic::Fp4, T>(from_bits(amax), global)
                                           : std::numeric_limits<float>::quiet_NaN();
    const __m256 divisor = _mm256_set1_ps(scale == 0.0f ? generic::EPS : scale);
    store_block(row, b, scale, [&](int piece) {
      const T* p = block + 16 * piece;
      const __m256i low = rounded(_mm256_div_ps(load8(p), divisor));
      const __m256i high = rounded(_mm256_div_ps(load8(p + 8), divisor));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    });
  }
  finish_row(l, row, k, rows, i);
}

// Row i of `count`, already quantized: packed codes [K / 2], low nibble first, and a byte a block.
template <typename F>
inline void load(
    const uint8_t* codes, const uint8_t* scales, int64_t k, float global, uint8_t* rows, int64_t i, int64_t count) {
  const Layout<F> l(count, k);
  const Row<F> row(l, rows, i);
  const __m128i table = bytes16(DOUBLED), nibble = _mm_set1_epi8(15);
  for (int64_t b = 0; b < k / F::SIZE; b++)
    store_block(row, b, F::scale(scales[b], global), [&](int piece) {
      const __m128i both = bytes8(codes + b * (F::SIZE / 2) + 8 * piece);
      const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(both, nibble));
      const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), nibble));
      return _mm_unpacklo_epi8(even, odd);
    });
  finish_row(l, row, k, rows, i);
}

// --- the product

// out[m * ld + c] += the products of `steps` tiles for 8 channels; scales and codes are theirs in the first tile.
template <typename F, int MR>
__attribute__((noinline)) void multiply(
    const int8_t* x, const float* x_scales, const int32_t* starts, const uint8_t* scales, const uint8_t* codes,
    int64_t steps, float* out, int64_t ld, Prefetch& next) {
  const __m256i table =
      _mm256_add_epi8(_mm256_broadcastsi128_si256(bytes16(DOUBLED)), _mm256_set1_epi8(OFFSET));
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256 sum[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) sum[m] = _mm256_loadu_ps(out + m * ld);
  for (int64_t s = 0; s < steps; s++, scales += TILE<F>, codes += TILE<F>) {
    next.step();
#pragma GCC unroll 2
    for (int h = 0; h < BLOCKS<F>; h++) {
      __m256i products[MR];
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) products[m] = _mm256_set1_epi32(starts[h * MR + m]);
#pragma GCC unroll 4
      for (int j = 0; j < F::SIZE / 8; j++) {
        const int8_t* eight = x + h * F::SIZE + j * 8;
        const __m256i both = bytes32(codes + (h * (F::SIZE / 8) + j) * 64);
        const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(both, nibble));
        const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
          products[m] = add_products(products[m], low, quad(eight + m * TILE_K));
          products[m] = add_products(products[m], high, quad(eight + m * TILE_K + 4));
        }
      }
      const __m256 of_weight = F::scales(scales + h * 64);
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) {
        const __m256 scale = _mm256_mul_ps(of_weight, _mm256_set1_ps(x_scales[h * MR + m]));
        sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total(products[m])), scale, sum[m]);
      }
    }
    x += MR * TILE_K;
    x_scales += MR * BLOCKS<F>;
    starts += MR * BLOCKS<F>;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) _mm256_storeu_ps(out + m * ld, sum[m]);
}

// One result, where scales are out of the range of float32.
template <typename F>
__attribute__((noinline)) float in_double(
    const Row<F>& row, int64_t blocks, double power, const uint8_t* panel, int64_t channel, float global) {
  double sum = 0.0;
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* tile = panel + b / BLOCKS<F> * TILE<F>;
    const uint8_t* w = tile + 64 * BLOCKS<F> + channel / 16 * 256 + b % BLOCKS<F> * F::SIZE * 8 + channel % 16 * 4;
    const int8_t* x = row.block(b);
    int32_t dot = 0;
    for (int64_t j = 0; j < F::SIZE / 8; j++)
      for (int64_t t = 0; t < 4; t++) {
        dot += DOUBLED[w[j * 64 + t] & 15] * x[j * 8 + t];
        dot += DOUBLED[w[j * 64 + t] >> 4] * x[j * 8 + 4 + t];
      }
    const float of_weight = F::scale(tile[b % BLOCKS<F> * 64 + channel], global);
    sum += double(dot) * double(row.scales[b * row.r]) * double(of_weight);
  }
  return float(0.25 * power * sum);
}

// out[i * ld + c] of `count` prepared rows (at most MOST) and the 16 * GROUPS channels from group `first_group` of a
// panel on; `global` is the weight's global scale.
template <typename F, int GROUPS, int MOST>
inline void tile(
    const uint8_t* rows, int64_t count, int64_t k, const uint8_t* panel, int64_t first_group, float global, float* out,
    int64_t ld) {
  const Layout<F> l(count, k);
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, GROUPS * 64);
  for (int64_t s = 0; s < l.steps; s += CHUNK) {
    const int64_t steps = std::min(CHUNK, l.steps - s), ahead = std::min(CHUNK, l.steps - s - steps);
    const uint8_t* w = panel + s * TILE<F>;
    Prefetch next(w + steps * TILE<F>, GROUPS == 4 ? ahead * TILE<F> : 0, l.tiles.tiles * steps * GROUPS * 2);
    for (int64_t t = 0; t < l.tiles.tiles; t++) {
      const int64_t first = l.tiles.first(t), r = l.tiles.size(t), step = first * l.steps + s * r;
      const int8_t* x = reinterpret_cast<const int8_t*>(rows) + step * TILE_K;
      const float* scales = floats(rows + l.scales) + step * BLOCKS<F>;
      const int32_t* starts = ints(rows + l.starts) + step * BLOCKS<F>;
      for (int64_t e = 2 * first_group; e < 2 * (first_group + GROUPS); e++) {
        const uint8_t* codes = w + 64 * BLOCKS<F> + e / 2 * 256 + e % 2 * 32;
        float* to = out + first * ld + (e - 2 * first_group) * 8;
        with_rows<1, std::min<int>(MOST, MOST_ROWS)>(r, [&](auto mr) {
          multiply<F, mr>(x, scales, starts, w + e * 8, codes, steps, to, ld, next);
        });
      }
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const double power = doubles(rows + l.powers)[i];
    if (!F::odd(global) && !ints(rows + l.odd)[i]) {
      for (int e = 0; e < GROUPS * 2; e++) multiply8(out + i * ld + e * 8, 0.25 * power * F::unit(global));
      continue;
    }
    const Row<F> row(l, const_cast<uint8_t*>(rows), i);
    for (int c = 0; c < GROUPS * 16; c++)
      out[i * ld + c] = in_double(row, l.steps * BLOCKS<F>, power, panel, first_group * 16 + c, global);
  }
}

}  // namespace quark::avx2::fp4

// The names of vnni_mxfp4.h and vnni_nvfp4.h.
namespace quark::avx2::mxfp4 {

constexpr int64_t TILE = fp4::TILE<fp4::Mx>;
inline int64_t rows_bytes(int64_t count, int64_t k) { return fp4::rows_bytes<fp4::Mx>(count, k); }
inline constexpr int64_t scratch_bytes(int64_t) { return 0; }

template <typename T>
inline void quantize(const T* x, int64_t k, uint8_t* rows, int64_t i, int64_t count) {
  fp4::quantize<fp4::Mx, generic::Even>(x, k, 1.0f, rows, i, count);
}
inline void load(const uint8_t* codes, const uint8_t* scales, int64_t k, uint8_t* rows, int64_t i, int64_t count) {
  fp4::load<fp4::Mx>(codes, scales, k, 1.0f, rows, i, count);
}
template <int GROUPS, int MOST = 384>
inline void tile(
    const uint8_t* rows, int64_t count, int64_t k, const uint8_t* panel, int64_t first_group, uint8_t*, float* out,
    int64_t ld) {
  fp4::tile<fp4::Mx, GROUPS, MOST>(rows, count, k, panel, first_group, 1.0f, out, ld);
}

}  // namespace quark::avx2::mxfp4

namespace quark::avx2::nvfp4 {

constexpr int64_t TILE = fp4::TILE<fp4::Nv>;
inline int64_t rows_bytes(int64_t count, int64_t k) { return fp4::rows_bytes<fp4::Nv>(count, k); }
inline constexpr int64_t scratch_bytes(int64_t) { return 0; }

template <typename Rule, typename T>
inline void quantize(const T* x, int64_t k, float global, uint8_t* rows, int64_t i, int64_t count) {
  fp4::quantize<fp4::Nv, Rule>(x, k, global, rows, i, count);
}
inline void load(
    const uint8_t* codes, const uint8_t* scales, int64_t k, float global, uint8_t* rows, int64_t i, int64_t count) {
  fp4::load<fp4::Nv>(codes, scales, k, global, rows, i, count);
}
template <int GROUPS, int MOST = 384>
inline void tile(
    const uint8_t* rows, int64_t count, int64_t k, const uint8_t* panel, int64_t first_group, float global, uint8_t*,
    float* out, int64_t ld) {
  fp4::tile<fp4::Nv, GROUPS, MOST>(rows, count, k, panel, first_group, global, out, ld);
}

}  // namespace quark::avx2::nvfp4

#endif  // QUARK_AVX2
#endif  // QUARK_AVX2_FP4_H
