// What harness_vnni.cpp and harness_avx2.cpp have in common: the kernels of `namespace kernels` against float64, and
// (argument "bench") their speed. Before it: that namespace, and what depends on the vector extension.
#include "harness_random.h"

#include <sys/mman.h>
#include <time.h>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace {

namespace generic = quark::generic;
constexpr int64_t BLOCK_ROWS = 384;
constexpr double INF = std::numeric_limits<double>::infinity();

// Aligned, of no byte more than is asked for.
struct Bytes {
  uint8_t* p;
  int64_t size;
  explicit Bytes(int64_t n) : p(static_cast<uint8_t*>(aligned_alloc(64, quark::round_up(n, 64)))), size(n) {
    std::memset(p, 0xa5, quark::round_up(n, 64));
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() { free(p); }
};

// --- the layout, naively

// Codes [N, K] and block scales [N, K / size] (none: size 0) in panels of 64 channels.
struct Panels {
  int64_t n, k, size, bits, tile, stride;
  Bytes bytes;

  Panels(int64_t n, int64_t k, int64_t size, int64_t bits, const std::vector<uint8_t>& codes, uint8_t zero,
         const std::vector<uint8_t>& scales)
      : n(n), k(k), size(size), bits(bits), tile((size ? 32 / size * 64 : 0) + 64 * 32 * bits / 8),
        stride(quark::round_up(k, 32) / 32 * tile), bytes(quark::round_up(n, 64) / 64 * stride) {
    const int64_t of_scales = size ? 32 / size * 64 : 0;
    for (int64_t p = 0; p < quark::round_up(n, 64) / 64; p++)
      for (int64_t t = 0; t < quark::round_up(k, 32) / 32; t++) {
        uint8_t* at = bytes.p + p * stride + t * tile;
        for (int64_t c = 0; c < 64; c++) {
          const int64_t channel = p * 64 + c;
          auto code = [&](int64_t i) {
            return channel < n && t * 32 + i < k ? codes[channel * k + t * 32 + i] : zero;
          };
          for (int64_t h = 0; size && h < 32 / size; h++) {
            const int64_t block = t * (32 / size) + h;
            at[h * 64 + c] = channel < n && block < k / size ? scales[channel * (k / size) + block] : 0;
          }
          for (int64_t j = 0; j < 4; j++) {
            uint8_t* chunk = at + of_scales + (c / 16 * 4 + j) * 16 * bits;
            for (int64_t i = 0; i < 4; i++) {
              static const int low[4] = {0, 4, 1, 5}, high[4] = {2, 6, 3, 7};
              if (bits == 4) {
                chunk[c % 16 * 4 + i] = uint8_t(code(j * 8 + low[i]) | code(j * 8 + high[i]) << 4);
              } else {
                chunk[c % 16 * 4 + i] = code(j * 8 + i);
                chunk[64 + c % 16 * 4 + i] = code(j * 8 + 4 + i);
              }
            }
          }
        }
      }
  }
  const uint8_t* panel(int64_t p) const { return bytes.p + p * stride; }
};

// --- activations

template <typename T>
void special_rows(int64_t m, int64_t k, std::vector<T>& x) {
  x.resize(m * k);
  const int kind = int(integer(0, 5));
  const bool outliers = chance(0.3);
  for (int64_t i = 0; i < m; i++) {
    const float row = kind == 0 ? 1.0f : kind == 1 ? std::ldexp(1.0f, int(integer(-14, 14)))
                    : kind == 2 ? std::ldexp(1.0f, int(integer(-124, 122))) : 1.0f;
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
    if (chance(0.3)) block(0.0f);
    if (chance(0.1)) block(-0.0f);
    if (chance(0.05)) block(1e-38f);
    if (chance(0.05)) block(1e-6f);
    if (chance(0.03)) block(1e37f);
    if (chance(0.02)) for (int64_t j = 0; j < k; j++) x[i * k + j] = T(0.0f);
    if (chance(0.02)) for (int64_t j = 0; j < k; j++) x[i * k + j] = T(float(x[i * k + j]) * 1e-38f);
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(std::numeric_limits<float>::infinity());
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(-std::numeric_limits<float>::quiet_NaN());
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(3.3e38f);
    if (chance(0.02)) x[i * k + integer(0, k - 1)] = T(1e-45f);
  }
}

// --- the comparison

int64_t failures = 0, compared = 0;
double worst = 0.0;

// What is wrong may be `allowed` of the sum of the magnitudes.
void compare(const std::string& what, float y, double exact, double magnitudes, double allowed = 1e-6) {
  compared++;
  bool right;
  if (std::isnan(exact) || std::isnan(magnitudes)) right = std::isnan(y);
  else if (magnitudes > 3e38) right = std::abs(exact) < 3e38 ? true : !std::isnan(y) || magnitudes == INF;
  else {
    const double error = std::abs(y - exact);
    right = error <= allowed * magnitudes + 3e-45;
    if (magnitudes > 1e-30) worst = std::max(worst, error / magnitudes);
  }
  if (!right && failures++ < 20) printf("%s: %g, not %g (magnitudes %g)\n", what.c_str(), y, exact, magnitudes);
}

// A GEMM's operands in float64 and how to run it.
struct Case {
  std::string name;
  int64_t m, n, k;
  std::vector<double> x, w;  // [m, k], [n, k]
  std::function<int64_t(int64_t)> rows_bytes;
  int64_t scratch_bytes;
  std::function<void(int64_t, uint8_t*, int64_t, int64_t)> prepare;  // row of x, rows, i, count
  // rows, count, group of 16 channels, groups, scratch, out, ld
  std::function<void(const uint8_t*, int64_t, int64_t, int, uint8_t*, float*, int64_t)> tile;
};

void check(const Case& c) {
  for (int64_t begin = 0; begin < c.m; begin += BLOCK_ROWS) {
    const int64_t count = std::min(BLOCK_ROWS, c.m - begin), groups_of_all = (c.n + 15) / 16;
    const Bytes rows(c.rows_bytes(count)), scratch(c.scratch_bytes);
    for (int64_t i = 0; i < count; i++) c.prepare(begin + i, rows.p, i, count);
    const int groups = int(1 << integer(0, 2));
    const int64_t ld = 16 * groups + integer(0, 3);
    for (int64_t g = 0; g < groups_of_all; g += groups) {
      std::vector<float> out(count * ld, 777.0f);
      c.tile(rows.p, count, g, groups, scratch.p, out.data(), ld);
      for (int64_t i = 0; i < count; i++) {
        if (count > 8 && i > 2 && i < count - 2 && !chance(0.1)) continue;
        for (int64_t j = 0; j < 16 * groups && g * 16 + j < c.n; j++) {
          double exact = 0.0, magnitudes = 0.0;
          const double *x = c.x.data() + (begin + i) * c.k, *w = c.w.data() + (g * 16 + j) * c.k;
          for (int64_t l = 0; l < c.k; l++) {
            exact += x[l] * w[l];
            magnitudes += std::abs(x[l] * w[l]);
          }
          const std::string what = c.name + " m=" + std::to_string(c.m) + " n=" + std::to_string(c.n) +
                                   " k=" + std::to_string(c.k) + " [" + std::to_string(begin + i) + ", " +
                                   std::to_string(g * 16 + j) + "]";
          compare(what, out[i * ld + j], exact, magnitudes);
        }
        for (int64_t j = 16 * groups; j < ld; j++)
          if (out[i * ld + j] != 777.0f && failures++ < 20) printf("%s: writes beyond\n", c.name.c_str());
      }
    }
  }
}

int64_t some_rows() { return chance(0.5) ? integer(1, 12) : chance(0.7) ? integer(13, 80) : integer(81, 600); }

template <typename F>
void with_groups(int groups, F&& f) {
  if (groups == 1) f(std::integral_constant<int, 1>());
  else if (groups == 2) f(std::integral_constant<int, 2>());
  else f(std::integral_constant<int, 4>());
}

double fp4(int code) { return generic::table<generic::Fp4>()[2 * code]; }

template <typename T>
const char* name_of() {
  return std::is_same_v<T, float> ? "float" : std::is_same_v<T, at::Half> ? "half" : "bfloat16";
}

// --- MXFP4

struct MxWeight {
  std::vector<uint8_t> codes, scales;
  std::vector<double> values;

