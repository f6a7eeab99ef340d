// Needs common.h, generic.h, panels.h and vnni.h before it.
// INT8 and UINT8 by INT8 and UINT8: one exact integer dot product a result.
#ifndef QUARK_VNNI_INT8_H
#define QUARK_VNNI_INT8_H
#if defined(QUARK_AVX512)

namespace quark::vnni::int8 {

// y = activation scale * weight scale * sum of (x - its zero point) * (w - its zero point). Weights are unsigned in the
// panel (signed codes + 128), activations are signed (unsigned codes - 128), sums are exact: |x| <= 128 and
// |w - its zero point| <= 255 stay below 2^31 for K < 65536, and sums wrap around without harm on the way.
constexpr int64_t TILE = 64 * TILE_K;
constexpr int64_t FEW = 8;                // rows that a GEMV multiplies
constexpr int64_t MOST_ROWS = 6;          // of a microkernel
constexpr int64_t CHUNK = 512 / TILE_K;   // tiles of a part of a panel that stays in L1
#if defined(QUARK_AMX)
constexpr bool AMX = true;
constexpr int64_t MANY_ROWS = amx::MOST_ROWS;
#else
constexpr bool AMX = false;
constexpr int64_t MANY_ROWS = MOST_ROWS;
#endif

// Of prepared rows, in bytes: tile by tile of r rows, codes [K / 32][r][32]. AMX multiplies 4 neighbouring k of each of
// 16 tiles of a panel, those whose channels lie at equal distances: for more than FEW rows [K / 512][8][r][16][4].
struct Layout {
  bool interleaved;
  RowTiles tiles;
  int64_t steps, row_bytes, scales, sums, zeros, bytes;  // steps of 32 k

  Layout(int64_t count, int64_t k)
      : interleaved(AMX && count > FEW),
        tiles(count, interleaved ? MANY_ROWS : MOST_ROWS),
        steps((k + TILE_K - 1) / TILE_K),
        row_bytes(round_up(steps, interleaved ? CHUNK : 1) * TILE_K) {
    const int64_t of_rows = round_up(count * 4, 64);
    scales = round_up(count * row_bytes, 64);  // floats; NaN for a row with a NaN
    sums = scales + of_rows;                        // of the codes
    zeros = sums + of_rows;                         // zero points
    bytes = zeros + of_rows;
  }
};

inline int64_t rows_bytes(int64_t count, int64_t k) { return Layout(count, k).bytes; }
inline constexpr int64_t scratch_bytes(int64_t) { return 64 * 4; }

// Where a row's codes are.
struct Row {
  bool interleaved;
  int8_t* codes;
  int64_t step;

  Row(const Layout& l, uint8_t* rows, int64_t i) : interleaved(l.interleaved) {
    const int64_t tile = l.tiles.of(i), first = l.tiles.first(tile), bytes = interleaved ? 64 : TILE_K;
    step = l.tiles.size(tile) * bytes;
    codes = reinterpret_cast<int8_t*>(rows) + first * l.row_bytes + (i - first) * bytes;
  }
  // Those of columns k to k + 15.
  void store(int64_t k, __m128i sixteen) const {
    if (!interleaved) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k / TILE_K * step + k % TILE_K), sixteen);
      return;
    }
    int8_t* to = codes + (k / 512 * 8 + k % TILE_K / 4) * step + k % 512 / TILE_K * 4;
    _mm_storeu_si32(to, sixteen);
    _mm_storeu_si32(to + step, _mm_bsrli_si128(sixteen, 4));
    _mm_storeu_si32(to + 2 * step, _mm_bsrli_si128(sixteen, 8));
    _mm_storeu_si32(to + 3 * step, _mm_bsrli_si128(sixteen, 12));
  }
};

inline void set_row(const Layout& l, uint8_t* rows, int64_t i, float scale, int32_t sum, int32_t zero) {
  std::memcpy(rows + l.scales + i * 4, &scale, 4);
  ints(rows + l.sums)[i] = sum;
  ints(rows + l.zeros)[i] = zero;
}

