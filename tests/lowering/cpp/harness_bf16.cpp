// The kernels of lowering/cpp/bf16.h, with HARNESS_AMX those that multiply by amx.h, against float64, and (-DBENCH,
// argument "bench") their speed.
//
//   g++ -std=c++17 -O3 -march=native -DQUARK_AVX512 -DBENCH -I<torch include> -Ilowering/cpp harness_bf16.cpp
#include "common.h"
#include "generic.h"
#include "panels.h"
#include "bf16_codes.h"
#if defined(HARNESS_AMX)
#include "amx.h"
#endif
#include "bf16.h"
#include "harness_random.h"

#include <sys/mman.h>
#include <time.h>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace {

namespace bf16 = quark::bf16;
namespace generic = quark::generic;
constexpr int64_t BLOCK_ROWS = 384;
constexpr float NaN = std::numeric_limits<float>::quiet_NaN(), INF = std::numeric_limits<float>::infinity();

// Of no byte more than is asked for.
struct Bytes {
  uint8_t* p;
  explicit Bytes(int64_t n) {
    void* at = nullptr;
    if (posix_memalign(&at, 64, std::max<int64_t>(n, 1))) std::abort();
    p = static_cast<uint8_t*>(at);
    std::memset(p, 0xff, n);
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() { free(p); }
};

// --- the layout, naively

enum class Order { NIBBLES, PAIRS, QUADS };

// Codes [N, K] and block scales [N, K / size] (none: size 0) in panels of 64 channels.
struct Panels {
  int64_t stride;
  Bytes bytes;

  Panels(int64_t n, int64_t k, int64_t size, int64_t bits, Order order, const std::vector<uint8_t>& codes, uint8_t zero,
         const std::vector<uint8_t>& scales)
      : stride((k + 31) / 32 * ((size ? 32 / size * 64 : 0) + 256 * bits)), bytes((n + 63) / 64 * stride) {
    const int64_t of_scales = size ? 32 / size * 64 : 0, tile = of_scales + 256 * bits;
    std::memset(bytes.p, 0, (n + 63) / 64 * stride);
    for (int64_t p = 0; p < (n + 63) / 64; p++)
      for (int64_t t = 0; t < (k + 31) / 32; t++)
        for (int64_t c = 0; c < 64; c++) {
          uint8_t* at = bytes.p + p * stride + t * tile;
          const int64_t channel = p * 64 + c, lane = c % 16;
          for (int64_t h = 0; size && h < 32 / size; h++) {
            const int64_t block = t * (32 / size) + h;
            at[h * 64 + c] = channel < n && block < k / size ? scales[channel * (k / size) + block] : 0;
          }
          for (int64_t i = 0; i < 32; i++) {
            uint8_t* chunk = at + of_scales + (c / 16 * 4 + i / 8) * 16 * bits;
            const int64_t column = t * 32 + i, e = i % 8, f = i % 4;
            const int code = channel < n && column < k ? codes[channel * k + column] : zero;
            static const int byte[8] = {0, 2, 0, 2, 1, 3, 1, 3}, high[8] = {0, 0, 1, 1, 0, 0, 1, 1};
            if (order == Order::NIBBLES) {
              chunk[lane * 4 + byte[e]] |= uint8_t(code << (4 * high[e]));
            } else if (order == Order::QUADS) {
              chunk[e / 4 * 64 + lane * 4 + f] = uint8_t(code);
            } else {
              const int64_t at_code = (lane >> 2) * 16 + (f >> 1) * 8 + (lane & 3) * 2 + (f & 1);
              for (int64_t b = 0; b < bits; b++) {
                const int64_t bit = at_code * bits + b;
                chunk[e / 4 * 8 * bits + bit / 8] |= uint8_t((code >> b & 1) << (bit % 8));
              }
            }
          }
        }
  }
  const uint8_t* panel(int64_t p) const { return bytes.p + p * stride; }
};

// --- the comparison

int64_t failures = 0, compared = 0;
double worst = 0.0, tolerance = 1e-6;

void fail(const std::string& what) {
  if (failures++ < 20) printf("%s\n", what.c_str());
}

void compare(const std::string& what, float y, double exact, double magnitudes, double row) {
  compared++;
  bool right;
  if (std::isnan(exact) || std::isinf(magnitudes)) right = std::isnan(exact) ? std::isnan(y) : !std::isfinite(y);
  else if (magnitudes > 1e38) right = true;  // may overflow on the way
  else {
    const double error = std::abs(y - exact), size = std::max(magnitudes * 0.5, row);
    right = error <= tolerance * size + 1e-36;
    if (size > 1e-25) worst = std::max(worst, error / size);
  }
  if (!right) {
    char text[200];
    snprintf(text, sizeof text, "%s: %g, not %g (magnitudes %g)", what.c_str(), y, exact, magnitudes);
    fail(text);
  }
}

// --- activations

// What a format of activations is: prepare(row of x, its place) and the values it stands for.
struct Activation {
  std::string name;
  bool of_columns;
  int64_t columns;
  std::vector<double> values;  // [M, K]
  std::function<void(int64_t, bf16::Rows, int64_t, int64_t)> prepare;
  bool rounds = false;

