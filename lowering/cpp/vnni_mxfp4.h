// Needs common.h, generic.h, panels.h and vnni.h before it.
// MXFP4 x MXFP4: exact integer dot products of blocks of 32, whose scales are sums of exponents.
#ifndef QUARK_VNNI_MXFP4_H
#define QUARK_VNNI_MXFP4_H
#if defined(QUARK_AVX512)

namespace quark::vnni::mxfp4 {

// f = sum of dot * 2^(weight exponent - 127 + activation exponent - the row's largest), y = f * 2^(largest - 129): 127
// for the E8M0 bias and 2 for the doubled codes. The product of both scales is a sum of exponents put into a float.
constexpr int64_t BLOCK = 32, TILE = 64 + 1024;
constexpr int64_t FEW = 8;                     // rows that a GEMV multiplies, by PASS_ROWS at a time
constexpr int64_t PASS_ROWS = 4, MOST_ROWS = 6;  // of a GEMV's pass over a panel; of a GEMM's microkernel
constexpr int64_t LARGE_CHUNK = 512 / BLOCK, SMALL_CHUNK = 256 / BLOCK;  // blocks of a decoded part of a panel
constexpr int SPREAD = 14;      // 16 blocks * 32 * 12 * 12 << 14 fits in 31 bits
constexpr int LARGEST = 226;    // weight exponent: 2^(226 - 127) * 32 * 144 * 2^15 blocks is finite
constexpr int ONE = 1 << 23;    // an exponent of 1 in a float
constexpr int BAD = 255, NONE = -1;  // exponents of blocks with NaN or infinity, and of zeros

inline int64_t chunk_blocks(int64_t count) { return count > 64 ? LARGE_CHUNK : SMALL_CHUNK; }

// Of prepared rows, in bytes: tile by tile of r rows. Codes are [block][r][32], what is per block is [block][r], and
// what is per chunk [chunk][r].
struct Layout {
  RowTiles tiles;
  int64_t blocks, scales, corrections, shifts, bases, spreads, posts, depths, bytes;

  Layout(int64_t count, int64_t k) : tiles(count, count <= FEW ? PASS_ROWS : MOST_ROWS), blocks(k / BLOCK) {
    const int64_t of_blocks = round_up(count * blocks * 4, 64), of_rows = round_up(count * 4, 64);
    const int64_t of_chunks = round_up(count * (blocks / SMALL_CHUNK + 1) * 4, 64);
    scales = round_up(count * k, 64);       // (exponent - the row's largest) * ONE
    corrections = scales + of_blocks;
    shifts = corrections + of_blocks;       // exponent - the chunk's least
    bases = shifts + of_blocks;             // (the chunk's least - the row's largest) * ONE
    spreads = bases + of_chunks;            // the chunk's largest exponent - its least
    posts = spreads + of_chunks;            // the row's largest exponent - 129, as a float; NaN for a bad row
    depths = posts + of_rows;               // the row's largest exponent - its least
    bytes = depths + of_rows;
  }
};

inline int64_t rows_bytes(int64_t count, int64_t k) { return Layout(count, k).bytes; }
inline constexpr int64_t scratch_bytes(int64_t) { return LARGE_CHUNK * (64 * BLOCK + 64 * 4) + 64 * 4; }

// Where a row's parts are.
struct Row {
  int64_t r;  // rows of its tile, the step of everything
  int8_t* codes;
  int32_t *scales, *corrections, *shifts, *bases, *spreads;

