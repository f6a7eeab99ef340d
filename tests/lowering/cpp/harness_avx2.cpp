// The kernels of lowering/cpp/avx2.h against float64, and (argument "bench") their speed.
//
//   g++ -std=c++17 -O3 -mavx2 -mfma -mf16c [-mavxvnni] -DQUARK_AVX2 -I<torch include> -Ilowering/cpp harness_avx2.cpp
//   ./a.out [rounds of random shapes]        ./a.out bench [M [mxfp4 | nvfp4 | int8]]
#include "common.h"
#include "generic.h"
#include "panels.h"
#include "avx2.h"
#include "avx2_fp4.h"
#include "avx2_int8.h"

#include <algorithm>

namespace {

namespace kernels = quark::avx2;
constexpr int MOST_SCALE = 190;     // E8M0 bytes of weights: the largest in a panel
constexpr int64_t DOT_OPS = 2 * 32;  // of an instruction, and what adds up its results

__attribute__((noinline)) void dots(int64_t steps) {
  __m256i sum[12], u = _mm256_set1_epi8(1), s = u;
  for (auto& v : sum) {
    v = _mm256_setzero_si256();
    asm volatile("" : "+x"(v));
  }
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) sum[j] = quark::avx2::fp4::add_products(sum[j], u, s);
    asm volatile("" : "+x"(u));
  }
  for (auto& v : sum) asm volatile("" ::"x"(v));
}

__attribute__((noinline)) void raw_read(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 128)
    asm volatile(
        "vmovups (%0), %%ymm0\n vmovups 32(%0), %%ymm1\n vmovups 64(%0), %%ymm2\n vmovups 96(%0), %%ymm3\n"
        "prefetcht0 4096(%0)\n prefetcht0 4160(%0)\n" ::"r"(p + i)
        : "xmm0", "xmm1", "xmm2", "xmm3");
}

// 16 numbers as a template would store them.
void store16(const float* from, at::BFloat16* to) {
  for (int i = 0; i < 16; i++) to[i] = at::BFloat16(from[i]);
}

}  // namespace

#include "harness_integers.h"
