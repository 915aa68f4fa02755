// lm_head_stats on CPU: everything between the matrix products, on one tile of logits.
//
// Shapes: R rows of a tile (at most 128), V vocabulary, C columns. The products themselves are torch's; see
// src/fastguard/ops/lm_head_stats/portable.py for the tile loop and TorchKernels for the same arithmetic in torch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/simd.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t LANES = 16;        // independent accumulators: one AVX-512 or two AVX2 registers of floats
constexpr int64_t CHUNK = 4096;      // partial sums of this many floats are carried on in double
constexpr int64_t BLOCK = 256;       // columns per block of the second sweep: R x BLOCK floats stay in L2
constexpr int THRESHOLDS = 16;       // steps of the ladder of ops/lm_head_stats/live.py, whose rule this file follows
constexpr uint8_t LIVE = 255;
constexpr float CODES_PER_OCTAVE = 4.0F;

FASTGUARD_INLINE float exponential(float x) { return fg_expf(x); }
FASTGUARD_INLINE double exponential(double x) { return std::exp(x); }

template <typename T>
struct Head {  // what turns a raw product into a logit
  const T* bias;
  const int64_t* index;  // vocabulary ids of the columns, or null for 0, 1, 2, ...
  T scale, softcap;
  bool identity() const { return bias == nullptr && scale == T(1) && softcap == T(0); }
};

template <typename T>
FASTGUARD_INLINE void to_logits(T* z, int64_t n, const Head<T>& head) {
  if (head.bias != nullptr) {
    for (int64_t v = 0; v < n; ++v) z[v] += head.bias[head.index == nullptr ? v : head.index[v]];
  }
  if (head.scale != T(1)) {
    for (int64_t v = 0; v < n; ++v) z[v] *= head.scale;
  }
  if (head.softcap != T(0)) {
    const T two_over_cap = T(2) / head.softcap;
    // tanh(u) = 1 - 2 / (exp(2 u) + 1): exact limits at both ends, one exponential.
    for (int64_t v = 0; v < n; ++v) {
      z[v] = head.softcap * (T(1) - T(2) / (exponential(z[v] * two_over_cap) + T(1)));
    }
  }
}

template <typename T>
FASTGUARD_INLINE T maximum(const T* z, int64_t n) {
  T lane[LANES];
  for (int64_t j = 0; j < LANES; ++j) lane[j] = -std::numeric_limits<T>::infinity();
  int64_t v = 0;
  for (; v + LANES <= n; v += LANES) {
    for (int64_t j = 0; j < LANES; ++j) lane[j] = lane[j] < z[v + j] ? z[v + j] : lane[j];
  }
  for (; v < n; ++v) lane[0] = lane[0] < z[v] ? z[v] : lane[0];
  T best = lane[0];
  for (int64_t j = 1; j < LANES; ++j) best = best < lane[j] ? lane[j] : best;
  return best;
}