  Row(const Layout& l, uint8_t* rows, int64_t i) {
    const int64_t tile = l.tiles.of(i), first = l.tiles.first(tile), place = i - first;
    const int64_t block = (first * l.blocks + place) * 4, chunk = (first * (l.blocks / SMALL_CHUNK + 1) + place) * 4;
    r = l.tiles.size(tile);
    codes = reinterpret_cast<int8_t*>(rows) + (first * l.blocks + place) * BLOCK;
    scales = ints(rows + l.scales + block);
    corrections = ints(rows + l.corrections + block);
    shifts = ints(rows + l.shifts + block);
    bases = ints(rows + l.bases + chunk);
    spreads = ints(rows + l.spreads + chunk);
  }
};

// From the blocks' exponents, left in `scales`.
inline void finish_row(const Layout& l, const Row& row, int64_t i, int64_t count, uint8_t* rows) {
  int largest = NONE, least = BAD;
  for (int64_t b = 0; b < l.blocks; b++) {
    const int exponent = row.scales[b * row.r];
    largest = std::max(largest, exponent);
    if (exponent != NONE) least = std::min(least, exponent);
  }
  const bool bad = largest == BAD;
  if (bad || largest == NONE) {
    largest = least = 0;
    for (int64_t b = 0; b < l.blocks; b++) row.scales[b * row.r] = NONE;
  }
  reinterpret_cast<float*>(rows + l.posts)[i] =
      bad ? std::numeric_limits<float>::quiet_NaN() : float(largest - 129);
  ints(rows + l.depths)[i] = largest - least;
  const int64_t step = count > FEW ? chunk_blocks(count) : l.blocks;
  for (int64_t begin = 0, chunk = 0; begin < l.blocks; begin += step, chunk++) {
    const int64_t end = std::min(l.blocks, begin + step);
    int low = BAD, high = NONE;
    for (int64_t b = begin; b < end && count > FEW; b++) {
      const int exponent = row.scales[b * row.r];
      high = std::max(high, exponent);
      if (exponent != NONE) low = std::min(low, exponent);
    }
    if (high == NONE) low = high = largest;
    for (int64_t b = begin; b < end; b++) {
      int32_t& scale = row.scales[b * row.r];
      if (count > FEW) row.shifts[b * row.r] = scale == NONE ? 0 : scale - low;
      scale = scale == NONE ? 0 : (scale - largest) * ONE;
    }
    if (count > FEW) {
      row.bases[chunk * row.r] = (low - largest) * ONE;
      row.spreads[chunk * row.r] = high - low;
    }
  }
}

// 32 values as bfloat16; bits that are cut off leave the last bit set: no value gets to a tie that was not on it.
template <typename T>
inline __m512i upper_halves(const T* x) {
  if constexpr (std::is_same_v<T, at::BFloat16>) return _mm512_loadu_si512(x);
  auto cut = [](__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), low = _mm512_set1_epi32(0xffff);
    return _mm512_or_si512(bits, _mm512_add_epi32(_mm512_and_si512(bits, low), low));
  };
  alignas(64) static constexpr int16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                  33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(cut(load16(x, 16)), _mm512_load_si512(odd), cut(load16(x + 16, 16)));
}

// Doubled values of 32 bfloat16 divided by 2^(scale - 127), `scales` being scale << 7. A magnitude's bits less those of
// the scale are 128 * log2, roughly: half octaves from 1 up, where FP4 has two values an octave. Adding 31, and 1 where
// the half octave is odd, rounds half to even. Below 1, -1 in place of 31 makes -5 of (0, 1/4], -4 to -2 of (1/4, 3/4)
// and -1 of [3/4, 1). Right for scale >= 3: subnormal bfloat16 are below 1/4 then.
inline __m256i rounded_codes(__m512i v, __m512i scales) {
  alignas(64) static constexpr int16_t table[32] = {2, 3, 4, 6, 8, 12, 12, 12, 0, 0, 0, 0, 1, 1, 1, 2,
                                                    -2, -3, -4, -6, -8, -12, -12, -12, 0, 0, 0, 0, -1, -1, -1, -2};
  const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi16(0x7fff));
  const __m512i d = _mm512_max_epi16(_mm512_sub_epi16(magnitude, scales), _mm512_set1_epi16(-320));
  const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(d, 6), _mm512_set1_epi16(1));
  const __m512i half = _mm512_or_si512(_mm512_srai_epi16(d, 15), _mm512_set1_epi16(31));
  const __m512i bucket = _mm512_srai_epi16(_mm512_add_epi16(d, _mm512_add_epi16(odd, half)), 6);
  const __m512i sign = _mm512_srli_epi16(v, 11);
  const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(16), sign, bucket, 0xca);  // bit 4 of the sign
  return _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(index, _mm512_load_si512(table)));
}

