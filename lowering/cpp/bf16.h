// Needs common.h, generic.h, panels.h and bf16_codes.h before it.
// Any activation by any packed weight by the bfloat16 dot products of AVX-512. Weights are packed in panels of 64
// output channels ("panel64": one sequential stream of tiles of 64 channels x 32 k, each [block scales][codes]).
//
// Both operands are exact in bfloat16: a weight's code, an activation's code or value. Scales multiply sums, in
// float32; only block scales of prepared activations, and of weights decoded for many rows, are part of the values.
// Rounded operands, as a model in bfloat16 has them that dequantizes before it multiplies, are values with their scales.
//
// Few rows stream the panel once, decoding it in registers (GEMV): memory is the limit. More rows decode a chunk of the
// panel into scratch that stays in L1 and run microkernels on it (GEMM).
#ifndef QUARK_BF16_H
#define QUARK_BF16_H
#if defined(QUARK_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace quark::bf16 {

using namespace panels;

constexpr int64_t PANEL_CHANNELS = 64;
#if defined(QUARK_AMX)
constexpr int64_t CHUNK_K = 1024;         // columns decoded at a time, at most: 128 KB for 64 channels, of L2
constexpr int FEW = 1, MOST_ROWS = amx::MOST_ROWS;
constexpr bool TILED = true;
#else
constexpr int64_t CHUNK_K = 256;          // columns decoded at a time: 32 KB for 64 channels, of L1
constexpr int FEW = 4, MOST_ROWS = 6;     // rows of a GEMV; of a GEMM's microkernel
constexpr bool TILED = false;             // decoded columns: [K / 32][GROUPS][16 pairs], or [K / 2][GROUPS]
#endif
constexpr int64_t SUMMED = 512;            // columns after which a GEMV adds what it has to the result
constexpr int64_t AHEAD = 8192;           // bytes a GEMV prefetches ahead

inline constexpr int64_t blocks_of(int64_t k) { return (k + TILE_K - 1) / TILE_K; }

// --- scales of weights

// The values of 16 scale bytes. E8M0: up to 2^127, and 2^-127 is 0.
template <typename S>
inline __m512 scales_at(const uint8_t* p) {
  const __m512i bytes = bytes16(p);
  if constexpr (std::is_same_v<S, generic::E8M0>) return _mm512_castsi512_ps(_mm512_slli_epi32(bytes, 23));
  constexpr bool E4M3 = std::is_same_v<S, generic::E4M3>;
  constexpr int NAN_CODE = E4M3 ? 127 : 255;
  const __m512i code = E4M3 ? _mm512_and_si512(bytes, _mm512_set1_epi32(127)) : bytes;
  __m512i value = _mm512_add_epi32(_mm512_slli_epi32(code, 20), _mm512_set1_epi32((E4M3 ? 120 : 112) << 23));
  const __m512 subnormal = _mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(E4M3 ? 0x1p-9f : 0x1p-17f));
  value = _mm512_mask_mov_epi32(
      value, _mm512_cmplt_epi32_mask(code, _mm512_set1_epi32(8)), _mm512_castps_si512(subnormal));
  value = _mm512_mask_mov_epi32(
      value, _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(NAN_CODE)), _mm512_set1_epi32(0x7fc00000));
  if (E4M3) value = _mm512_or_si512(value, _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(127), bytes), 24));
  return _mm512_castsi512_ps(value);
}

// Blocks of SIZE columns have a byte each in the tile (S: generic::E8M0, E4M3 or E5M3). `global` multiplies them all.
template <typename S, int SIZE>
struct InTile {
  float global = 1.0f;
  static constexpr int PARTS = TILE_K / SIZE;
  static constexpr int64_t BYTES = PANEL_CHANNELS * PARTS;
  using Scale = S;
};

// One a channel. fill(0, scale, zero) writes those of the panel's 64 channels and their zero points.
template <typename Fill>
struct PerChannel {
  Fill fill;
};
template <typename Fill>
PerChannel(Fill) -> PerChannel<Fill>;

// One for `columns` columns, a multiple of 32, of a channel: fill(k, scale, zero) writes those from column k on.
// prefetch(k) may fetch what fill(k) will read: it lies apart, and waiting for it group by group is slow.
struct NoPrefetch {
  void operator()(int64_t) const {}
};
template <typename Fill, typename Ahead = NoPrefetch>
struct PerGroup {
  int64_t columns;
  Fill fill;
  Ahead prefetch = {};
};
template <typename Fill>
PerGroup(int64_t, Fill) -> PerGroup<Fill>;
template <typename Fill, typename Ahead>
PerGroup(int64_t, Fill, Ahead) -> PerGroup<Fill, Ahead>;

template <typename Scales>
struct InTileScales : std::false_type {};
template <typename S, int SIZE>
struct InTileScales<InTile<S, SIZE>> : std::true_type {};
template <typename Scales>
struct PerGroupScales : std::false_type {};
template <typename Fill, typename Ahead>
struct PerGroupScales<PerGroup<Fill, Ahead>> : std::true_type {};

// What kernels see of the latter two.
struct OfChannels {
  static constexpr int PARTS = 1;
  static constexpr int64_t BYTES = 0;
};
struct OfGroups : OfChannels {};

template <typename Weight, typename Scales>
constexpr int64_t TILE_BYTES = Scales::BYTES + PANEL_CHANNELS * TILE_K * Weight::BITS / 8;

