// Random numbers for the harnesses: the same in every run.
#include <cstdint>
#include <random>

namespace {

std::mt19937 engine(1);
int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
float normal() { return std::normal_distribution<float>()(engine); }
bool chance(double p) { return std::uniform_real_distribution<double>()(engine) < p; }

}  // namespace
