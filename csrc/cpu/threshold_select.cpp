// threshold_select on CPU: histograms of digits, ties by spans, the k-th largest of each row, masks.
//
// A float is a sign and a magnitude; its key is that number in two's complement (ops/threshold_select/keys.py). Numbers
// become keys a block at a time, in a buffer that stays in cache, and every pass works on keys alone. Tensors are cut
// into spans of equal length, a task each. All results are integers: nothing depends on the threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/bf16.h"
#include "cpu/bits.h"
#include "cpu/simd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t SPAN = 1 << 16;   // entries of a task, and those whose ties are counted together (portable.py)
constexpr int64_t BLOCK = 2048;     // keys that are held at a time
constexpr int64_t GROUP = 32;       // keys that are looked over at a time for one with the prefix
constexpr int64_t FLUSH = 1 << 14;  // spans after which counts of 32 bits are emptied
constexpr int64_t TABLES = 4;       // equal keys in a row would wait for each other's count in one table

struct Operand {
  const char* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  Operand() = default;
  explicit Operand(const Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())), dtype(t.scalar_type()) {}
};

struct Item {
  Operand score, weight;  // no data where there are no weights
  int64_t size, span;     // entries; the number of the first span
};

// Keys.

FASTGUARD_INLINE int64_t key(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int64_t magnitude = bits & std::numeric_limits<int64_t>::max();
  return bits < 0 ? -magnitude : magnitude;
}
FASTGUARD_INLINE int32_t key(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t magnitude = bits & std::numeric_limits<int32_t>::max();
  return bits < 0 ? -magnitude : magnitude;
}
FASTGUARD_INLINE int16_t key(uint16_t bits) {
  const auto magnitude = static_cast<int16_t>(bits & 0x7FFF);
  return static_cast<int16_t>((bits & 0x8000) != 0 ? -magnitude : magnitude);
}

FASTGUARD_INLINE float value(float x) { return x; }
FASTGUARD_INLINE float value(bf16 x) { return of_bf16(x); }
FASTGUARD_INLINE float size(float x) { return __builtin_fabsf(x); }
FASTGUARD_INLINE float size(bf16 x) { return of_bf16(x & 0x7FFF); }

template <typename S>
FASTGUARD_INLINE void plain(const S* x, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = key(value(x[i]));
}
template <typename S, typename W>
FASTGUARD_INLINE void times(const S* x, const W* w, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = key(size(w[i]) * value(x[i]));
}
FASTGUARD_MULTIVERSION void keys_(const float* x, int64_t n, int32_t* out) { plain(x, n, out); }
FASTGUARD_MULTIVERSION void keys_(const bf16* x, int64_t n, int32_t* out) { plain(x, n, out); }
FASTGUARD_MULTIVERSION void keys_(const double* x, int64_t n, int64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = key(x[i]);
}
FASTGUARD_MULTIVERSION void keys_(const uint16_t* x, int64_t n, int16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = key(x[i]);
}
FASTGUARD_MULTIVERSION void keys_(const float* x, const float* w, int64_t n, int32_t* out) { times(x, w, n, out); }
FASTGUARD_MULTIVERSION void keys_(const float* x, const bf16* w, int64_t n, int32_t* out) { times(x, w, n, out); }
FASTGUARD_MULTIVERSION void keys_(const bf16* x, const float* w, int64_t n, int32_t* out) { times(x, w, n, out); }
FASTGUARD_MULTIVERSION void keys_(const bf16* x, const bf16* w, int64_t n, int32_t* out) { times(x, w, n, out); }

template <typename S>
const S* at(const Operand& o, int64_t first) {
  return reinterpret_cast<const S*>(o.data) + first;
}

// Elements as floats or doubles, where they lie or in the buffer.
template <typename T>
const T* read(const Operand& o, int64_t first, int64_t n, T* buffer) {
  const auto convert = [&](const auto* x) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(x[i]);
    return buffer;
  };
  switch (o.dtype) {
    case ScalarType::Double:
      if constexpr (std::is_same_v<T, double>) return at<double>(o, first);
      return convert(at<double>(o, first));
    case ScalarType::Float:
      if constexpr (std::is_same_v<T, float>) return at<float>(o, first);
      return convert(at<float>(o, first));
    case ScalarType::Half: return convert(at<c10::Half>(o, first));
    default: return convert(at<c10::BFloat16>(o, first));
  }
}

