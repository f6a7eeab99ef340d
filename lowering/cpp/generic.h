// Needs common.h before it.
// Any format by any other, exactly: operands are dequantized as the emulation does it, rounded to T where it rounds to
// the model's dtype T, and multiplied in float32.
//
// A prepared activation row is its K values as floats, padded with zeros to a multiple of 16. A tile decodes a weight row
// once for all its activation rows.
#ifndef QUARK_GENERIC_H
#define QUARK_GENERIC_H

namespace quark::generic {

constexpr int64_t LANES = 16;
constexpr float EPS = 0x1p-23f;  // what amd-quark puts in place of a zero scale
typedef float vec __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));

inline constexpr int64_t padded(int64_t k) { return round_up(k, LANES); }
inline constexpr int64_t row_bytes(int64_t k) { return padded(k) * 4; }
inline void zero_row(uint8_t* row, int64_t k) { std::memset(row, 0, row_bytes(k)); }

// 16 at a time, written out: Inductor compiles with the loop vectorizer turned off.
template <typename T>
inline void round_all(vec& v) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    bits b;
    std::memcpy(&b, &v, sizeof b);
    b = v != v ? bits{} + 0x7fc00000u : (b + 0x7fffu + (b >> 16 & 1u)) & 0xffff0000u;
    std::memcpy(&v, &b, sizeof v);
  } else if constexpr (!std::is_same_v<T, float>) {
    for (int l = 0; l < LANES; l++) v[l] = float(T(v[l]));
  }
}

// out[i] = in[i] * scale, rounded; may be done in place.
template <typename T>
inline void scale_into(const float* in, float scale, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec v;
    std::memcpy(&v, in + i, sizeof v);
    v *= scale;
    round_all<T>(v);
    std::memcpy(out + i, &v, sizeof v);
  }
  for (; i < n; i++) out[i] = rounded<T>(in[i] * scale);
}

inline float clamped(float v, float low, float high) { return v < low ? low : v > high ? high : v; }  // NaN stays NaN

// --- element formats

// Mantissa bits, largest exponent, subnormal step, largest value.
struct Fp4 {
  static constexpr int man = 1, emax = 2;
  static constexpr float least = 0.5f, max = 6.0f;
};
struct Fp6E2M3 {
  static constexpr int man = 3, emax = 2;
  static constexpr float least = 0.125f, max = 7.5f;
};
struct Fp6E3M2 {
  static constexpr int man = 2, emax = 4;
  static constexpr float least = 0x1p-4f, max = 28.0f;
};
struct Fp8E4M3 {
  static constexpr int man = 3, emax = 8;
  static constexpr float least = 0x1p-9f, max = 448.0f;
};
struct Fp8E5M2 {
  static constexpr int man = 2, emax = 15;
  static constexpr float least = 0x1p-16f, max = 57344.0f;
};

// The value of the nearest code: saturated, half to even.
template <typename E>
inline float nearest(float v) { return round_to_grid(clamped(v, -E::max, E::max), E::man, E::least); }

// Values of the codes of a minifloat of a sign, `bits - 1 - man` exponent bits and `man` mantissa bits.
inline float minifloat(int code, int bits, int man, int bias) {
  const int magnitude = code & ((1 << (bits - 1)) - 1), exponent = magnitude >> man, mantissa = magnitude & ((1 << man) - 1);
  const float value = exponent ? std::ldexp(1.0f + std::ldexp(float(mantissa), -man), exponent - bias)
                               : std::ldexp(float(mantissa), 1 - bias - man);
  return code >> (bits - 1) ? -value : value;
}