// For a `fill`: n (at least 1; what is beyond 64 does not matter) scales in a row, or one for all.
template <typename T>
inline void fill_scales(const T* scales, int64_t n, float* out) {
  for (int64_t c = 0; c < PANEL_CHANNELS; c += 16)
    _mm512_storeu_ps(out + c, load16(scales + c, std::max<int64_t>(n - c, 0)));
}
inline void fill_all(float value, float* out) {
  for (int64_t c = 0; c < PANEL_CHANNELS; c += 16) _mm512_storeu_ps(out + c, _mm512_set1_ps(value));
}
// n zero points of 4 bits, eight in a word.
template <bool SIGNED, bool REORDER>
inline void fill_zeros(const int32_t* words, int64_t n, float* out) {
  // What moves a nibble to the top of its word.
  alignas(64) static constexpr int32_t shifts[2][16] = {
      {28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0},
      {28, 12, 24, 8, 20, 4, 16, 0, 28, 12, 24, 8, 20, 4, 16, 0}};
  for (int64_t c = 0; c < PANEL_CHANNELS; c += 16) {
    const int64_t left = std::max<int64_t>(n - c, 0);
    const __m128i two = _mm_maskz_loadu_epi32(left > 8 ? 3 : left > 0 ? 1 : 0, words + c / 8);
    const __m512i word = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), _mm512_castsi128_si512(two));
    __m512i code = _mm512_sllv_epi32(word, _mm512_load_si512(shifts[REORDER]));
    code = SIGNED ? _mm512_srai_epi32(code, 28) : _mm512_srli_epi32(code, 28);
    _mm512_storeu_ps(out + c, _mm512_cvtepi32_ps(code));
  }
}

// A weight whose values are rounded to bfloat16 with all their scales.
template <typename Weight>
struct Rounded : Weight {};
template <typename Weight>
constexpr bool ROUNDED = false;
template <typename Weight>
constexpr bool ROUNDED<Rounded<Weight>> = true;

inline __m512i rounded(__m512i pairs, __m512 scale) {
  alignas(64) static constexpr int16_t in_turn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512 first = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), scale);
  const __m512i upper = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
  const __m512 second = _mm512_mul_ps(_mm512_castsi512_ps(upper), scale);
  return _mm512_permutexvar_epi16(_mm512_load_si512(in_turn), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// --- prepared rows: tiles of r rows, their values [K / 32][r][32]; then the scales: one a row, or [K / 32][r] for a
// tile.

// How the activation is scaled: one scale a row, or one for `columns` columns, a multiple of 32.
struct OfRows {};
struct OfColumns {
  int64_t columns;
};

// Rows in one tile if they are few; else in tiles of 3 to 6, or of 16 to 32 with AMX if they are that many.
inline RowTiles tiles_of(int64_t count) { return RowTiles(count, count <= FEW ? FEW : MOST_ROWS); }

inline constexpr int64_t scales_offset(int64_t count, int64_t k) { return count * blocks_of(k) * TILE_K * 2; }
inline constexpr int64_t rows_bytes(int64_t count, int64_t k) {
  return scales_offset(count, k) + round_up(count * std::max<int64_t>(blocks_of(k), 1) * 4, 64);
}

// Where prepared rows are. `rounds`: their values are rounded with their scales, which then are 1; all are OfRows.
struct Rows {
  uint8_t* at;
  bool rounds;

  Rows(uint8_t* at, bool rounds = false) : at(at), rounds(rounds) {}
};

// Where row i of `count` is.
struct Row {
  int64_t k, r;
  uint16_t* values;
  float *scale, *scales;  // of the row, or of its columns
  bool rounds;
  float times = 1.0f;

  Row(Rows all_rows, int64_t k, int64_t i, int64_t count) : k(k), rounds(all_rows.rounds) {
    uint8_t* const rows = all_rows.at;
    const RowTiles tiles = tiles_of(count);
    const int64_t tile = tiles.of(i), first = tiles.first(tile);
    r = tiles.size(tile);
    values = reinterpret_cast<uint16_t*>(rows) + (first * blocks_of(k) + i - first) * TILE_K;
    float* all = reinterpret_cast<float*>(rows + scales_offset(count, k));
    scale = all + i;
    scales = all + first * blocks_of(k) + i - first;
  }
  // The scale of the values stored from now on: of the whole row, or of the columns begin to end.
  void set_scale(float s) {
    times = rounds ? s : 1.0f;
    *scale = rounds ? 1.0f : s;
  }
  void set_scale(float s, int64_t begin, int64_t end) {
    if (rounds) return set_scale(s);
    for (int64_t b = begin; b < end; b += TILE_K) scales[b / TILE_K * r] = s;
  }
  // 32 values, exact unless they are to be rounded; what is beyond K becomes 0.
  void store(int64_t block, __m512 low, __m512 high) const {
    if (rounds) {
      low = _mm512_mul_ps(low, _mm512_set1_ps(times));
      high = _mm512_mul_ps(high, _mm512_set1_ps(times));
    }
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const int64_t left = k - block * TILE_K;
    if (left < TILE_K) both = _mm512_maskz_mov_epi16((1u << left) - 1, both);
    _mm512_storeu_si512(values + block * r * TILE_K, both);
  }
  void store(int64_t block, const float* v) const { store(block, _mm512_loadu_ps(v), _mm512_loadu_ps(v + 16)); }
};

// f(16 elements) for all blocks of columns begin to end, a multiple of 32 or K.
template <typename T, typename F>
inline void store_each(const Row& row, const T* x, int64_t begin, int64_t end, F f) {
  for (int64_t i = begin; i < end; i += TILE_K)
    row.store(i / TILE_K, f(load16(x + i, end - i)), f(load16(x + i + 16, std::max<int64_t>(end - i - 16, 0))));
}

// By what a row should be multiplied whose values are near 2^128 or 2^-126, as bfloat16 and blocks of E8M0 scales can
// be, so that sums of its products neither overflow nor vanish before they are scaled. A row of zeros may have been too
// small.
inline float range_factor(const Row& row) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t b = 0; b < blocks_of(row.k); b++) {
    const __m512i v = _mm512_loadu_si512(row.values + b * row.r * TILE_K);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff)));
  }
  largest = _mm512_max_epu16(largest, _mm512_slli_epi32(largest, 16));
  const float amax = from_bits(_mm512_reduce_max_epu32(largest) & 0xffff0000);
  return amax < 0x1p-64f ? 0x1p64f : amax > 0x1p64f ? 0x1p-64f : 1.0f;
}