  MxWeight(int64_t n, int64_t k) : codes(n * k), scales(n * k / 32), values(n * k) {
    const int kind = int(integer(0, 4));
    for (auto& c : codes) c = uint8_t(integer(0, 15));
    for (size_t b = 0; b < scales.size(); b++) {
      scales[b] = uint8_t(kind == 0 ? integer(118, 122) : kind == 1 ? integer(100, 135)
                        : kind == 2 ? integer(0, MOST_SCALE) : kind == 3 ? integer(0, 40) : integer(115, 120));
      if (chance(0.02)) {
        scales[b] = 0;
        if (chance(0.9)) for (int i = 0; i < 32; i++) codes[b * 32 + i] = chance(0.5) ? 0 : 8;
      }
      for (int i = 0; i < 32; i++) values[b * 32 + i] = fp4(codes[b * 32 + i]) * std::ldexp(1.0, scales[b] - 127);
    }
  }
};

template <typename T>
void check_mxfp4() {
  Case c;
  const bool quantized = chance(0.3);
  c.name = std::string("mxfp4 ") + (quantized ? "codes" : name_of<T>());
  c.m = some_rows(), c.n = integer(1, 200), c.k = integer(1, 48) * 32;
  const MxWeight w(c.n, c.k);
  const Panels panels(c.n, c.k, 32, 4, w.codes, 0, w.scales);
  c.w = w.values;
  c.x.resize(c.m * c.k);
  std::vector<T> x;
  std::vector<uint8_t> packed(c.m * c.k / 2), scales(c.m * c.k / 32);
  if (quantized) {
    const bool wide = chance(0.3);
    for (auto& v : packed) v = uint8_t(integer(0, 255));
    for (auto& v : scales) v = uint8_t(chance(0.001) ? 255 : wide ? integer(0, 254) : integer(120, 128));
    for (int64_t i = 0; i < c.m * c.k; i++)
      c.x[i] = fp4(packed[i / 2] >> (i % 2 * 4) & 15) * double(quark::e8m0(scales[i / 32]));
    c.prepare = [&](int64_t m, uint8_t* rows, int64_t i, int64_t count) {
      kernels::mxfp4::load(packed.data() + m * c.k / 2, scales.data() + m * c.k / 32, c.k, rows, i, count);
    };
  } else {
    special_rows(c.m, c.k, x);
    for (int64_t b = 0; b < c.m * c.k; b += 32) {
      const float amax = generic::amax_of(x.data() + b, 32);
      const float scale = std::isinf(amax) ? NAN : generic::Even::scale<generic::Fp4, T>(amax, 1.0f);
      for (int64_t i = b; i < b + 32; i++) c.x[i] = double(generic::nearest<generic::Fp4>(float(x[i]) / scale)) * scale;
    }
    c.prepare = [&](int64_t m, uint8_t* rows, int64_t i, int64_t count) {
      kernels::mxfp4::quantize(x.data() + m * c.k, c.k, rows, i, count);
    };
  }
  c.rows_bytes = [&](int64_t count) { return kernels::mxfp4::rows_bytes(count, c.k); };
  c.scratch_bytes = kernels::mxfp4::scratch_bytes(c.k);
  c.tile = [&](const uint8_t* rows, int64_t count, int64_t g, int groups, uint8_t* scratch, float* out, int64_t ld) {
    with_groups(groups, [&](auto n) {
      const uint8_t* panel = panels.panel(g / 4);
      if (count <= 4 && chance(0.5)) kernels::mxfp4::tile<n, 4>(rows, count, c.k, panel, g % 4, scratch, out, ld);
      else kernels::mxfp4::tile<n>(rows, count, c.k, panel, g % 4, scratch, out, ld);
    });
  };
  check(c);
}

// --- NVFP4

template <typename Rule, typename T>
void check_nvfp4_by() {
  Case c;
  const bool quantized = chance(0.3);
  c.name = std::string("nvfp4 ") + (quantized ? "codes" : name_of<T>());
  c.m = some_rows(), c.n = integer(1, 200), c.k = integer(1, 96) * 16;
  const int64_t blocks = c.k / 16;
  std::vector<uint8_t> codes(c.n * c.k), scales(c.n * blocks), packed(c.m * c.k / 2), x_scales(c.m * blocks);
  const float weight_global = chance(0.05) ? 1e-39f : chance(0.05) ? 1e33f : std::ldexp(1.3f, int(integer(-20, 4)));
  const int kind = int(integer(0, 2));
  c.w.resize(c.n * c.k);
  c.x.resize(c.m * c.k);
  for (auto& v : codes) v = uint8_t(integer(0, 15));
  for (size_t b = 0; b < scales.size(); b++) {
    scales[b] = uint8_t(chance(0.02) ? 0 : kind == 0 ? integer(90, 106) : integer(0, 126));
    if (kind == 2 && chance(0.0005)) scales[b] = uint8_t(integer(127, 255));
    const bool whole = weight_global < 1e-30f || weight_global > 1e30f;
    const float value = generic::E4M3::value(scales[b]);
    const double scale = whole ? double(value * weight_global) : double(value) * weight_global;
    for (int i = 0; i < 16; i++) c.w[b * 16 + i] = fp4(codes[b * 16 + i]) * scale;
  }
  const Panels panels(c.n, c.k, 16, 4, codes, 0, scales);
  float global = std::ldexp(1.7f, int(integer(-16, 2)));
  if (chance(0.1)) global = std::vector<float>{1e-39f, 1e-32f, 1e32f, 3e38f, 0.0f, INFINITY}[integer(0, 5)];
  std::vector<T> x;
  if (quantized) {
    if (!(global > 0.0f && global < 1e38f)) global = 0.5f;
    for (auto& v : packed) v = uint8_t(integer(0, 255));
    for (auto& v : x_scales)
      v = uint8_t(chance(0.001) ? integer(127, 255) : kind == 0 ? integer(80, 100) : integer(0, 126));
    for (int64_t i = 0; i < c.m * c.k; i++)
      c.x[i] = fp4(packed[i / 2] >> (i % 2 * 4) & 15) * double(generic::E4M3::value(x_scales[i / 16]) * global);
    c.prepare = [&](int64_t m, uint8_t* rows, int64_t i, int64_t count) {
      kernels::nvfp4::load(packed.data() + m * c.k / 2, x_scales.data() + m * blocks, c.k, global, rows, i, count);
    };
  } else {
    special_rows(c.m, c.k, x);
    for (int64_t b = 0; b < c.m * c.k; b += 16) {
      const float scale = Rule::template scale<generic::Fp4, T>(generic::amax_of(x.data() + b, 16), global);
      const float divisor = scale == 0.0f ? generic::EPS : scale;
      for (int64_t i = b; i < b + 16; i++)
        c.x[i] = double(generic::nearest<generic::Fp4>(float(x[i]) / divisor)) * scale;
    }
    c.prepare = [&](int64_t m, uint8_t* rows, int64_t i, int64_t count) {
      kernels::nvfp4::quantize<Rule>(x.data() + m * c.k, c.k, global, rows, i, count);
    };
  }
  c.rows_bytes = [&](int64_t count) { return kernels::nvfp4::rows_bytes(count, c.k); };
  c.scratch_bytes = kernels::nvfp4::scratch_bytes(c.k);
  c.tile = [&](const uint8_t* rows, int64_t count, int64_t g, int groups, uint8_t* scratch, float* out, int64_t ld) {
    with_groups(groups, [&](auto n) {
      const uint8_t* panel = panels.panel(g / 4);
      if (count <= 4 && chance(0.5))
        kernels::nvfp4::tile<n, 4>(rows, count, c.k, panel, g % 4, weight_global, scratch, out, ld);
      else kernels::nvfp4::tile<n>(rows, count, c.k, panel, g % 4, weight_global, scratch, out, ld);
    });
  };
  check(c);
}

template <typename T>
void check_nvfp4() {
  if (chance(0.5)) check_nvfp4_by<generic::Sequential, T>();
  else check_nvfp4_by<generic::Combined, T>();
}

// --- INT8

// Activations LOW..HIGH, weights in the panel with `offset` added to them.
template <int LOW, int HIGH, bool SYMMETRIC, typename T>
void check_int8_by() {
  Case c;
  const int kind = int(integer(0, 2));  // codes, given scale, dynamic
  c.name = std::string(LOW ? "int8 " : "uint8 ") + (kind == 0 ? "codes" : name_of<T>()) + (kind == 1 ? " static" : "");
  c.m = some_rows(), c.n = integer(1, 200), c.k = chance(0.03) ? 65535 : integer(1, chance(0.05) ? 20000 : 700);
  if (c.k > 700) c.m = std::min<int64_t>(c.m, 9), c.n = std::min<int64_t>(c.n, 20);
  const int offset = chance(0.5) ? 128 : 0;
  const bool zeros = chance(0.5), sums = chance(0.5), extreme = chance(0.1);
  const int64_t padded = quark::round_up(c.n, 64);
  std::vector<uint8_t> codes(c.n * c.k);
  std::vector<float> w_scales(padded, 1.0f);
  std::vector<int32_t> w_zeros(padded, 0), w_sums(padded, 0);
  c.w.resize(c.n * c.k);
  c.x.resize(c.m * c.k);
  for (int64_t n = 0; n < c.n; n++) {
    w_scales[n] = 0.01f * (1.0f + std::abs(normal()));
    if (zeros) w_zeros[n] = int32_t(extreme ? -offset : integer(-offset, 255 - offset));
    for (int64_t i = n * c.k; i < (n + 1) * c.k; i++) {
      codes[i] = uint8_t(extreme ? 255 : integer(0, 255));
      c.w[i] = double(w_scales[n]) * (codes[i] - offset - w_zeros[n]);
    }
  }
  const Panels panels(c.n, c.k, 0, 8, codes, uint8_t(offset), {});
  std::vector<T> x;
  std::vector<uint8_t> x_codes(c.m * c.k);
  std::vector<float> scales(c.m);
  std::vector<int32_t> zero_points(c.m);
  const generic::Grid given{chance(0.1) ? 3e-39f : 0.031f, SYMMETRIC ? 0.0f : float(integer(LOW, HIGH))};
  if (kind == 0) {
    for (int64_t i = 0; i < c.m; i++) {
      scales[i] = 0.02f * (1.0f + std::abs(normal()));
      zero_points[i] = SYMMETRIC ? 0 : int32_t(extreme ? LOW : integer(LOW, HIGH));
      for (int64_t j = i * c.k; j < (i + 1) * c.k; j++) {
        x_codes[j] = uint8_t(extreme ? HIGH : integer(LOW, HIGH));
        c.x[j] = double(scales[i]) * ((LOW ? int(int8_t(x_codes[j])) : int(x_codes[j])) - zero_points[i]);
      }
    }
    c.prepare = [&](int64_t m, uint8_t* rows, int64_t i, int64_t count) {
      using Code = std::conditional_t<LOW == 0, uint8_t, int8_t>;
      const Code* row = reinterpret_cast<const Code*>(x_codes.data()) + m * c.k;
      kernels::int8::load(row, c.k, scales[m], zero_points[m], rows, i, count);
    };
  } else {
    special_rows(c.m, c.k, x);
    for (int64_t i = 0; i < c.m; i++) {
      const T* row = x.data() + i * c.k;
      const generic::Grid grid = kind == 1 ? given : generic::integer_grid<LOW, HIGH, SYMMETRIC>(row, c.k);
      const float inverse = 1.0f / grid.scale;
      for (int64_t j = 0; j < c.k; j++) {
        const float code =
            generic::clamped(std::nearbyint(float(row[j]) * inverse) + grid.zero_point, float(LOW), float(HIGH));
        c.x[i * c.k + j] = (double(code) - grid.zero_point) * grid.scale;
      }
    }
    c.prepare = [&](int64_t m, uint8_t* rows, int64_t i, int64_t count) {
      const T* row = x.data() + m * c.k;
      const generic::Grid grid = kind == 1 ? given : kernels::integer_grid<LOW, HIGH, SYMMETRIC>(row, c.k);
      kernels::int8::quantize<LOW, HIGH>(row, c.k, grid, rows, i, count);
    };
  }
  c.rows_bytes = [&](int64_t count) { return kernels::int8::rows_bytes(count, c.k); };
  c.scratch_bytes = kernels::int8::scratch_bytes(c.k);
  c.tile = [&](const uint8_t* rows, int64_t count, int64_t g, int groups, uint8_t* scratch, float* out, int64_t ld) {
    with_groups(groups, [&](auto n) {
      const uint8_t* panel = panels.panel(g / 4);
      kernels::int8::channel_sums<n>(panel, g % 4, c.k, w_sums.data() + g * 16);
      const kernels::int8::Epilogue epilogue{
          offset, w_scales.data() + g * 16, zeros ? w_zeros.data() + g * 16 : nullptr,
          sums ? w_sums.data() + g * 16 : nullptr};
      if (count <= 4 && chance(0.5))
        kernels::int8::tile<n, 4>(rows, count, c.k, panel, g % 4, epilogue, scratch, out, ld);
      else kernels::int8::tile<n>(rows, count, c.k, panel, g % 4, epilogue, scratch, out, ld);
    });
  };
  check(c);
}

template <typename T>
void check_int8() {
  switch (integer(0, 2)) {
    case 0: return check_int8_by<-128, 127, true, T>();
    case 1: return check_int8_by<-128, 127, false, T>();
    default: return check_int8_by<0, 255, false, T>();
  }
}

// --- speed

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

// What dot products do at best, in GOP/s, now.
double peak() {
  constexpr int64_t steps = 20000;
  const double t = now();
  dots(steps);
  return 1e-9 * double(steps * 12 * DOT_OPS) / (now() - t);
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}
double least(const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); }