// One row: logits in place, then rest_lse and (on request) the mean, with the target's own entry set aside. On
// return z holds exp(z - max) without the target (mean not wanted), or the logits themselves (mean wanted).
template <typename T>
FASTGUARD_INLINE void reduce_row(T* z, int64_t V, int64_t target, const Head<T>& head, bool with_mean, double* stats,
                                 T* largest) {
  to_logits(z, V, head);
  const T zt = z[target];
  z[target] = -std::numeric_limits<T>::infinity();
  const T top = maximum(z, V);
  const T base = top == -std::numeric_limits<T>::infinity() ? T(0) : top;  // V = 1 leaves no rest
  double sum = 0, weighted = 0;
  for (int64_t start = 0; start < V; start += CHUNK) {
    const int64_t stop = std::min(V, start + CHUNK);
    T s[LANES] = {}, m[LANES] = {};
    int64_t v = start;
    if (with_mean) {
      for (; v + LANES <= stop; v += LANES) {
        for (int64_t j = 0; j < LANES; ++j) {
          const T d = z[v + j] - base, e = exponential(d);
          s[j] += e;
          m[j] += e * (d < T(-1e4) ? T(-1e4) : d);  // the target's -inf must not make 0 * inf
        }
      }
      for (; v < stop; ++v) {
        const T d = z[v] - base, e = exponential(d);
        s[0] += e;
        m[0] += e * (d < T(-1e4) ? T(-1e4) : d);
      }
    } else {
      for (; v + LANES <= stop; v += LANES) {
        for (int64_t j = 0; j < LANES; ++j) {
          const T e = exponential(z[v + j] - base);
          z[v + j] = e;
          s[j] += e;
        }
      }
      for (; v < stop; ++v) {
        const T e = exponential(z[v] - base);
        z[v] = e;
        s[0] += e;
      }
    }
    for (int64_t j = 0; j < LANES; ++j) {
      sum += s[j];
      weighted += m[j];
    }
  }
  const double rest = base + std::log(sum);
  const double hi = std::max<double>(rest, zt), lo = std::min<double>(rest, zt);
  const double lse = hi == lo && std::isinf(hi) ? hi : hi + std::log1p(std::exp(lo - hi));
  stats[0] = std::isnan(sum) || std::isnan(zt) ? std::numeric_limits<double>::quiet_NaN() : lse;
  stats[1] = std::isnan(sum) ? std::numeric_limits<double>::quiet_NaN() : rest;
  stats[2] = zt;
  if (with_mean) {
    const double p_target = std::exp(zt - lse);
    const double mean_rest = sum > 0 ? base + weighted / sum : 0;
    stats[3] = p_target * zt + (sum > 0 ? std::exp(rest - lse) : 0) * mean_rest;
    z[target] = zt;
  }
  *largest = base;
}

// A block of columns of the tile: their largest and summed mass over the rows, and each row's mass by the number of
// candidate thresholds that its columns fall under: dropped[n, k] grows by the columns under exactly k + 1 of them.
// mass [R, BLOCK] is scratch. Masses are relative to the row's rest; a row of NaN, whose factor is NaN, has none.
template <typename T>
FASTGUARD_INLINE void column_block(const T* z, int64_t V, int64_t R, int64_t first, int64_t width, const T* factor,
                                   const T* rest, const T* mean, const int64_t* target, const uint8_t* is_target,
                                   const T* taus, T* mass, T* largest, T* total, double* dropped) {
  for (int64_t c = 0; c < width; ++c) largest[c] = total[c] = T(0);
  for (int64_t n = 0; n < R; ++n) {
    const T* zn = z + n * V + first;
    T* r = mass + n * BLOCK;
    if (std::isnan(factor[n])) {
      std::fill(r, r + width, T(0));
      continue;
    }
    if (mean == nullptr) {
      for (int64_t c = 0; c < width; ++c) r[c] = zn[c] * factor[n];
    } else {
      for (int64_t c = 0; c < width; ++c) {
        const T weight = T(1) + zn[c] - mean[n];
        const T size = weight < T(0) ? -weight : weight;
        r[c] = exponential(zn[c] - rest[n]) * (size < T(1) ? T(1) : size);
      }
      const int64_t t = target[n] - first;
      if (t >= 0 && t < width) r[t] = T(0);
    }
    for (int64_t c = 0; c < width; ++c) {
      largest[c] = largest[c] < r[c] ? r[c] : largest[c];
      total[c] += r[c];
    }
  }
  // Each column falls under the first so many thresholds. Most fall under all (one masked sum) or under none (out);
  // the contested rest is listed by threshold, so that a row's sums run through registers.
  T everywhere[BLOCK];
  int16_t contested[BLOCK];
  int64_t ends[THRESHOLDS] = {};
  int8_t under[BLOCK];
  for (int64_t c = 0; c < width; ++c) {
    int count = 0;
    for (int k = 0; k < THRESHOLDS; ++k) count += largest[c] < taus[k] ? 1 : 0;
    under[c] = static_cast<int8_t>(is_target[first + c] == 0 ? count : 0);
    everywhere[c] = under[c] == THRESHOLDS ? T(1) : T(0);
  }
  int64_t listed = 0;
  for (int k = 1; k < THRESHOLDS; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      if (under[c] == k) contested[listed++] = static_cast<int16_t>(c);
    }
    ends[k] = listed;
  }
  for (int64_t n = 0; n < R; ++n) {
    const T* r = mass + n * BLOCK;
    double* mine = dropped + n * THRESHOLDS;
    T lane[LANES] = {};
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
      for (int64_t j = 0; j < LANES; ++j) lane[j] += r[c + j] * everywhere[c + j];
    }
    for (; c < width; ++c) lane[0] += r[c] * everywhere[c];
    double all = 0;
    for (int64_t j = 0; j < LANES; ++j) all += lane[j];
    mine[THRESHOLDS - 1] += all;
    for (int k = 1; k < THRESHOLDS; ++k) {
      T sum = 0;
      for (int64_t i = ends[k - 1]; i < ends[k]; ++i) sum += r[contested[i]];
      mine[k - 1] += sum;
    }
  }
}

