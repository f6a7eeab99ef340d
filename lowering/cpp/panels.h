// Needs common.h and generic.h before it.
// What kernels of packed weights have in common, whatever they compute with: tiles of activation rows, prefetching of
// panels, small pieces. The layout of a panel is described in panel64.py.
#ifndef QUARK_PANELS_H
#define QUARK_PANELS_H

namespace quark::panels {

constexpr int64_t TILE_K = 32;

// Rows in tiles of at most `most`, as even as possible: 13 rows by 6 are 5 + 4 + 4.
struct RowTiles {
  int64_t tiles, base, larger;  // the first `larger` tiles have base + 1 rows

  RowTiles(int64_t count, int64_t most)
      : tiles(std::max<int64_t>((count + most - 1) / most, 1)), base(count / tiles), larger(count % tiles) {}

  int64_t first(int64_t tile) const { return tile * base + std::min(tile, larger); }
  int64_t size(int64_t tile) const { return base + (tile < larger); }
  int64_t of(int64_t row) const {
    const int64_t in_larger = larger * (base + 1);
    return row < in_larger ? row / (base + 1) : larger + (row - in_larger) / base;
  }
};

// f(integral_constant<int, rows>) for LEAST <= rows <= MOST.
template <int LEAST, int MOST, typename F>
inline void with_rows(int64_t rows, F&& f) {
  if constexpr (LEAST < MOST)
    if (rows > LEAST) return with_rows<LEAST + 1, MOST>(rows, f);
  f(std::integral_constant<int, LEAST>());
}

// The next chunk of a panel, fetched into L2 a few lines at a time while this one is multiplied.
struct Prefetch {
  const uint8_t* at;
  const uint8_t* end;
  int64_t lines;  // a step

  Prefetch(const uint8_t* begin, int64_t bytes, int64_t steps)
      : at(begin), end(begin + bytes), lines((bytes / 64 + steps - 1) / steps) {}

  __attribute__((always_inline)) void step() {
    for (int64_t i = 0; i < lines; i++) __builtin_prefetch(at + i * 64, 0, 2);
    at += lines * 64;
    if (at >= end) lines = 0;
  }
};

// Inlined always: gcc takes a function that only prefetches for one without effects, and calls to it for dead.
template <int LINES>
__attribute__((always_inline)) inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 32
  for (int i = 0; i < LINES; i++) __builtin_prefetch(p + i * 64, 0, 3);
}

#if defined(QUARK_AVX512)
inline __m512i bytes16(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Between two uses of a register: gcc moves other prefetches together, more than there are buffers for.
template <typename V>  // __m512 or __m512i
__attribute__((always_inline)) inline void prefetch_between(const uint8_t* p, V& used) {
  asm volatile("prefetcht0 %1" : "+v"(used) : "m"(*p));
}

template <typename V>  // __m512 or __m512i
inline V zero_register() {
  V zero = {};
  asm volatile("" : "+v"(zero));  // else gcc shares one register among accumulators and spills them
  return zero;
}

// generic::integer_grid of a row.
template <int LOW, int HIGH, bool SYMMETRIC, typename T>
inline generic::Grid integer_grid(const T* x, int64_t k) {
  __m512 smallest = _mm512_setzero_ps(), largest = smallest;
  __mmask16 nan = 0;
  for (int64_t i = 0; i < k; i += 16) {
    const __m512 v = load16(x + i, k - i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    smallest = _mm512_min_ps(smallest, v);
    largest = _mm512_max_ps(largest, v);
  }
  const float quiet = std::numeric_limits<float>::quiet_NaN();
  const T ends[2] = {T(nan ? quiet : _mm512_reduce_min_ps(smallest)), T(nan ? quiet : _mm512_reduce_max_ps(largest))};
  return generic::integer_grid<LOW, HIGH, SYMMETRIC>(ends, 2);
}
#endif  // QUARK_AVX512

}  // namespace quark::panels

#endif  // QUARK_PANELS_H
