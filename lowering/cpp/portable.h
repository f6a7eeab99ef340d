// Needs common.h and generic.h before it.
// Any activation by any packed weight, on any CPU: what generic.h computes, from weights in panels of 64 channels (their
// layout is described in panel64.py). Activation rows are prepared as generic.h does it.
//
// A chunk of a panel is decoded once for all rows, with the channels side by side: then a product needs no sums across
// a vector.
#ifndef QUARK_PORTABLE_H
#define QUARK_PORTABLE_H

namespace quark::portable {

using generic::LANES;
using generic::vec;

constexpr int64_t TILE_ROWS = 64, TILE_COLUMNS = 32;
constexpr int64_t AT_ONCE = 128;  // columns decoded at a time: 32 KB

// --- codes: a chunk of 16 channels x 8 k to values, out[k * 64 + channel]

template <typename E>
struct Minifloat {
  static constexpr int BITS = std::is_same_v<E, generic::Fp4> ? 4 : std::is_same_v<E, generic::Fp6E2M3> ? 6 : std::is_same_v<E, generic::Fp6E3M2> ? 6 : 8;
  static float value(int code) { return generic::table<E>()[BITS == 4 ? 2 * code : code]; }
};
template <int N_BITS, bool SIGNED>
struct Integer {
  static constexpr int BITS = N_BITS;
  // 8 bits are stored plus 128 where they are signed, 4 bits as they are.
  static float value(int code) {
    if (!SIGNED) return float(code);
    return float(N_BITS == 8 ? code - 128 : code & 8 ? code - 16 : code);
  }
};

using Fp4 = Minifloat<generic::Fp4>;
using Fp6E2M3 = Minifloat<generic::Fp6E2M3>;
using Fp6E3M2 = Minifloat<generic::Fp6E3M2>;
using Fp8E4M3 = Minifloat<generic::Fp8E4M3>;
using Fp8E5M2 = Minifloat<generic::Fp8E5M2>;
using Int4 = Integer<4, true>;
using UInt4 = Integer<4, false>;
using Int8 = Integer<8, true>;
using UInt8 = Integer<8, false>;

template <typename E>
inline void decode_chunk(Minifloat<E>, const uint8_t* in, float* out) {
  using M = Minifloat<E>;
  if constexpr (M::BITS == 4) {
    constexpr int low[4] = {0, 4, 1, 5}, high[4] = {2, 6, 3, 7};
    for (int c = 0; c < 16; c++)
      for (int t = 0; t < 4; t++) {
        out[low[t] * TILE_ROWS + c] = M::value(in[4 * c + t] & 15);
        out[high[t] * TILE_ROWS + c] = M::value(in[4 * c + t] >> 4);
      }
  } else {
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 64; i++) {
        const int channel = i / 16 * 4 + i % 8 / 2, k = half * 4 + i / 8 % 2 * 2 + i % 2, bit = (half * 64 + i) * M::BITS;
        const int code = M::BITS == 8 ? in[half * 64 + i] : (in[bit / 8] | in[(bit + 5) / 8] << 8) >> (bit % 8) & 63;
        out[k * TILE_ROWS + channel] = M::value(code);
      }
  }
}

template <int N_BITS, bool SIGNED>
inline void decode_chunk(Integer<N_BITS, SIGNED>, const uint8_t* in, float* out) {
  using I = Integer<N_BITS, SIGNED>;
  if constexpr (N_BITS == 4) {
    constexpr int low[4] = {0, 4, 1, 5}, high[4] = {2, 6, 3, 7};
    for (int c = 0; c < 16; c++)
      for (int t = 0; t < 4; t++) {
        out[low[t] * TILE_ROWS + c] = I::value(in[4 * c + t] & 15);
        out[high[t] * TILE_ROWS + c] = I::value(in[4 * c + t] >> 4);
      }
  } else {
    for (int half = 0; half < 2; half++)
      for (int c = 0; c < 16; c++)
        for (int t = 0; t < 4; t++) out[(half * 4 + t) * TILE_ROWS + c] = I::value(in[half * 64 + 4 * c + t]);
  }
}

// --- (code - zero) * scale * second, rounded to T

// What a tile's codes are multiplied by, for each of 64 channels: blocks of SIZE columns have a byte each in the tile.
template <typename S, int SIZE>
struct InTile {
  float global;
  static constexpr int64_t BYTES = TILE_ROWS * (TILE_COLUMNS / SIZE);
  void operator()(const uint8_t* tile, int64_t k, float* scale, float*) const {
    for (int64_t c = 0; c < TILE_ROWS; c++) scale[c] = S::value(tile[k % TILE_COLUMNS / SIZE * TILE_ROWS + c]) * global;
  }
};

