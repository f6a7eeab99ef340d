// Needs common.h, generic.h, panels.h and vnni.h before it.
// NVFP4 x NVFP4: exact integer dot products of blocks of 16, under two E4M3 scales and two global ones.
#ifndef QUARK_VNNI_NVFP4_H
#define QUARK_VNNI_NVFP4_H
#if defined(QUARK_AVX512)

namespace quark::vnni::nvfp4 {

// f = sum of dot * weight scale / 2^8 * activation scale, E4M3 both; y = f * 2^8 / 4 (for the doubled codes) * both
// global scales.
constexpr int64_t BLOCK = 16, TILE = 128 + 1024;
constexpr int64_t FEW = 8;                   // rows that a GEMV multiplies
constexpr int64_t MOST_ROWS = 4;             // of a GEMV's pass over a panel, and of a GEMM's microkernel
constexpr int64_t CHUNK = 256 / TILE_K;      // tiles of a decoded part of a panel
constexpr int SPREAD = 7;                    // 15 * 15 << 7 fits in 16 bits, 16 blocks * 16 * 12 * 12 times it in 31
constexpr int UNIT = 10;                     // an E4M3 is (integer of 4 bits) << (exponent - 10), exponent 1..15
constexpr int NO_NUMBER = 0x7f;              // scale bytes from here on are NaN or negative

// Global scales whose products with E4M3 are normal; other rows and weights are computed in_double.
inline bool ordinary(float global) { return global >= 0x1p-100f && global <= 0x1p100f; }

// Of prepared rows, in bytes: tile by tile of r rows. Codes are [K / 32][r][32], what is per block is [block][r].
struct Layout {
  RowTiles tiles;
  int64_t steps, chunks, scales, corrections, pairs, bases, spreads, globals, odd, bytes;  // steps of 32 k

  Layout(int64_t count, int64_t k)
      : tiles(count, MOST_ROWS), steps((k + TILE_K - 1) / TILE_K), chunks(steps / CHUNK + 1) {
    const int64_t of_steps = round_up(count * steps * 4, 64), of_rows = round_up(count * 4, 64);
    const int64_t of_chunks = round_up(count * chunks * 4, 64);
    scales = round_up(count * steps * TILE_K, 64);  // floats: E4M3; of an odd row with the global scale in it
    corrections = scales + 2 * of_steps;
    pairs = corrections + 2 * of_steps;  // of two blocks the scales as 16-bit integers, in units of the chunk's base
    bases = pairs + of_steps;            // floats: 2^(the chunk's least exponent - UNIT)
    spreads = bases + of_chunks;         // the chunk's largest exponent - its least
    globals = spreads + of_chunks;       // floats: the global scale; NaN for a bad row, 1 for an odd one
    odd = globals + of_rows;             // whether the row is one for in_double
    bytes = odd + of_rows;
  }
};

inline int64_t rows_bytes(int64_t count, int64_t k) { return Layout(count, k).bytes; }
inline constexpr int64_t scratch_bytes(int64_t) { return CHUNK * (64 * TILE_K + 64 * 4) + 64 * 4; }

inline float* floats(uint8_t* p) { return reinterpret_cast<float*>(p); }
inline const float* floats(const uint8_t* p) { return reinterpret_cast<const float*>(p); }

// Where a row's parts are.
struct Row {
  int64_t r;  // rows of its tile, the step of everything
  int8_t* codes;
  float *scales, *bases;
  int32_t *corrections, *pairs, *spreads;