// A block whose scale is nearly the least there is, or of any other kind.
template <typename T>
inline void quantize_exactly(const T* x, int exponent, int8_t* codes) {
  for (int i = 0; i < BLOCK; i++) {
    const float v = generic::nearest<generic::Fp4>(float(x[i]) / e8m0(uint8_t(exponent)));
    codes[i / 8 * 8 + PLACE[i % 8]] = int8_t(2.0f * v);
  }
}

// Up to 4 blocks: their codes, exponents (by rule "even") and corrections.
template <typename T>
inline void quantize_four(const T* x, int64_t n, const Row& row, int64_t block) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i v[4], a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    v[i] = i < n ? upper_halves(x + i * BLOCK) : _mm512_setzero_si512();
    a[i] = _mm512_and_si512(v[i], magnitude);
  }
  // The largest magnitude of block i, in all of the i-th 128 bits. As integers NaN are above infinity.
  auto halves = [](__m512i p, __m512i q) {
    return _mm512_max_epu16(_mm512_shuffle_i64x2(p, q, 0x44), _mm512_shuffle_i64x2(p, q, 0xee));
  };
  const __m512i p = halves(a[0], a[1]), q = halves(a[2], a[3]);
  __m512i amax = _mm512_max_epu16(_mm512_shuffle_i64x2(p, q, 0x88), _mm512_shuffle_i64x2(p, q, 0xdd));
  amax = _mm512_max_epu16(amax, _mm512_shuffle_epi32(amax, _MM_PERM_BADC));
  amax = _mm512_max_epu16(amax, _mm512_shuffle_epi32(amax, _MM_PERM_CDAB));
  amax = _mm512_max_epu16(amax, _mm512_rol_epi32(amax, 16));

  const __m512i up = _mm512_srli_epi16(_mm512_add_epi16(amax, _mm512_set1_epi16(0x20)), 7);
  __m512i scale = _mm512_subs_epu16(up, _mm512_set1_epi16(2));
  scale = _mm512_mask_mov_epi16(scale, _mm512_cmpge_epi16_mask(up, _mm512_set1_epi16(255)), _mm512_set1_epi16(254));
  const __m512i shifted = _mm512_slli_epi16(_mm512_max_epu16(scale, _mm512_set1_epi16(3)), 7);  // makes zeros of zeros
  const __m256i c[4] = {
      in_panel_order(rounded_codes(v[0], _mm512_shuffle_i64x2(shifted, shifted, 0x00))),
      in_panel_order(rounded_codes(v[1], _mm512_shuffle_i64x2(shifted, shifted, 0x55))),
      in_panel_order(rounded_codes(v[2], _mm512_shuffle_i64x2(shifted, shifted, 0xaa))),
      in_panel_order(rounded_codes(v[3], _mm512_shuffle_i64x2(shifted, shifted, 0xff)))};

  auto sums = [](__m256i low, __m256i high) {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(OFFSET), both);
  };
  const __m512i s = sums(c[0], c[1]), t = sums(c[2], c[3]);
  __m512i sum = _mm512_add_epi32(_mm512_shuffle_i64x2(s, t, 0x88), _mm512_shuffle_i64x2(s, t, 0xdd));
  sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
  sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_CDAB));

  alignas(64) int32_t amaxes[16], scales[16], all_sums[16];
  _mm512_store_si512(amaxes, amax);
  _mm512_store_si512(scales, scale);
  _mm512_store_si512(all_sums, sum);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    if (i >= n) break;
    const int64_t at = (block + i) * row.r;
    const int largest = amaxes[4 * i] & 0xffff, exponent = scales[4 * i] & 0xffff;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.codes + at * BLOCK), c[i]);
    row.corrections[at] = -all_sums[4 * i];
    row.scales[at] = largest >= 0x7f80 ? BAD : largest == 0 ? NONE : exponent;
    if (__builtin_expect(exponent < 3 && largest != 0, 0)) {
      quantize_exactly(x + i * BLOCK, exponent, row.codes + at * BLOCK);
      row.corrections[at] = correction(row.codes + at * BLOCK, BLOCK);
    }
  }
}