// Row i of `count`, to be quantized as generic::quantize_integers does it. With a given scale infinity is the last code
// and NaN makes the row NaN; a scale that is no finite number makes it NaN too.
template <int LOW, int HIGH, typename T>
inline void quantize(const T* x, int64_t k, generic::Grid grid, uint8_t* rows, int64_t i, int64_t count) {
  constexpr int SHIFT = LOW + 128;  // unsigned codes become signed
  const Layout l(count, k);
  const Row row(l, rows, i);
  const bool usable = std::isfinite(grid.scale) && std::isfinite(grid.zero_point);
  const float zero_point = usable ? grid.zero_point : 0.0f;
  const __m512 inverse = _mm512_set1_ps(1.0f / grid.scale);
  // Saturated before it is rounded: integers are the bounds.
  const __m512 low = _mm512_set1_ps(float(LOW) - zero_point), high = _mm512_set1_ps(float(HIGH) - zero_point);
  const __m512i add = _mm512_set1_epi32(int(zero_point) - SHIFT);
  __mmask16 nan = 0;
  __m512i sum = _mm512_setzero_si512();
  auto sixteen = [&](int64_t at, __mmask16 valid) {
    const __m512 v = _mm512_mul_ps(load16(x + at, k - at), inverse);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, low), high));
    const __m512i stored = _mm512_maskz_add_epi32(valid, code, add);
    sum = _mm512_add_epi32(sum, stored);
    return _mm512_cvtepi32_epi8(stored);
  };
  int64_t at = 0;
  for (; at + 16 <= k; at += 16) row.store(at, sixteen(at, 0xffff));
  for (; at < l.steps * TILE_K; at += 16)
    row.store(at, at < k ? sixteen(at, __mmask16((1u << (k - at)) - 1)) : _mm_setzero_si128());
  const bool number = usable && !nan;
  set_row(
      l, rows, i, number ? grid.scale : std::numeric_limits<float>::quiet_NaN(), _mm512_reduce_add_epi32(sum),
      int(zero_point) - SHIFT);
}

// Row i of `count`, already quantized: int8 or uint8 codes.
template <typename C>
inline void load(
    const C* codes, int64_t k, float scale, int32_t zero_point, uint8_t* rows, int64_t i, int64_t count) {
  constexpr bool is_signed = std::is_signed_v<C>;
  const Layout l(count, k);
  const Row row(l, rows, i);
  const __m256i flip = _mm256_set1_epi8(is_signed ? 0 : -128);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t s = 0; s < l.steps; s++) {
    const int64_t left = k - s * TILE_K;
    const __mmask32 valid = left < TILE_K ? (1u << left) - 1 : 0xffffffffu;
    const __m256i raw = _mm256_maskz_loadu_epi8(valid, codes + s * TILE_K);
    const __m256i stored = _mm256_maskz_mov_epi8(valid, _mm256_xor_si256(raw, flip));
    sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), stored);
    row.store(s * TILE_K, _mm256_castsi256_si128(stored));
    row.store(s * TILE_K + 16, _mm256_extracti128_si256(stored, 1));
  }
  alignas(32) int32_t parts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
  int32_t total = 0;
  for (int32_t part : parts) total += part;
  set_row(l, rows, i, scale, total, zero_point - (is_signed ? 0 : 128));
}

// Sums over k of the codes as they are in the panel, of 16 * GROUPS channels.
template <int GROUPS>
__attribute__((noinline)) void channel_sums(const uint8_t* panel, int64_t first_group, int64_t k, int32_t* sums) {
  for (int g = 0; g < GROUPS; g++) {
    const uint8_t* w = panel + (first_group + g) * 512;
    __m512i sum[4];
    for (auto& s : sum) s = _mm512_setzero_si512();
    int64_t q = 0;
    auto at = [&](int64_t quad) { return _mm512_loadu_si512(w + quad / 8 * TILE + quad % 8 * 64); };
    for (; q + 4 <= k / 4; q += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum[j] = _mm512_dpbusd_epi32(sum[j], at(q + j), _mm512_set1_epi8(1));
    for (; q < k / 4; q++) sum[0] = _mm512_dpbusd_epi32(sum[0], at(q), _mm512_set1_epi8(1));
    if (k % 4) sum[1] = _mm512_dpbusd_epi32(sum[1], at(q), _mm512_set1_epi32(0x01010101 >> (8 * (4 - k % 4))));
    const __m512i total = _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3]));
    _mm512_storeu_si512(sums + g * 16, total);
  }
}