  Row(const Layout& l, uint8_t* rows, int64_t i) {
    const int64_t tile = l.tiles.of(i), first = l.tiles.first(tile), place = i - first;
    const int64_t step = first * l.steps + place, block = first * l.steps * 2 + place, chunk = first * l.chunks + place;
    r = l.tiles.size(tile);
    codes = reinterpret_cast<int8_t*>(rows) + step * TILE_K;
    scales = floats(rows + l.scales) + block;
    corrections = ints(rows + l.corrections) + block;
    pairs = ints(rows + l.pairs) + step;
    bases = floats(rows + l.bases) + chunk;
    spreads = ints(rows + l.spreads) + chunk;
  }
  int8_t* block(int64_t b) const { return codes + b / 2 * r * TILE_K + b % 2 * BLOCK; }
};

// Scales as integers of each chunk's unit.
inline void finish_row(const Layout& l, const Row& row) {
  for (int64_t begin = 0, chunk = 0; begin < l.steps; begin += CHUNK, chunk++) {
    const int64_t end = std::min(l.steps, begin + CHUNK);
    int least = 15, largest = 1;
    for (int64_t b = 2 * begin; b < 2 * end; b++) {
      const float scale = row.scales[b * row.r];
      const int exponent = std::max(int(to_bits(scale) >> 23) - 120, 1);
      if (scale != 0.0f) least = std::min(least, exponent);
      largest = std::max(largest, exponent);
    }
    least = std::min(least, largest);
    row.spreads[chunk * row.r] = largest - least;
    row.bases[chunk * row.r] = from_bits(uint32_t(127 + least - UNIT) << 23);
    const float units = from_bits(uint32_t(127 - least + UNIT) << 23);
    for (int64_t s = begin; s < end; s++) {
      const uint32_t low = uint32_t(row.scales[2 * s * row.r] * units);
      const uint32_t high = uint32_t(row.scales[(2 * s + 1) * row.r] * units);
      row.pairs[s * row.r] = int32_t(low | high << 16);
    }
  }
}

// Zeros up to a multiple of 32.
inline void pad_row(const Layout& l, const Row& row, int64_t k) {
  if (k % TILE_K == 0) return;
  const int64_t b = 2 * l.steps - 1;
  std::memset(row.block(b), 0, BLOCK);
  row.scales[b * row.r] = 0.0f;
  row.corrections[b * row.r] = 0;
}

// A row whose numbers are not in the chunks' units.
inline void set_odd(const Layout& l, const Row& row, uint8_t* rows, int64_t i, float global) {
  for (int64_t chunk = 0; chunk < l.chunks; chunk++) row.spreads[chunk * row.r] = 0;
  for (int64_t chunk = 0; chunk < l.chunks; chunk++) row.bases[chunk * row.r] = 0.0f;
  for (int64_t s = 0; s < l.steps; s++) row.pairs[s * row.r] = 0;
  floats(rows + l.globals)[i] = global;
  ints(rows + l.odd)[i] = 1;
}

// 16 codes (in the panel's order) and their correction.
inline void store_codes(const Row& row, int64_t b, __m128i natural) {
  const __m128i codes = _mm256_castsi256_si128(in_panel_order(_mm256_castsi128_si256(natural)));
  __m128i sum = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(OFFSET), codes);
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(row.block(b)), codes);
  row.corrections[b * row.r] = -_mm_cvtsi128_si32(sum);
}

// Doubled values of x / divisor.
template <typename T>
inline __m128i rounded_codes(const T* x, float divisor) {
  __m512 v = _mm512_div_ps(load16(x, BLOCK), _mm512_set1_ps(divisor));
  v = _mm512_max_ps(_mm512_set1_ps(-6.0f), _mm512_min_ps(_mm512_set1_ps(6.0f), v));
  v = round_to_grid(v, generic::Fp4::man, generic::Fp4::least);
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_add_ps(v, v)));
}

// The bits of a block's largest magnitude, as a float's; NaN are above infinity.
template <typename T>
inline uint32_t amax_bits(const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    return _mm512_reduce_max_epu32(_mm512_and_si512(_mm512_loadu_si512(x), magnitude));
  } else {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    const __m256i v = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), magnitude);
    const __m128i most = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const int lowest = _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1))), 0);
    return uint32_t(~lowest & 0xffff) << (std::is_same_v<T, at::BFloat16> ? 16 : 0);
  }
}

// E4M3 scales of 16 largest magnitudes, before the global scale: generic::Sequential or Combined; 0 for a zero block.
template <typename Rule>
inline __m512 scales_of(__m512 amax, float global) {
  const __m512 max = _mm512_set1_ps(generic::Fp4::max), one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  const __m512 wide = _mm512_set1_ps(global);
  constexpr bool sequential = std::is_same_v<Rule, generic::Sequential>;
  const __m512 ratio = sequential ? _mm512_div_ps(_mm512_div_ps(amax, max), wide)
                                  : _mm512_div_ps(amax, _mm512_mul_ps(wide, max));
  const __m512 scale = round_to_grid(_mm512_min_ps(ratio, _mm512_set1_ps(448.0f)), 3, 0x1p-9f);
  if (sequential) return scale;
  const __mmask16 is_zero = _mm512_cmp_ps_mask(scale, zero, _CMP_EQ_OQ);
  const __m512 positive = _mm512_mask_mov_ps(scale, is_zero, one);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(amax, zero, _CMP_NEQ_OQ), positive);
}