// Row i of `count`, to be quantized.
template <typename T>
inline void quantize(const T* x, int64_t k, uint8_t* rows, int64_t i, int64_t count) {
  const Layout l(count, k);
  const Row row(l, rows, i);
  for (int64_t b = 0; b < l.blocks; b += 4) quantize_four(x + b * BLOCK, std::min<int64_t>(4, l.blocks - b), row, b);
  finish_row(l, row, i, count, rows);
}

// Row i of `count`, already quantized: packed codes [K / 2], low nibble first, and E8M0 scales [K / 32].
inline void load(const uint8_t* codes, const uint8_t* scales, int64_t k, uint8_t* rows, int64_t i, int64_t count) {
  const Layout l(count, k);
  const Row row(l, rows, i);
  for (int64_t b = 0; b < l.blocks; b++) {
    int8_t* to = row.codes + b * row.r * BLOCK;
    const bool any = load_codes(codes + b * (BLOCK / 2), to);
    row.corrections[b * row.r] = correction(to, BLOCK);
    row.scales[b * row.r] = any || scales[b] == BAD ? scales[b] : NONE;
  }
  finish_row(l, row, i, count, rows);
}

// GROUPS groups of a panel.
struct Weight {
  const uint8_t *scales, *codes;
  Weight(const uint8_t* panel, int64_t group) : scales(panel + group * 16), codes(panel + 64 + group * 256) {}
};

// The prepared rows of a tile, from a block on.
struct RowTile {
  const int8_t* codes;
  const int32_t *scales, *corrections, *shifts, *bases, *spreads;
  const float* posts;

  RowTile(const Layout& l, const uint8_t* rows, int64_t tile, int64_t block, int64_t chunk) {
    const int64_t first = l.tiles.first(tile), r = l.tiles.size(tile), at = first * l.blocks + block * r;
    const int64_t of_chunk = first * (l.blocks / SMALL_CHUNK + 1) + chunk * r;
    codes = codes_at(rows) + at * BLOCK;
    scales = ints(rows + l.scales) + at;
    corrections = ints(rows + l.corrections) + at;
    shifts = ints(rows + l.shifts) + at;
    bases = ints(rows + l.bases) + of_chunk;
    spreads = ints(rows + l.spreads) + of_chunk;
    posts = reinterpret_cast<const float*>(rows + l.posts) + first;
  }
};

// 2^(exponents - 127), from exponents * ONE. What is too small is of a block of zeros (or computed in_double).
inline __m512 power(__m512i exponents) {
  return _mm512_castsi512_ps(_mm512_max_epi32(exponents, _mm512_setzero_si512()));
}

// What the exponents of weights were.
struct Range {
  int least, largest;  // of blocks that are not zero

  // Whether float32 holds every product of a row that is not zero.
  bool fits(int depth) const { return least > depth && largest <= LARGEST; }
};

// Exponents seen so far, and codes of blocks whose exponent is 0: blocks of zeros, it is to be found out.
struct Seen {
  __m512i least = _mm512_set1_epi32(255), largest = _mm512_setzero_si512(), codes = _mm512_setzero_si512();

  void add(__m512i exponents) {
    least = _mm512_mask_min_epi32(least, _mm512_test_epi32_mask(exponents, exponents), least, exponents);
    largest = _mm512_max_epi32(largest, exponents);
  }
  void add_codes(__m512i exponents, __m512i any) {
    codes = _mm512_mask_or_epi32(codes, _mm512_testn_epi32_mask(exponents, exponents), codes, any);
  }
  Range range() const {
    const bool tiny = _mm512_test_epi32_mask(codes, _mm512_set1_epi32(0x77777777));  // a nibble 8 is -0
    return {tiny ? 0 : _mm512_reduce_min_epi32(least), _mm512_reduce_max_epi32(largest)};
  }
};