// write(factor) writes the values of a row, times the factor.
template <typename Write>
inline void write_in_range(const Row& row, Write write) {
  write(1.0f);
  const float factor = range_factor(row);
  if (__builtin_expect(factor == 1.0f, 1)) return;
  write(factor);
  *row.scale /= factor;
}

// --- prepare functions: row i of `count`

inline void copy(const at::BFloat16* x, int64_t k, Rows rows, int64_t i, int64_t count) {
  Row row(rows, k, i, count);
  *row.scale = 1.0f;
  write_in_range(row, [&](float factor) {
    const __m512 times = _mm512_set1_ps(factor);
    if (factor != 1.0f) return store_each(row, x, 0, k, [&](__m512 v) { return _mm512_mul_ps(v, times); });
    for (int64_t b = 0; b < blocks_of(k); b++) {
      const int64_t left = k - b * TILE_K;
      const __mmask32 valid = left < TILE_K ? (1u << left) - 1 : ~0u;
      _mm512_storeu_si512(row.values + b * row.r * TILE_K, _mm512_maskz_loadu_epi16(valid, x + b * TILE_K));
    }
  });
}

// The largest magnitude; NaN if there is one.
template <typename T>
inline T amax_of(const T* x, int64_t n) {
  __m512i best = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16)  // as integers NaN are above infinity
    best = _mm512_max_epu32(best, _mm512_castps_si512(_mm512_abs_ps(load16(x + i, n - i))));
  return T(from_bits(_mm512_reduce_max_epu32(best)));
}
template <>
inline at::BFloat16 amax_of(const at::BFloat16* x, int64_t n) {
  __m512i best = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 valid = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
    const __m512i v = _mm512_maskz_loadu_epi16(valid, x + i);
    best = _mm512_max_epu16(best, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff)));
  }
  best = _mm512_max_epu16(best, _mm512_slli_epi32(best, 16));
  return at::BFloat16(from_bits(_mm512_reduce_max_epu32(_mm512_srli_epi32(best, 16)) << 16));
}

// The second operand of min and max is the result where one is NaN: this order keeps a NaN.
inline __m512 clamped(__m512 v, float low, float high) {
  return _mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), v));
}
template <typename E>
inline __m512 nearest(__m512 v) { return round_to_grid(clamped(v, -E::max, E::max), E::man, E::least); }

// FP8 by one scale: the quotient is rounded to T.
template <typename E, typename T>
inline void quantize_fp8(const T* x, int64_t k, float scale, Rows rows, int64_t i, int64_t count) {
  Row row(rows, k, i, count);
  row.set_scale(scale);
  const __m512 divisor = _mm512_set1_ps(scale);
  store_each(row, x, 0, k, [&](__m512 v) { return nearest<E>(rounded_to<T>(_mm512_div_ps(v, divisor))); });
}

template <typename E, typename T>
inline void quantize_fp8(const T* x, int64_t k, Rows rows, int64_t i, int64_t count) {
  const T amax = amax_of(x, k);
  quantize_fp8<E>(x, k, generic::fp8_scale<E>(&amax, 1), rows, i, count);
}

// FP8 by groups of columns: the quotient stays in float32.
template <typename E, typename T>
inline void quantize_fp8_groups(const T* x, int64_t k, int64_t group, Rows rows, int64_t i, int64_t count) {
  Row row(rows, k, i, count);
  for (int64_t begin = 0; begin < k; begin += group) {
    const int64_t end = std::min(k, begin + group);
    const T amax = amax_of(x + begin, end - begin);
    const float scale = generic::fp8_scale<E>(&amax, 1);
    const __m512 divisor = _mm512_set1_ps(scale);
    row.set_scale(scale, begin, end);
    store_each(row, x, begin, end, [&](__m512 v) { return nearest<E>(_mm512_div_ps(v, divisor)); });
  }
}