// One row of the gradient at the raw products, in place; returns the row's tail mass.
//   d_v = p_v (g_lse + g_mean (1 + z_v - mean)) + g_rest r_v [v != t] + g_target [v = t],
// with r_v = exp(z_v - rest_lse) and p_v = r_v exp(rest_lse - lse): one exponential an element.
template <typename T>
FASTGUARD_INLINE double gradient_row(T* z, int64_t C, int64_t position, const Head<T>& head, T lse, T rest, T mean,
                                     T g_lse, T g_rest, T g_target, T g_mean) {
  to_logits(z, C, head);
  const bool has_target = position >= 0;
  const T zt = has_target ? z[position] : T(0);
  const bool no_rest = rest == -std::numeric_limits<T>::infinity();
  const T base = no_rest ? T(0) : rest;
  const T share = exponential(rest - lse);
  const T constant = share * (g_lse + g_mean * (T(1) - mean)) + g_rest, slope = share * g_mean;
  if (has_target) z[position] = -std::numeric_limits<T>::infinity();
  double kept = 0, kept_mean = 0;
  for (int64_t start = 0; start < C; start += CHUNK) {
    const int64_t stop = std::min(C, start + CHUNK);
    T s[LANES] = {}, m[LANES] = {};
    int64_t v = start;
    if (g_mean == T(0) && head.softcap == T(0)) {
      const T factor = constant * head.scale;
      for (; v + LANES <= stop; v += LANES) {
        for (int64_t j = 0; j < LANES; ++j) {
          const T r = exponential(z[v + j] - base);
          s[j] += r;
          z[v + j] = r * factor;
        }
      }
      for (; v < stop; ++v) {
        const T r = exponential(z[v] - base);
        s[0] += r;
        z[v] = r * factor;
      }
    } else {
      const T inverse_cap = head.softcap == T(0) ? T(0) : T(1) / head.softcap;
      for (; v < stop; ++v) {
        const T x = z[v] < T(-1e30) ? T(0) : z[v];
        const T r = exponential(z[v] - base);
        const T u = x * inverse_cap;
        s[0] += r;
        m[0] += r * (T(1) + x - mean);
        z[v] = r * (constant + slope * x) * head.scale * (T(1) - u * u);
      }
    }
    for (int64_t j = 0; j < LANES; ++j) {
      kept += s[j];
      kept_mean += m[j];
    }
  }
  if (has_target) {
    const T p = exponential(zt - lse);
    const T u = head.softcap == T(0) ? T(0) : zt / head.softcap;
    z[position] = (p * (g_lse + g_mean * (T(1) + zt - mean)) + g_target) * head.scale * (T(1) - u * u);
    kept_mean = share * kept_mean + p * (T(1) + zt - mean);
  } else {
    kept_mean *= share;
  }
  if (no_rest) return 0;
  double tail = (g_lse * share + g_rest) * std::max(0.0, 1.0 - kept);
  if (g_mean != T(0)) tail += g_mean * (1.0 - kept_mean);
  return tail;
}