// 16 channels' codes of a block, put together.
inline __m512i any_code(const uint8_t* codes) {
  const __m512i a = _mm512_or_si512(_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64));
  return _mm512_or_si512(a, _mm512_or_si512(_mm512_loadu_si512(codes + 128), _mm512_loadu_si512(codes + 192)));
}

template <int GROUPS>
__attribute__((noinline)) Range range_of(Weight w, int64_t blocks) {
  Seen seen;
  for (int64_t b = 0; b < blocks; b++, w.scales += TILE, w.codes += TILE)
    for (int g = 0; g < GROUPS; g++) {
      const __m512i exponents = bytes16(w.scales + g * 16);
      seen.add(exponents);
      if (_mm512_testn_epi32_mask(exponents, exponents)) seen.add_codes(exponents, any_code(w.codes + g * 256));
    }
  return seen.range();
}

// Whole K of a panel for MR rows of which the deepest is `depth` deep. Returns whether float32 surely held it all.
template <int MR, int GROUPS>
__attribute__((noinline)) bool gemv(RowTile a, Weight w, int64_t blocks, int depth, float* out, int64_t ld) {
  constexpr int64_t AHEAD = MR == 1 ? 5120 : 12288;
  constexpr __mmask64 ALL = ~__mmask64(0) >> (64 - 16 * GROUPS);
  const __m512i table = weight_table();
  // Bytes least .. LARGEST become the smallest as unsigned ones.
  const int first = std::min(depth + 1, LARGEST);
  __m512i outside = _mm512_setzero_si512();
  __m512 sum[MR][GROUPS];
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) sum[m][g] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b++, w.scales += TILE, w.codes += TILE) {
    prefetch<1>(w.scales + AHEAD);
    const __m512i start = _mm512_set1_epi8(int8_t(first));
    outside = _mm512_max_epu8(outside, _mm512_sub_epi8(_mm512_mask_loadu_epi8(start, ALL, w.scales), start));
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const uint8_t* chunks = w.codes + g * 256;
      const __m512i exponent = _mm512_slli_epi32(bytes16(w.scales + g * 16), 23);
      if constexpr (MR == 1) {
        __m512i total = _mm512_set1_epi32(a.corrections[b]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          prefetch_between(chunks + AHEAD + j * 64, total);
          const Eight eight(table, chunks + j * 64);
          total = _mm512_dpbusd_epi32(total, eight.low, quad(a.codes + j * 8));
          total = _mm512_dpbusd_epi32(total, eight.high, quad(a.codes + j * 8 + 4));
        }
        const __m512 scale = power(_mm512_add_epi32(exponent, _mm512_set1_epi32(a.scales[b])));
        sum[0][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum[0][g]);
      } else {
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
          __m512i total = _mm512_set1_epi32(a.corrections[b * MR + m]);
#pragma GCC unroll 8
          for (int j = 0; j < 8; j++)
            total = _mm512_dpbusd_epi32(total, quads[j], quad(a.codes + m * BLOCK + j * 4));
          const __m512 scale = power(_mm512_add_epi32(exponent, _mm512_set1_epi32(a.scales[b * MR + m])));
          sum[m][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum[m][g]);
        }
        asm volatile("" ::: "memory");  // else gcc interleaves the groups and spills
      }
    }
    a.codes += MR * BLOCK;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++)
      _mm512_storeu_ps(out + m * ld + g * 16, _mm512_scalef_ps(sum[m][g], _mm512_set1_ps(a.posts[m])));
  return _mm512_cmpgt_epu8_mask(outside, _mm512_set1_epi8(int8_t(LARGEST - first))) == 0;
}

