// Packed masks: entry i is bit i % 8 of byte i / 8, the lowest bit first.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

// Bytes of 0 or 1 as bits; the bits behind the last entry are 0.
FASTGUARD_INLINE void pack_bits(const uint8_t* entries, int64_t n, uint8_t* packed) {
  const auto byte = [](uint64_t eight) { return static_cast<uint8_t>((eight * 0x0102040810204080U) >> 56); };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight = 0;
    for (int64_t u = 0; u < 8; ++u) eight |= static_cast<uint64_t>(entries[i + u]) << (8 * u);
    packed[i / 8] = byte(eight);
  }
  if (i < n) {
    uint64_t rest = 0;
    for (int64_t u = 0; u < n - i; ++u) rest |= static_cast<uint64_t>(entries[i + u]) << (8 * u);
    packed[i / 8] = byte(rest);
  }
}
