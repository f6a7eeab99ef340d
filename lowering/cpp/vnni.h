// Needs common.h, generic.h and panels.h before it.
// What the GEMMs by integer dot products of AVX-512 VNNI have in common: vnni_mxfp4.h, vnni_nvfp4.h, vnni_int8.h, on
// weights packed in panels of 64 output channels (panel64.py: one sequential stream of tiles of 64 channels x 32 k, each
// [block scales][codes]).
//
// Per pair of formats: prepare functions (row i of a block of `count` activation rows into `rows`), and tile(), which
// multiplies all rows of the block by GROUPS groups of 16 channels. Few rows stream the panel once, decoding it in
// registers (GEMV): memory is the limit. More rows decode a chunk of the panel into scratch that stays in L1 and run
// microkernels on it (GEMM).
#ifndef QUARK_VNNI_H
#define QUARK_VNNI_H
#if defined(QUARK_AVX512)

namespace quark::vnni {

using namespace panels;

// 4 neighbouring activation codes, in every lane.
inline __m512i quad(const int8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

inline int32_t* ints(uint8_t* p) { return reinterpret_cast<int32_t*>(p); }
inline const int32_t* ints(const uint8_t* p) { return reinterpret_cast<const int32_t*>(p); }
inline const int8_t* codes_at(const uint8_t* p) { return reinterpret_cast<const int8_t*>(p); }

// --- FP4: twice a value is an integer of at most 12. Weights are decoded to 2 * value + 12, unsigned, activations to
// 2 * value; sums of products start at -12 * (sum of the activations), a block's `correction`.

constexpr int OFFSET = 12;

// The panel holds k = 0,4,1,5 of 8 in the low nibbles of 4 bytes and 2,6,3,7 in the high ones.
constexpr int PLACE[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of element k of 8
inline __m256i in_panel_order(__m256i codes) {
  return _mm256_shuffle_epi8(
      codes, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)));
}

alignas(64) constexpr int8_t DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline __m512i weight_table() {
  const __m512i doubled = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(DOUBLED)));
  return _mm512_add_epi8(doubled, _mm512_set1_epi8(OFFSET));
}

// 64 codes in the low nibbles; what is in the high ones does not matter.
inline __m512i decoded(__m512i table, __m512i nibbles) {
#if defined(__AVX512VBMI__)
  return _mm512_permutexvar_epi8(nibbles, table);
#else
  return _mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
#endif
}

// 16 channels x 8 k.
struct Eight {
  __m512i low, high;
  Eight(__m512i table, const uint8_t* chunk) {
    const __m512i both = _mm512_loadu_si512(chunk);
    low = decoded(table, both);
    high = decoded(table, _mm512_srli_epi16(both, 4));
  }
};

// The sum of `quads` groups of 4 products, for one row and 16 channels, from the panel.
inline __m512i dot(__m512i start, __m512i table, const uint8_t* chunks, const int8_t* codes, int n_chunks) {
  for (int j = 0; j < n_chunks; j++) {
    const Eight w(table, chunks + j * 64);
    start = _mm512_dpbusd_epi32(start, w.low, quad(codes + j * 8));
    start = _mm512_dpbusd_epi32(start, w.high, quad(codes + j * 8 + 4));
  }
  return start;
}

// Dot products of a block of 4 * QUADS columns by MR rows that lie 32 codes apart; NV registers of channels.
template <int QUADS, int MR, int NV>
__attribute__((always_inline)) inline void multiply_block(
    const int8_t* a, const int32_t* corrections, const uint8_t* b, __m512i (&total)[MR][NV]) {
#pragma GCC unroll 6
  for (int m = 0; m < MR; m++) {
    const __m512i start = _mm512_set1_epi32(corrections[m]);
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) total[m][v] = start;
  }
#pragma GCC unroll 8
  for (int j = 0; j < QUADS; j++) {
    __m512i w[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) w[v] = _mm512_load_si512(b + (j * NV + v) * 64);
#pragma GCC unroll 6
    for (int m = 0; m < MR; m++) {
      const __m512i x = quad(a + m * TILE_K + j * 4);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) total[m][v] = _mm512_dpbusd_epi32(total[m][v], w[v], x);
    }
  }
}

// 32 packed codes, low nibble first, to doubled values in the panel's order. Returns whether one is not zero.
inline bool load_codes(const uint8_t* packed, int8_t* codes) {
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(DOUBLED)), nibble = _mm_set1_epi8(15);
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(both, nibble));
  const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), nibble));
  const __m256i natural = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), in_panel_order(natural));
  return !_mm256_testz_si256(natural, natural);
}

// -12 * (sum of n doubled codes).
inline int32_t correction(const int8_t* codes, int n) {
  int32_t sum = 0;
  for (int i = 0; i < n; i++) sum += codes[i];
  return -OFFSET * sum;
}

}  // namespace quark::vnni

#endif  // QUARK_AVX512
#endif  // QUARK_VNNI_H