// One row (of a tile of r) and 16 channels, where exponents are out of float32's range. Exponent 255 is NaN.
inline void in_double(RowTile a, int64_t r, Weight w, int64_t blocks, float post, float* out) {
  const __m512i table = weight_table();
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  for (int64_t b = 0; b < blocks; b++, w.scales += TILE, w.codes += TILE) {
    const __m512i total = dot(_mm512_set1_epi32(a.corrections[b * r]), table, w.codes, a.codes + b * r * BLOCK, 4);
    const __m512i bytes = bytes16(w.scales);
    const __m512i exponent = _mm512_add_epi32(bytes, _mm512_set1_epi32(a.scales[b * r] / ONE + 1023 - 127));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255));
    auto add = [&](__m512d sum, __m256i totals, __m256i exponents, __mmask8 nans) {
      const __m512i power = _mm512_slli_epi64(_mm512_cvtepi32_epi64(exponents), 52);
      const __m512d scale = _mm512_mask_mov_pd(
          _mm512_castsi512_pd(power), nans, _mm512_set1_pd(std::numeric_limits<double>::quiet_NaN()));
      return _mm512_fmadd_pd(_mm512_cvtepi32_pd(totals), scale, sum);
    };
    low = add(low, _mm512_castsi512_si256(total), _mm512_castsi512_si256(exponent), __mmask8(nan));
    high = add(
        high, _mm512_extracti64x4_epi64(total, 1), _mm512_extracti64x4_epi64(exponent, 1), __mmask8(nan >> 8));
  }
  const __m512d power = _mm512_set1_pd(post);
  _mm256_storeu_ps(out, _mm512_cvtpd_ps(_mm512_scalef_pd(low, power)));
  _mm256_storeu_ps(out + 8, _mm512_cvtpd_ps(_mm512_scalef_pd(high, power)));
}

// Rows of which float32 cannot hold all products, once more.
template <int GROUPS>
__attribute__((noinline)) void redo(
    const Layout& l, const uint8_t* rows, int64_t count, const uint8_t* panel, int64_t group, Range range, float* out,
    int64_t ld) {
  for (int64_t i = 0; i < count; i++) {
    if (range.fits(ints(rows + l.depths)[i])) continue;
    const int64_t tile = l.tiles.of(i), place = i - l.tiles.first(tile);
    RowTile a(l, rows, tile, 0, 0);
    a.codes += place * BLOCK;
    a.scales += place;
    a.corrections += place;
    for (int g = 0; g < GROUPS; g++)
      in_double(a, l.tiles.size(tile), Weight(panel, group + g), l.blocks, a.posts[place], out + i * ld + g * 16);
  }
}

// A decoded part of a panel: for each pair of groups (or one) the codes [block][8 quads][groups][64], the shifts
// [block][groups][16] (a block's exponent less the least of the channel's) and the least exponents * ONE [groups][16].
struct Decoded {
  uint8_t* codes;
  int32_t *shifts, *bases;
};