// A block format by generic.h's rules; `zero` is what a scale of 0 multiplies by. The global scale stays the row's.
template <typename E, int SIZE, typename Rule, typename T>
inline void quantize_blocks(
    const T* x, int64_t k, float global, float zero, Rows rows, int64_t i, int64_t count) {
  constexpr bool HAS_GLOBAL = std::is_same_v<Rule, generic::Sequential> || std::is_same_v<Rule, generic::Combined>;
  const Row row(rows, k, i, count);
  *row.scale = HAS_GLOBAL && !row.rounds ? global : 1.0f;
  auto write = [&](float factor) {
    for (int64_t b = 0; b < k; b += TILE_K) {
      __m512 v[2] = {load16(x + b, 16), b + 16 < k ? load16(x + b + 16, 16) : _mm512_setzero_ps()};
      __m512i amax[2] = {_mm512_castps_si512(_mm512_abs_ps(v[0])), _mm512_castps_si512(_mm512_abs_ps(v[1]))};
      if (SIZE == 32) amax[0] = _mm512_max_epu32(amax[0], amax[1]);  // as integers NaN are above infinity
      float scales[2];
#pragma GCC unroll 2
      for (int h = 0; h < TILE_K / SIZE; h++)
        scales[h] = Rule::template scale<E, T>(from_bits(_mm512_reduce_max_epu32(amax[h])), global);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const float scale = scales[h * 16 / SIZE];
        // The block's scale alone: the product with the global one was rounded once, far below the steps of its grid.
        const float block = HAS_GLOBAL && !row.rounds ? round_to_grid(scale / global, 3, 0x1p-9f) : scale;
        const __m512 divisor = _mm512_set1_ps(scale == 0.0f ? generic::EPS : scale);
        const __m512 value = _mm512_mul_ps(
            nearest<E>(_mm512_div_ps(v[h], divisor)), _mm512_set1_ps(scale == 0.0f ? zero : block));
        v[h] = _mm512_mul_ps(value, _mm512_set1_ps(factor));  // after what may become infinite
      }
      row.store(b / TILE_K, v[0], v[1]);
    }
  };
  if (HAS_GLOBAL) write(1.0f);
  else write_in_range(row, write);
}

// Integers: the codes less the zero point.
template <int LOW, int HIGH, typename T>
inline void quantize_integers(const Row& row, const T* x, int64_t begin, int64_t end, generic::Grid grid) {
  const __m512 inverse = _mm512_set1_ps(1.0f / grid.scale), zero = _mm512_set1_ps(grid.zero_point);
  store_each(row, x, begin, end, [&](__m512 v) {
    const __m512 code = _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_sub_ps(clamped(_mm512_add_ps(code, zero), LOW, HIGH), zero);
  });
}

template <int LOW, int HIGH, typename T>
inline void quantize_integers(
    const T* x, int64_t k, generic::Grid grid, Rows rows, int64_t i, int64_t count) {
  Row row(rows, k, i, count);
  row.set_scale(grid.scale);
  quantize_integers<LOW, HIGH>(row, x, 0, k, grid);
}

template <int LOW, int HIGH, bool SYMMETRIC, typename T>
inline void quantize_integers(const T* x, int64_t k, Rows rows, int64_t i, int64_t count) {
  quantize_integers<LOW, HIGH>(x, k, integer_grid<LOW, HIGH, SYMMETRIC>(x, k), rows, i, count);
}

template <int LOW, int HIGH, bool SYMMETRIC, typename T>
inline void quantize_integer_groups(
    const T* x, int64_t k, int64_t group, Rows rows, int64_t i, int64_t count) {
  Row row(rows, k, i, count);
  for (int64_t begin = 0; begin < k; begin += group) {
    const int64_t end = std::min(k, begin + group);
    const generic::Grid grid = integer_grid<LOW, HIGH, SYMMETRIC>(x + begin, end - begin);
    row.set_scale(grid.scale, begin, end);
    quantize_integers<LOW, HIGH>(row, x, begin, end, grid);
  }
}

// Activations that are quantized already: `value(k)` is a code's value, the scale of column k is scales[k / columns];
// OfRows for columns >= K.
template <typename S, typename Value>
inline void load_values(Row row, const S* scales, int64_t columns, Value value) {
  if (columns >= row.k) row.set_scale(float(scales[0]));
  for (int64_t b = 0; b < blocks_of(row.k); b++) {
    float v[TILE_K] = {};
    const int64_t begin = b * TILE_K, end = std::min(row.k, begin + TILE_K);
    if (columns < row.k) row.set_scale(float(scales[begin / columns]), begin, end);
    for (int64_t j = begin; j < end; j++) v[j - begin] = value(j);
    row.store(b, v);
  }
}

template <typename E, typename C, typename S>
inline void load_fp8(
    const C* codes, const S* scales, int64_t k, int64_t columns, Rows rows, int64_t i, int64_t count) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes);
  const float* values = generic::table<E>();
  load_values(Row(rows, k, i, count), scales, columns, [&](int64_t j) { return values[bytes[j]]; });
}

template <typename C, typename S, typename Z>
inline void load_integers(
    const C* codes, const S* scales, const Z* zero_points, int64_t k, int64_t columns, Rows rows, int64_t i,
    int64_t count) {
  load_values(Row(rows, k, i, count), scales, columns, [&](int64_t j) {
    return float(codes[j]) - (zero_points ? float(zero_points[j / columns]) : 0.0f);
  });
}

template <typename E, int SIZE, typename S, typename C, typename SC>
inline void load_blocks(
    const C* packed, const SC* scales, int64_t k, float global, float zero, Rows rows, int64_t i, int64_t count) {
  constexpr int BITS = std::is_same_v<E, generic::Fp4> ? 4 : E::max < 100.0f ? 6 : 8;
  const Row row(rows, k, i, count);
  *row.scale = row.rounds ? 1.0f : global;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(packed);
  write_in_range(row, [&](float factor) {
    for (int64_t b = 0; b < k; b += TILE_K) {
      float v[TILE_K] = {};
      generic::decode_blocks<E, SIZE, S, float>(
          codes + b * BITS / 8, scales + b / SIZE, std::min<int64_t>(TILE_K, k - b), row.rounds ? global : 1.0f, zero, v);
      for (float& value : v) value *= factor;
      row.store(b / TILE_K, v);
    }
  });
}

// --- the product: few rows