// Keys of entries from `first` on, at most BLOCK of them.
void keys_of(const Item& item, int64_t first, int64_t n, int16_t* out) { keys_(at<uint16_t>(item.score, first), n, out); }

void keys_of(const Item& item, int64_t first, int64_t n, int32_t* out) {
  const auto &s = item.score, &w = item.weight;
  const bool weighted = w.data != nullptr;
  if (s.dtype == ScalarType::BFloat16 && !weighted) return keys_(at<bf16>(s, first), n, out);
  float of_score[BLOCK], of_weight[BLOCK];
  if (weighted && w.dtype == ScalarType::BFloat16) {
    if (s.dtype == ScalarType::BFloat16) return keys_(at<bf16>(s, first), at<bf16>(w, first), n, out);
    return keys_(read(s, first, n, of_score), at<bf16>(w, first), n, out);
  }
  if (weighted && s.dtype == ScalarType::BFloat16) {
    return keys_(at<bf16>(s, first), read(w, first, n, of_weight), n, out);
  }
  const float* x = read(s, first, n, of_score);
  weighted ? keys_(x, read(w, first, n, of_weight), n, out) : keys_(x, n, out);
}

void keys_of(const Item& item, int64_t first, int64_t n, int64_t* out) {
  const auto &s = item.score, &w = item.weight;
  double of_score[BLOCK], of_weight[BLOCK];
  const double* x = read(s, first, n, of_score);
  if (w.data != nullptr) {
    const double* y = read(w, first, n, of_weight);
    for (int64_t i = 0; i < n; ++i) of_score[i] = __builtin_fabs(y[i]) * x[i];
    if (s.dtype != ScalarType::Double && w.dtype != ScalarType::Double) {  // a product in fp32
      for (int64_t i = 0; i < n; ++i) of_score[i] = static_cast<float>(of_score[i]);
    }
    x = of_score;
  }
  keys_(x, n, out);
}

// The largest magnitude that is a number, of numbers with this key's width.
template <typename K>
K infinity(ScalarType dtype) {
  if constexpr (std::is_same_v<K, int16_t>) return dtype == ScalarType::Half ? 0x7C00 : 0x7F80;
  if constexpr (std::is_same_v<K, int32_t>) return 0x7F800000;
  return static_cast<K>(0x7FF0000000000000);
}

// What is done with a block of keys, cloned per instruction set.

template <typename K>
FASTGUARD_INLINE bool beyond(const K* keys, int64_t n, K most) {  // a NaN among them
  K high = 0, low = 0;
  for (int64_t i = 0; i < n; ++i) {
    high = keys[i] > high ? keys[i] : high;
    low = keys[i] < low ? keys[i] : low;
  }
  return high > most || low < -most;
}

template <typename K>
FASTGUARD_INLINE int64_t equals(const K* keys, int64_t n, K to) {
  using U = std::make_unsigned_t<K>;
  static_assert(BLOCK < std::numeric_limits<int16_t>::max());
  U count = 0;
  for (int64_t i = 0; i < n; ++i) count = static_cast<U>(count + (keys[i] == to ? 1 : 0));
  return static_cast<int64_t>(count);
}

template <typename K>
FASTGUARD_INLINE void chosen(const K* keys, int64_t n, K above, bool ties, uint8_t* out) {
  if (ties) {
    for (int64_t i = 0; i < n; ++i) out[i] = keys[i] >= above;
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = keys[i] > above;
  }
}