template <typename E>
struct Table {
  float value[256];
  Table() {
    for (int c = 0; c < 256; c++) {
      if constexpr (std::is_same_v<E, Fp6E2M3>) value[c] = minifloat(c & 63, 6, 3, 1);
      else if constexpr (std::is_same_v<E, Fp6E3M2>) value[c] = minifloat(c & 63, 6, 2, 3);
      else if constexpr (std::is_same_v<E, Fp8E4M3>) value[c] = at::Float8_e4m3fn(uint8_t(c), at::Float8_e4m3fn::from_bits());
      else value[c] = at::Float8_e5m2(uint8_t(c), at::Float8_e5m2::from_bits());
    }
  }
};
template <>
struct Table<Fp4> {  // both values of a byte
  float value[512];
  Table() {
    for (int c = 0; c < 256; c++) {
      value[2 * c] = minifloat(c & 15, 4, 1, 1);
      value[2 * c + 1] = minifloat(c >> 4, 4, 1, 1);
    }
  }
};
template <typename E>
inline const float* table() {
  static const Table<E> t;
  return t.value;
}

// --- block scales

struct E8M0 {
  static float value(uint8_t code) { return e8m0(code); }
};
struct E4M3 {
  static float value(uint8_t code) { return table<Fp8E4M3>()[code]; }
};
struct E5M3 {
  static float value(uint8_t code) {
    if (code == 255) return std::numeric_limits<float>::quiet_NaN();
    const int exponent = code >> 3, mantissa = code & 7;
    return exponent ? std::ldexp(1.0f + 0.125f * float(mantissa), exponent - 15) : std::ldexp(float(mantissa), -17);
  }
};

// How a block's scale follows from its largest magnitude: what its elements are multiplied by, global scale included.
struct Even {
  template <typename E, typename T>
  static float scale(float amax, float) {
    if (std::isnan(amax)) return amax;
    const int exponent = int((to_bits(amax) + (1u << (22 - E::man))) >> 23);
    return e8m0(uint8_t(exponent >= 255 ? 254 : std::max(exponent - E::emax, 0)));
  }
};
struct Rceil {
  template <typename E, typename T>
  static float scale(float amax, float) {
    if (!std::isfinite(amax)) return std::numeric_limits<float>::quiet_NaN();
    const float quotient = amax / E::max;
    const uint32_t bits = to_bits(quotient);
    const int exponent = int(bits >> 23) + ((bits & 0x7fffff) != 0);
    return e8m0(uint8_t(quotient <= 0x1p-127f ? 0 : std::min(exponent, 254)));
  }
};
struct Nearest {
  template <typename E, typename T>
  static float scale(float amax, float) {
    if (!std::isfinite(amax)) return std::numeric_limits<float>::quiet_NaN();
    return round_to_grid(std::min(rounded<T>(amax / E::max), 114688.0f), 3, 0x1p-17f);
  }
};
struct Sequential {
  template <typename E, typename T>
  static float scale(float amax, float global) {
    if (!std::isfinite(amax)) return std::numeric_limits<float>::quiet_NaN();
    return round_to_grid(std::min(amax / E::max / global, 448.0f), 3, 0x1p-9f) * global;
  }
};
struct Combined {
  template <typename E, typename T>
  static float scale(float amax, float global) {
    if (!std::isfinite(amax)) return std::numeric_limits<float>::quiet_NaN();
    const float scale = round_to_grid(std::min(amax / (global * E::max), 448.0f), 3, 0x1p-9f);
    return (scale == 0.0f ? 1.0f : scale) * global;
  }
};

// --- activation rows

inline float* floats(uint8_t* row) { return reinterpret_cast<float*>(row); }

inline void pad(int64_t k, float* out) {
  for (int64_t i = k; i < padded(k); i++) out[i] = 0.0f;
}