// 16 * GROUPS channels of a panel by a tile of rows.
struct Operands {
  const uint8_t* panel;      // its first tile
  int first_group;           // the first 16 channels
  const uint16_t* values;    // of the rows
  const float* x_scales;     // [K / 32][r], of OfColumns
  const float* scales;       // [groups][16 * GROUPS]
  const int32_t* zeros;      // as the decoder encoded them, [groups][16 * GROUPS]
  int64_t blocks;
  int64_t group_blocks;      // 32 columns each
  float factor;              // the global scale, where it has to be part of x_scales or of rounded values
};

inline __m512 dot(__m512 sum, __m512i w, const uint16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
}

// MR rows; `out` gets the sums, in which scales of rows, channels and the global one are missing.
template <int MR, int GROUPS, typename Weight, typename Scales, bool OF_COLUMNS>
__attribute__((noinline)) void gemv(const Operands& o, float* out, int64_t ld) {
  constexpr bool OF_CHANNELS = std::is_same_v<Scales, OfChannels>, ROUNDS = ROUNDED<Weight>;
  constexpr bool DIRECT = (OF_CHANNELS || ROUNDS) && !OF_COLUMNS;
  constexpr int CHAINS = MR <= 2 ? 2 : 1;  // a dot product has a latency of 6 cycles
  constexpr int SUMS = DIRECT ? CHAINS : 1, STEPS = 8 / Scales::PARTS;
  // Two groups at a time share the loads of activations.
  constexpr int ALONE = Weight::ZERO_POINT ? 0 : Weight::BITS < 8 ? 1 : 2;  // rows for which one is faster: measured
  constexpr int WIDE = GROUPS > 1 && MR > ALONE ? 2 : 1, LINES = Weight::BITS * WIDE;
  constexpr int64_t CHUNK = 16 * Weight::BITS;
  const Weight weight;
  const uint8_t* scale_bytes = o.panel + o.first_group * 16;
  const uint8_t* codes = o.panel + Scales::BYTES + o.first_group * 4 * CHUNK;
  const uint16_t* x = o.values;
  const float *x_scales = o.x_scales, *scales = o.scales;
  const int32_t* zeros = o.zeros;
  const float factor = o.factor;
  int64_t left = o.group_blocks;
  for (int64_t begin = 0, end; begin < o.blocks; begin = end) {
    // Sums of a whole K would gather rounding errors.
    end = DIRECT ? std::min(o.blocks, begin + SUMMED / TILE_K) : o.blocks;
    __m512 sum[MR][GROUPS][SUMS];
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < GROUPS; v++)
#pragma GCC unroll 2
        for (int c = 0; c < SUMS; c++) sum[m][v][c] = zero_register<__m512>();
    for (int64_t b = begin; b < end; b++) {
      prefetch<Scales::BYTES / 64>(scale_bytes + AHEAD);
#pragma GCC unroll 4
      for (int v = 0; v < GROUPS; v += WIDE) {
        const uint8_t* chunk = codes + v * 4 * CHUNK;
#pragma GCC unroll 2
        for (int part = 0; part < Scales::PARTS; part++) {
          __m512 total[MR][WIDE][CHAINS];
#pragma GCC unroll 4
          for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE * CHAINS; c++)
              total[m][c / CHAINS][c % CHAINS] = DIRECT ? sum[m][v + c / CHAINS][c % SUMS] : zero_register<__m512>();
          __m512 scale[WIDE];
#pragma GCC unroll 2
          for (int g = 0; g < WIDE; g++) {
            if constexpr (Scales::BYTES > 0)
              scale[g] = scales_at<typename Scales::Scale>(scale_bytes + part * PANEL_CHANNELS + 16 * (v + g));
            else if constexpr (!OF_CHANNELS || ROUNDS) scale[g] = _mm512_loadu_ps(scales + 16 * (v + g));
            if constexpr (Scales::BYTES > 0 && ROUNDS) scale[g] = _mm512_mul_ps(scale[g], _mm512_set1_ps(factor));
          }
#pragma GCC unroll 8
          for (int half = part * STEPS; half < part * STEPS + STEPS; half++) {
#pragma GCC unroll 2
            for (int l = half * LINES / 8; l < (half + 1) * LINES / 8; l++)
              prefetch_between(chunk + AHEAD + l * 64, total[0][0][0]);
            Pairs pairs[WIDE];
#pragma GCC unroll 2
            for (int g = 0; g < WIDE; g++) {
              const __m512i zero =
                  Weight::ZERO_POINT ? _mm512_loadu_si512(zeros + 16 * (v + g)) : _mm512_setzero_si512();
              pairs[g] = weight(chunk + (g * 4 + half / 2) * CHUNK, half % 2, zero);
              if constexpr (ROUNDS) pairs[g] = {rounded(pairs[g].first, scale[g]), rounded(pairs[g].second, scale[g])};
            }
#pragma GCC unroll 4
            for (int m = 0; m < MR; m++) {
              const uint16_t* at = x + m * TILE_K + half * 4;
#pragma GCC unroll 2
              for (int g = 0; g < WIDE; g++) {
                total[m][g][0] = dot(total[m][g][0], pairs[g].first, at);
                total[m][g][CHAINS - 1] = dot(total[m][g][CHAINS - 1], pairs[g].second, at + 2);
              }
            }
          }
#pragma GCC unroll 2
          for (int g = 0; g < WIDE; g++)
#pragma GCC unroll 4
            for (int m = 0; m < MR; m++) {
              __m512(&s)[SUMS] = sum[m][v + g];
              if constexpr (DIRECT) {
                s[0] = total[m][g][0];
                s[SUMS - 1] = total[m][g][CHAINS - 1];
              } else {
                __m512 t = CHAINS == 2 ? _mm512_add_ps(total[m][g][0], total[m][g][CHAINS - 1]) : total[m][g][0];
                if constexpr (OF_COLUMNS && !OF_CHANNELS) t = _mm512_mul_ps(t, scale[g]);
                s[0] = _mm512_fmadd_ps(t, OF_COLUMNS ? _mm512_set1_ps(x_scales[m] * factor) : scale[g], s[0]);
              }
            }
        }
        asm volatile("" ::: "memory");  // else gcc interleaves the groups and spills
      }
      scale_bytes += TILE_BYTES<Weight, Scales>;
      codes += TILE_BYTES<Weight, Scales>;
      x += MR * TILE_K;
      x_scales += MR;
      if (--left == 0) {
        left = o.group_blocks;
        scales += 16 * GROUPS;
        zeros += 16 * GROUPS;
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < GROUPS; v++) {
        __m512 total = SUMS == 2 ? _mm512_add_ps(sum[m][v][0], sum[m][v][SUMS - 1]) : sum[m][v][0];
        if (DIRECT && begin) total = _mm512_add_ps(_mm512_loadu_ps(out + m * ld + 16 * v), total);
        _mm512_storeu_ps(out + m * ld + 16 * v, total);
      }
  }
}