// A row whose global scale is not ordinary.
template <typename Rule, typename T>
__attribute__((noinline)) void quantize_exactly(
    const T* x, int64_t k, float global, const Layout& l, const Row& row, uint8_t* rows, int64_t i) {
  bool finite = true;
  for (int64_t b = 0; b < k / BLOCK; b++) {
    const T* block = x + b * BLOCK;
    const float scale = Rule::template scale<generic::Fp4, T>(generic::amax_of(block, BLOCK), global);
    finite &= std::isfinite(scale);
    row.scales[b * row.r] = scale;
    store_codes(row, b, rounded_codes(block, scale == 0.0f ? generic::EPS : scale));
  }
  pad_row(l, row, k);
  set_odd(l, row, rows, i, finite ? 1.0f : std::numeric_limits<float>::quiet_NaN());
}

// Row i of `count`, to be quantized by generic::Sequential or Combined.
template <typename Rule, typename T>
inline void quantize(const T* x, int64_t k, float global, uint8_t* rows, int64_t i, int64_t count) {
  const Layout l(count, k);
  const Row row(l, rows, i);
  if (!ordinary(global)) return quantize_exactly<Rule>(x, k, global, l, row, rows, i);
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512i largest = _mm512_setzero_si512();
  for (int64_t begin = 0; begin < k / BLOCK; begin += 16) {
    const int64_t n = std::min<int64_t>(16, k / BLOCK - begin);
    alignas(64) uint32_t amax[16] = {};
    alignas(64) float scales[16], divisors[16];
    for (int64_t b = 0; b < n; b++) amax[b] = amax_bits(x + (begin + b) * BLOCK);
    __m512i bits = _mm512_load_si512(amax);
    if constexpr (std::is_same_v<T, at::Half>) bits = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits)));
    largest = _mm512_max_epu32(largest, bits);
    const __m512 scale = scales_of<Rule>(_mm512_castsi512_ps(bits), global);
    const __mmask16 zero = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_EQ_OQ);
    _mm512_store_ps(scales, scale);
    _mm512_store_ps(divisors, _mm512_mask_mov_ps(_mm512_mul_ps(scale, _mm512_set1_ps(global)), zero, infinity));
    for (int64_t b = 0; b < n; b++) {
      row.scales[(begin + b) * row.r] = scales[b];
      store_codes(row, begin + b, rounded_codes(x + (begin + b) * BLOCK, divisors[b]));
    }
  }
  pad_row(l, row, k);
  if (_mm512_reduce_max_epu32(largest) >= 0x7f800000u)
    return set_odd(l, row, rows, i, std::numeric_limits<float>::quiet_NaN());
  floats(rows + l.globals)[i] = global;
  ints(rows + l.odd)[i] = 0;
  if (count > FEW) finish_row(l, row);
}

// Row i of `count`, already quantized: packed codes [K / 2], low nibble first, and E4M3 scales [K / 16].
inline void load(
    const uint8_t* codes, const uint8_t* scales, int64_t k, float global, uint8_t* rows, int64_t i, int64_t count) {
  const Layout l(count, k);
  const Row row(l, rows, i);
  bool odd = !ordinary(global);
  for (int64_t b = 0; b < k / BLOCK; b++) odd |= scales[b] >= NO_NUMBER;
  for (int64_t b = 0; b < k / BLOCK; b++) {
    alignas(32) int8_t both[32];
    alignas(16) uint8_t packed[16] = {};
    std::memcpy(packed, codes + b * (BLOCK / 2), BLOCK / 2);
    const bool any = load_codes(packed, both);
    std::memcpy(row.block(b), both, BLOCK);
    row.corrections[b * row.r] = correction(both, BLOCK);
    const float scale = generic::E4M3::value(scales[b]);
    row.scales[b * row.r] = odd ? scale * global : any ? scale : 0.0f;
  }
  pad_row(l, row, k);
  if (odd) return set_odd(l, row, rows, i, 1.0f);
  floats(rows + l.globals)[i] = global;
  ints(rows + l.odd)[i] = 0;
  if (count > FEW) finish_row(l, row);
}

// GROUPS groups of a panel; the scales of a tile's second half are 64 bytes after those of the first.
struct Weight {
  const uint8_t *scales, *codes;
  Weight(const uint8_t* panel, int64_t group) : scales(panel + group * 16), codes(panel + 128 + group * 256) {}
};