// sum += a tile of the panel. MEMORY: in the order of the panel, and fetching what is AHEAD bytes further.
template <bool MEMORY, int MR, int GROUPS>
__attribute__((always_inline)) inline void multiply_tile(
    const int8_t* a, const uint8_t* w, __m512i (&sum)[MR][GROUPS]) {
  constexpr int64_t AHEAD = MR == 1 ? 4096 : 8192;
  if constexpr (MEMORY) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      prefetch<8>(w + AHEAD + g * 512);
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        const __m512i b = _mm512_loadu_si512(w + g * 512 + q * 64);
#pragma GCC unroll 6
        for (int m = 0; m < MR; m++) sum[m][g] = _mm512_dpbusd_epi32(sum[m][g], b, quad(a + m * TILE_K + q * 4));
      }
      if constexpr (MR > 1) asm volatile("" ::: "memory");  // else gcc keeps the rows' quads for all groups and spills
    }
  } else {
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
      __m512i b[GROUPS];
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) b[g] = _mm512_loadu_si512(w + g * 512 + q * 64);
#pragma GCC unroll 6
      for (int m = 0; m < MR; m++) {
        const __m512i x = quad(a + m * TILE_K + q * 4);
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++) sum[m][g] = _mm512_dpbusd_epi32(sum[m][g], b[g], x);
      }
    }
  }
}

// Whole K of a panel for MR rows; the sums are integers, held where the results will be.
template <int MR, int GROUPS>
__attribute__((noinline)) void gemv(const int8_t* a, const uint8_t* w, int64_t steps, float* out, int64_t ld) {
  __m512i sum[MR][GROUPS];
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) sum[m][g] = zero_register<__m512i>();
  for (int64_t s = 0; s < steps; s++, a += MR * TILE_K, w += TILE) {
    multiply_tile<true, MR, GROUPS>(a, w, sum);
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) _mm512_storeu_si512(out + m * ld + g * 16, sum[m][g]);
}

// out += a chunk's products, as integers.
template <int MR, int GROUPS>
__attribute__((noinline)) void multiply(
    const int8_t* a, const uint8_t* w, int64_t steps, float* out, int64_t ld, Prefetch& next) {
  __m512i sum[MR][GROUPS];
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) sum[m][g] = _mm512_loadu_si512(out + m * ld + g * 16);
  for (int64_t s = 0; s < steps; s++, a += MR * TILE_K, w += TILE) {
    next.step();
    multiply_tile<false, MR, GROUPS>(a, w, sum);
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) _mm512_storeu_si512(out + m * ld + g * 16, sum[m][g]);
}

template <int GROUPS, int MOST>
inline void gemm(
    const Layout& l, const uint8_t* rows, int64_t count, const uint8_t* panel, int64_t first_group, float* out,
    int64_t ld) {
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, GROUPS * 64);
#if defined(QUARK_AMX)
  amx::Shapes shapes;
  const int64_t wide = std::min<int64_t>(GROUPS, count > amx::ROWS ? 2 : 4), quads = GROUPS / wide * TILE_K / 4;
#endif
  for (int64_t s = 0; s < l.steps; s += CHUNK) {
    const int64_t steps = std::min(CHUNK, l.steps - s), ahead = std::min(CHUNK, l.steps - s - steps);
    const uint8_t* w = panel + s * TILE + first_group * 512;
#if defined(QUARK_AMX)
    Prefetch next(panel + (s + steps) * TILE, GROUPS == 4 ? ahead * TILE : 0, l.tiles.tiles * quads);
    for (int64_t v = 0; v < GROUPS; v += wide)
      for (int64_t t = 0; t < l.tiles.tiles; t++) {
        const int64_t first = l.tiles.first(t), r = l.tiles.size(t);
        const int8_t* a = codes_at(rows) + first * l.row_bytes + s * r * TILE_K;
        shapes.set(count > amx::ROWS, r, steps);
        with_rows<0, (MOST > amx::ROWS)>(count > amx::ROWS, [&](auto pair) {
          amx::multiply_integers<pair, GROUPS>(
              a, r, {w + v * 512, TILE, 512, 64}, 8, out + first * ld + v * 16, ld, next);
        });
      }
#else
    Prefetch next(panel + (s + steps) * TILE, GROUPS == 4 ? ahead * TILE : 0, l.tiles.tiles * steps);
    for (int64_t t = 0; t < l.tiles.tiles; t++) {
      const int64_t first = l.tiles.first(t), r = l.tiles.size(t);
      const int8_t* a = codes_at(rows) + (first * l.steps + s * r) * TILE_K;
      with_rows<3, MOST_ROWS>(r, [&](auto mr) { multiply<mr, GROUPS>(a, w, steps, out + first * ld, ld, next); });
    }
#endif
  }
}

