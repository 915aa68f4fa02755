// One binary for every CPU: hot loops are compiled once per instruction set and chosen when the library loads.
#pragma once

#include <cstdint>
#include <cstring>

#define FASTGUARD_INLINE inline __attribute__((always_inline))

// On x86-64 under GCC a function so marked is cloned for AVX-512, AVX2 and the baseline, and the loader picks one.
// FASTGUARD_AVX2 leaves AVX-512 out. It must be a plain function (no template, no lambda); what it calls must be
// FASTGUARD_INLINE to be cloned with it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FASTGUARD_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FASTGUARD_AVX2 __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FASTGUARD_MULTIVERSION
#define FASTGUARD_AVX2
#endif

// exp for floats in branch-free arithmetic that vectorises; within 2 ulp of the true value where that is a normal
// number, 0 below ln(2^-126) and at -inf, +inf above ln(2^128), NaN for NaN alone.
FASTGUARD_INLINE float fg_expf(float x) {
  const float clamped = x < -87.33654F ? -87.33654F : (x > 88.72284F ? 88.72284F : x);
  // n = round(x / ln 2) by the magic constant 1.5 * 2^23, whose low bits then hold n.
  const float shifted = clamped * 1.44269504F + 12582912.0F;
  const float n = shifted - 12582912.0F;
  const float r = (clamped - n * 0.693145751953125F) - n * 1.428606765330187e-06F;  // ln 2 in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  // 2^n in two factors: 2^128 itself is not a float.
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t half = (bits - 0x4B400000) >> 1, other = (bits - 0x4B400000) - half;
  const int32_t first = (half + 127) << 23, second = (other + 127) << 23;
  float a, b;
  std::memcpy(&a, &first, sizeof a);
  std::memcpy(&b, &second, sizeof b);
  const float y = p * a * b;
  return x < -87.33654F ? 0.0F : y;
}