// The same bodies, cloned per instruction set for float; float64 serves exactness, not speed.
FASTGUARD_MULTIVERSION void reduce_row_(float* z, int64_t V, int64_t t, const Head<float>& h, bool mean, double* stats,
                                        float* largest) {
  reduce_row(z, V, t, h, mean, stats, largest);
}
void reduce_row_(double* z, int64_t V, int64_t t, const Head<double>& h, bool mean, double* stats, double* largest) {
  reduce_row(z, V, t, h, mean, stats, largest);
}
FASTGUARD_MULTIVERSION void column_block_(const float* z, int64_t V, int64_t R, int64_t first, int64_t width,
                                          const float* factor, const float* rest, const float* mean,
                                          const int64_t* target, const uint8_t* is_target, const float* taus,
                                          float* mass, float* largest, float* total, double* dropped) {
  column_block(z, V, R, first, width, factor, rest, mean, target, is_target, taus, mass, largest, total, dropped);
}
void column_block_(const double* z, int64_t V, int64_t R, int64_t first, int64_t width, const double* factor,
                   const double* rest, const double* mean, const int64_t* target, const uint8_t* is_target,
                   const double* taus, double* mass, double* largest, double* total, double* dropped) {
  column_block(z, V, R, first, width, factor, rest, mean, target, is_target, taus, mass, largest, total, dropped);
}
FASTGUARD_MULTIVERSION double gradient_row_(float* z, int64_t C, int64_t position, const Head<float>& h, float lse,
                                            float rest, float mean, float g_lse, float g_rest, float g_target,
                                            float g_mean) {
  return gradient_row(z, C, position, h, lse, rest, mean, g_lse, g_rest, g_target, g_mean);
}
double gradient_row_(double* z, int64_t C, int64_t position, const Head<double>& h, double lse, double rest,
                     double mean, double g_lse, double g_rest, double g_target, double g_mean) {
  return gradient_row(z, C, position, h, lse, rest, mean, g_lse, g_rest, g_target, g_mean);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T>
void statistics_of(const Tensor& z_, const Head<T>& head, const int64_t* target, double filter_tol, bool with_mean,
                   uint8_t* columns, T* out) {
  const int64_t R = z_.size(0), V = z_.size(1);
  T* z = static_cast<T*>(z_.mutable_data_ptr());
  std::vector<T> factor(R), rest(R), mean(R);
  torch::stable::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      double stats[4] = {0, 0, 0, 0};
      T base = 0;
      reduce_row_(z + n * V, V, target[n], head, with_mean, stats, &base);
      for (int64_t k = 0; k < 4; ++k) out[k * R + n] = static_cast<T>(stats[k]);
      factor[n] = std::isinf(stats[1]) ? T(0) : static_cast<T>(std::exp(base - stats[1]));
      rest[n] = std::isinf(stats[1]) ? std::numeric_limits<T>::max() : static_cast<T>(stats[1]);
      mean[n] = static_cast<T>(stats[3]);
    }
  });
  if (columns == nullptr) return;

  T taus[THRESHOLDS];
  for (int k = 0; k < THRESHOLDS; ++k) taus[k] = static_cast<T>(std::exp2(std::ceil(std::log2(filter_tol)) - k));
  std::vector<uint8_t> is_target(V, 0);
  for (int64_t n = 0; n < R; ++n) is_target[target[n]] = 1;
  std::vector<T> largest(V), total(V);
  const int64_t blocks = (V + BLOCK - 1) / BLOCK;
  std::vector<std::vector<double>> partial(blocks);  // by first block of a range, so that the sum has one order
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> mass(R * BLOCK);
    std::vector<double> mine(R * THRESHOLDS, 0.0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * BLOCK, width = std::min(BLOCK, V - first);
      column_block_(z, V, R, first, width, factor.data(), rest.data(), with_mean ? mean.data() : nullptr, target,
                    is_target.data(), taus, mass.data(), largest.data() + first, total.data() + first, mine.data());
    }
    partial[begin] = std::move(mine);
  });
  std::vector<double> dropped(R * THRESHOLDS, 0.0);
  for (const auto& mine : partial) {
    for (size_t i = 0; i < mine.size(); ++i) dropped[i] += mine[i];
  }

  // The largest threshold at which no row drops more than filter_tol; none: every column is live.
  T tau = 0;
  std::vector<double> below(R, 0.0);
  for (int k = THRESHOLDS - 1; k >= 0; --k) {
    bool kept = true;
    for (int64_t n = 0; n < R; ++n) {
      below[n] += dropped[n * THRESHOLDS + k];
      kept = kept && below[n] <= filter_tol;
    }
    if (!kept) break;
    tau = taus[k];
  }
  torch::stable::parallel_for(0, V, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      if (is_target[v] != 0 || !(largest[v] < tau)) {
        columns[v] = LIVE;
        continue;
      }
      const float average = static_cast<float>(total[v]) / static_cast<float>(R);
      const float code = average > 0.0F ? 254.0F + CODES_PER_OCTAVE * std::log2(average) : 0.0F;
      columns[v] = static_cast<uint8_t>(std::clamp(std::nearbyint(code), 0.0F, 254.0F));
    }
  });
}