// They lie elsewhere: fill(k, scale, zero) for the columns from k on.
template <typename Fill>
struct Beside {
  Fill fill;
  static constexpr int64_t BYTES = 0;
  void operator()(const uint8_t*, int64_t k, float* scale, float* zero) const { fill(k, scale, zero); }
};
template <typename Fill>
Beside(Fill) -> Beside<Fill>;

// Columns k_begin to k_end of a panel's channels from 16 * first on, out[k * 64 + channel]. Scales are the same for `step`
// neighbouring columns.
template <int GROUPS, typename Code, typename T, typename Scales>
inline void decode(
    const uint8_t* panel, int first, int64_t k_begin, int64_t k_end, int64_t step, float second, const Scales& scales,
    float* out) {
  constexpr int64_t CHUNK = 16 * Code::BITS, TILE = Scales::BYTES + 16 * CHUNK;
  alignas(64) float scale[TILE_ROWS], zero[TILE_ROWS] = {};
  for (int64_t k = k_begin; k < k_end; k += 8, out += 8 * TILE_ROWS) {
    const uint8_t* tile = panel + k / TILE_COLUMNS * TILE;
    if (k == k_begin || k % step == 0 || k % TILE_COLUMNS == 0) scales(tile, k, scale, zero);
    for (int v = first; v < first + GROUPS; v++) {
      float* chunk = out + 16 * v;
      decode_chunk(Code(), tile + Scales::BYTES + (v * 4 + k % TILE_COLUMNS / 8) * CHUNK, chunk);
      const vec s = *reinterpret_cast<const vec*>(scale + 16 * v), z = *reinterpret_cast<const vec*>(zero + 16 * v);
      for (int i = 0; i < 8; i++) {
        vec& w = *reinterpret_cast<vec*>(chunk + i * TILE_ROWS);
        w = (w - z) * s * second;
        generic::round_all<T>(w);
      }
    }
  }
}

// --- the product

// out[r * ld + c] += for R prepared rows and the decoded columns from k on.
template <int R, int GROUPS>
__attribute__((noinline)) void dot(
    const float* rows, int64_t stride, const float* weight, int64_t columns, float* out, int64_t ld) {
  vec sum[R][GROUPS];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < GROUPS; v++) std::memcpy(&sum[r][v], out + r * ld + 16 * v, sizeof(vec));
  for (int64_t k = 0; k < columns; k++) {
    vec w[GROUPS];
#pragma GCC unroll 4
    for (int v = 0; v < GROUPS; v++) w[v] = *reinterpret_cast<const vec*>(weight + k * TILE_ROWS + 16 * v);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const vec x = vec{} + rows[r * stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < GROUPS; v++) sum[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < GROUPS; v++) std::memcpy(out + r * ld + 16 * v, &sum[r][v], sizeof(vec));
}

inline constexpr int64_t scratch_bytes() { return AT_ONCE * TILE_ROWS * 4; }

// out[i * ld + c] for `count` prepared rows and the 16 * GROUPS channels of a panel from 16 * first on. `step`: how many
// columns share a scale. `second` multiplies after the scales.
template <int GROUPS, typename Code, typename T, typename Scales>
inline void tile(
    const uint8_t* prepared, int64_t count, int64_t k, const uint8_t* panel, int first, int64_t step, float second,
    const Scales& scales, uint8_t* scratch, float* out, int64_t ld) {
  const float* rows = reinterpret_cast<const float*>(prepared);
  float* decoded = reinterpret_cast<float*>(scratch);
  const int64_t stride = generic::padded(k);
  for (int64_t i = 0; i < count; i++) std::memset(out + i * ld, 0, 64 * GROUPS);
  for (int64_t begin = 0; begin < k; begin += AT_ONCE) {
    const int64_t end = std::min(k, begin + AT_ONCE);
    decode<GROUPS, Code, T>(panel, first, begin, end, step, second, scales, decoded);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      dot<4, GROUPS>(rows + i * stride + begin, stride, decoded + 16 * first, end - begin, out + i * ld, ld);
    for (; i < count; i++)
      dot<1, GROUPS>(rows + i * stride + begin, stride, decoded + 16 * first, end - begin, out + i * ld, ld);
  }
}

}  // namespace quark::portable

#endif  // QUARK_PORTABLE_H