int64_t only = 0;  // M to measure

// `fill` writes one weight of `bytes`; gemm(weight, m) prepares m rows and multiplies.
void bench(const char* name, int64_t n, int64_t k, int64_t bytes, const std::function<void(uint8_t*)>& fill,
           const std::function<void(const uint8_t*, int64_t)>& gemm) {
  const int64_t copies = std::max<int64_t>(3, (192 << 20) / bytes);
  uint8_t* weights = huge_pages(copies * bytes);
  fill(weights);
  for (int64_t i = 1; i < copies; i++) std::memcpy(weights + i * bytes, weights, bytes);
  int64_t at = 0;
  auto next = [&] { return weights + at++ % copies * bytes; };
  printf("%s %ldx%ld:", name, long(n), long(k));
  for (int64_t m : {1, 2, 4, 5, 8, 16, 32, 128, 512}) {
    if (only && m != only) continue;
    const int repeats = m <= 4 ? 201 : m <= 32 ? 61 : m <= 128 ? 15 : 9;
    std::vector<double> read, run, peaks;
    for (int i = 0; i < repeats; i++) {
      double t = now();
      raw_read(next(), bytes);
      read.push_back(now() - t);
      t = now();
      gemm(next(), m);
      run.push_back(now() - t);
      if (m > 8) peaks.push_back(peak());
    }
    const double gops = 2e-9 * double(n) * double(k) * double(m);
    if (m <= 8) printf("  M=%ld %.0f%% (%.0f us; raw %.1f GB/s)", long(m), 100 * median(read) / median(run),
                       1e6 * median(run), 1e-9 * double(bytes) / median(read));
    else printf("  M=%ld %.0f GOP/s (best %.0f; %.0f%% of the peak)", long(m), gops / median(run), gops / least(run),
                100 * gops / median(run) / median(peaks));
    fflush(stdout);
  }
  printf("\n");
  free(weights);
}