  void round();
};

double rounded(double v) { return float(at::BFloat16(float(v))); }
void Activation::round() {
  rounds = true;
  of_columns = false;
  for (double& v : values) v = rounded(v);
}

template <typename T>
const char* name_of() {
  return std::is_same_v<T, float> ? "float" : std::is_same_v<T, at::Half> ? "half" : "bfloat16";
}

template <typename T>
std::vector<T> special_rows(int64_t m, int64_t k) {
  std::vector<T> x(m * k);
  const int kind = int(integer(0, 5));
  const bool outliers = chance(0.3), specials = chance(0.5);
  for (int64_t i = 0; i < m; i++) {
    const float row = kind == 1 ? std::ldexp(1.0f, int(integer(-14, 14)))
                    : kind == 2 ? std::ldexp(1.0f, int(integer(-60, 60))) : 1.0f;
    for (int64_t j = 0; j < k; j++) {
      float v = normal() * row;
      if (kind == 3) v *= std::ldexp(1.0f, int(integer(-12, 2)));
      if (outliers && j % 97 == 5) v *= 1000.0f;
      if (kind == 5 && chance(0.2)) v = float(integer(-24, 24)) * 0.25f;  // ties
      x[i * k + j] = T(v);
    }
    auto block = [&](float value) {
      const int64_t size = std::min<int64_t>(k, 32), b = integer(0, k / size - 1) * size;
      for (int64_t j = b; j < b + size; j++) x[i * k + j] = T(value * (chance(0.5) ? normal() : 0.0f));
    };
    if (!specials) continue;
    if (chance(0.3)) block(0.0f);
    if (chance(0.1)) block(-0.0f);
    if (chance(0.05)) block(1e-38f);
    if (chance(0.05)) block(1e-6f);
    if (chance(0.03)) block(1e37f);
    if (chance(0.02)) for (int64_t j = 0; j < k; j++) x[i * k + j] = T(0.0f);
    if (chance(0.02)) for (int64_t j = 0; j < k; j++) x[i * k + j] = T(float(x[i * k + j]) * 1e-38f);
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(INF);
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(-INF);
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(-NaN);
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(3.3e38f);
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(1e-45f);
  }
  return x;
}

// reference(row of x, values): what generic.h makes of it, but for the rounding of the products to T.
template <typename T, typename Reference>
Activation quantized(const char* name, int64_t m, int64_t k, bool of_columns, int64_t columns, Reference reference,
                     std::function<void(const T*, bf16::Rows, int64_t, int64_t)> prepare) {
  auto x = std::make_shared<std::vector<T>>(special_rows<T>(m, k));
  Activation a{std::string(name) + " " + name_of<T>(), of_columns, columns, {}, {}};
  a.values.resize(m * k);
  for (int64_t i = 0; i < m; i++) reference(x->data() + i * k, a.values.data() + i * k);
  a.prepare = [=](int64_t i, bf16::Rows rows, int64_t at, int64_t count) { prepare(x->data() + i * k, rows, at, count); };
  return a;
}

template <typename E>
void fp8_codes(float scale, double* out, int64_t n, const std::function<float(int64_t)>& quotient) {
  for (int64_t j = 0; j < n; j++) out[j] = double(generic::nearest<E>(quotient(j))) * scale;
}

template <typename E, typename T>
Activation fp8_given(int64_t m, int64_t k) {
  const float scale = chance(0.5) ? 0.01f : std::ldexp(1.0f, int(integer(-20, 20))) * 1.3f;
  return quantized<T>("fp8 given", m, k, false, 0,
      [=](const T* x, double* out) {
        fp8_codes<E>(scale, out, k, [&](int64_t j) { return quark::rounded<T>(float(x[j]) / scale); });
      },
      [=](const T* x, bf16::Rows rows, int64_t i, int64_t count) { bf16::quantize_fp8<E>(x, k, scale, rows, i, count); });
}
template <typename E, typename T>
Activation fp8_dynamic(int64_t m, int64_t k) {
  return quantized<T>("fp8 dynamic", m, k, false, 0,
      [=](const T* x, double* out) {
        const float scale = generic::fp8_scale<E>(x, k);
        fp8_codes<E>(scale, out, k, [&](int64_t j) { return quark::rounded<T>(float(x[j]) / scale); });
      },
      [=](const T* x, bf16::Rows rows, int64_t i, int64_t count) { bf16::quantize_fp8<E>(x, k, rows, i, count); });
}
template <typename E, typename T>
Activation fp8_groups(int64_t m, int64_t k, int64_t group) {
  return quantized<T>("fp8 groups", m, k, true, group,
      [=](const T* x, double* out) {
        for (int64_t g = 0; g < k; g += group) {
          const float scale = generic::fp8_scale<E>(x + g, group);
          fp8_codes<E>(scale, out + g, group, [&](int64_t j) { return float(x[g + j]) / scale; });
        }
      },
      [=](const T* x, bf16::Rows rows, int64_t i, int64_t count) {
        bf16::quantize_fp8_groups<E>(x, k, group, rows, i, count);
      });
}
template <typename E, int SIZE, typename Rule, typename T>
Activation blocks(const char* name, int64_t m, int64_t k) {
  constexpr bool NEAREST = std::is_same_v<Rule, generic::Nearest>;
  constexpr bool GLOBAL = std::is_same_v<Rule, generic::Sequential> || std::is_same_v<Rule, generic::Combined>;
  const float global = GLOBAL ? chance(0.8) ? 0.0013f : std::ldexp(1.1f, int(integer(-40, 40))) : 1.0f;
  const float zero = NEAREST ? generic::EPS : 0.0f;
  return quantized<T>(name, m, k, false, 0,
      [=](const T* x, double* out) {
        for (int64_t b = 0; b < k; b += SIZE) {
          const float scale = Rule::template scale<E, T>(generic::amax_of(x + b, SIZE), global);
          for (int64_t j = b; j < b + SIZE; j++)
            out[j] = generic::nearest<E>(float(x[j]) / (scale == 0.0f ? generic::EPS : scale))
                * (scale == 0.0f ? zero : scale);
        }
      },
      [=](const T* x, bf16::Rows rows, int64_t i, int64_t count) {
        bf16::quantize_blocks<E, SIZE, Rule>(x, k, global, zero, rows, i, count);
      });
}
template <int LOW, int HIGH, typename T>
void integers(const T* x, int64_t n, generic::Grid grid, double* out) {
  const float inverse = 1.0f / grid.scale;
  for (int64_t j = 0; j < n; j++) {
    const float code = generic::clamped(std::nearbyint(float(x[j]) * inverse) + grid.zero_point, LOW, HIGH);
    out[j] = double(code - grid.zero_point) * grid.scale;
  }
}
template <int LOW, int HIGH, typename T>
Activation integers_given(int64_t m, int64_t k) {
  const generic::Grid grid{0.02f, float(integer(LOW, HIGH))};
  return quantized<T>("integers given", m, k, false, 0,
      [=](const T* x, double* out) { integers<LOW, HIGH>(x, k, grid, out); },
      [=](const T* x, bf16::Rows rows, int64_t i, int64_t count) {
        bf16::quantize_integers<LOW, HIGH>(x, k, grid, rows, i, count);
      });
}
template <int LOW, int HIGH, bool SYMMETRIC, typename T>
Activation integers_dynamic(int64_t m, int64_t k) {
  return quantized<T>("integers dynamic", m, k, false, 0,
      [=](const T* x, double* out) {
        integers<LOW, HIGH>(x, k, generic::integer_grid<LOW, HIGH, SYMMETRIC>(x, k), out);
      },
      [=](const T* x, bf16::Rows rows, int64_t i, int64_t count) {
        bf16::quantize_integers<LOW, HIGH, SYMMETRIC>(x, k, rows, i, count);
      });
}
template <int LOW, int HIGH, bool SYMMETRIC, typename T>
Activation integer_groups(int64_t m, int64_t k, int64_t group) {
  return quantized<T>("integer groups", m, k, true, group,
      [=](const T* x, double* out) {
        for (int64_t g = 0; g < k; g += group)
          integers<LOW, HIGH>(x + g, group, generic::integer_grid<LOW, HIGH, SYMMETRIC>(x + g, group), out + g);
      },
      [=](const T* x, bf16::Rows rows, int64_t i, int64_t count) {
        bf16::quantize_integer_groups<LOW, HIGH, SYMMETRIC>(x, k, group, rows, i, count);
      });
}
Activation copied(int64_t m, int64_t k) {
  return quantized<at::BFloat16>("copy", m, k, false, 0,
      [=](const at::BFloat16* x, double* out) { for (int64_t j = 0; j < k; j++) out[j] = float(x[j]); },
      [=](const at::BFloat16* x, bf16::Rows rows, int64_t i, int64_t count) { bf16::copy(x, k, rows, i, count); });
}
template <typename E>
Activation fp8_loaded(int64_t m, int64_t k, int64_t columns) {
  auto codes = std::make_shared<std::vector<uint8_t>>(m * k);
  const int64_t groups = k / columns;
  auto scales = std::make_shared<std::vector<float>>(m * groups);
  Activation a{"fp8 codes", columns < k, columns, std::vector<double>(m * k), {}};
  for (auto& s : *scales) s = std::abs(normal()) * 0.01f;
  for (int64_t i = 0; i < m * k; i++) {
    (*codes)[i] = uint8_t(chance(1e-4) ? 0x7f : integer(0, 119) | integer(0, 1) << 7);
    a.values[i] = double(generic::table<E>()[(*codes)[i]]) * (*scales)[i / columns];
  }
  a.prepare = [=](int64_t m, bf16::Rows rows, int64_t i, int64_t count) {
    bf16::load_fp8<E>(codes->data() + m * k, scales->data() + m * groups, k, columns, rows, i, count);
  };
  return a;
}
Activation integers_loaded(int64_t m, int64_t k, int64_t columns) {
  auto codes = std::make_shared<std::vector<int8_t>>(m * k);
  const int64_t groups = k / columns;
  auto scales = std::make_shared<std::vector<float>>(m * groups);
  auto zeros = std::make_shared<std::vector<int8_t>>(m * groups);
  const bool with_zeros = chance(0.5);
  Activation a{"int8 codes", columns < k, columns, std::vector<double>(m * k), {}};
  for (auto& s : *scales) s = std::abs(normal()) * 0.01f;
  for (auto& z : *zeros) z = int8_t(integer(-128, 127));
  for (int64_t i = 0; i < m * k; i++) {
    (*codes)[i] = int8_t(integer(-128, 127));
    a.values[i] = double((*codes)[i] - (with_zeros ? (*zeros)[i / columns] : 0)) * (*scales)[i / columns];
  }
  a.prepare = [=](int64_t m, bf16::Rows rows, int64_t i, int64_t count) {
    bf16::load_integers(codes->data() + m * k, scales->data() + m * groups,
                        with_zeros ? zeros->data() + m * groups : nullptr, k, columns, rows, i, count);
  };
  return a;
}
template <typename E, int SIZE, typename S>
Activation blocks_loaded(int64_t m, int64_t k) {
  constexpr int BITS = std::is_same_v<E, generic::Fp4> ? 4 : E::max < 100.0f ? 6 : 8;
  constexpr bool E8M0 = std::is_same_v<S, generic::E8M0>;
  auto packed = std::make_shared<std::vector<uint8_t>>(m * k * BITS / 8);
  auto scales = std::make_shared<std::vector<uint8_t>>(m * k / SIZE);
  const float global = std::is_same_v<S, generic::E4M3> ? 0.37f : 1.0f;
  const float zero = std::is_same_v<S, generic::E5M3> ? generic::EPS : 0.0f;
  const bool wide = chance(0.3);
  Activation a{"block codes", false, 0, std::vector<double>(m * k), {}};
  for (auto& p : *packed) p = uint8_t(integer(0, BITS == 8 ? 119 : 255));
  for (auto& s : *scales) {
    const int64_t finite = !E8M0 ? integer(0, 126) : wide ? integer(60, 190) : integer(118, 130);
    s = uint8_t(chance(0.0003) ? 255 : finite);
  }
  for (int64_t i = 0; i < m; i++) {
    std::vector<float> row(generic::padded(k));
    for (int64_t b = 0; b < k; b += SIZE) {
      generic::decode_blocks<E, SIZE, S, float>(
          packed->data() + (i * k + b) * BITS / 8, scales->data() + (i * k + b) / SIZE, SIZE, global, zero, row.data());
      for (int j = 0; j < SIZE; j++) a.values[i * k + b + j] = double(row[j]);
    }
  }
  a.prepare = [=](int64_t m, bf16::Rows rows, int64_t i, int64_t count) {
    bf16::load_blocks<E, SIZE, S>(
        packed->data() + m * k * BITS / 8, scales->data() + m * k / SIZE, k, global, zero, rows, i, count);
  };
  return a;
}

template <typename T>
Activation some_activation(int64_t m, int64_t k) {
  using namespace generic;
  const int64_t group = k % 128 == 0 && chance(0.5) ? 128 : 32;
  const bool whole = k % 32 == 0;
  for (;;) switch (integer(0, 27)) {
    case 0:
      if constexpr (std::is_same_v<T, at::BFloat16>) return copied(m, k);
      else break;
    case 1: return fp8_given<Fp8E4M3, T>(m, k);
    case 2: return fp8_given<Fp8E5M2, T>(m, k);
    case 3: return fp8_dynamic<Fp8E4M3, T>(m, k);
    case 4: return fp8_dynamic<Fp8E5M2, T>(m, k);
    case 5: if (whole) return fp8_groups<Fp8E4M3, T>(m, k, group); break;
    case 6: if (whole) return blocks<Fp4, 32, Even, T>("mxfp4 even", m, k); break;
    case 7: if (whole) return blocks<Fp6E2M3, 32, Even, T>("mxfp6 e2m3", m, k); break;
    case 8: if (whole) return blocks<Fp6E3M2, 32, Even, T>("mxfp6 e3m2", m, k); break;
    case 9: if (whole) return blocks<Fp8E4M3, 32, Even, T>("mxfp8 even", m, k); break;
    case 10: if (whole) return blocks<Fp8E4M3, 32, Rceil, T>("mxfp8 rceil", m, k); break;
    case 11: if (whole) return blocks<Fp8E5M2, 32, Even, T>("mxfp8 e5m2", m, k); break;
    case 12: if (k % 16 == 0) return blocks<Fp4, 16, Sequential, T>("nvfp4 sequential", m, k); break;
    case 13: if (k % 16 == 0) return blocks<Fp4, 16, Combined, T>("nvfp4 combined", m, k); break;
    case 14: if (k % 16 == 0) return blocks<Fp4, 16, Nearest, T>("amdfp4 g16", m, k); break;
    case 15: if (whole) return blocks<Fp4, 32, Nearest, T>("amdfp4 g32", m, k); break;
    case 16: return integers_given<-128, 127, T>(m, k);
    case 17: return integers_given<0, 255, T>(m, k);
    case 18: return integers_dynamic<-128, 127, true, T>(m, k);
    case 19: return integers_dynamic<0, 15, false, T>(m, k);
    case 20: if (whole) return integer_groups<-8, 7, false, T>(m, k, group); break;
    case 21: return fp8_loaded<Fp8E4M3>(m, k, whole && chance(0.5) ? group : k);
    case 22: return integers_loaded(m, k, whole && chance(0.5) ? group : k);
    case 23: if (whole) return blocks_loaded<Fp4, 32, E8M0>(m, k); break;
    case 24: if (whole) return blocks_loaded<Fp6E3M2, 32, E8M0>(m, k); break;
    case 25: if (whole) return blocks_loaded<Fp8E4M3, 32, E8M0>(m, k); break;
    case 26: if (k % 16 == 0) return blocks_loaded<Fp4, 16, E4M3>(m, k); break;
    case 27: if (k % 16 == 0) return blocks_loaded<Fp4, 16, E5M3>(m, k); break;
  }
}

// What prepare left of a row: each code is right.
void check_prepared(const Activation& a, const uint8_t* rows, int64_t m, int64_t k, int64_t i, int64_t count) {
  const bf16::Row row(const_cast<uint8_t*>(rows), k, i, count);
  double largest = 0.0;  // what is nothing beside it may be 0
  for (int64_t j = 0; j < k; j++) {
    const double v = std::abs(a.values[m * k + j]);
    largest = std::max(largest, std::isfinite(v) ? v : 0x1p127);
  }
  for (int64_t j = 0; j < quark::round_up(k, 32); j++) {
    const float v = quark::from_bits(uint32_t(row.values[j / 32 * row.r * 32 + j % 32]) << 16);
    if (j >= k) {
      if (v != 0.0f) fail(a.name + ": padding is not 0");
      continue;
    }
    const double value = double(v) * (a.of_columns ? row.scales[j / 32 * row.r] : *row.scale);
    const double exact = a.values[m * k + j];
    const bool same = std::isnan(exact) ? std::isnan(value) || std::isnan(v)
        : value == exact || std::abs(value - exact) <= 2e-7 * std::abs(exact) + 1e-36 + 0x1p-120 * largest;
    if (!same) {
      char text[200];
      snprintf(text, sizeof text, "%s k=%ld [%ld, %ld]: prepared %g, not %g", a.name.c_str(), long(k), long(m), long(j),
               value, exact);
      fail(text);
    }
  }
}

// --- weights

template <typename W>
constexpr Order order_of() {
  return W::BITS == 4 ? Order::NIBBLES : W::ZERO_POINT ? Order::QUADS : Order::PAIRS;
}

// Random codes and what they stand for.
struct Codes {
  std::vector<uint8_t> codes, blocks;
  std::vector<double> values;     // [N, K]
  std::vector<float> scales, zeros;  // [groups, N]
  Codes(int64_t n, int64_t k) : codes(n * k), values(n * k) {}
};

template <typename W>
double value_of(int code) {
  if constexpr (std::is_same_v<W, bf16::Fp4>) return generic::table<generic::Fp4>()[2 * code];
  else if constexpr (std::is_same_v<W, bf16::Fp6E2M3>) return generic::table<generic::Fp6E2M3>()[code];
  else if constexpr (std::is_same_v<W, bf16::Fp6E3M2>) return generic::table<generic::Fp6E3M2>()[code];
  else if constexpr (std::is_same_v<W, bf16::Fp8E4M3>) return generic::table<generic::Fp8E4M3>()[code];
  else if constexpr (std::is_same_v<W, bf16::Fp8E5M2>) return generic::table<generic::Fp8E5M2>()[code];
  else if constexpr (std::is_same_v<W, bf16::Int8>) return code - 128;
  else if constexpr (std::is_same_v<W, bf16::Int4>) return code & 8 ? code - 16 : code;
  else return code;
}

template <typename W>
uint8_t some_code(bool with_nan) {
  if (W::BITS == 8 && !W::ZERO_POINT) {
    const int nan = with_nan && chance(3e-4);
    const int finite = std::is_same_v<W, bf16::Fp8E4M3> ? 0x7e : 0x7b;
    return uint8_t((nan ? integer(finite + 1, 127) : chance(0.1) ? 0 : integer(0, finite)) | integer(0, 1) << 7);
  }
  return uint8_t(integer(0, (1 << W::BITS) - 1));
}

using Tile = std::function<void(const uint8_t*, int64_t, int64_t, int, uint8_t*, float*, int64_t)>;

void check(const std::string& weight_name, const Activation& a, const std::vector<double>& w, int64_t m, int64_t n,
           int64_t k, int64_t columns, const Tile& tile) {
  const std::string name = weight_name + " x " + a.name + " m=" + std::to_string(m) + " n=" + std::to_string(n) +
                           " k=" + std::to_string(k);
  for (int64_t begin = 0; begin < m; begin += BLOCK_ROWS) {
    const int64_t count = std::min(BLOCK_ROWS, m - begin);
    const Bytes rows(bf16::rows_bytes(count, k)), scratch(bf16::scratch_bytes(k, columns));
    for (int64_t i = 0; i < count; i++) a.prepare(begin + i, {rows.p, a.rounds}, i, count);
    for (int64_t i = 0; i < count; i++) check_prepared(a, rows.p, begin + i, k, i, count);
    const int groups = int(1 << integer(0, 2));
    const int64_t ld = 16 * groups + integer(0, 3);
    std::vector<int64_t> some;
    for (int64_t i = 0; i < count; i++)
      if (count <= 8 || i < 2 || i >= count - 2 || chance(0.05)) some.push_back(i);
    std::vector<double> exact(count * n), magnitudes(count * n), largest(count);
    for (int64_t i : some)
      for (int64_t c = 0; c < n; c++) {
        double sum = 0.0, all = 0.0;
        const double *x = a.values.data() + (begin + i) * k, *v = w.data() + c * k;
        for (int64_t l = 0; l < k; l++) {
          sum += x[l] * v[l];
          all += std::abs(x[l] * v[l]);
        }
        exact[i * n + c] = sum;
        magnitudes[i * n + c] = all;
        if (std::isfinite(sum)) largest[i] = std::max(largest[i], std::abs(sum));
      }
    for (int64_t g = 0; g < (n + 15) / 16; g += groups) {
      std::vector<float> out(count * ld, 777.0f);
      tile(rows.p, count, g, groups, scratch.p, out.data(), ld);
      for (int64_t i : some) {
        for (int64_t j = 0; j < 16 * groups && g * 16 + j < n; j++)
          compare(name + " [" + std::to_string(begin + i) + ", " + std::to_string(g * 16 + j) + "]", out[i * ld + j],
                  exact[i * n + g * 16 + j], magnitudes[i * n + g * 16 + j], largest[i]);
        for (int64_t j = 16 * groups; j < ld; j++)
          if (out[i * ld + j] != 777.0f) fail(name + ": writes beyond");
      }
    }
  }
}

template <typename F>
void with_groups(int groups, F&& f) {
  if (groups == 1) f(std::integral_constant<int, 1>());
  else if (groups == 2) f(std::integral_constant<int, 2>());
  else f(std::integral_constant<int, 4>());
}

// A tile of either kind of activation.
template <int MOST, typename W, bool ROUNDS, typename Make>
Tile tile_of(const Panels& panels, int64_t k, const Activation& a, Make make) {
  return [=, &panels, &a](const uint8_t* rows, int64_t count, int64_t g, int groups, uint8_t* scratch, float* out,
                          int64_t ld) {
    const auto scales = make(g / 4);
    with_groups(groups, [&](auto n) {
      auto run = [&](auto activation, auto weight) {
        bf16::tile<n, MOST, decltype(weight)>(
            rows, count, k, panels.panel(g / 4), int(g % 4), activation, scales, scratch, out, ld);
      };
      if constexpr (ROUNDS) run(bf16::OfRows{}, bf16::Rounded<W>());
      else if (a.of_columns) run(bf16::OfColumns{a.columns}, W());
      else run(bf16::OfRows{}, W());
    });
  };
}

int64_t some_rows() { return chance(0.5) ? integer(1, 12) : chance(0.8) ? integer(13, 80) : integer(81, 600); }
int64_t some_k(int64_t multiple) {
  const int64_t k = integer(1, chance(0.2) ? 40 : 12) * 32;
  return multiple == 32 ? k : multiple == 16 ? k + integer(0, 1) * 16 : std::max<int64_t>(8, k - integer(0, 31));
}

template <typename W, typename S, int SIZE, typename T, bool ROUNDS = false>
void check_in_tile(const char* name) {
  const int64_t m = some_rows(), n = integer(1, 200), k = some_k(SIZE);
  Activation a = some_activation<T>(m, k);
  if (ROUNDS) a.round();
  Codes c(n, k);
  constexpr bool E8M0 = std::is_same_v<S, generic::E8M0>;
  const int kind = int(integer(0, 4)), nan = chance(0.3);
  const float global = E8M0 || std::is_same_v<S, generic::E5M3> ? 1.0f : 0.0021f;
  c.blocks.resize(n * k / SIZE);
  for (auto& s : c.blocks) {
    s = E8M0 ? uint8_t(kind == 0 ? integer(118, 122) : kind == 1 ? integer(100, 135) : kind == 2 ? integer(0, 190)
                       : kind == 3 ? integer(0, 40) : integer(80, 190))
             : uint8_t(integer(0, std::is_same_v<S, generic::E4M3> ? 126 : 254));
    if (!E8M0 && nan && chance(0.001)) s = std::is_same_v<S, generic::E4M3> ? 127 : 255;
  }
  for (auto& v : c.codes) v = some_code<W>(nan);
  for (int64_t i = 0; i < n * k; i++) {
    const double scale = E8M0 ? std::ldexp(1.0, c.blocks[i / SIZE] - 127) : S::value(c.blocks[i / SIZE]);
    c.values[i] = value_of<W>(c.codes[i]) * scale * global;
    if (ROUNDS) c.values[i] = rounded(value_of<W>(c.codes[i]) * double(float(scale) * global));
  }
  const Panels panels(n, k, SIZE, W::BITS, order_of<W>(), c.codes, 0, c.blocks);
  check(name, a, c.values, m, n, k, k,
        tile_of<384, W, ROUNDS>(panels, k, a, [=](int64_t) { return bf16::InTile<S, SIZE>{global}; }));
}

template <bool OF_GROUPS, typename W, typename T, bool ROUNDS = false>
void check_beside(const char* name) {
  const int64_t m = OF_GROUPS || chance(0.7) ? some_rows() : integer(1, 4), n = integer(1, 200);
  const int64_t k = some_k(OF_GROUPS ? 32 : 1), group = OF_GROUPS ? integer(1, 4) * 32 : k;
  const bool with_zeros = W::ZERO_POINT && chance(0.7), nan = chance(0.3);
  Activation a = some_activation<T>(m, k);
  if (ROUNDS) a.round();
  Codes c(n, k);
  const int64_t groups = (k + group - 1) / group;
  constexpr int LOW = std::is_same_v<W, bf16::Int8> ? -128 : std::is_same_v<W, bf16::Int4> ? -8 : 0;
  for (int64_t i = 0; i < groups * n; i++) {
    c.scales.push_back(std::abs(normal()) * 0.01f);
    c.zeros.push_back(with_zeros ? float(integer(LOW, LOW + (1 << W::BITS) - 1)) : 0.0f);
  }
  for (auto& v : c.codes) v = some_code<W>(nan);
  for (int64_t i = 0; i < n * k; i++) {
    const int64_t at = i % k / group * n + i / k;
    c.values[i] = (value_of<W>(c.codes[i]) - c.zeros[at]) * c.scales[at];
    if (ROUNDS) c.values[i] = rounded(c.values[i]);
  }
  const Panels panels(n, k, 0, W::BITS, order_of<W>(), c.codes, std::is_same_v<W, bf16::Int8> ? 128 : 0, {});
  auto fill_of = [&](int64_t panel) {
    return [=, &c](int64_t column, float* scale, float* zero) {
      for (int64_t i = 0; i < 64; i++) {
        const int64_t channel = panel * 64 + i, at = column / group * n + channel;
        scale[i] = channel < n ? c.scales[at] : 0.0f;
        zero[i] = channel < n ? c.zeros[at] : 0.0f;
      }
    };
  };
  if constexpr (OF_GROUPS)
    check(name, a, c.values, m, n, k, group,
          tile_of<384, W, ROUNDS>(panels, k, a, [=](int64_t p) { return bf16::PerGroup{group, fill_of(p)}; }));
  else if (m <= 4)
    check(name, a, c.values, m, n, k, k,
          tile_of<4, W, ROUNDS>(panels, k, a, [=](int64_t p) { return bf16::PerChannel{fill_of(p)}; }));
  else
    check(name, a, c.values, m, n, k, k,
          tile_of<384, W, ROUNDS>(panels, k, a, [=](int64_t p) { return bf16::PerChannel{fill_of(p)}; }));
}

// The vectors a `fill` may be made of.
void check_fills() {
  for (int round = 0; round < 50; round++) {
    const int64_t n = integer(1, 64);
    std::vector<at::BFloat16> scales(n);
    for (auto& s : scales) s = at::BFloat16(normal());
    std::vector<int32_t> words((n + 7) / 8);
    for (auto& w : words) w = int32_t(engine());
    float out[64], ordered[64], reordered[64];
    bf16::fill_scales(scales.data(), n, out);
    bf16::fill_zeros<true, false>(words.data(), n, ordered);
    bf16::fill_zeros<false, true>(words.data(), n, reordered);
    for (int c = 0; c < n; c++) {
      const bool right = out[c] == float(scales[c]) && ordered[c] == generic::int4<true>(words[c / 8], c % 8) &&
                         reordered[c] == generic::int4<false>(words[c / 8], generic::nibble<true>(c % 8));
      if (!right) fail("fill");
    }
  }
}

// --- speed

#ifdef BENCH  // takes long to compile
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

uint8_t* huge_pages(int64_t bytes) {
  constexpr int64_t page = 2 << 20;
  void* p = aligned_alloc(page, quark::round_up(bytes, page));
  madvise(p, quark::round_up(bytes, page), MADV_HUGEPAGE);
  return static_cast<uint8_t*>(p);
}

__attribute__((noinline)) void raw_read(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 256)
    asm volatile(
        "vmovups (%0), %%zmm16\n vmovups 64(%0), %%zmm17\n vmovups 128(%0), %%zmm18\n vmovups 192(%0), %%zmm19\n"
        "prefetcht0 4096(%0)\n prefetcht0 4160(%0)\n prefetcht0 4224(%0)\n prefetcht0 4288(%0)\n" ::"r"(p + i)
        : "xmm16", "xmm17", "xmm18", "xmm19");
}