// --- the product: more rows

// A chunk of a panel is decoded to pairs [K / 2][GROUPS][16 channels]. Block scales become part of the values.

// E8M0 scales are added to the exponents where that is right: nothing underflows, and no code is NaN or infinity.
constexpr int LEAST_ADDED = 17;  // 2^(17 - 127) times the least magnitude, 2^-16, is a normal bfloat16

// Times a float scale a channel, if that is exact. What is too small becomes 0, or is a subnormal that counts as 0.
inline __m512i scaled(__m512i pairs, __m512 scale) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  const __m512 first = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), scale);
  const __m512 second = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, upper)), scale);
  return _mm512_ternarylogic_epi32(
      _mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second), upper, 0xf8);
}

template <int GROUPS, typename Weight, typename Scales>
__attribute__((noinline)) void decode(const Operands& o, int64_t begin, int64_t end, uint16_t* out, Prefetch& next) {
  constexpr int64_t CHUNK = 16 * Weight::BITS, TILE = TILE_BYTES<Weight, Scales>, PAIRS = TILED ? 32 : GROUPS * 32;
  const Weight weight;
  const uint8_t* tile = o.panel + begin * TILE;
  for (int64_t b = begin; b < end; b++, tile += TILE) {
    for (int v = 0; v < GROUPS; v++, out += TILED ? 16 * 32 : 32) {
      next.step();
      const uint8_t* chunk = tile + Scales::BYTES + (o.first_group + v) * 4 * CHUNK;
      const uint8_t* bytes = tile + (o.first_group + v) * 16;
      const __m512i zero = Weight::ZERO_POINT
          ? _mm512_loadu_si512(o.zeros + (b / o.group_blocks * GROUPS + v) * 16) : _mm512_setzero_si512();
      auto store = [&](int j, auto f) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          const Pairs pairs = weight(chunk + j * CHUNK, h, zero);
          _mm512_store_si512(out + (j * 4 + h * 2) * PAIRS, f(pairs.first));
          _mm512_store_si512(out + (j * 4 + h * 2 + 1) * PAIRS, f(pairs.second));
        }
      };
      if constexpr (Scales::BYTES == 0 && ROUNDED<Weight>) {
        const __m512 scale = _mm512_loadu_ps(o.scales + (b / o.group_blocks * GROUPS + v) * 16);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) store(j, [&](__m512i p) { return rounded(p, scale); });
      } else if constexpr (Scales::BYTES == 0) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) store(j, [](__m512i p) { return p; });
      } else {
        if constexpr (std::is_same_v<typename Scales::Scale, generic::E8M0> && !ROUNDED<Weight>) {
          const __m512i exponent = bytes16(bytes);
          bool added = !_mm512_cmplt_epu32_mask(exponent, _mm512_set1_epi32(LEAST_ADDED));
          if constexpr (Weight::LARGE < 256) {
            __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
              const __m512i codes = _mm512_loadu_si512(chunk + j * 64);
              largest = _mm512_max_epu8(largest, _mm512_add_epi8(codes, codes));
            }
            added = added && !_mm512_cmpge_epu8_mask(largest, _mm512_set1_epi8(int8_t(Weight::LARGE)));
          }
          if (__builtin_expect(added, 1)) {
            const __m512i difference = _mm512_slli_epi32(_mm512_sub_epi32(exponent, _mm512_set1_epi32(127)), 7);
            const __m512i both = _mm512_mask_mov_epi16(_mm512_slli_epi32(difference, 16), 0x55555555, difference);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
              store(j, [&](__m512i p) {
                return _mm512_mask_add_epi16(p, _mm512_test_epi16_mask(p, _mm512_set1_epi16(0x7fff)), p, both);
              });
            continue;
          }
        }
        for (int j = 0; j < 4; j++) {
          const __m512 scale = scales_at<typename Scales::Scale>(bytes + j * Scales::PARTS / 4 * PANEL_CHANNELS);
          if constexpr (ROUNDED<Weight>) {
            const __m512 all = _mm512_mul_ps(scale, _mm512_set1_ps(o.factor));
            store(j, [&](__m512i p) { return rounded(p, all); });
          } else {
            store(j, [&](__m512i p) { return scaled(p, scale); });
          }
        }
      }
    }
    if (!TILED) out += 15 * GROUPS * 32;
  }
}