// The prepared rows of a tile, from a step and chunk on.
struct RowTile {
  const int8_t* codes;
  const float *scales, *bases;
  const int32_t *corrections, *pairs, *spreads;

  RowTile(const Layout& l, const uint8_t* rows, int64_t tile, int64_t step, int64_t chunk) {
    const int64_t first = l.tiles.first(tile), r = l.tiles.size(tile), at = first * l.steps + step * r;
    codes = codes_at(rows) + at * TILE_K;
    scales = floats(rows + l.scales) + 2 * at;
    corrections = ints(rows + l.corrections) + 2 * at;
    pairs = ints(rows + l.pairs) + at;
    bases = floats(rows + l.bases) + first * l.chunks + chunk * r;
    spreads = ints(rows + l.spreads) + first * l.chunks + chunk * r;
  }
};

// What remains to multiply by, so that only the result may overflow.
struct Factor {
  __m512 mantissa, exponent;

  Factor(float row_global, float weight_global) {
    const double product = 64.0 * double(row_global) * double(weight_global);
    uint64_t bits;
    std::memcpy(&bits, &product, 8);
    const int field = int(bits >> 52 & 0x7ff);
    const bool number = field != 0 && field != 0x7ff;
    if (number) bits = (bits & ~(uint64_t(0x7ff) << 52)) | uint64_t(1023) << 52;
    double one_to_two;
    std::memcpy(&one_to_two, &bits, 8);
    mantissa = _mm512_set1_ps(float(one_to_two));
    exponent = _mm512_set1_ps(number ? float(field - 1023) : 0.0f);
  }
  __m512 operator()(__m512 v) const { return _mm512_scalef_ps(_mm512_mul_ps(v, mantissa), exponent); }
};

// E4M3 / 2^8: in a half, an E4M3 one place up is right but for the bias.
inline __m512 scale16(const uint8_t* bytes) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 7));
}

// Whole K of a panel for MR rows. Returns the largest scale byte.
template <int MR, int GROUPS>
__attribute__((noinline)) int gemv(
    const RowTile& rows, Weight w, int64_t steps, const float* globals, float weight_global, float* out, int64_t ld) {
  constexpr int64_t AHEAD = MR == 1 ? 5120 : 12288;
  constexpr __mmask64 ALL = ~__mmask64(0) >> (64 - 16 * GROUPS);
  const __m512i table = weight_table();
  RowTile a = rows;
  __m512i highest = _mm512_setzero_si512();
  __m512 sum[MR][GROUPS];
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) sum[m][g] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; s++, w.scales += TILE, w.codes += TILE) {
    prefetch<2>(w.scales + AHEAD);
    highest = _mm512_max_epu8(highest, _mm512_maskz_loadu_epi8(ALL, w.scales));
    highest = _mm512_max_epu8(highest, _mm512_maskz_loadu_epi8(ALL, w.scales + 64));
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const uint8_t* chunks = w.codes + g * 256;
      const __m512 low = scale16(w.scales + g * 16), high = scale16(w.scales + 64 + g * 16);
      __m512i quads[8];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Eight eight(table, chunks + j * 64);
        quads[2 * j] = eight.low;
        quads[2 * j + 1] = eight.high;
        prefetch_between(chunks + AHEAD + j * 64, quads[2 * j]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) {
        const int8_t* codes = a.codes + m * TILE_K;
        __m512i first = _mm512_set1_epi32(a.corrections[m]), second = _mm512_set1_epi32(a.corrections[MR + m]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          first = _mm512_dpbusd_epi32(first, quads[j], quad(codes + j * 4));
          second = _mm512_dpbusd_epi32(second, quads[4 + j], quad(codes + 16 + j * 4));
        }
        const __m512 first_scale = _mm512_mul_ps(low, _mm512_set1_ps(a.scales[m]));
        const __m512 second_scale = _mm512_mul_ps(high, _mm512_set1_ps(a.scales[MR + m]));
        sum[m][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), first_scale, sum[m][g]);
        sum[m][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), second_scale, sum[m][g]);
      }
      if constexpr (MR > 1) asm volatile("" ::: "memory");  // else gcc interleaves the groups and spills
    }
    a.codes += MR * TILE_K;
    a.scales += 2 * MR;
    a.corrections += 2 * MR;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) {
    const Factor factor(globals[m], weight_global);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) _mm512_storeu_ps(out + m * ld + g * 16, factor(sum[m][g]));
  }
  alignas(64) uint8_t bytes[64];
  _mm512_store_si512(bytes, highest);
  return *std::max_element(bytes, bytes + 64);
}