template <typename T>
std::vector<T> ordinary(int64_t m, int64_t k, bool outliers) {
  std::vector<T> x(m * k);
  for (int64_t i = 0; i < m * k; i++) x[i] = T(normal() * (outliers && i % k % 511 == 3 ? 1000.0f : 1.0f));
  return x;
}

// What a template would do with a unit of 64 channels.
void store(const float* unit, int64_t count, int64_t channel, int64_t n, at::BFloat16* y) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < 64; c += 16) store16(unit + i * 64 + c, y + i * n + channel + c);
}

template <typename Prepare, typename Tile>
std::function<void(const uint8_t*, int64_t)> gemm_of(
    int64_t n, int64_t panel_bytes, const Bytes& rows, const Bytes& scratch, const Bytes& y, Prepare prepare,
    Tile tile) {
  return [=, &rows, &scratch, &y](const uint8_t* w, int64_t m) {
    alignas(64) static float unit[BLOCK_ROWS * 64];
    for (int64_t begin = 0; begin < m; begin += BLOCK_ROWS) {
      const int64_t count = std::min(BLOCK_ROWS, m - begin);
      for (int64_t i = 0; i < count; i++) prepare(begin + i, rows.p, i, count);
      for (int64_t p = 0; p < n / 64; p++) {
        tile(rows.p, count, w + p * panel_bytes, p, scratch.p, unit);
        store(unit, count, p * 64, n, reinterpret_cast<at::BFloat16*>(y.p) + begin * n);
      }
    }
  };
}