template <typename T>
void gradient_of(const Tensor& z_, const Head<T>& head, const int64_t* target, const Tensor& row_, const T* g_lse,
                 const T* g_rest, const T* g_target, const T* g_mean, T* tail) {
  const int64_t R = z_.size(0), C = z_.size(1);
  T* z = static_cast<T*>(z_.mutable_data_ptr());
  const T* row = static_cast<const T*>(row_.const_data_ptr());
  torch::stable::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t position = target[n];
      if (head.index != nullptr) {  // ascending; every target is live
        const int64_t* found = std::lower_bound(head.index, head.index + C, target[n]);
        position = found != head.index + C && *found == target[n] ? found - head.index : -1;
      }
      const auto at = [n](const T* g) { return g == nullptr ? T(0) : g[n]; };
      tail[n] = static_cast<T>(gradient_row_(z + n * C, C, position, head, row[n], row[R + n], row[2 * R + n],
                                             at(g_lse), at(g_rest), at(g_target), at(g_mean)));
    }
  });
}

// The columns a tile's backward reads: see tile_columns in live.py. Fills index with the live columns, then the
// warm ones, and share with the weights of the latter, unless they are more than index holds; counts has both numbers.
template <typename T>
void columns_of(const uint8_t* codes, int64_t V, double coverage, int64_t most, int64_t* index, int64_t capacity,
                T* share, int64_t* counts) {
  int64_t histogram[256] = {};
  for (int64_t v = 0; v < V; ++v) ++histogram[codes[v]];
  double mass[256] = {}, dropped = 0;
  for (int c = 1; c < LIVE; ++c) {
    mass[c] = std::exp2((c - 254) / static_cast<double>(CODES_PER_OCTAVE));
    dropped += mass[c] * static_cast<double>(histogram[c]);
  }
  int floor = LIVE;  // the lightest code among the warm columns
  double covered = 0;
  int64_t warm = 0;
  while (floor > 1 && (floor == LIVE || (covered < coverage * dropped && warm < most))) {
    --floor;
    covered += mass[floor] * static_cast<double>(histogram[floor]);
    warm += histogram[floor];
  }
  const int64_t skipped = std::max<int64_t>(warm - most, 0);  // of the lightest code, the last ones
  int64_t lightest = histogram[floor] - skipped;
  covered -= mass[floor] * static_cast<double>(skipped);
  warm -= skipped;
  const int64_t live = histogram[LIVE];
  counts[0] = live;
  counts[1] = warm;
  if (live + warm > capacity) return;
  int64_t next_live = 0, next_warm = live;
  for (int64_t v = 0; v < V; ++v) {
    if (codes[v] == LIVE) {
      index[next_live++] = v;
    } else if (codes[v] > floor || (codes[v] == floor && lightest-- > 0)) {
      share[next_warm - live] = static_cast<T>(mass[codes[v]] / covered);
      index[next_warm++] = v;
    }
  }
}

