// Needs common.h before it.
// The codes of packed weights to bfloat16, exactly, with AVX-512 VBMI.
#ifndef QUARK_BF16_CODES_H
#define QUARK_BF16_CODES_H
#if defined(QUARK_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace quark::bf16 {

// A decoder makes two pairs (k, k + 1) of 16 channels, those of half h of a chunk of 8 k. `zero`
// is what it made of the channels' zero points.

struct Pairs {
  __m512i first, second;
};

// The bits of a minifloat's value, exactly: a sign, BITS - 1 - MAN exponent bits, MAN mantissa bits.
template <int BITS, int MAN, int BIAS>
constexpr uint16_t minifloat_bits(int code) {
  const int sign = (code >> (BITS - 1) & 1) << 15, magnitude = code & ((1 << (BITS - 1)) - 1);
  int exponent = magnitude >> MAN, mantissa = magnitude & ((1 << MAN) - 1);
  if (BITS == 8 && MAN == 3 && magnitude == 0x7f) return uint16_t(sign | 0x7fc0);
  if (BITS == 8 && MAN == 2 && exponent == 31) return uint16_t(sign | (mantissa ? 0x7fc0 : 0x7f80));
  if (magnitude == 0) return uint16_t(sign);
  if (exponent == 0) {
    for (exponent = 1; !(mantissa >> MAN); exponent--) mantissa <<= 1;
    mantissa &= (1 << MAN) - 1;
  }
  return uint16_t(sign | (exponent - BIAS + 127) << 7 | mantissa << (7 - MAN));
}

template <int BITS, int MAN, int BIAS, int COUNT>
struct Halves {
  alignas(64) uint8_t low[COUNT] = {}, high[COUNT] = {};
  constexpr Halves() {
    for (int c = 0; c < COUNT; c++) {
      low[c] = uint8_t(minifloat_bits<BITS, MAN, BIAS>(c) & 255);
      high[c] = uint8_t(minifloat_bits<BITS, MAN, BIAS>(c) >> 8);
    }
  }
};

struct Words {
  alignas(64) uint16_t word[32] = {};
};
constexpr Words fp4_words() {
  Words t;
  for (int i = 0; i < 32; i++) t.word[i] = minifloat_bits<4, 1, 1>(i & 15);
  return t;
}
// Entry i: i - 16.
constexpr Words integer_words() {
  Words t;
  for (int i = 0; i < 32; i++) {
    int magnitude = i < 16 ? 16 - i : i - 16, exponent = 127;
    if (magnitude == 0) continue;
    while (magnitude >> (exponent - 126)) exponent++;
    t.word[i] = uint16_t((i < 16 ? 0x8000 : 0) | exponent << 7 | ((magnitude << (134 - exponent)) & 0x7f));
  }
  return t;
}

struct Fp4 {
  static constexpr int BITS = 4, LARGE = 256;  // from which doubled magnitude on codes are not finite
  static constexpr bool ZERO_POINT = false;
  static constexpr Words WORDS = fp4_words();
  __m512i words = _mm512_load_si512(WORDS.word);

  __attribute__((always_inline)) Pairs operator()(const uint8_t* chunk, int h, __m512i) const {
    const __m512i codes = _mm512_loadu_si512(chunk);
    return {_mm512_permutexvar_epi16(h ? _mm512_srli_epi16(codes, 8) : codes, words),
            _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, h ? 12 : 4), words)};
  }
};

template <int MAN, int BIAS>
struct Fp6 {
  static constexpr int BITS = 6, LARGE = 256;
  static constexpr bool ZERO_POINT = false;
  static constexpr Halves<6, MAN, BIAS, 64> HALVES{};
  // 6 bytes hold 8 codes: each goes to the bytes of a 64-bit lane, where multishift cuts the codes out.
  __m512i spread, low = _mm512_load_si512(HALVES.low), high = _mm512_load_si512(HALVES.high);
  __m512i shifts = _mm512_set1_epi64(0x2a241e18120c0600);

  Fp6() {
    alignas(64) static constexpr uint8_t to[64] = {
        0,  1,  2,  3,  4,  5,  0, 0, 6,  7,  8,  9,  10, 11, 0, 0, 12, 13, 14, 15, 16, 17, 0, 0,
        18, 19, 20, 21, 22, 23, 0, 0, 24, 25, 26, 27, 28, 29, 0, 0, 30, 31, 32, 33, 34, 35, 0, 0,
        36, 37, 38, 39, 40, 41, 0, 0, 42, 43, 44, 45, 46, 47, 0, 0};
    spread = _mm512_load_si512(to);
  }

  __attribute__((always_inline)) Pairs operator()(const uint8_t* chunk, int h, __m512i) const {
    const __m512i packed = _mm512_maskz_loadu_epi8(0xffffffffffff, chunk + h * 48);
    const __m512i codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, packed));
    const __m512i l = _mm512_permutexvar_epi8(codes, low), u = _mm512_permutexvar_epi8(codes, high);
    return {_mm512_unpacklo_epi8(l, u), _mm512_unpackhi_epi8(l, u)};
  }
};
using Fp6E2M3 = Fp6<3, 1>;
using Fp6E3M2 = Fp6<2, 3>;