void bench_mxfp4(int64_t n, int64_t k, bool outliers) {
  const auto x = ordinary<at::BFloat16>(512, k, outliers);
  const int64_t panel = k / 32 * kernels::mxfp4::TILE;
  const Bytes rows(kernels::mxfp4::rows_bytes(BLOCK_ROWS, k)), scratch(kernels::mxfp4::scratch_bytes(k));
  const Bytes y(512 * n * 2);
  auto fill = [&](uint8_t* w) {
    for (int64_t i = 0; i < n / 64 * panel; i++)
      w[i] = uint8_t(i % kernels::mxfp4::TILE < 64 ? integer(118, 122) : integer(0, 255));
  };
  bench(
      outliers ? "mxfp4, outliers" : "mxfp4", n, k, n / 64 * panel, fill,
      gemm_of(
          n, panel, rows, scratch, y,
          [&](int64_t m, uint8_t* r, int64_t i, int64_t count) {
            kernels::mxfp4::quantize(x.data() + m * k, k, r, i, count);
          },
          [&](const uint8_t* r, int64_t count, const uint8_t* w, int64_t, uint8_t* s, float* out) {
            kernels::mxfp4::tile<4>(r, count, k, w, 0, s, out, 64);
          }));
}

void bench_nvfp4(int64_t n, int64_t k, bool outliers) {
  const auto x = ordinary<at::BFloat16>(512, k, outliers);
  const int64_t panel = k / 32 * kernels::nvfp4::TILE;
  const Bytes rows(kernels::nvfp4::rows_bytes(BLOCK_ROWS, k)), scratch(kernels::nvfp4::scratch_bytes(k));
  const Bytes y(512 * n * 2);
  auto fill = [&](uint8_t* w) {  // scales as of amax / 6 of 16 normal numbers
    for (int64_t i = 0; i < n / 64 * panel; i++)
      w[i] = uint8_t(i % kernels::nvfp4::TILE < 128 ? integer(96, 108) : integer(0, 255));
  };
  const float global = outliers ? 3000.0f / 2688.0f : 4.5f / 2688.0f;
  bench(
      outliers ? "nvfp4, outliers" : "nvfp4", n, k, n / 64 * panel, fill,
      gemm_of(
          n, panel, rows, scratch, y,
          [&](int64_t m, uint8_t* r, int64_t i, int64_t count) {
            kernels::nvfp4::quantize<generic::Sequential>(x.data() + m * k, k, global, r, i, count);
          },
          [&](const uint8_t* r, int64_t count, const uint8_t* w, int64_t, uint8_t* s, float* out) {
            kernels::nvfp4::tile<4>(r, count, k, w, 0, 0.01f, s, out, 64);
          }));
}