template <typename T>
inline float amax_of(const T* x, int64_t n) {
  float amax = 0.0f;
  bool nan = false;
  for (int64_t i = 0; i < n; i++) {
    const float a = std::abs(float(x[i]));
    nan |= a != a;
    amax = a > amax ? a : amax;
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : amax;
}

// The activation as it is.
template <typename T>
inline void copy_row(const T* x, int64_t k, uint8_t* row) {
  for (int64_t i = 0; i < k; i++) floats(row)[i] = float(x[i]);
  pad(k, floats(row));
}

// A block format; `zero` is what a scale of 0 multiplies by.
template <typename E, int SIZE, typename Rule, typename T>
inline void quantize_blocks(const T* x, int64_t k, float global, float zero, uint8_t* row) {
  for (int64_t b = 0; b < k; b += SIZE) {
    const float scale = Rule::template scale<E, T>(amax_of(x + b, SIZE), global);
    const float divisor = scale == 0.0f ? EPS : scale, multiplier = scale == 0.0f ? zero : scale;
    for (int i = 0; i < SIZE; i++)
      floats(row)[b + i] = rounded<T>(nearest<E>(float(x[b + i]) / divisor) * multiplier);
  }
  pad(k, floats(row));
}

template <typename E, typename T>
inline float fp8_scale(const T* x, int64_t n) {
  const float scale = rounded<T>(amax_of(x, n) / E::max);
  return scale == 0.0f ? EPS : scale;
}

// FP8 by one scale: the quotient is rounded to T.
template <typename E, typename T>
inline void quantize_fp8(const T* x, int64_t k, float scale, uint8_t* row) {
  for (int64_t i = 0; i < k; i++)
    floats(row)[i] = rounded<T>(nearest<E>(rounded<T>(float(x[i]) / scale)) * scale);
  pad(k, floats(row));
}

// FP8 by groups: the quotient stays in float32.
template <typename E, typename T>
inline void quantize_fp8_groups(const T* x, int64_t k, int64_t group, uint8_t* row) {
  for (int64_t g = 0; g < k; g += group) {
    const float scale = fp8_scale<E>(x + g, group);
    for (int64_t i = g; i < g + group; i++) floats(row)[i] = rounded<T>(nearest<E>(float(x[i]) / scale) * scale);
  }
  pad(k, floats(row));
}

struct Grid {
  float scale, zero_point;
};

// Scale and zero point of integers LOW..HIGH, every step rounded to T.
template <int LOW, int HIGH, bool SYMMETRIC, typename T>
inline Grid integer_grid(const T* x, int64_t n) {
  float smallest = 0.0f, largest = 0.0f;
  bool nan = false;
  for (int64_t i = 0; i < n; i++) {
    const float v = float(x[i]);
    nan |= v != v;
    smallest = v < smallest ? v : smallest;
    largest = v > largest ? v : largest;
  }
  constexpr float steps = HIGH - LOW;
  float scale = SYMMETRIC ? rounded<T>(std::max(-smallest, largest) / (steps / 2))
                          : rounded<T>(rounded<T>(largest - smallest) / steps);
  scale = nan ? std::numeric_limits<float>::quiet_NaN() : std::max(scale, EPS);
  if (SYMMETRIC) return {scale, 0.0f};
  const float zero_point = rounded<T>(float(LOW) - std::nearbyint(rounded<T>(smallest / scale)));
  return {scale, clamped(zero_point, LOW, HIGH)};
}

template <int LOW, int HIGH, typename T>
inline void quantize_integers(const T* x, int64_t n, Grid grid, float* out) {
  const float inverse = 1.0f / grid.scale;
  for (int64_t i = 0; i < n; i++) {
    const float code = clamped(std::nearbyint(float(x[i]) * inverse) + grid.zero_point, LOW, HIGH);
    out[i] = rounded<T>((code - grid.zero_point) * grid.scale);
  }
}

template <int LOW, int HIGH, typename T>
inline void quantize_integer_row(const T* x, int64_t k, Grid grid, uint8_t* row) {
  quantize_integers<LOW, HIGH>(x, k, grid, floats(row));
  pad(k, floats(row));
}

template <int LOW, int HIGH, bool SYMMETRIC, typename T>
inline void quantize_integer_groups(const T* x, int64_t k, int64_t group, uint8_t* row) {
  for (int64_t g = 0; g < k; g += group)
    quantize_integers<LOW, HIGH>(x + g, group, integer_grid<LOW, HIGH, SYMMETRIC>(x + g, group), floats(row) + g);
  pad(k, floats(row));
}

// --- codes to values: rows of weights, and of activations that are quantized already

// Packed codes of a block format.
template <typename E, int SIZE, typename S, typename T, typename C, typename SC>
inline void decode_blocks(const C* packed, const SC* scales, int64_t k, float global, float zero, float* out) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(packed);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(scales);
  const float* values = table<E>();
  for (int64_t b = 0; b < k / SIZE; b++) {
    const float stored = S::value(bytes[b]) * global, scale = stored == 0.0f ? zero : stored;
    float* block = out + b * SIZE;
    float raw[SIZE];
    if constexpr (std::is_same_v<E, Fp4>) {
      for (int i = 0; i < SIZE / 2; i++) std::memcpy(raw + 2 * i, values + 2 * codes[i], 8);
      codes += SIZE / 2;
    } else if constexpr (std::is_same_v<E, Fp6E2M3> || std::is_same_v<E, Fp6E3M2>) {
      for (int i = 0; i < SIZE; i += 4, codes += 3) {
        const uint32_t bits = codes[0] | uint32_t(codes[1]) << 8 | uint32_t(codes[2]) << 16;
        for (int j = 0; j < 4; j++) raw[i + j] = values[bits >> (6 * j) & 63];
      }
    } else {
      for (int i = 0; i < SIZE; i++) raw[i] = values[codes[i]];
      codes += SIZE;
    }
    scale_into<T>(raw, scale, SIZE, block);
  }
  pad(k, out);
}