// GFLOP/s of nothing but dot products.
double peak() {
  std::vector<double> times;
  for (int i = 0; i < 9; i++) {
    const double t = now();
    for (int j = 0; j < 20000; j++)
      asm volatile(
          "vdpbf16ps %%zmm16, %%zmm17, %%zmm0\n vdpbf16ps %%zmm16, %%zmm17, %%zmm1\n"
          "vdpbf16ps %%zmm16, %%zmm17, %%zmm2\n vdpbf16ps %%zmm16, %%zmm17, %%zmm3\n"
          "vdpbf16ps %%zmm16, %%zmm17, %%zmm4\n vdpbf16ps %%zmm16, %%zmm17, %%zmm5\n"
          "vdpbf16ps %%zmm16, %%zmm17, %%zmm6\n vdpbf16ps %%zmm16, %%zmm17, %%zmm7\n"
          "vdpbf16ps %%zmm16, %%zmm17, %%zmm8\n vdpbf16ps %%zmm16, %%zmm17, %%zmm9\n"
          "vdpbf16ps %%zmm16, %%zmm17, %%zmm10\n vdpbf16ps %%zmm16, %%zmm17, %%zmm11\n" ::: "xmm0", "xmm1", "xmm2",
          "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
    times.push_back(now() - t);
  }
  return 20000 * 12 * 64e-9 / *std::min_element(times.begin(), times.end());
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}
double least(const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); }

