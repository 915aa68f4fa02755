// Packed masks on CPU: pack, unpack, count, and set the entries whose bit is set.
//
// Entries are numbers of 1, 2, 4 or 8 bytes of which nothing is known but that 0 has no bit set. Tasks begin at
// multiples of 64 entries, so that each has mask bytes of its own.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/bits.h"
#include "cpu/simd.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t SPAN = 1 << 16;  // entries of a task

template <typename F>
void spans(int64_t n, const F& f) {
  torch::stable::parallel_for(0, (n + SPAN - 1) / SPAN, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) f(s * SPAN, std::min(SPAN, n - s * SPAN));
  });
}

uint64_t word(const uint8_t* packed, int64_t bytes) {
  uint64_t out = 0;
  if (bytes >= 8) {
    std::memcpy(&out, packed, 8);
    if constexpr (std::endian::native == std::endian::little) return out;
  }
  out = 0;
  for (int64_t i = 0; i < std::min<int64_t>(bytes, 8); ++i) out |= static_cast<uint64_t>(packed[i]) << (8 * i);
  return out;
}

FASTGUARD_MULTIVERSION void pack_(const uint8_t* entries, int64_t n, uint8_t* packed) {
  pack_bits(entries, n, packed);
}

FASTGUARD_MULTIVERSION void unpack_(const uint8_t* packed, int64_t n, uint8_t* entries) {
  for (int64_t i = 0; i < n / 8; ++i) {
    for (int64_t u = 0; u < 8; ++u) entries[8 * i + u] = (packed[i] >> u) & 1;
  }
  for (int64_t i = n / 8 * 8; i < n; ++i) entries[i] = (packed[i / 8] >> (i % 8)) & 1;
}

FASTGUARD_MULTIVERSION int64_t count_(const uint8_t* packed, int64_t bytes) {
  int64_t total = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, packed + i, 8);
    total += __builtin_popcountll(eight);
  }
  for (; i < bytes; ++i) total += __builtin_popcount(packed[i]);
  return total;
}

// A word of the mask at a time: those without a bit are passed over, those of bits alone copied, the others walked.
template <typename T>
void apply_span(T* to, const uint8_t* packed, const T* value, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t bits = word(packed + i / 8, (n - i + 7) / 8);
    if (n - i < 64) bits &= (uint64_t{1} << (n - i)) - 1;
    if (bits == ~uint64_t{0}) {
      if (value == nullptr) {
        std::memset(to + i, 0, 64 * sizeof(T));
      } else {
        std::memcpy(to + i, value + i, 64 * sizeof(T));
      }
      continue;
    }
    for (; bits != 0; bits &= bits - 1) {
      const int64_t at = i + std::countr_zero(bits);
      to[at] = value == nullptr ? T(0) : value[at];
    }
  }
}

void pack(const Tensor& mask, const Tensor& packed) {
  const auto* from = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  spans(mask.numel(), [&](int64_t first, int64_t n) { pack_(from + first, n, to + first / 8); });
}

void unpack(const Tensor& packed, const Tensor& mask) {
  const auto* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  spans(mask.numel(), [&](int64_t first, int64_t n) { unpack_(from + first / 8, n, to + first); });
}

int64_t count(const Tensor& packed) {
  const auto* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  std::vector<int64_t> partial((packed.numel() + SPAN - 1) / SPAN);
  spans(packed.numel(), [&](int64_t first, int64_t n) { partial[first / SPAN] = count_(from + first, n); });
  return std::accumulate(partial.begin(), partial.end(), int64_t{0});
}

void apply(const Tensor& entries, const Tensor& packed, const std::optional<Tensor>& value) {
  const auto* bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto with = [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(entries.mutable_data_ptr());
    const T* from = value.has_value() ? static_cast<const T*>(value->const_data_ptr()) : nullptr;
    spans(entries.numel(), [&](int64_t first, int64_t n) {
      apply_span(to + first, bits + first / 8, from == nullptr ? nullptr : from + first, n);
    });
  };
  switch (entries.element_size()) {
    case 1: with(uint8_t()); break;
    case 2: with(uint16_t()); break;
    case 4: with(uint32_t()); break;
    default: with(uint64_t()); break;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def("masks_pack(Tensor mask, Tensor(a!) packed) -> ()");
  m.def("masks_unpack(Tensor packed, Tensor(a!) mask) -> ()");
  m.def("masks_count(Tensor packed) -> int");
  m.def("masks_apply(Tensor(a!) entries, Tensor packed, Tensor? value) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("masks_pack", TORCH_BOX(&pack));
  m.impl("masks_unpack", TORCH_BOX(&unpack));
  m.impl("masks_count", TORCH_BOX(&count));
  m.impl("masks_apply", TORCH_BOX(&apply));
}