template <int MAN, int BIAS>
struct Fp8 {
  static constexpr int BITS = 8, LARGE = MAN == 3 ? 0xfe : 0xf8;
  static constexpr bool ZERO_POINT = false;
  static constexpr Halves<8, MAN, BIAS, 128> HALVES{};
  __m512i low0 = _mm512_load_si512(HALVES.low), low1 = _mm512_load_si512(HALVES.low + 64);
  __m512i high0 = _mm512_load_si512(HALVES.high), high1 = _mm512_load_si512(HALVES.high + 64);
  __m512i sign = _mm512_set1_epi8(int8_t(0x80));

  __attribute__((always_inline)) Pairs operator()(const uint8_t* chunk, int h, __m512i) const {
    const __m512i codes = _mm512_loadu_si512(chunk + h * 64);
    const __m512i l = _mm512_permutex2var_epi8(low0, codes, low1);
    const __m512i magnitude = _mm512_permutex2var_epi8(high0, codes, high1);
    const __m512i u = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xf8);  // magnitude | (codes & sign)
    return {_mm512_unpacklo_epi8(l, u), _mm512_unpackhi_epi8(l, u)};
  }
};
using Fp8E4M3 = Fp8<3, 7>;
using Fp8E5M2 = Fp8<2, 15>;

// 0..15, or two's complement.
template <bool SIGNED>
struct FourBits {
  static constexpr int BITS = 4, LARGE = 256;
  static constexpr bool ZERO_POINT = true;
  static constexpr Words WORDS = integer_words();
  __m512i words = _mm512_load_si512(WORDS.word), nibble = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(SIGNED ? 8 : 0);

  // What a code (plus 8 where it is signed) is added to: an entry of `words`, in every byte of a lane.
  static __m512i encoded(__m512 zero) {
    const __m512i index = _mm512_sub_epi32(_mm512_set1_epi32(SIGNED ? 8 : 16), _mm512_cvtps_epi32(zero));
    return _mm512_mullo_epi32(index, _mm512_set1_epi32(0x01010101));
  }
  __attribute__((always_inline)) Pairs operator()(const uint8_t* chunk, int h, __m512i zero) const {
    const __m512i codes = _mm512_loadu_si512(chunk);
    const __m512i even = entries(codes, zero), odd = entries(_mm512_srli_epi16(codes, 4), zero);
    return {_mm512_permutexvar_epi16(h ? _mm512_srli_epi16(even, 8) : even, words),
            _mm512_permutexvar_epi16(h ? _mm512_srli_epi16(odd, 8) : odd, words)};
  }
  __attribute__((always_inline)) __m512i entries(__m512i nibbles, __m512i zero) const {
    const __m512i codes = _mm512_ternarylogic_epi32(nibbles, nibble, flip, 0x6a);  // (nibbles & 15) ^ flip
    return _mm512_add_epi8(codes, zero);
  }
};
using Int4 = FourBits<true>;
using UInt4 = FourBits<false>;

// A byte less OFFSET. A byte in the mantissa of a float is an integer added to a power of two; what remains after a
// subtraction has 8 bits, so its upper half is its bfloat16.
template <int OFFSET>
struct EightBits {
  static constexpr int BITS = 8, LARGE = 256;
  static constexpr bool ZERO_POINT = true;
  __m512i first = _mm512_set1_epi32(0xff), at_first = _mm512_set1_epi32(0x4b000000);      // 2^23 + byte
  __m512i second = _mm512_set1_epi32(0xff00), at_second = _mm512_set1_epi32(0x47000000);  // 2^15 + byte

  static __m512i encoded(__m512 zero) { return _mm512_castps_si512(_mm512_add_ps(zero, _mm512_set1_ps(OFFSET))); }
  __attribute__((always_inline)) Pairs operator()(const uint8_t* chunk, int h, __m512i zero) const {
    const __m512i codes = _mm512_loadu_si512(chunk + h * 64);
    return {decoded(codes, zero), decoded(_mm512_srli_epi32(codes, 16), zero)};
  }
  __attribute__((always_inline)) __m512i decoded(__m512i codes, __m512i zero) const {
    const __m512 zero0 = _mm512_add_ps(_mm512_castsi512_ps(zero), _mm512_castsi512_ps(at_first));
    const __m512 zero1 = _mm512_add_ps(_mm512_castsi512_ps(zero), _mm512_castsi512_ps(at_second));
    const __m512i byte0 = _mm512_ternarylogic_epi32(codes, first, at_first, 0xea);  // (codes & first) | at_first
    const __m512i byte1 = _mm512_ternarylogic_epi32(codes, second, at_second, 0xea);
    const __m512i v0 = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(byte0), zero0));
    const __m512i v1 = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(byte1), zero1));
    return _mm512_or_si512(_mm512_srli_epi32(v0, 16), v1);
  }
};
using Int8 = EightBits<128>;
using UInt8 = EightBits<0>;

}  // namespace quark::bf16

#endif  // QUARK_AVX512 && __AVX512BF16__ && __AVX512VBMI__
#endif  // QUARK_BF16_CODES_H