std::vector<int64_t> ms = {1, 2, 3, 4, 8, 16, 128, 512};
std::string bench_of;  // part of the names of what is to be timed

// gemm(weight, m) prepares m rows and multiplies; weights are random bytes, but for scales.
void bench(const char* name, int64_t n, int64_t k, int64_t tile, int64_t scale_bytes, int low, int high,
           const std::function<void(const uint8_t*, int64_t)>& gemm) {
  if (std::string(name).find(bench_of) == std::string::npos) return;
  const int64_t bytes = n / 64 * (k / 32) * tile, copies = std::max<int64_t>(3, (192 << 20) / bytes);
  uint8_t* weights = huge_pages(copies * bytes);
  for (int64_t i = 0; i < bytes; i++)
    weights[i] = i % tile < scale_bytes ? uint8_t(low + engine() % (high - low)) : uint8_t(engine() & 0xf7);
  for (int64_t i = 1; i < copies; i++) std::memcpy(weights + i * bytes, weights, bytes);
  int64_t at = 0;
  auto next = [&] { return weights + at++ % copies * bytes; };
  printf("%-28s", name);
  for (int64_t m : ms) {
    const int repeats = m <= 4 ? 201 : m <= 16 ? 41 : m <= 128 ? 15 : 7;
    std::vector<double> read, run;
    for (int i = 0; i < repeats; i++) {
      double t = now();
      raw_read(next(), bytes);
      read.push_back(now() - t);
      t = now();
      gemm(next(), m);
      run.push_back(now() - t);
    }
    const double gops = 2e-9 * double(n) * double(k) * double(m);
    if (m <= 4) printf("  M=%ld %.0f%%", long(m), 100 * median(read) / median(run));
    else printf("  M=%ld %.0f (best %.0f)", long(m), gops / median(run), gops / least(run));
    fflush(stdout);
  }
  printf(" GFLOP/s (peak %.0f)\n", peak());
  free(weights);
}