void bench_int8(int64_t n, int64_t k, bool symmetric) {
  const auto x = ordinary<at::BFloat16>(512, k, false);
  const int64_t panel = k * 64;
  const Bytes rows(kernels::int8::rows_bytes(BLOCK_ROWS, k)), scratch(kernels::int8::scratch_bytes(k)), y(512 * n * 2);
  const std::vector<float> scales(n, 0.01f);
  const std::vector<int32_t> sums(n, int32_t(k * 127));
  auto fill = [&](uint8_t* w) {
    for (int64_t i = 0; i < n / 64 * panel; i++) w[i] = uint8_t(integer(0, 255));
  };
  bench(
      symmetric ? "int8" : "uint8, zero points", n, k, n / 64 * panel, fill,
      gemm_of(
          n, panel, rows, scratch, y,
          [&](int64_t m, uint8_t* r, int64_t i, int64_t count) {
            const at::BFloat16* row = x.data() + m * k;
            if (symmetric)
              kernels::int8::quantize<-128, 127>(row, k, kernels::integer_grid<-128, 127, true>(row, k), r, i, count);
            else kernels::int8::quantize<0, 255>(row, k, kernels::integer_grid<0, 255, false>(row, k), r, i, count);
          },
          [&](const uint8_t* r, int64_t count, const uint8_t* w, int64_t p, uint8_t* s, float* out) {
            const kernels::int8::Epilogue epilogue{
                128, scales.data() + p * 64, nullptr, symmetric ? nullptr : sums.data() + p * 64};
            kernels::int8::tile<4>(r, count, k, w, 0, epilogue, s, out, 64);
          }));
}

}  // namespace