// Counts the digits of `bits` bits from `shift` on of keys that shifted by shift + bits are the prefix.
template <typename K>
FASTGUARD_INLINE void count(const K* keys, int64_t n, K prefix, int shift, int bits, uint32_t* table) {
  const int high = shift + bits;
  const K mask = static_cast<K>((int64_t{1} << bits) - 1);
  int64_t i = 0;
  for (; i + GROUP <= n; i += GROUP) {
    K any = 0;
    for (int64_t u = i; u < i + GROUP; ++u) any = static_cast<K>(any | (static_cast<K>(keys[u] >> high) == prefix));
    if (any == 0) continue;
    for (int64_t u = i; u < i + GROUP; ++u) {
      if (static_cast<K>(keys[u] >> high) == prefix) ++table[(keys[u] >> shift) & mask];
    }
  }
  for (; i < n; ++i) {
    if (static_cast<K>(keys[i] >> high) == prefix) ++table[(keys[i] >> shift) & mask];
  }
}

#define BODY(K)                                                                                                     \
  FASTGUARD_MULTIVERSION bool beyond_(const K* keys, int64_t n, K most) { return beyond(keys, n, most); }           \
  FASTGUARD_MULTIVERSION int64_t equals_(const K* keys, int64_t n, K to) { return equals(keys, n, to); }            \
  FASTGUARD_MULTIVERSION void chosen_(const K* keys, int64_t n, K above, bool ties, uint8_t* out) {                 \
    chosen(keys, n, above, ties, out);                                                                              \
  }                                                                                                                 \
  FASTGUARD_MULTIVERSION void count_(const K* keys, int64_t n, K prefix, int shift, int bits, uint32_t* table) {    \
    count(keys, n, prefix, shift, bits, table);                                                                     \
  }
BODY(int16_t)
BODY(int32_t)
BODY(int64_t)
#undef BODY
FASTGUARD_MULTIVERSION void pack_(const uint8_t* entries, int64_t n, uint8_t* packed) {
  pack_bits(entries, n, packed);
}

// The first digit, which holds the sign: every key counts.
template <typename K>
void count_first(const K* keys, int64_t n, int shift, int bits, uint32_t* tables, int64_t between) {
  uint32_t* middle = tables + (int64_t{1} << (bits - 1));
  int64_t i = 0;
  for (; i + TABLES <= n; i += TABLES) {
#pragma GCC unroll 4
    for (int64_t u = 0; u < TABLES; ++u) ++middle[(keys[i + u] >> shift) + u * between];
  }
  for (; i < n; ++i) ++middle[keys[i] >> shift];
}

// Tensors and spans.

std::vector<Item> items(const std::vector<Tensor>& scores, const std::vector<Tensor>& weights) {
  std::vector<Item> out;
  int64_t span = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto size = static_cast<int64_t>(scores[i].numel());
    out.push_back({Operand(scores[i]), weights.empty() ? Operand() : Operand(weights[i]), size, span});
    span += (size + SPAN - 1) / SPAN;
  }
  return out;
}

int64_t spans(const std::vector<Item>& all) { return all.back().span + (all.back().size + SPAN - 1) / SPAN; }

// f(keys, item, first, n) for the blocks of a span.
template <typename K, typename F>
void blocks(const std::vector<Item>& all, int64_t span, const F& f) {
  const auto item = std::prev(std::partition_point(all.begin(), all.end(),  // the last that begins at or before it
                                                   [&](const Item& i) { return i.span <= span; }));
  const int64_t begin = (span - item->span) * SPAN, end = std::min(item->size, begin + SPAN);
  alignas(64) K keys[BLOCK];
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t n = std::min(BLOCK, end - first);
    keys_of(*item, first, n, keys);
    f(static_cast<const K*>(keys), item - all.begin(), first, n);
  }
}

template <typename F>
void with_keys(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double: return f(int64_t());
    case ScalarType::Float: return f(int32_t());
    default: return f(int16_t());
  }
}

