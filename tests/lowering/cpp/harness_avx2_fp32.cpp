// The kernels of lowering/cpp/avx2_fp32.h against those of portable.h and float64, and (argument "bench") their speed.
//
//   g++ -std=c++17 -O3 -mavx2 -mfma -mf16c -DQUARK_AVX2 -I<torch include> -Ilowering/cpp harness_avx2_fp32.cpp
#include "common.h"
#include "generic.h"
#include "panels.h"
#include "avx2.h"
#include "portable.h"
#include "avx2_fp32.h"
#include "harness_random.h"

#include <sys/mman.h>
#include <time.h>
#include <cstdio>
#include <string>
#include <vector>

namespace {

namespace fp32 = quark::avx2::fp32;
namespace portable = quark::portable;
namespace generic = quark::generic;

// Aligned; the end is that of what was asked for.
struct Bytes {
  uint8_t* p;
  explicit Bytes(int64_t n) : p(static_cast<uint8_t*>(aligned_alloc(64, quark::round_up(n, 64)))) {}
  Bytes(const Bytes&) = delete;
  ~Bytes() { free(p); }
};

int64_t failures = 0, compared = 0;
double worst = 0.0;

void compare(const char* name, float y, double exact, double allowed) {
  compared++;
  const bool right = std::isnan(exact) ? std::isnan(y) : y == exact || std::abs(y - exact) <= allowed;
  if (!right && failures++ < 20) printf("%s: %g, not %g\n", name, y, exact);
}

// Panels of random bytes, by rows of one number each, whose products are weights, and by rows of random ones.
template <typename Code, typename T, typename Scales>
void check(const char* name, int64_t k, int64_t step, float second, const Scales& scales, int least, int most) {
  constexpr int64_t TILE = Scales::BYTES + 256 * Code::BITS;
  const int64_t steps = quark::round_up(k, 32) / 32, stride = generic::padded(k), count = integer(1, 40);
  const Bytes panel(steps * TILE), scratch(fp32::scratch_bytes()), decoded(quark::round_up(k, 8) * 256);
  for (int64_t i = 0; i < steps * TILE; i++)
    panel.p[i] = uint8_t(i % TILE < Scales::BYTES ? integer(least, most) : integer(0, 255));
  portable::decode<4, Code, T>(panel.p, 0, 0, k, step, second, scales, reinterpret_cast<float*>(decoded.p));
  const float* w = reinterpret_cast<const float*>(decoded.p);
  const Bytes rows(count * stride * 4);
  float* x = reinterpret_cast<float*>(rows.p);
  std::memset(rows.p, 0, count * stride * 4);
  const bool one = chance(0.5);
  // What is not finite spoils a whole channel's products with numbers; with a single one it is to be seen itself.
  std::vector<int64_t> places(count);
  for (int64_t i = 0; i < count; i++)
    if (one) x[i * stride + (places[i] = integer(0, k - 1))] = 1.0f;
    else for (int64_t j = 0; j < k; j++) x[i * stride + j] = normal();
  auto compare_all = [&](const std::vector<float>& out, int first, int64_t channels) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < channels; c++) {
        double exact = 0.0, all = 0.0;
        for (int64_t j = 0; j < k; j++) {
          const double product = double(x[i * stride + j]) * double(w[j * 64 + first * 16 + c]);
          exact += product;
          all += std::abs(product);
        }
        const float y = out[i * 64 + c];
        compare(name, y, exact, one ? 0.0 : double(k) * 0x1p-24 * all);
        if (all > 0.0 && std::isfinite(exact)) worst = std::max(worst, std::abs(y - exact) / all);
      }
  };
  auto tile = [&](auto groups, int first) {
    std::vector<float> out(count * 64, 7.0f);
    auto run = [&](auto most) {
      fp32::tile<groups, most, Code, T>(
          rows.p, count, k, panel.p, first, step, second, scales, scratch.p, out.data(), 64);
    };
    if constexpr (groups == 4)
      if (count <= 4) return run(std::integral_constant<int, 4>()), compare_all(out, first, 64);
    run(std::integral_constant<int, 384>());
    compare_all(out, first, 16 * groups);
  };
  tile(std::integral_constant<int, 4>(), 0);
  tile(std::integral_constant<int, 2>(), 2);
  tile(std::integral_constant<int, 1>(), int(integer(0, 3)));
}