template <typename W, typename Activation, typename Scales, typename Prepare>
void bench(const char* name, int64_t n, int64_t k, int64_t columns, Activation a, Scales scales, int64_t scale_bytes,
           int low, int high, Prepare prepare) {
  std::vector<at::BFloat16> x(512 * k);
  for (auto& v : x) v = at::BFloat16(normal());
  const int64_t tile = scale_bytes + 256 * W::BITS, panel = k / 32 * tile;
  const Bytes rows(bf16::rows_bytes(BLOCK_ROWS, k)), scratch(bf16::scratch_bytes(k, columns));
  const Bytes unit(BLOCK_ROWS * 64 * 4), y(512 * n * 2);
  bench(name, n, k, tile, scale_bytes, low, high, [&](const uint8_t* w, int64_t m) {
    float* out = reinterpret_cast<float*>(unit.p);
    for (int64_t begin = 0; begin < m; begin += BLOCK_ROWS) {
      const int64_t count = std::min(BLOCK_ROWS, m - begin);
      for (int64_t i = 0; i < count; i++) prepare(x.data() + (begin + i) * k, rows.p, i, count);
      for (int64_t p = 0; p < n / 64; p++) {
        bf16::tile<4, 384, W>(rows.p, count, k, w + p * panel, 0, a, scales(p), scratch.p, out, 64);
        // What a template would do with a unit of 64 channels.
        for (int64_t i = 0; i < count; i++)
          for (int64_t c = 0; c < 64; c += 16) {
            const __m512 v = quark::rounded_to<at::BFloat16>(_mm512_loadu_ps(out + i * 64 + c));
            const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
            at::BFloat16* to = reinterpret_cast<at::BFloat16*>(y.p) + (begin + i) * n + p * 64 + c;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
          }
      }
    }
  });
}