// counts [2^bits] int64, added to; nan [tensors] uint8, set.
void histogram(const std::vector<Tensor>& scores, const std::vector<Tensor>& weights, ScalarType dtype,
               std::optional<int64_t> prefix, int64_t shift_, int64_t bits_, const Tensor& counts, const Tensor& nan) {
  const auto all = items(scores, weights);
  const int shift = static_cast<int>(shift_), bits = static_cast<int>(bits_);
  const int64_t bins = int64_t{1} << bits;
  auto* total = static_cast<int64_t*>(counts.mutable_data_ptr());
  auto* nans = static_cast<uint8_t*>(nan.mutable_data_ptr());
  std::mutex one_at_a_time;
  with_keys(dtype, [&](auto type) {
    using K = decltype(type);
    const K most = infinity<K>(dtype);
    torch::stable::parallel_for(0, spans(all), 1, [&](int64_t begin, int64_t end) {
      // Few keys are counted in one table: emptying several would take longer.
      const int64_t between = !prefix.has_value() && end - begin > 4 ? bins : 0;
      std::vector<uint32_t> tables(bins + (TABLES - 1) * between);
      std::vector<bool> bad(all.size());
      const auto flush = [&] {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        for (size_t i = 0; i < tables.size(); ++i) total[i & (bins - 1)] += tables[i];
        std::fill(tables.begin(), tables.end(), 0);
      };
      for (int64_t span = begin; span < end; ++span) {
        blocks<K>(all, span, [&](const K* keys, int64_t i, int64_t, int64_t n) {
          if (prefix.has_value()) return count_(keys, n, static_cast<K>(*prefix), shift, bits, tables.data());
          if (beyond_(keys, n, most)) bad[i] = true;
          count_first(keys, n, shift, bits, tables.data(), between);
        });
        if ((span - begin) % FLUSH == FLUSH - 1) flush();
      }
      flush();
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      for (size_t i = 0; i < bad.size(); ++i) nans[i] |= static_cast<uint8_t>(bad[i]);
    });
  });
}

// counts [spans] int64.
void ties(const std::vector<Tensor>& scores, const std::vector<Tensor>& weights, ScalarType dtype, int64_t key,
          const Tensor& counts) {
  const auto all = items(scores, weights);
  auto* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  with_keys(dtype, [&](auto type) {
    using K = decltype(type);
    torch::stable::parallel_for(0, spans(all), 1, [&](int64_t begin, int64_t end) {
      for (int64_t span = begin; span < end; ++span) {
        int64_t count = 0;
        blocks<K>(all, span, [&](const K* keys, int64_t, int64_t, int64_t n) {
          count += equals_(keys, n, static_cast<K>(key));
        });
        out[span] = count;
      }
    });
  });
}

// The k-th largest of n keys, 1 <= k <= n, and the place behind the last one equal to it that is chosen.
template <typename K>
std::pair<K, int64_t> nth(const K* keys, int64_t n, int64_t k, std::vector<K>& rest, std::vector<uint32_t>& table) {
  const int width = 8 * sizeof(K), most = n < 4096 ? 8 : 11;  // short rows: emptying the table takes time, too
  const K* from = keys;
  K* to = rest.data();
  int64_t left = n, missing = k, prefix = 0;
  for (int shift = width; shift > 0 && left > 1;) {
    const int bits = std::min(most, shift);
    const bool first = shift == width;
    shift -= bits;
    const int64_t bins = int64_t{1} << bits, offset = first ? bins / 2 : 0, mask = first ? -1 : bins - 1;
    std::fill_n(table.begin(), bins, 0);
    for (int64_t i = 0; i < left; ++i) ++table[((static_cast<int64_t>(from[i]) >> shift) & mask) + offset];
    int64_t bin = bins - 1;
    for (; table[bin] < missing; --bin) missing -= table[bin];
    const int64_t digit = bin - offset;
    int64_t kept = 0;
    for (int64_t i = 0; i < left; ++i) {
      const K key = from[i];
      to[kept] = key;
      kept += ((static_cast<int64_t>(key) >> shift) & mask) == digit ? 1 : 0;
    }
    prefix = first ? digit : (prefix << bits) | digit;
    from = to;
    left = kept;
  }
  const K found = left == 1 ? from[0] : static_cast<K>(prefix);
  if (missing == left) return {found, n};
  int64_t i = 0;
  for (; missing > 0; ++i) missing -= keys[i] == found ? 1 : 0;
  return {found, i};
}