int64_t some_k(int64_t multiple) { return integer(1, chance(0.2) ? 600 / multiple : 200 / multiple) * multiple; }

template <typename Code, typename S, int SIZE, typename T>
void check_in_tile(const char* name, int most = 254) {
  const float global = std::is_same_v<S, generic::E4M3> ? 0.0021f : 1.0f;
  const bool ordinary = chance(0.7);
  check<Code, T>(name, some_k(SIZE), SIZE, 1.0f, portable::InTile<S, SIZE>{global}, ordinary ? 100 : 0,
                 ordinary ? 120 : most);
}

template <typename Code, typename T>
void check_beside(const char* name) {
  const int64_t k = some_k(8), step = chance(0.5) ? k : 8 * integer(1, 8);
  std::vector<float> scales(64 * (k / step + 1)), zeros(scales.size());
  for (auto& s : scales) s = normal() * 0.01f;
  for (auto& z : zeros) z = float(integer(-8, 15));
  auto fill = [&](int64_t at, float* scale, float* zero) {
    for (int64_t c = 0; c < 64; c++) scale[c] = scales[at / step * 64 + c], zero[c] = zeros[at / step * 64 + c];
  };
  check<Code, T>(name, k, step, chance(0.5) ? 1.0f : 0.37f, portable::Beside{fill}, 0, 0);
}

// --- speed

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

template <typename Code, typename Scales, typename Prepare>
void bench(const char* name, const Scales& scales, int64_t step, Prepare prepare, bool slowly) {
  constexpr int64_t n = 4096, k = 4096, TILE = Scales::BYTES + 256 * Code::BITS, panel = k / 32 * TILE;
  const int64_t bytes = n / 64 * panel, copies = 192 * (1 << 20) / bytes;
  uint8_t* weights = static_cast<uint8_t*>(aligned_alloc(2 << 20, quark::round_up(copies * bytes, 2 << 20)));
  madvise(weights, copies * bytes, MADV_HUGEPAGE);
  for (int64_t i = 0; i < bytes; i++)
    weights[i] = uint8_t(i % TILE < Scales::BYTES ? integer(110, 124) : engine() & 0xf7);
  for (int64_t i = 1; i < copies; i++) std::memcpy(weights + i * bytes, weights, bytes);
  std::vector<at::BFloat16> x(128 * k), y(128 * n);
  for (auto& v : x) v = at::BFloat16(normal());
  const Bytes rows(128 * k * 4), scratch(portable::scratch_bytes());
  std::vector<float> out(128 * 64);
  printf("%-24s", name);
  int64_t at = 0;
  for (int64_t m : {1, 4, 16, 128}) {
    std::vector<double> times, preparing;
    for (int i = 0; i < (slowly || m > 16 ? 3 : 15); i++) {
      const uint8_t* w = weights + at++ % copies * bytes;
      double t = now();
      for (int64_t r = 0; r < m; r++) prepare(x.data() + r * k, k, rows.p + r * k * 4);
      preparing.push_back(now() - t);
      for (int64_t p = 0; p < n / 64; p++) {
        if (slowly)
          portable::tile<4, Code, at::BFloat16>(
              rows.p, m, k, w + p * panel, 0, step, 1.0f, scales, scratch.p, out.data(), 64);
        else
          fp32::tile<4, 384, Code, float>(
              rows.p, m, k, w + p * panel, 0, step, 1.0f, scales, scratch.p, out.data(), 64);
        for (int64_t r = 0; r < m; r++)
          for (int64_t c = 0; c < 64; c++) y[r * n + p * 64 + c] = at::BFloat16(out[r * 64 + c]);
      }
      times.push_back(now() - t);
    }
    std::sort(times.begin(), times.end());
    std::sort(preparing.begin(), preparing.end());
    const double median = times[times.size() / 2];
    if (m <= 4) printf("  M=%ld %.2f ms (%.1f GB/s)", long(m), 1e3 * median, 1e-9 * double(bytes) / median);
    else printf("  M=%ld %.2f ms (%.0f GFLOP/s)", long(m), 1e3 * median, 2e-9 * double(m * n * k) / median);
    if (m == 1) printf(" of which rows %.3f", 1e3 * preparing[preparing.size() / 2]);
    fflush(stdout);
  }
  printf("\n");
  free(weights);
}