int main(int argc, char** argv) {
#if defined(HARNESS_AMX)
  quark::amx::permit();
#endif
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "bench") {
    only = argc > 2 ? std::atoi(argv[2]) : 0;
    const std::string which = argc > 3 ? argv[3] : "";
    auto wanted = [&](const char* name) { return which.empty() || which == name; };
    if (wanted("mxfp4")) bench_mxfp4(4096, 4096, false);
    if (wanted("mxfp4")) bench_mxfp4(4096, 4096, true);
    if (wanted("nvfp4")) bench_nvfp4(4096, 4096, false);
    if (wanted("nvfp4")) bench_nvfp4(4096, 4096, true);
    if (wanted("int8")) bench_int8(4096, 4096, true);
    if (wanted("int8")) bench_int8(4096, 4096, false);
    return 0;
  }
  const int rounds = mode.empty() ? 60 : std::atoi(argv[1]);
  auto every = [&](const char* name, auto f) {
    worst = 0.0;
    for (int i = 0; i < rounds; i++) {
      f(at::BFloat16());
      f(at::Half());
      f(float());
    }
    printf("%s: worst error %.2g of the sum of magnitudes\n", name, worst);
  };
#if !defined(HARNESS_AMX)  // which has INT8 of its own alone
  every("mxfp4", [](auto t) { check_mxfp4<decltype(t)>(); });
  every("nvfp4", [](auto t) { check_nvfp4<decltype(t)>(); });
#endif
  every("int8", [](auto t) { check_int8<decltype(t)>(); });
  printf("%ld compared, %ld wrong\n", long(compared), long(failures));
  return failures != 0;
}