// Of each row of score [R, C] key [R] and cut [R], int64; nan [1] uint8, set.
void rows(const Tensor& score, const Maybe& weight, ScalarType dtype, int64_t k, const Tensor& key, const Tensor& cut,
          const Tensor& nan) {
  const int64_t R = score.size(0), C = score.size(1);
  const Item item{Operand(score), weight.has_value() ? Operand(*weight) : Operand(), R * C, 0};
  auto* of_key = static_cast<int64_t*>(key.mutable_data_ptr());
  auto* of_cut = static_cast<int64_t*>(cut.mutable_data_ptr());
  std::mutex one_at_a_time;
  with_keys(dtype, [&](auto type) {
    using K = decltype(type);
    const K most = infinity<K>(dtype);
    const int64_t grain = std::max<int64_t>(1, SPAN / 4 / std::max<int64_t>(C, 1));
    torch::stable::parallel_for(0, R, grain, [&](int64_t begin, int64_t end) {
      std::vector<K> keys(C), rest(C + 1);
      std::vector<uint32_t> table(1 << 11);
      bool bad = false;
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t first = 0; first < C; first += BLOCK) {
          const int64_t n = std::min(BLOCK, C - first);
          keys_of(item, r * C + first, n, &keys[first]);
          bad = beyond_(&keys[first], n, most) || bad;
        }
        const auto [found, until] =
            k == 0 ? std::pair<K, int64_t>{std::numeric_limits<K>::max(), 0} : nth(keys.data(), C, k, rest, table);
        of_key[r] = found;
        of_cut[r] = until;
      }
      if (bad) {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        *static_cast<uint8_t*>(nan.mutable_data_ptr()) = 1;
      }
    });
  });
}

// mask [ceil(R C / 8)] of score [R, C]: keys above key [R], and those equal to it in columns before cut [R].
void write_mask(const Tensor& score, const Maybe& weight, ScalarType dtype, const Tensor& key, const Tensor& cut,
                const Tensor& mask) {
  const int64_t C = score.size(1);
  const std::vector<Item> one{
      {Operand(score), weight.has_value() ? Operand(*weight) : Operand(), static_cast<int64_t>(score.numel()), 0}};
  const auto* above = static_cast<const int64_t*>(key.const_data_ptr());
  const auto* until = static_cast<const int64_t*>(cut.const_data_ptr());
  auto* packed = static_cast<uint8_t*>(mask.mutable_data_ptr());
  with_keys(dtype, [&](auto type) {
    using K = decltype(type);
    torch::stable::parallel_for(0, spans(one), 1, [&](int64_t begin, int64_t end) {
      alignas(64) uint8_t entries[BLOCK];
      for (int64_t span = begin; span < end; ++span) {
        blocks<K>(one, span, [&](const K* keys, int64_t, int64_t first, int64_t n) {
          for (int64_t i = 0; i < n;) {  // runs in which a row's ties are all chosen or none of them
            const int64_t row = (first + i) / C, column = (first + i) % C;
            const bool ties = column < until[row];
            const int64_t run = std::min(n - i, (ties ? std::min(until[row], C) : C) - column);
            chosen_(keys + i, run, static_cast<K>(above[row]), ties, entries + i);
            i += run;
          }
          pack_(entries, n, packed + first / 8);
        });
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def(
      "threshold_select_histogram(Tensor[] scores, Tensor[] weights, ScalarType dtype, int? prefix, int shift, "
      "int bits, Tensor(a!) counts, Tensor(b!) nan) -> ()");
  m.def(
      "threshold_select_ties(Tensor[] scores, Tensor[] weights, ScalarType dtype, int key, Tensor(a!) counts) -> ()");
  m.def(
      "threshold_select_rows(Tensor score, Tensor? weight, ScalarType dtype, int k, Tensor(a!) key, Tensor(b!) cut, "
      "Tensor(c!) nan) -> ()");
  m.def(
      "threshold_select_write(Tensor score, Tensor? weight, ScalarType dtype, Tensor key, Tensor cut, "
      "Tensor(a!) mask) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("threshold_select_histogram", TORCH_BOX(&histogram));
  m.impl("threshold_select_ties", TORCH_BOX(&ties));
  m.impl("threshold_select_rows", TORCH_BOX(&rows));
  m.impl("threshold_select_write", TORCH_BOX(&write_mask));
}