// Returns the largest shift.
template <int GROUPS>
__attribute__((noinline)) int decode(Weight w, int64_t blocks, Decoded to, Seen& seen) {
  constexpr int PAIR = GROUPS == 1 ? 1 : 2;
  const __m512i table = weight_table();
  __m512i spread = _mm512_setzero_si512();
  for (int g = 0; g < GROUPS; g++) {
    Seen group;
    for (int64_t b = 0; b < blocks; b++) group.add(bytes16(w.scales + b * TILE + g * 16));
    seen.least = _mm512_min_epi32(seen.least, group.least);
    seen.largest = _mm512_max_epi32(seen.largest, group.largest);
    const __m512i base = _mm512_min_epi32(group.least, group.largest);  // 0 where all is zero
    spread = _mm512_max_epi32(spread, _mm512_sub_epi32(group.largest, base));
    _mm512_store_si512(to.bases + g * 16, _mm512_slli_epi32(base, 23));
  }
  Seen zeros;
  for (int64_t b = 0; b < blocks; b++, w.scales += TILE, w.codes += TILE)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const int64_t at = (g / PAIR * blocks + b) * PAIR + g % PAIR;
      const __m512i exponents = bytes16(w.scales + g * 16);
      const __mmask16 live = _mm512_test_epi32_mask(exponents, exponents);
      const __m512i base = _mm512_srli_epi32(_mm512_load_si512(to.bases + g * 16), 23);
      _mm512_store_si512(to.shifts + at * 16, _mm512_maskz_sub_epi32(live, exponents, base));
      if (live != 0xffff) zeros.add_codes(exponents, any_code(w.codes + g * 256));
      uint8_t* quads = to.codes + (g / PAIR * blocks + b) * PAIR * 512 + g % PAIR * 64;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Eight eight(table, w.codes + g * 256 + j * 64);
        _mm512_store_si512(quads + (2 * j) * PAIR * 64, eight.low);
        _mm512_store_si512(quads + (2 * j + 1) * PAIR * 64, eight.high);
      }
    }
  seen.codes = _mm512_or_si512(seen.codes, zeros.codes);
  return _mm512_reduce_max_epi32(spread);
}

// out += a chunk's products, summed exactly as integers: each block is shifted by how far its exponents are above the
// least of the chunk.
template <int MR, int NV>
__attribute__((noinline)) void multiply_shifted(
    const RowTile& rows, const Decoded& weight, int64_t blocks, float* out, int64_t ld, Prefetch& next) {
  RowTile a = rows;
  Decoded w = weight;
  __m512i sum[MR][NV];
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) sum[m][v] = zero_register<__m512i>();
  for (int64_t b = 0; b < blocks; b++) {
    __m512i total[MR][NV];
    next.step();
    multiply_block<8, MR, NV>(a.codes, a.corrections, w.codes, total);
#pragma GCC unroll 6
    for (int m = 0; m < MR; m++) {
      const __m512i shift = _mm512_set1_epi32(a.shifts[m]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        const __m512i both = _mm512_add_epi32(_mm512_load_si512(w.shifts + v * 16), shift);
        sum[m][v] = _mm512_add_epi32(sum[m][v], _mm512_sllv_epi32(total[m][v], both));
      }
    }
    a.codes += MR * BLOCK;
    a.corrections += MR;
    a.shifts += MR;
    w.codes += NV * 512;
    w.shifts += NV * 16;
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      float* to = out + m * ld + v * 16;
      const __m512i base = _mm512_add_epi32(_mm512_load_si512(w.bases + v * 16), _mm512_set1_epi32(a.bases[m]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][v]), power(base), _mm512_loadu_ps(to)));
    }
}

// The same where the exponents spread too far: every block is scaled in float32. `scales` are the panel's.
template <int MR, int NV>
__attribute__((noinline)) void multiply_scaled(
    const RowTile& rows, const Decoded& weight, const uint8_t* scales, int64_t blocks, float* out, int64_t ld,
    Prefetch& next) {
  RowTile a = rows;
  Decoded w = weight;
  __m512 sum[MR][NV];
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) sum[m][v] = _mm512_loadu_ps(out + m * ld + v * 16);
  for (int64_t b = 0; b < blocks; b++) {
    __m512i total[MR][NV];
    next.step();
    multiply_block<8, MR, NV>(a.codes, a.corrections, w.codes, total);
    __m512i exponent[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) exponent[v] = _mm512_slli_epi32(bytes16(scales + v * 16), 23);
#pragma GCC unroll 6
    for (int m = 0; m < MR; m++) {
      const __m512i of_row = _mm512_set1_epi32(a.scales[m]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++)
        sum[m][v] = _mm512_fmadd_ps(
            _mm512_cvtepi32_ps(total[m][v]), power(_mm512_add_epi32(exponent[v], of_row)), sum[m][v]);
    }
    a.codes += MR * BLOCK;
    a.corrections += MR;
    a.scales += MR;
    w.codes += NV * 512;
    scales += TILE;
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(out + m * ld + v * 16, sum[m][v]);
}