bool is_double(const Tensor& z) { return z.element_size() == 8; }

template <typename T>
Head<T> head_of(const std::optional<Tensor>& bias, const std::optional<Tensor>& index, double scale, double softcap) {
  return {data_or_null<T>(bias), data_or_null<int64_t>(index), static_cast<T>(scale), static_cast<T>(softcap)};
}

void columns(const Tensor& codes, double coverage, int64_t most, const Tensor& index, const Tensor& share,
             const Tensor& counts) {
  const auto* code = static_cast<const uint8_t*>(codes.const_data_ptr());
  auto* where = static_cast<int64_t*>(index.mutable_data_ptr());
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  if (is_double(share)) {
    columns_of(code, codes.size(0), coverage, most, where, index.size(0),
               static_cast<double*>(share.mutable_data_ptr()), count);
  } else {
    columns_of(code, codes.size(0), coverage, most, where, index.size(0),
               static_cast<float*>(share.mutable_data_ptr()), count);
  }
}

void statistics(const Tensor& z, const std::optional<Tensor>& bias, const Tensor& target, double scale, double softcap,
                double filter_tol, bool with_mean, const std::optional<Tensor>& columns, const Tensor& out) {
  const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
  auto* code = columns.has_value() ? static_cast<uint8_t*>(columns->mutable_data_ptr()) : nullptr;
  if (is_double(z)) {
    statistics_of(z, head_of<double>(bias, std::nullopt, scale, softcap), t, filter_tol, with_mean, code,
                  static_cast<double*>(out.mutable_data_ptr()));
  } else {
    statistics_of(z, head_of<float>(bias, std::nullopt, scale, softcap), t, filter_tol, with_mean, code,
                  static_cast<float*>(out.mutable_data_ptr()));
  }
}

template <typename T>
void gradient_typed(const Tensor& z, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
                    const Tensor& target, double scale, double softcap, const Tensor& row,
                    const std::optional<Tensor>& g_lse, const std::optional<Tensor>& g_rest,
                    const std::optional<Tensor>& g_target, const std::optional<Tensor>& g_mean, const Tensor& tail) {
  gradient_of(z, head_of<T>(bias, index, scale, softcap), static_cast<const int64_t*>(target.const_data_ptr()), row,
              data_or_null<T>(g_lse), data_or_null<T>(g_rest), data_or_null<T>(g_target), data_or_null<T>(g_mean),
              static_cast<T*>(tail.mutable_data_ptr()));
}

void gradient(const Tensor& z, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
              const Tensor& target, double scale, double softcap, const Tensor& row,
              const std::optional<Tensor>& g_lse, const std::optional<Tensor>& g_rest,
              const std::optional<Tensor>& g_target, const std::optional<Tensor>& g_mean, const Tensor& tail) {
  if (is_double(z)) {
    gradient_typed<double>(z, bias, index, target, scale, softcap, row, g_lse, g_rest, g_target, g_mean, tail);
  } else {
    gradient_typed<float>(z, bias, index, target, scale, softcap, row, g_lse, g_rest, g_target, g_mean, tail);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def(
      "lm_head_statistics(Tensor(a!) z, Tensor? bias, Tensor target, float scale, float softcap, float filter_tol, "
      "bool with_mean, Tensor(b!)? columns, Tensor(c!) out) -> ()");
  m.def(
      "lm_head_columns(Tensor codes, float coverage, int most, Tensor(a!) index, Tensor(b!) share, Tensor(c!) counts) "
      "-> ()");
  m.def(
      "lm_head_gradient(Tensor(a!) z, Tensor? bias, Tensor? index, Tensor target, float scale, float softcap, "
      "Tensor row, Tensor? g_lse, Tensor? g_rest, Tensor? g_target, Tensor? g_mean, Tensor(b!) tail) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("lm_head_statistics", TORCH_BOX(&statistics));
  m.impl("lm_head_columns", TORCH_BOX(&columns));
  m.impl("lm_head_gradient", TORCH_BOX(&gradient));
}