// How the sums of products become results. The arrays have 16 * GROUPS entries, for channels beyond N too.
struct Epilogue {
  int offset;              // what 0 is in the panel: 128 for signed codes, 0 for unsigned ones
  const float* scales;
  const int32_t* zeros;    // zero points of the codes, or null: all 0
  const int32_t* sums;     // channel_sums, or null: the activation has no zero points
};

// Adds what zero points of the activation contribute: a difference of two int32.
inline __m512 less_zero(__m512i sum, int32_t row_zero, int64_t k, __m512i channel_sum, __m512i zero) {
  const __m512i of_channel =
      _mm512_sub_epi32(channel_sum, _mm512_mullo_epi32(_mm512_set1_epi32(int32_t(k)), zero));
  const __m512d factor = _mm512_set1_pd(double(row_zero));
  auto half = [&](__m256i minuend, __m256i subtrahend) {
    return _mm512_cvtpd_ps(
        _mm512_fnmadd_pd(factor, _mm512_cvtepi32_pd(subtrahend), _mm512_cvtepi32_pd(minuend)));
  };
  const __m256 low = half(_mm512_castsi512_si256(sum), _mm512_castsi512_si256(of_channel));
  const __m256 high = half(_mm512_extracti64x4_epi64(sum, 1), _mm512_extracti64x4_epi64(of_channel, 1));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

template <int GROUPS>
inline void finish(const Layout& l, const uint8_t* rows, int64_t count, int64_t k, Epilogue e, float* out, int64_t ld) {
  for (int64_t i = 0; i < count; i++) {
    float scale;
    std::memcpy(&scale, rows + l.scales + i * 4, 4);
    const int32_t row_sum = ints(rows + l.sums)[i], row_zero = ints(rows + l.zeros)[i];
    const __m512i of_offset = _mm512_set1_epi32(int32_t(uint32_t(row_sum) * uint32_t(e.offset)));
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      float* to = out + i * ld + g * 16;
      __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(to), of_offset);
      __m512i zero = _mm512_set1_epi32(e.offset);
      if (e.zeros) {
        const __m512i zeros = _mm512_loadu_si512(e.zeros + g * 16);
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(row_sum), zeros));
        zero = _mm512_add_epi32(zero, zeros);
      }
      const __m512 centered = row_zero ? less_zero(sum, row_zero, k, _mm512_loadu_si512(e.sums + g * 16), zero)
                                       : _mm512_cvtepi32_ps(sum);
      const __m512 scaled = _mm512_mul_ps(centered, _mm512_loadu_ps(e.scales + g * 16));
      _mm512_storeu_ps(to, _mm512_mul_ps(scaled, _mm512_set1_ps(scale)));
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
  if (count <= FEW) {
    for (int64_t t = 0; t < l.tiles.tiles; t++)
      with_rows<1, std::min<int>(MOST, MOST_ROWS)>(l.tiles.size(t), [&](auto mr) {
        const int64_t first = l.tiles.first(t);
        const int8_t* a = codes_at(rows) + first * l.steps * TILE_K;
        gemv<mr, GROUPS>(a, panel + first_group * 512, l.steps, out + first * ld, ld);
      });
  } else if constexpr (MOST > FEW) {
    gemm<GROUPS, MOST>(l, rows, count, panel, first_group, out, ld);
  }
  bool zero_points = false;
  for (int64_t i = 0; i < count; i++) zero_points |= ints(rows + l.zeros)[i] != 0;
  if (zero_points && !epilogue.sums) {
    channel_sums<GROUPS>(panel, first_group, k, ints(scratch));
    epilogue.sums = ints(scratch);
  }
  finish<GROUPS>(l, rows, count, k, epilogue, out, ld);
}

}  // namespace quark::vnni::int8

#endif  // QUARK_AVX512
#endif  // QUARK_VNNI_INT8_H