void bench_all(bool slowly) {
  using T = at::BFloat16;
  using generic::E8M0, generic::E4M3, generic::E5M3;
  auto copied = [](const T* x, int64_t k, uint8_t* row) { generic::copy_row(x, k, row); };
  auto given = [](const T* x, int64_t k, uint8_t* row) { generic::quantize_fp8<generic::Fp8E4M3>(x, k, 0.01f, row); };
  auto mx8 = [](const T* x, int64_t k, uint8_t* row) {
    generic::quantize_blocks<generic::Fp8E4M3, 32, generic::Rceil>(x, k, 1.0f, 0.0f, row);
  };
  auto mx6 = [](const T* x, int64_t k, uint8_t* row) {
    generic::quantize_blocks<generic::Fp6E2M3, 32, generic::Even>(x, k, 1.0f, 0.0f, row);
  };
  const portable::Beside channels{[](int64_t, float* scale, float*) { std::fill(scale, scale + 64, 0.01f); }};
  bench<portable::Fp8E4M3>("fp8 x fp8 given", channels, 4096, given, slowly);
  bench<portable::Fp4>("mxfp4 x fp8 given", portable::InTile<E8M0, 32>{1.0f}, 32, given, slowly);
  bench<portable::Fp8E4M3>("mxfp8 x mxfp8", portable::InTile<E8M0, 32>{1.0f}, 32, mx8, slowly);
  bench<portable::Fp6E2M3>("mxfp6 x mxfp6", portable::InTile<E8M0, 32>{1.0f}, 32, mx6, slowly);
  bench<portable::Fp4>("mxfp4 weight only", portable::InTile<E8M0, 32>{1.0f}, 32, copied, slowly);
  bench<portable::Fp4>("nvfp4 weight only", portable::InTile<E4M3, 16>{1.0f}, 16, copied, slowly);
  bench<portable::Int4>("int4 128 weight only", channels, 128, copied, slowly);
  bench<portable::Int8>("int8 weight only", channels, 4096, copied, slowly);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "bench") return bench_all(argc > 2), 0;
  const int rounds = mode.empty() ? 15 : std::atoi(argv[1]);
  using generic::E4M3, generic::E5M3, generic::E8M0;
  auto rounded = [&](auto t) {
    using T = decltype(t);
    check_beside<portable::Fp8E4M3, T>("fp8 e4m3");
    check_beside<portable::Int4, T>("int4");
    check_in_tile<portable::Fp4, E4M3, 16, T>("nvfp4");
  };
  for (int i = 0; i < rounds; i++) {
    rounded(float());
    rounded(at::BFloat16());
    rounded(at::Half());
    check_beside<portable::Fp8E5M2, float>("fp8 e5m2");
    check_beside<portable::Int8, float>("int8");
    check_beside<portable::UInt8, float>("uint8");
    check_beside<portable::UInt4, float>("uint4");
    check_in_tile<portable::Fp4, E8M0, 32, float>("mxfp4", 190);
    check_in_tile<portable::Fp6E2M3, E8M0, 32, float>("mxfp6 e2m3", 190);
    check_in_tile<portable::Fp6E3M2, E8M0, 32, float>("mxfp6 e3m2", 190);
    check_in_tile<portable::Fp8E4M3, E8M0, 32, float>("mxfp8 e4m3", 190);
    check_in_tile<portable::Fp8E5M2, E8M0, 32, float>("mxfp8 e5m2", 190);
    check_in_tile<portable::Fp4, E5M3, 16, float>("amdfp4 g16");
    check_in_tile<portable::Fp4, E5M3, 32, float>("amdfp4 g32", 255);
  }
  printf("worst error %.2g of the sum of magnitudes\n%ld compared, %ld wrong\n", worst, long(compared), long(failures));
  return failures != 0;
}
