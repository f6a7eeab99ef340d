// Needs common.h and panels.h before it; bf16.h and vnni_int8.h multiply with what is here where it comes before them.
// Products of small matrices by AMX: 16 rows by 16 channels in an instruction.
#ifndef QUARK_AMX_H
#define QUARK_AMX_H
#if defined(QUARK_AVX512) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define QUARK_AMX
#include <sys/syscall.h>
#include <unistd.h>
#include <stdexcept>

namespace quark::amx {

constexpr int64_t ROWS = 16;  // of a tile
constexpr int64_t MOST_ROWS = 2 * ROWS;

// Linux lets a process use tiles that asks for them. Outside of parallel regions, which no exception may leave.
inline void permit() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  if (!granted)
    throw std::runtime_error(
        "this kernel was compiled for AMX and the system does not let this process use it: compile with "
        "QUARK_INDUCTOR_ISA=avx512_bf16");
}

// The shapes of a thread's tiles, from the first use on until the object is gone: other code has shapes of its own.
// Tiles 0 to 3 are sums; 4 and 5 rows; 6 and 7 weights, and 5 too where all rows are in tile 4.
class Shapes {
 public:
  Shapes() = default;
  Shapes(const Shapes&) = delete;
  ~Shapes() { _tile_release(); }
  // `rows` in one tile or halved in two, by `depth` rows of the weight's tiles. It takes 200 cycles.
  void set(bool pair, int64_t rows, int64_t depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows;
    depth_ = depth;
    const int64_t first = pair ? (rows + 1) / 2 : rows, second = pair ? rows / 2 : rows;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t column_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; i++) {
      const bool of_rows = i == 4 || (i == 5 && pair);
      shapes.rows[i] = uint8_t(i < 2 || i == 4 ? first : i < 4 || of_rows ? second : depth);
      shapes.column_bytes[i] = uint16_t(of_rows ? depth * 4 : 64);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }

 private:
  int64_t rows_ = 0, depth_ = 0;
};

// The compiler's own intrinsics do not say that these read memory.
template <int TILE>
inline void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void clear() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }

struct Bf16 {
  template <int SUM, int ROWS, int WEIGHT>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROWS), "i"(WEIGHT));
  }
};
// Signed rows, unsigned weights.
struct Int8 {
  template <int SUM, int ROWS, int WEIGHT>
  static void dot() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROWS), "i"(WEIGHT));
  }
};

// Where tiles of the weight are: bytes from a row of a tile to the next, to the next 16 channels, to the next step.
struct Weight {
  const void* at;
  int64_t row, group, step;
};

// Groups of channels that are multiplied at a time, where the rows are in one tile, or a pair.
template <bool PAIR, int GROUPS>
constexpr int WIDE = PAIR ? std::min(GROUPS, 2) : GROUPS;

// f(number of a tile of sums, its group, its first row) for those that there are.
template <bool PAIR, int GROUPS, typename F>
__attribute__((always_inline)) inline void each_sum(int64_t r, F f) {
  auto one = [&](auto i) __attribute__((always_inline)) {
    constexpr int group = PAIR ? i % 2 : i;
    if constexpr (group < WIDE<PAIR, GROUPS>) f(i, group, PAIR ? i / 2 * ((r + 1) / 2) : 0);
  };
  one(std::integral_constant<int, 0>());
  one(std::integral_constant<int, 1>());
  one(std::integral_constant<int, 2>());
  one(std::integral_constant<int, 3>());
}

// The sums += the products of r rows [steps][r][64 bytes] and a weight.
template <bool PAIR, int GROUPS, typename Of>
__attribute__((always_inline)) inline void multiply(
    const void* rows, int64_t r, Weight weight, int64_t steps, panels::Prefetch& next) {
  constexpr int WIDE = amx::WIDE<PAIR, GROUPS>;
  const uint8_t *x = static_cast<const uint8_t*>(rows), *w = static_cast<const uint8_t*>(weight.at);
  for (int64_t s = 0; s < steps; s++, x += r * 64, w += weight.step) {
    next.step();
    load<4>(x, 64);
    load<6>(w, weight.row);
    Of::template dot<0, 4, 6>();
    if constexpr (WIDE > 1) {
      load<7>(w + weight.group, weight.row);
      Of::template dot<1, 4, 7>();
    }
    if constexpr (PAIR) {
      load<5>(x + (r + 1) / 2 * 64, 64);
      Of::template dot<2, 5, 6>();
      if constexpr (WIDE > 1) Of::template dot<3, 5, 7>();
    } else if constexpr (WIDE > 2) {
      load<5>(w + 2 * weight.group, weight.row);
      Of::template dot<2, 4, 5>();
      load<6>(w + 3 * weight.group, weight.row);
      Of::template dot<3, 4, 6>();
    }
  }
}

// out += the products, of integers.
template <bool PAIR, int GROUPS>
__attribute__((noinline)) void multiply_integers(
    const void* rows, int64_t r, Weight weight, int64_t steps, float* out, int64_t ld, panels::Prefetch& next) {
  auto at = [=](int64_t group, int64_t row) { return out + row * ld + group * 16; };
  each_sum<PAIR, GROUPS>(r, [&](auto i, int64_t group, int64_t row) { load<i>(at(group, row), ld * 4); });
  multiply<PAIR, GROUPS, Int8>(rows, r, weight, steps, next);
  each_sum<PAIR, GROUPS>(r, [&](auto i, int64_t group, int64_t row) { store<i>(at(group, row), ld * 4); });
}

// out += the products, of bfloat16; SCALED: times w_scales, [16] a group, x_scales [r] and x_factor. The tiles start
// from 0: sums of a whole K would gather rounding errors.
template <bool PAIR, int GROUPS, bool SCALED>
__attribute__((noinline)) void multiply_bf16(
    const void* rows, int64_t r, Weight weight, int64_t steps, const float* w_scales, const float* x_scales,
    float x_factor, float* out, int64_t ld, panels::Prefetch& next) {
  alignas(64) float sums[4][ROWS][16];
  each_sum<PAIR, GROUPS>(r, [&](auto i, int64_t, int64_t) { clear<i>(); });
  multiply<PAIR, GROUPS, Bf16>(rows, r, weight, steps, next);
  each_sum<PAIR, GROUPS>(r, [&](auto i, int64_t, int64_t) { store<i>(sums[i], 64); });
  each_sum<PAIR, GROUPS>(r, [&](auto i, int64_t group, int64_t row) {
    const __m512 of_channels = SCALED ? _mm512_loadu_ps(w_scales + group * 16) : _mm512_setzero_ps();
    const int64_t count = !PAIR ? r : row ? r / 2 : (r + 1) / 2;
    for (int64_t m = 0; m < count; m++) {
      float* to = out + (row + m) * ld + group * 16;
      const __m512 sum = _mm512_load_ps(sums[i][m]), before = _mm512_loadu_ps(to);
      const __m512 of_row = SCALED ? _mm512_set1_ps(x_scales[row + m] * x_factor) : _mm512_setzero_ps();
      _mm512_storeu_ps(
          to, SCALED ? _mm512_fmadd_ps(_mm512_mul_ps(sum, of_channels), of_row, before) : _mm512_add_ps(sum, before));
    }
  });
}

}  // namespace quark::amx

#endif  // QUARK_AVX512 && __AMX_TILE__ && __AMX_BF16__ && __AMX_INT8__
#endif  // QUARK_AMX_H
