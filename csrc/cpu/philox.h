// Gaussian noise from Philox4x32-10 counters; the layout is stated in src/fastguard/ops/philox.py.
//
// Everything is branch-free and inlined, so that a loop over the sixteen lanes of a block becomes vector code. The
// polynomials are minimax fits in the ranges they are used in (relative error below 1e-8 before rounding).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace fastguard {

constexpr int64_t NOISE_LANES = 16, NOISE_BLOCK = 64;

struct NoiseKey {
  uint32_t k0, k1;          // the seed
  uint32_t layer, call;     // counter words 2 and 3
};

FASTGUARD_INLINE uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

FASTGUARD_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  // Low halves as 32-bit products of their own: compilers then take the high ones by even and odd lanes.
  const uint32_t high0 = high_product(c0, 0xD2511F53U), low0 = c0 * 0xD2511F53U;
  const uint32_t high1 = high_product(c2, 0xCD9E8D57U), low1 = c2 * 0xCD9E8D57U;
  c0 = high1 ^ c1 ^ k0;
  c1 = low1;
  c2 = high0 ^ c3 ^ k1;
  c3 = low0;
}

FASTGUARD_INLINE void philox4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (uint32_t r = 0; r < 10; ++r) philox_round(c0, c1, c2, c3, k0 + r * 0x9E3779B9U, k1 + r * 0xBB67AE85U);
}

// log of a normal positive float: 2^e m with m in [sqrt(1/2), sqrt(2)), exact m - 1.
FASTGUARD_INLINE float positive_log(float u) {
  int32_t bits;
  std::memcpy(&bits, &u, sizeof bits);
  const int32_t above = bits - 0x3F3504F3;
  const int32_t mantissa = (above & 0x007FFFFF) + 0x3F3504F3;
  const float e = static_cast<float>(above >> 23);
  float m;
  std::memcpy(&m, &mantissa, sizeof m);
  const float f = m - 1.0F;
  float p = -0.0785954595F;
  p = p * f + 0.128816217F;
  p = p * f - 0.131287679F;
  p = p * f + 0.141811967F;
  p = p * f - 0.166245535F;
  p = p * f + 0.200022861F;
  p = p * f - 0.250008106F;
  p = p * f + 0.333333164F;
  const float square = f * f;
  // ln 2 in two parts: the first times any exponent is exact.
  return e * 0.693145751953125F + (f - (0.5F * square - (p * f * square + e * 1.428606765330187e-06F)));
}

// Two independent normals from two words.
FASTGUARD_INLINE void box_muller(uint32_t p, uint32_t q, float& first, float& second) {
  const float u = (static_cast<float>(static_cast<int32_t>(p >> 9)) + 0.5F) * 0x1p-23F;
  const float radius = std::sqrt(-2.0F * positive_log(u));
  // The nearest quarter turn is taken off in integers, so that the rest of the angle is exact.
  const int32_t turn = static_cast<int32_t>(q >> 8), quarter = (turn + (1 << 21)) >> 22;
  const float a = static_cast<float>(turn - (quarter << 22)) * 3.7450705e-07F;  // 2 pi 2^-24
  const float y = a * a;
  const float s = a + a * y * (-0.166666552F + y * (0.008332178F + y * -0.000195172659F));
  const float c = 1.0F - (0.5F * y - y * y * (0.0416666456F + y * (-0.00138873677F + y * 2.44384137e-05F)));
  const float cosine = (quarter & 1) != 0 ? s : c, sine = (quarter & 1) != 0 ? c : s;
  first = radius * (((quarter + 1) & 2) != 0 ? -cosine : cosine);
  second = radius * ((quarter & 2) != 0 ? -sine : sine);
}

FASTGUARD_INLINE void box_muller(uint32_t p, uint32_t q, double& first, double& second) {
  const double radius = std::sqrt(-2.0 * std::log((static_cast<double>(p >> 9) + 0.5) * 0x1p-23));
  const double a = static_cast<double>(q >> 8) * (6.283185307179586476925 * 0x1p-24);
  first = radius * std::cos(a);
  second = radius * std::sin(a);
}

// Noise of `blocks` blocks of 64 features of one sample, from block `first` on.
template <typename T>
FASTGUARD_INLINE void noise_blocks(T* z, uint32_t first, int64_t blocks, uint32_t sample, const NoiseKey& key) {
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t group = (first + static_cast<uint32_t>(b)) * static_cast<uint32_t>(NOISE_LANES);
    T* out = z + b * NOISE_BLOCK;
    T n0[NOISE_LANES], n1[NOISE_LANES], n2[NOISE_LANES], n3[NOISE_LANES];
    for (uint32_t j = 0; j < NOISE_LANES; ++j) {
      uint32_t c0 = group + j, c1 = sample, c2 = key.layer, c3 = key.call;
      philox4x32(c0, c1, c2, c3, key.k0, key.k1);
      box_muller(c0, c1, n0[j], n1[j]);
      box_muller(c2, c3, n2[j], n3[j]);
    }
    std::memcpy(out, n0, sizeof n0);
    std::memcpy(out + NOISE_LANES, n1, sizeof n1);
    std::memcpy(out + 2 * NOISE_LANES, n2, sizeof n2);
    std::memcpy(out + 3 * NOISE_LANES, n3, sizeof n3);
  }
}

}  // namespace fastguard
