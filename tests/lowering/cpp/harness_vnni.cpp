// The kernels of lowering/cpp/vnni.h against float64, and (argument "bench") their speed.
//
//   g++ -std=c++17 -O3 -march=native -DQUARK_AVX512 -I<torch include> -Ilowering/cpp harness_vnni.cpp
//   ./a.out [rounds of random shapes]        ./a.out bench [M [mxfp4 | nvfp4 | int8]]
#include "common.h"
#include "generic.h"
#include "panels.h"
#if defined(HARNESS_AMX)
#include "amx.h"
#endif
#include "vnni.h"
#include "vnni_int8.h"
#include "vnni_mxfp4.h"
#include "vnni_nvfp4.h"

#include <algorithm>

namespace {

namespace kernels = quark::vnni;
constexpr int MOST_SCALE = 254;     // E8M0 bytes of weights
constexpr int64_t DOT_OPS = 2 * 64;  // of an instruction

__attribute__((noinline)) void dots(int64_t steps) {
  __m512i sum[12], u = _mm512_set1_epi8(1), s = u;
  for (auto& v : sum) v = quark::panels::zero_register<__m512i>();
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) sum[j] = _mm512_dpbusd_epi32(sum[j], u, s);
    asm volatile("" : "+v"(u));
  }
  for (auto& v : sum) asm volatile("" ::"v"(v));
}

__attribute__((noinline)) void raw_read(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 256)
    asm volatile(
        "vmovups (%0), %%zmm16\n vmovups 64(%0), %%zmm17\n vmovups 128(%0), %%zmm18\n vmovups 192(%0), %%zmm19\n"
        "prefetcht0 4096(%0)\n prefetcht0 4160(%0)\n prefetcht0 4224(%0)\n prefetcht0 4288(%0)\n" ::"r"(p + i)
        : "xmm16", "xmm17", "xmm18", "xmm19");
}

// 16 numbers as a template would store them.
void store16(const float* from, at::BFloat16* to) {
  const __m512 v = quark::rounded_to<at::BFloat16>(_mm512_loadu_ps(from));
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}

}  // namespace

#include "harness_integers.h"