template <int GROUPS>
inline void gemm(
    const Layout& l, const uint8_t* rows, int64_t count, const uint8_t* panel, int64_t group, uint8_t* scratch,
    float* out, int64_t ld) {
  constexpr int NV = GROUPS == 1 ? 1 : 2;
  const int64_t step = chunk_blocks(count);
  const Decoded decoded{
      scratch, ints(scratch + LARGE_CHUNK * 64 * BLOCK), ints(scratch + LARGE_CHUNK * (64 * BLOCK + 64 * 4))};
  Seen seen;
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, GROUPS * 64);
  for (int64_t b = 0, chunk = 0; b < l.blocks; b += step, chunk++) {
    const int64_t blocks = std::min(step, l.blocks - b), ahead = std::min(step, l.blocks - b - blocks);
    const Weight w(panel + b * TILE, group);
    const int of_weight = decode<GROUPS>(w, blocks, decoded, seen);
    Prefetch next(panel + (b + blocks) * TILE, GROUPS == 4 ? ahead * TILE : 0, l.tiles.tiles * blocks * (GROUPS / NV));
    for (int64_t t = 0; t < l.tiles.tiles; t++) {
      const RowTile a(l, rows, t, b, chunk);
      const int64_t r = l.tiles.size(t);
      int spread = 0;
      for (int64_t m = 0; m < r; m++) spread = std::max(spread, a.spreads[m]);
      const bool exact = of_weight + spread <= SPREAD;
      for (int g = 0; g < GROUPS; g += NV) {
        const Decoded part{
            decoded.codes + g * blocks * 512, decoded.shifts + g * blocks * 16, decoded.bases + g * 16};
        float* to = out + l.tiles.first(t) * ld + g * 16;
        with_rows<3, MOST_ROWS>(r, [&](auto mr) {
          if (exact) multiply_shifted<mr, NV>(a, part, blocks, to, ld, next);
          else multiply_scaled<mr, NV>(a, part, w.scales + g * 16, blocks, to, ld, next);
        });
      }
    }
  }
  for (int64_t i = 0; i < count; i++)
    for (int g = 0; g < GROUPS; g++) {
      float* to = out + i * ld + g * 16;
      const __m512 post = _mm512_set1_ps(reinterpret_cast<const float*>(rows + l.posts)[i]);
      _mm512_storeu_ps(to, _mm512_scalef_ps(_mm512_loadu_ps(to), post));
    }
  redo<GROUPS>(l, rows, count, panel, group, seen.range(), out, ld);
}

// out[i * ld + c] of `count` prepared rows (at most MOST) and the 16 * GROUPS channels from group `first_group` of a
// panel on.
template <int GROUPS, int MOST = 384>
inline void tile(
    const uint8_t* rows, int64_t count, int64_t k, const uint8_t* panel, int64_t first_group, uint8_t* scratch,
    float* out, int64_t ld) {
  const Layout l(count, k);
  if constexpr (MOST > FEW)
    if (count > FEW) return gemm<GROUPS>(l, rows, count, panel, first_group, scratch, out, ld);
  int depth = 0;
  for (int64_t i = 0; i < count; i++) depth = std::max(depth, ints(rows + l.depths)[i]);
  const Weight w(panel, first_group);
  bool fits = true;
  for (int64_t t = 0; t < l.tiles.tiles; t++)
    with_rows<1, std::min<int>(MOST, PASS_ROWS)>(l.tiles.size(t), [&](auto mr) {
      fits &= gemv<mr, GROUPS>(RowTile(l, rows, t, 0, 0), w, l.blocks, depth, out + l.tiles.first(t) * ld, ld);
    });
  if (!fits) redo<GROUPS>(l, rows, count, panel, first_group, range_of<GROUPS>(w, l.blocks), out, ld);
}

}  // namespace quark::vnni::mxfp4

#endif  // QUARK_AVX512
#endif  // QUARK_VNNI_MXFP4_H