void bench_all(int64_t n, int64_t k) {
  printf("peak %.0f GFLOP/s\n", peak());
  using namespace bf16;
  using generic::E8M0;
  const std::vector<float> channel(n, 0.01f);
  const std::vector<at::BFloat16> groups(n * k / 32, at::BFloat16(0.01f));
  const std::vector<int32_t> words(n / 8 * k / 32, 0x12345678);
  auto of_channels = [&](int64_t p) {
    return PerChannel{[&, p](int64_t, float* s, float* z) {
      fill_scales(channel.data() + p * 64, 64, s);
      fill_all(0.0f, z);
    }};
  };
  auto of_groups = [&](int64_t p) {
    return PerGroup{int64_t(128), [&, p](int64_t column, float* s, float* z) {
      fill_scales(groups.data() + column / 128 * n + p * 64, 64, s);
      fill_zeros<true, true>(words.data() + (column / 128 * n + p * 64) / 8, 64, z);
    }, [&, p](int64_t column) {
      prefetch<2>(reinterpret_cast<const uint8_t*>(groups.data() + column / 128 * n + p * 64));
      prefetch<1>(reinterpret_cast<const uint8_t*>(words.data() + (column / 128 * n + p * 64) / 8));
    }};
  };
  auto of_squares = [&](int64_t p) {
    return PerGroup{int64_t(128), [&, p](int64_t column, float* s, float*) {
      fill_all(float(groups[p / 2 * (k / 128) + column / 128]), s);
    }};
  };
  auto given = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_fp8<generic::Fp8E4M3>(x, k, 0.01f, r, i, c);
  };
  auto dynamic = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_fp8<generic::Fp8E4M3>(x, k, r, i, c);
  };
  auto by_groups = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_fp8_groups<generic::Fp8E4M3>(x, k, 128, r, i, c);
  };
  auto rceil = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_blocks<generic::Fp8E4M3, 32, generic::Rceil>(x, k, 1.0f, 0.0f, r, i, c);
  };
  auto even6 = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_blocks<generic::Fp6E2M3, 32, generic::Even>(x, k, 1.0f, 0.0f, r, i, c);
  };
  auto even4 = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_blocks<generic::Fp4, 32, generic::Even>(x, k, 1.0f, 0.0f, r, i, c);
  };
  auto sequential = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_blocks<generic::Fp4, 16, generic::Sequential>(x, k, 0.0017f, 0.0f, r, i, c);
  };
  auto copied = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) { copy(x, k, r, i, c); };
  auto int8 = [&](const at::BFloat16* x, uint8_t* r, int64_t i, int64_t c) {
    quantize_integers<-128, 127, true>(x, k, r, i, c);
  };
  auto mx = [](int64_t) { return InTile<E8M0, 32>{}; };
  auto nv = [](int64_t) { return InTile<generic::E4M3, 16>{0.01f}; };
  bench<Fp8E4M3>("fp8 x fp8 given", n, k, k, OfRows{}, of_channels, 0, 0, 1, given);
  bench<Fp8E4M3>("fp8 x fp8 dynamic", n, k, k, OfRows{}, of_channels, 0, 0, 1, dynamic);
  bench<Fp8E4M3>("fp8 128x128 x fp8 128", n, k, 128, OfColumns{128}, of_squares, 0, 0, 1, by_groups);
  bench<Fp8E4M3>("fp8 weight only", n, k, k, OfRows{}, of_channels, 0, 0, 1, copied);
  bench<Fp4>("mxfp4 weight only", n, k, k, OfRows{}, mx, 64, 110, 130, copied);
  bench<Fp4>("mxfp4 x fp8 given", n, k, k, OfRows{}, mx, 64, 110, 130, given);
  bench<Fp4>("mxfp4 x mxfp4", n, k, k, OfRows{}, mx, 64, 110, 130, even4);
  bench<Fp4>("nvfp4 x nvfp4", n, k, k, OfRows{}, nv, 128, 20, 120, sequential);
  bench<Fp8E4M3>("mxfp8 x mxfp8 rceil", n, k, k, OfRows{}, mx, 64, 110, 130, rceil);
  bench<Fp6E2M3>("mxfp6 x mxfp6", n, k, k, OfRows{}, mx, 64, 110, 130, even6);
  bench<Fp4>("nvfp4 weight only", n, k, k, OfRows{}, nv, 128, 20, 120, copied);
  bench<Int4>("int4 group 128 weight only", n, k, 128, OfRows{}, of_groups, 0, 0, 1, copied);
  bench<Int4>("int4 weight only", n, k, k, OfRows{}, of_channels, 0, 0, 1, copied);
  bench<Int8>("int8 weight only", n, k, k, OfRows{}, of_channels, 0, 0, 1, copied);
  bench<Int8>("int8 x int8", n, k, k, OfRows{}, of_channels, 0, 0, 1, int8);
}
#endif

}  // namespace