// One row (of a tile of r) and 16 channels, where a scale is no ordinary number.
inline void in_double(
    RowTile a, int64_t r, Weight w, int64_t steps, float row_global, float weight_global, float* out) {
  const __m512i table = weight_table();
  const bool whole = !ordinary(weight_global);  // then the scale is rounded with the global one in it
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  for (int64_t b = 0; b < 2 * steps; b++) {
    const uint8_t* bytes = w.scales + b / 2 * TILE + b % 2 * 64;
    const __m512i total = dot(
        _mm512_set1_epi32(a.corrections[b * r]), table, w.codes + b / 2 * TILE + b % 2 * 128,
        a.codes + b / 2 * r * TILE_K + b % 2 * BLOCK, 2);
    alignas(64) float scales[16];
    for (int c = 0; c < 16; c++) scales[c] = generic::E4M3::value(bytes[c]) * (whole ? weight_global : 1.0f);
    const __m512d of_row = _mm512_set1_pd(double(a.scales[b * r]));
    auto add = [&](__m512d sum, __m256i totals, const float* scale) {
      const __m512d both = _mm512_mul_pd(_mm512_cvtps_pd(_mm256_load_ps(scale)), of_row);
      return _mm512_fmadd_pd(_mm512_cvtepi32_pd(totals), both, sum);
    };
    low = add(low, _mm512_castsi512_si256(total), scales);
    high = add(high, _mm512_extracti64x4_epi64(total, 1), scales + 8);
  }
  const __m512d factor = _mm512_set1_pd(0.25 * double(row_global) * (whole ? 1.0 : double(weight_global)));
  _mm256_storeu_ps(out, _mm512_cvtpd_ps(_mm512_mul_pd(low, factor)));
  _mm256_storeu_ps(out + 8, _mm512_cvtpd_ps(_mm512_mul_pd(high, factor)));
}

// Odd rows once more, or all rows of odd weights.
template <int GROUPS>
__attribute__((noinline)) void redo(
    const Layout& l, const uint8_t* rows, int64_t count, const uint8_t* panel, int64_t group, float weight_global,
    bool all, float* out, int64_t ld) {
  for (int64_t i = 0; i < count; i++) {
    if (!all && !ints(rows + l.odd)[i]) continue;
    const int64_t tile = l.tiles.of(i), place = i - l.tiles.first(tile);
    RowTile a(l, rows, tile, 0, 0);
    a.codes += place * TILE_K;
    a.scales += place;
    a.corrections += place;
    for (int g = 0; g < GROUPS; g++)
      in_double(
          a, l.tiles.size(tile), Weight(panel, group + g), l.steps, floats(rows + l.globals)[i], weight_global,
          out + i * ld + g * 16);
  }
}

// A decoded part of a panel: for each pair of groups (or one) the codes [step][8 quads][groups][64] and of each two
// blocks the scales as 16-bit integers [step][groups][16], in units of bases [groups][16].
struct Decoded {
  uint8_t* codes;
  int32_t* pairs;
  float* bases;
};

