// bf16 by its bits, so that loops over it vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

using bf16 = uint16_t;  // its bits

// NaN becomes the quiet NaN, as in torch.
FASTGUARD_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  return static_cast<bf16>((bits & 0x7FFFFFFFU) > 0x7F800000U ? 0x7FC0U : rounded);
}

FASTGUARD_INLINE float of_bf16(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