int main(int argc, char** argv) {
#if defined(HARNESS_AMX)
  quark::amx::permit();
#endif
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "bench") {
#ifdef BENCH
    bench_of = argc > 2 ? argv[2] : "";
    bench_all(4096, 4096);
    return 0;
#else
    printf("compiled without -DBENCH\n");
    return 2;
#endif
  }
  const int rounds = mode.empty() ? 12 : std::atoi(argv[1]);
  auto every = [&](const char* name, auto f) {
    worst = 0.0;
    for (int i = 0; i < rounds; i++) {
      f(name, at::BFloat16());
#if !defined(HARNESS_AMX)  // which differs in products alone
      f(name, at::Half());
      f(name, float());
#endif
    }
    printf("%s: worst error %.2g of the row's largest, or half the magnitudes\n", name, worst);
    fflush(stdout);
  };
  using namespace bf16;
  using generic::E4M3, generic::E5M3, generic::E8M0;
  check_fills();
#define QUARK_IN_TILE(name, W, S, SIZE) \
  every(name, [](const char* n, auto t) { check_in_tile<W, S, SIZE, decltype(t)>(n); })
#define QUARK_BESIDE(name, GROUPED, W) \
  every(name, [](const char* n, auto t) { check_beside<GROUPED, W, decltype(t)>(n); })
  QUARK_BESIDE("fp8 e4m3", false, Fp8E4M3);
  QUARK_BESIDE("fp8 e5m2", false, Fp8E5M2);
  QUARK_BESIDE("fp8 e4m3 groups", true, Fp8E4M3);
  QUARK_IN_TILE("mxfp4", Fp4, E8M0, 32);
  QUARK_IN_TILE("mxfp6 e2m3", Fp6E2M3, E8M0, 32);
  QUARK_IN_TILE("mxfp6 e3m2", Fp6E3M2, E8M0, 32);
  QUARK_IN_TILE("mxfp8 e4m3", Fp8E4M3, E8M0, 32);
  QUARK_IN_TILE("mxfp8 e5m2", Fp8E5M2, E8M0, 32);
  QUARK_IN_TILE("nvfp4", Fp4, E4M3, 16);
  QUARK_IN_TILE("amdfp4 g16", Fp4, E5M3, 16);
  QUARK_IN_TILE("amdfp4 g32", Fp4, E5M3, 32);
  QUARK_BESIDE("int8", false, Int8);
  QUARK_BESIDE("int8 groups", true, Int8);
  QUARK_BESIDE("uint8", false, UInt8);
  QUARK_BESIDE("int4", false, Int4);
  QUARK_BESIDE("int4 groups", true, Int4);
  QUARK_BESIDE("uint4", false, UInt4);
  QUARK_BESIDE("uint4 groups", true, UInt4);
  // Values that are rounded with their scales: a product has all 16 bits, and a sum loses twice as much as one of codes.
  tolerance = 2e-6;
  every("fp8 e4m3 rounded", [](const char* n, auto) { check_beside<false, Fp8E4M3, at::BFloat16, true>(n); });
  every("int4 groups rounded", [](const char* n, auto) { check_beside<true, Int4, at::BFloat16, true>(n); });
  every("nvfp4 rounded", [](const char* n, auto) { check_in_tile<Fp4, E4M3, 16, at::BFloat16, true>(n); });
  printf("%ld compared, %ld wrong\n", long(compared), long(failures));
  return failures != 0;
}