// Returns how far the exponents spread; raises the highest scale byte.
template <int GROUPS>
__attribute__((noinline)) int decode(Weight w, int64_t steps, Decoded to, int& highest) {
  constexpr int PAIR = GROUPS == 1 ? 1 : 2;
  const __m512i table = weight_table(), one = _mm512_set1_epi32(1);
  __m512i spread = _mm512_setzero_si512(), most = spread;
  for (int g = 0; g < GROUPS; g++) {
    __m512i least = _mm512_set1_epi32(255), largest = one;
    for (int64_t b = 0; b < 2 * steps; b++) {
      const __m512i bytes = bytes16(w.scales + b / 2 * TILE + b % 2 * 64 + g * 16);
      least = _mm512_mask_min_epi32(least, _mm512_test_epi32_mask(bytes, bytes), least, bytes);
      largest = _mm512_max_epi32(largest, bytes);
    }
    most = _mm512_max_epi32(most, largest);
    largest = _mm512_max_epi32(_mm512_srli_epi32(largest, 3), one);
    least = _mm512_min_epi32(_mm512_max_epi32(_mm512_srli_epi32(least, 3), one), largest);
    spread = _mm512_max_epi32(spread, _mm512_sub_epi32(largest, least));
    _mm512_store_ps(
        to.bases + g * 16,
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(least, _mm512_set1_epi32(127 - UNIT - 8)), 23)));
  }
  for (int64_t s = 0; s < steps; s++, w.scales += TILE, w.codes += TILE)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const int64_t at = (g / PAIR * steps + s) * PAIR + g % PAIR;
      const __m512i base = _mm512_srli_epi32(_mm512_castps_si512(_mm512_load_ps(to.bases + g * 16)), 23);
      const __m512i least = _mm512_sub_epi32(base, _mm512_set1_epi32(127 - UNIT - 8));
      auto integers = [&](const uint8_t* p) {
        const __m512i bytes = bytes16(p), exponent = _mm512_srli_epi32(bytes, 3);
        const __m512i fraction = _mm512_and_si512(bytes, _mm512_set1_epi32(7));
        const __m512i whole = _mm512_mask_or_epi32(
            fraction, _mm512_test_epi32_mask(exponent, exponent), fraction, _mm512_set1_epi32(8));
        return _mm512_sllv_epi32(whole, _mm512_sub_epi32(_mm512_max_epi32(exponent, one), least));
      };
      const __m512i low = integers(w.scales + g * 16), high = integers(w.scales + 64 + g * 16);
      _mm512_store_si512(to.pairs + at * 16, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
      uint8_t* quads = to.codes + (g / PAIR * steps + s) * PAIR * 512 + g % PAIR * 64;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Eight eight(table, w.codes + g * 256 + j * 64);
        _mm512_store_si512(quads + (2 * j) * PAIR * 64, eight.low);
        _mm512_store_si512(quads + (2 * j + 1) * PAIR * 64, eight.high);
      }
    }
  highest = std::max(highest, _mm512_reduce_max_epi32(most));
  return _mm512_reduce_max_epi32(spread);
}

// out += a chunk's products, summed exactly as integers: two blocks' dot products fit in 16 bits each, and so do the
// products of their scales.
template <int MR, int NV>
__attribute__((noinline)) void multiply_pairs(
    const RowTile& rows, const Decoded& weight, int64_t steps, float* out, int64_t ld, Prefetch& next) {
  RowTile a = rows;
  Decoded w = weight;
  __m512i sum[MR][NV];
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) sum[m][v] = zero_register<__m512i>();
  for (int64_t s = 0; s < steps; s++) {
    __m512i first[MR][NV], second[MR][NV];
    next.step();
    multiply_block<4, MR, NV>(a.codes, a.corrections, w.codes, first);
    multiply_block<4, MR, NV>(a.codes + BLOCK, a.corrections + MR, w.codes + NV * 256, second);
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) {
      const __m512i of_row = _mm512_set1_epi32(a.pairs[m]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        const __m512i scales = _mm512_mullo_epi16(_mm512_load_si512(w.pairs + v * 16), of_row);
        const __m512i dots = _mm512_mask_mov_epi16(first[m][v], 0xaaaaaaaa, _mm512_slli_epi32(second[m][v], 16));
        sum[m][v] = _mm512_dpwssd_epi32(sum[m][v], dots, scales);
      }
    }
    a.codes += MR * TILE_K;
    a.corrections += 2 * MR;
    a.pairs += MR;
    w.codes += NV * 512;
    w.pairs += NV * 16;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      float* to = out + m * ld + v * 16;
      const __m512 base = _mm512_mul_ps(_mm512_load_ps(w.bases + v * 16), _mm512_set1_ps(a.bases[m]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][v]), base, _mm512_loadu_ps(to)));
    }
}

// The same where the exponents spread too far: every block is scaled in float32. `scales` are the panel's.
template <int MR, int NV>
__attribute__((noinline)) void multiply_scaled(
    const RowTile& rows, const Decoded& weight, const uint8_t* scales, int64_t steps, float* out, int64_t ld,
    Prefetch& next) {
  RowTile a = rows;
  Decoded w = weight;
  __m512 sum[MR][NV];
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) sum[m][v] = _mm512_loadu_ps(out + m * ld + v * 16);
  for (int64_t s = 0; s < steps; s++) {
    next.step();
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      __m512i total[MR][NV];
      multiply_block<4, MR, NV>(a.codes + h * BLOCK, a.corrections + h * MR, w.codes + h * NV * 256, total);
      __m512 scale[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) scale[v] = scale16(scales + h * 64 + v * 16);
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) {
        const __m512 of_row = _mm512_set1_ps(a.scales[h * MR + m]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++)
          sum[m][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[m][v]), _mm512_mul_ps(scale[v], of_row), sum[m][v]);
      }
    }
    a.codes += MR * TILE_K;
    a.corrections += 2 * MR;
    a.scales += 2 * MR;
    w.codes += NV * 512;
    scales += TILE;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(out + m * ld + v * 16, sum[m][v]);
}