// FP8 codes; the scale of code i is scales[i / columns].
template <typename E, typename T, typename C, typename S>
inline void decode_fp8(const C* codes, const S* scales, int64_t k, int64_t columns, float* out) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes);
  const float* values = table<E>();
  for (int64_t c = 0; c < k; c += columns) {
    const float scale = float(scales[c / columns]);
    const int64_t end = std::min(k, c + columns);
    for (int64_t i = c; i < end; i++) out[i] = values[bytes[i]];
    scale_into<T>(out + c, scale, end - c, out + c);
  }
  pad(k, out);
}

// Integer codes; the scale and zero point of code i are those at i / columns; strides in elements.
template <typename T, typename C, typename S, typename Z>
inline void decode_integers(
    const C* codes, int64_t stride, const S* scales, int64_t scale_stride, const Z* zero_points, int64_t zero_stride,
    int64_t k, int64_t columns, float* out) {
  for (int64_t c = 0; c < k; c += columns) {
    const float scale = float(scales[c / columns * scale_stride]);
    const float zero_point = zero_points ? float(zero_points[c / columns * zero_stride]) : 0.0f;
    const int64_t end = std::min(k, c + columns);
    int64_t i = c;
    if (stride == 1) {
      typedef C sixteen __attribute__((vector_size(LANES * sizeof(C))));
      for (; i + LANES <= end; i += LANES) {
        sixteen held;
        std::memcpy(&held, codes + i, sizeof held);
        vec v = (__builtin_convertvector(held, vec) - zero_point) * scale;
        round_all<T>(v);
        std::memcpy(out + i, &v, sizeof v);
      }
    }
    for (; i < end; i++) out[i] = rounded<T>((float(codes[i * stride]) - zero_point) * scale);
  }
  pad(k, out);
}

// In which nibble of an int32 element i of its eight is: "reorder" or "order".
template <bool REORDER>
inline int nibble(int i) { return REORDER ? (i & 1) * 4 + i / 2 : i; }

template <bool SIGNED>
inline float int4(int32_t word, int nibble) {
  const int code = int(uint32_t(word) >> (4 * nibble)) & 15;
  return float(SIGNED && code & 8 ? code - 16 : code);
}