// out += the products of MR rows and decoded columns; SCALED: times w_scales [GROUPS][16], x_scales [MR] and factor.
template <int MR, int GROUPS, bool SCALED>
__attribute__((noinline)) void multiply(
    const uint16_t* x, const uint16_t* w, int64_t blocks, const float* w_scales, const float* x_scales, float factor,
    float* out, int64_t ld, Prefetch& next) {
  __m512 sum[MR][GROUPS];
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < GROUPS; v++) sum[m][v] = zero_register<__m512>();
  for (int64_t b = 0; b < blocks; b++, x += (MR - 1) * TILE_K)
    for (int q = 0; q < 4; q++, x += 8, w += 4 * GROUPS * 32) {
      next.step();
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m512i pairs[GROUPS];
#pragma GCC unroll 4
        for (int v = 0; v < GROUPS; v++) pairs[v] = _mm512_load_si512(w + (i * GROUPS + v) * 32);
#pragma GCC unroll 6
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
          for (int v = 0; v < GROUPS; v++) sum[m][v] = dot(sum[m][v], pairs[v], x + m * TILE_K + i * 2);
      }
    }
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < GROUPS; v++) {
      float* to = out + m * ld + 16 * v;
      const __m512 before = _mm512_loadu_ps(to);
      if (SCALED) {
        const __m512 of_channels = _mm512_mul_ps(sum[m][v], _mm512_loadu_ps(w_scales + 16 * v));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(of_channels, _mm512_set1_ps(x_scales[m] * factor), before));
      } else {
        _mm512_storeu_ps(to, _mm512_add_ps(before, sum[m][v]));
      }
    }
}

template <int GROUPS, int MOST, typename Weight, typename Scales, bool OF_COLUMNS>
inline void gemm(
    Operands o, const RowTiles& tiles, int64_t count, int64_t x_blocks, uint16_t* decoded, float* out, int64_t ld) {
  constexpr bool OF_GROUPS = std::is_same_v<Scales, OfGroups> && !ROUNDED<Weight>, SCALED = OF_GROUPS || OF_COLUMNS;
  constexpr int64_t TILE = TILE_BYTES<Weight, Scales>;
#if defined(QUARK_AMX)
  const int64_t chunk = (count > amx::ROWS ? CHUNK_K : CHUNK_K / 4) / TILE_K;
  amx::Shapes shapes;
  const int64_t wide = std::min<int64_t>(GROUPS, count > amx::ROWS ? 2 : 4), steps = GROUPS / wide;
#else
  constexpr int64_t chunk = CHUNK_K / TILE_K;
  constexpr int64_t wide = GROUPS, steps = 4;  // groups at a time; of prefetching, for a tile of rows and 32 columns
#endif
  alignas(64) float ones[PANEL_CHANNELS];
  fill_all(1.0f, ones);
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, GROUPS * 64);
  for (int64_t begin = 0; begin < o.blocks; begin += chunk) {
    const int64_t end = std::min(o.blocks, begin + chunk), after = std::min(o.blocks, end + chunk);
    Prefetch next(o.panel + end * TILE, (after - end) * TILE, (tiles.tiles * steps + GROUPS) * (end - begin));
    decode<GROUPS, Weight, Scales>(o, begin, end, decoded, next);
    for (int64_t v = 0; v < GROUPS; v += wide)
      for (int64_t t = 0; t < tiles.tiles; t++) {
        const int64_t first = tiles.first(t), r = tiles.size(t);
        const uint16_t* x = o.values + first * o.blocks * TILE_K;
        const float* x_scales = o.x_scales + first * o.blocks;
        // From scale to scale.
        for (int64_t b = begin, stop; b < end; b = stop) {
          stop = end;
          if (OF_GROUPS) stop = std::min(stop, (b / o.group_blocks + 1) * o.group_blocks);
          if (OF_COLUMNS) stop = std::min(stop, (b / x_blocks + 1) * x_blocks);
          const float* w_scales = (OF_GROUPS ? o.scales + b / o.group_blocks * GROUPS * 16 : ones) + v * 16;
          const uint16_t *rows = x + b * r * TILE_K, *pairs = decoded + ((b - begin) * GROUPS + v) * 16 * 32;
          const float* of_rows = OF_COLUMNS ? x_scales + b * r : ones;
          float* to = out + first * ld + v * 16;
#if defined(QUARK_AMX)
          shapes.set(count > amx::ROWS, r, 16);
          with_rows<0, (MOST > amx::ROWS)>(count > amx::ROWS, [&](auto pair) {
            amx::multiply_bf16<pair, GROUPS, SCALED>(
                rows, r, {pairs, 64, 1024, GROUPS * 1024}, stop - b, w_scales, of_rows, o.factor, to, ld, next);
          });
#else
          with_rows<3, std::min(MOST, MOST_ROWS)>(r, [&](auto mr) {
            multiply<mr, GROUPS, SCALED>(rows, pairs, stop - b, w_scales, of_rows, o.factor, to, ld, next);
          });
#endif
        }
      }
  }
}

// out *= what scales a whole row, channel or all. In double, where no order of these overflows or loses bits.
__attribute__((noinline)) inline void apply_scales(
    float* out, int64_t ld, int64_t count, int groups, const float* of_rows, const float* of_channels, float global) {
  for (int64_t i = 0; i < count; i++) {
    const __m512d row = _mm512_set1_pd(double(of_rows ? of_rows[i] : 1.0f) * double(global));
    for (int c = 0; c < groups * 16; c += 8) {
      __m512d v = _mm512_mul_pd(_mm512_cvtps_pd(_mm256_loadu_ps(out + i * ld + c)), row);
      if (of_channels) v = _mm512_mul_pd(v, _mm512_cvtps_pd(_mm256_loadu_ps(of_channels + c)));
      _mm256_storeu_ps(out + i * ld + c, _mm512_cvtpd_ps(v));
    }
  }
}