template <int GROUPS>
inline void gemm(
    const Layout& l, const uint8_t* rows, int64_t count, const uint8_t* panel, int64_t group, float weight_global,
    uint8_t* scratch, float* out, int64_t ld) {
  constexpr int NV = GROUPS == 1 ? 1 : 2;
  const Decoded decoded{
      scratch, ints(scratch + CHUNK * 64 * TILE_K), floats(scratch + CHUNK * (64 * TILE_K + 64 * 4))};
  int highest = 0;
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, GROUPS * 64);
  for (int64_t s = 0, chunk = 0; s < l.steps; s += CHUNK, chunk++) {
    const int64_t steps = std::min(CHUNK, l.steps - s), ahead = std::min(CHUNK, l.steps - s - steps);
    const Weight w(panel + s * TILE, group);
    const int of_weight = decode<GROUPS>(w, steps, decoded, highest);
    Prefetch next(panel + (s + steps) * TILE, GROUPS == 4 ? ahead * TILE : 0, l.tiles.tiles * steps * (GROUPS / NV));
    for (int64_t t = 0; t < l.tiles.tiles; t++) {
      const RowTile a(l, rows, t, s, chunk);
      const int64_t r = l.tiles.size(t);
      int spread = 0;
      for (int64_t m = 0; m < r; m++) spread = std::max(spread, a.spreads[m]);
      const bool exact = of_weight + spread <= SPREAD;
      for (int g = 0; g < GROUPS; g += NV) {
        const Decoded part{decoded.codes + g * steps * 512, decoded.pairs + g * steps * 16, decoded.bases + g * 16};
        float* to = out + l.tiles.first(t) * ld + g * 16;
        with_rows<3, MOST_ROWS>(r, [&](auto mr) {
          if (exact) multiply_pairs<mr, NV>(a, part, steps, to, ld, next);
          else multiply_scaled<mr, NV>(a, part, w.scales + g * 16, steps, to, ld, next);
        });
      }
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const Factor factor(floats(rows + l.globals)[i], weight_global);
    for (int g = 0; g < GROUPS; g++) {
      float* to = out + i * ld + g * 16;
      _mm512_storeu_ps(to, factor(_mm512_loadu_ps(to)));
    }
  }
  redo<GROUPS>(
      l, rows, count, panel, group, weight_global, highest >= NO_NUMBER || !ordinary(weight_global), out, ld);
}

// out[i * ld + c] of `count` prepared rows (at most MOST) and the 16 * GROUPS channels from group `first_group` of a
// panel on; `weight_global` is the weight's global scale.
template <int GROUPS, int MOST = 384>
inline void tile(
    const uint8_t* rows, int64_t count, int64_t k, const uint8_t* panel, int64_t first_group, float weight_global,
    uint8_t* scratch, float* out, int64_t ld) {
  const Layout l(count, k);
  if constexpr (MOST > FEW)
    if (count > FEW) return gemm<GROUPS>(l, rows, count, panel, first_group, weight_global, scratch, out, ld);
  bool odd = !ordinary(weight_global);
  for (int64_t t = 0; t < l.tiles.tiles; t++)
    with_rows<1, std::min<int>(MOST, MOST_ROWS)>(l.tiles.size(t), [&](auto mr) {
      const RowTile a(l, rows, t, 0, 0);
      const int64_t first = l.tiles.first(t);
      const float* globals = floats(rows + l.globals) + first;
      const Weight w(panel, first_group);
      odd |= gemv<mr, GROUPS>(a, w, l.steps, globals, weight_global, out + first * ld, ld) >= NO_NUMBER;
    });
  redo<GROUPS>(l, rows, count, panel, first_group, weight_global, odd, out, ld);
}

}  // namespace quark::vnni::nvfp4

#endif  // QUARK_AVX512
#endif  // QUARK_VNNI_NVFP4_H