// 4-bit integers of channel n, packed along K: words [K/8], the zero points along N: [N/8].
template <bool SIGNED, bool REORDER, typename T, typename S>
inline void decode_int4(
    const int32_t* words, const S* scales, const int32_t* zero_points, int64_t n, int64_t k, float* out) {
  const float zero_point = int4<SIGNED>(zero_points[n / 8], nibble<REORDER>(n % 8)), scale = float(scales[n]);
  for (int64_t i = 0; i < k; i += 8)
    for (int j = 0; j < 8; j++) out[i + j] = int4<SIGNED>(words[i / 8], nibble<REORDER>(j)) - zero_point;
  scale_into<T>(out, scale, k, out);
  pad(k, out);
}

// 4-bit integers of channel n of a transposed weight: words [K, N/8], scales [K/group, N], zero points [K/group, N/8].
template <bool SIGNED, bool REORDER, typename T, typename S>
inline void decode_int4_groups(
    const int32_t* words, const S* scales, const int32_t* zero_points, int64_t n, int64_t channels, int64_t k,
    int64_t group, float* out) {
  const int at = nibble<REORDER>(n % 8);
  for (int64_t g = 0; g < k / group; g++) {
    const float zero_point = int4<SIGNED>(zero_points[(g * channels + n) / 8], at), scale = float(scales[g * channels + n]);
    for (int64_t i = g * group; i < (g + 1) * group; i++)
      out[i] = rounded<T>((int4<SIGNED>(words[(i * channels + n) / 8], at) - zero_point) * scale);
  }
  pad(k, out);
}

// INT4 under FP8: one scale a channel, and one for all.
template <typename T>
inline void decode_int4_fp8(
    const int32_t* words, float scale, const float* scales_2, const int32_t* zero_points, int64_t n, int64_t k,
    float* out) {
  decode_int4<true, true, float>(words, scales_2, zero_points, n, k, out);
  for (int64_t i = 0; i < k; i++) out[i] = rounded<T>(out[i] * scale);
}

// --- the product

// out[r * ld + c] for R prepared rows and C decoded weight rows, all of them padded(k) floats apart.
template <int R, int C>
inline void dot(const float* rows, const float* weight, int64_t k, float* out, int64_t ld) {
  vec sum[R][C] = {};
  for (int64_t i = 0; i < padded(k); i += LANES) {
    vec w[C];
    for (int c = 0; c < C; c++) w[c] = *reinterpret_cast<const vec*>(weight + c * padded(k) + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const vec x = *reinterpret_cast<const vec*>(rows + r * padded(k) + i);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sum[r][c] += x * w[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      float total = 0.0f;
      for (int l = 0; l < LANES; l++) total += sum[r][c][l];
      out[r * ld + c] = total;
    }
}

template <int C>
inline void columns(const float* rows, int64_t m_rows, const float* weight, int64_t k, float* out, int64_t ld) {
  int64_t m = 0;
  for (; m + 4 <= m_rows; m += 4) dot<4, C>(rows + m * padded(k), weight, k, out + m * ld, ld);
  for (; m < m_rows; m++) dot<1, C>(rows + m * padded(k), weight, k, out + m * ld, ld);
}

// How many weight rows are decoded before they are multiplied: each activation row is then read once for all of them.
constexpr int AT_ONCE = 4;
inline constexpr int64_t weight_bytes(int64_t k) { return AT_ONCE * row_bytes(k); }

// out[m * ld + n] for prepared rows and `channels` output channels from n_start on; decode(n, weight row).
template <typename Decode>
__attribute__((noinline)) void tile(
    const uint8_t* prepared, int64_t m_rows, int64_t k, int64_t n_start, int64_t channels, float* weight, float* out,
    int64_t ld, Decode decode) {
  const float* rows = reinterpret_cast<const float*>(prepared);
  int64_t n = 0;
  for (; n + AT_ONCE <= channels; n += AT_ONCE) {
    for (int c = 0; c < AT_ONCE; c++) decode(n_start + n + c, weight + c * padded(k));
    columns<AT_ONCE>(rows, m_rows, weight, k, out + n, ld);
  }
  for (; n < channels; n++) {
    decode(n_start + n, weight);
    columns<1>(rows, m_rows, weight, k, out + n, ld);
  }
}

}  // namespace quark::generic

#endif  // QUARK_GENERIC_H