// `columns`: that share a scale of the weight, where those are not in the panel; K for PerChannel.
inline constexpr int64_t scratch_bytes(int64_t k, int64_t columns = TILE_K) {
  return (k + columns - 1) / columns * PANEL_CHANNELS * 8 + CHUNK_K * PANEL_CHANNELS * 2;
}

// Scales and encoded zero points of all groups of columns, 16 * GROUPS channels each. Meanwhile what a GEMV has not
// prefetched of the panel is.
template <int GROUPS, typename Weight, typename Fill>
inline void collect(
    const Fill& fill, int64_t k, int64_t columns, const uint8_t* panel, int first_group, float* scales,
    int32_t* zeros) {
  alignas(64) float scale[PANEL_CHANNELS], zero[PANEL_CHANNELS];
  for (int64_t i = 0; i < k; i += columns, panel += 512, scales += 16 * GROUPS, zeros += 16 * GROUPS) {
    for (int l = 0; l < 8; l++) _mm_prefetch(reinterpret_cast<const char*>(panel + AHEAD + l * 64), _MM_HINT_T1);
    fill(i, GROUPS == 4 ? scales : scale, zero);
    for (int v = 0; v < GROUPS; v++) {
      if (GROUPS < 4) _mm512_store_ps(scales + v * 16, _mm512_load_ps(scale + (first_group + v) * 16));
      if constexpr (Weight::ZERO_POINT)
        _mm512_store_si512(zeros + v * 16, Weight::encoded(_mm512_load_ps(zero + (first_group + v) * 16)));
    }
  }
}

template <int GROUPS, int MOST, typename Weight, typename Scales, bool OF_COLUMNS>
inline void multiply_rows(
    const Operands& o, int64_t count, int64_t x_blocks, uint16_t* decoded, float* out, int64_t ld) {
  if (MOST <= FEW || count <= FEW) {
    with_rows<1, std::min(MOST, FEW)>(
        count, [&](auto rows) { gemv<rows, GROUPS, Weight, Scales, OF_COLUMNS>(o, out, ld); });
  } else if constexpr (MOST > FEW) {
    gemm<GROUPS, MOST, Weight, Scales, OF_COLUMNS>(o, tiles_of(count), count, x_blocks, decoded, out, ld);
  }
}

// out[i * ld + c] for `count` prepared rows and the 16 * GROUPS channels of a panel from 16 * first_group on.
// Activation: OfRows or OfColumns, as the rows were prepared; Scales: InTile, PerChannel or PerGroup. `count` is at
// most MOST. A Rounded weight takes OfRows.
template <int GROUPS, int MOST, typename Weight, typename Activation, typename Scales>
inline void tile(
    const uint8_t* rows, int64_t count, int64_t k, const uint8_t* panel, int first_group, Activation activation,
    const Scales& scales, uint8_t* scratch, float* out, int64_t ld) {
  constexpr bool OF_COLUMNS = std::is_same_v<Activation, OfColumns>;
  static_assert(!(OF_COLUMNS && ROUNDED<Weight>));
  const float* x_scales = reinterpret_cast<const float*>(rows + scales_offset(count, k));
  Operands o{panel, first_group, reinterpret_cast<const uint16_t*>(rows), x_scales, nullptr, nullptr, blocks_of(k), 0,
             1.0f};
  int64_t x_blocks = o.blocks;
  if constexpr (OF_COLUMNS) x_blocks = blocks_of(activation.columns);
  const float *of_rows = OF_COLUMNS ? nullptr : x_scales, *of_channels = nullptr;
  float global = 1.0f;
  uint16_t* decoded = reinterpret_cast<uint16_t*>(scratch);
  if constexpr (InTileScales<Scales>::value) {
    o.group_blocks = o.blocks;
    (OF_COLUMNS || ROUNDED<Weight> ? o.factor : global) = scales.global;
    multiply_rows<GROUPS, MOST, Weight, Scales, OF_COLUMNS>(o, count, x_blocks, decoded, out, ld);
  } else {
    constexpr bool OF_GROUPS = PerGroupScales<Scales>::value;
    int64_t columns = k;
    if constexpr (OF_GROUPS) {
      columns = scales.columns;
      for (int64_t i = 0; i < k; i += columns) scales.prefetch(i);
    }
    o.group_blocks = blocks_of(columns);
    float* all = reinterpret_cast<float*>(scratch + CHUNK_K * PANEL_CHANNELS * 2);
    int32_t* zeros = reinterpret_cast<int32_t*>(all + (k + columns - 1) / columns * GROUPS * 16);
    collect<GROUPS, Weight>(scales.fill, k, columns, panel, first_group, all, zeros);
    o.scales = all;
    o.zeros = zeros;
    if (!OF_GROUPS && !ROUNDED<Weight>) of_channels = all;
    using Kind = std::conditional_t<OF_GROUPS, OfGroups, OfChannels>;
    multiply_rows<GROUPS, MOST, Weight, Kind, OF_COLUMNS>(o, count, x_blocks, decoded, out, ld);
  }
  if (of_rows || of_channels || global != 1.0f) apply_scales(out, ld, count, GROUPS, of_rows, of_channels, global);
}

}  // namespace quark::bf16

#endif  // QUARK_AVX512 && __AVX512BF16__ && __AVX512VBMI__
#endif  // QUARK_BF16_H
