// class_moments_ on CPU: a batch's moments by class and position, joined with those so far.
//
// Shapes: B samples, T tokens, D features, C classes, P positions. A task is CHUNK features of one position, through all
// classes: the batch's mean in double, the squared distances from it, then Chan's formula on numbers that are kept as
// fp32 and what their rounding left (or as float64). A task's numbers are its own: nothing depends on the threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/bf16.h"
#include "cpu/simd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t CHUNK = 512;  // features of a task

FASTGUARD_INLINE double value(double x) { return x; }
FASTGUARD_INLINE double value(float x) { return x; }
FASTGUARD_INLINE double value(c10::Half x) { return static_cast<float>(x); }
FASTGUARD_INLINE double value(bf16 x) { return of_bf16(x); }

template <typename S>
FASTGUARD_INLINE void add(const S* x, int64_t n, double* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += value(x[i]);
}
template <typename S>
FASTGUARD_INLINE void add_squares(const S* x, const double* mean, int64_t n, double* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += (value(x[i]) - mean[i]) * (value(x[i]) - mean[i]);
}

// The same bodies, cloned per instruction set.
#define BODY(S) \
  FASTGUARD_MULTIVERSION void add_(const S* x, int64_t n, double* sum) { add(x, n, sum); } \
  FASTGUARD_MULTIVERSION void add_squares_(const S* x, const double* mean, int64_t n, double* sum) { \
    add_squares(x, mean, n, sum); \
  }
BODY(double)
BODY(float)
BODY(bf16)
#undef BODY
void add_(const c10::Half* x, int64_t n, double* sum) { add(x, n, sum); }
void add_squares_(const c10::Half* x, const double* mean, int64_t n, double* sum) { add_squares(x, mean, n, sum); }

// Numbers [C, P, D] and what their rounding left, or none.
template <typename T>
struct Numbers {
  T *number = nullptr, *rest = nullptr;

  Numbers(const Maybe& of, const Maybe& left) {
    if (of.has_value()) number = static_cast<T*>(of->mutable_data_ptr());
    if (left.has_value()) rest = static_cast<T*>(left->mutable_data_ptr());
  }
  double get(int64_t i) const {
    return static_cast<double>(number[i]) + (rest != nullptr ? static_cast<double>(rest[i]) : 0.0);
  }
  void put(int64_t i, double x) const {
    number[i] = static_cast<T>(x);
    const double left = x - static_cast<double>(number[i]);
    if (rest != nullptr) rest[i] = std::isfinite(number[i]) ? static_cast<T>(left) : T(0);
  }
};

template <typename S, typename T>
void take(const Numbers<T>& mean, const Numbers<T>& second, const std::vector<std::vector<int64_t>>& members,
          const int64_t* count, const Tensor& x, const Tensor& positions) {
  const int64_t T_ = x.size(1), D = x.size(2), places = positions.size(positions.dim() - 1);
  const int64_t of_sample = positions.dim() == 2 ? places : 0;
  const S* from = static_cast<const S*>(x.const_data_ptr());
  const int64_t sample = x.stride(0), token = x.stride(1);
  const int64_t* at = static_cast<const int64_t*>(positions.const_data_ptr());
  const int64_t parts = (D + CHUNK - 1) / CHUNK;
  torch::stable::parallel_for(0, places * parts, 4, [&](int64_t begin, int64_t end) {
    double ours[CHUNK], spread[CHUNK];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / parts, first = task % parts * CHUNK, n = std::min(CHUNK, D - first);
      const auto features = [&](int64_t b) {
        const int64_t t = at[b * of_sample + p];
        return from + b * sample + (t < 0 ? t + T_ : t) * token + first;
      };
      for (size_t c = 0; c < members.size(); ++c) {
        if (members[c].empty()) continue;
        const double now = static_cast<double>(members[c].size()), before = static_cast<double>(count[c]);
        std::fill_n(ours, n, 0.0);
        for (const int64_t b : members[c]) add_(features(b), n, ours);
        for (int64_t i = 0; i < n; ++i) ours[i] /= now;
        std::fill_n(spread, n, 0.0);
        if (second.number != nullptr) {
          for (const int64_t b : members[c]) add_squares_(features(b), ours, n, spread);
        }
        const int64_t start = (static_cast<int64_t>(c) * places + p) * D + first;
        for (int64_t i = 0; i < n; ++i) {
          const double old = mean.get(start + i), delta = ours[i] - old;
          mean.put(start + i, old + delta * (now / (before + now)));
          if (second.number != nullptr) {
            second.put(start + i, second.get(start + i) + spread[i] + delta * delta * (before * now / (before + now)));
          }
        }
      }
    }
  });
}

void class_moments(const Tensor& count, const Tensor& mean, const Maybe& mean_rest, const Maybe& second,
                   const Maybe& second_rest, const Tensor& x, const Tensor& label, const Tensor& positions) {
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  const int64_t* labels = static_cast<const int64_t*>(label.const_data_ptr());
  std::vector<std::vector<int64_t>> members(count.size(0));
  for (int64_t b = 0; b < x.size(0); ++b) {
    if (labels[b] >= 0) members[labels[b]].push_back(b);
  }
  const auto with = [&](auto type) {
    using S = decltype(type);
    if (mean.scalar_type() == ScalarType::Double) {
      take<S, double>({mean, mean_rest}, {second, second_rest}, members, counts, x, positions);
    } else {
      take<S, float>({mean, mean_rest}, {second, second_rest}, members, counts, x, positions);
    }
  };
  switch (x.scalar_type()) {
    case ScalarType::Double: with(double()); break;
    case ScalarType::Float: with(float()); break;
    case ScalarType::BFloat16: with(bf16()); break;
    case ScalarType::Half: with(c10::Half()); break;
    default: STD_TORCH_CHECK(false, "x: expected float64, float32, bfloat16 or float16");
  }
  for (size_t c = 0; c < members.size(); ++c) counts[c] += static_cast<int64_t>(members[c].size());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def(
      "class_moments(Tensor(a!) count, Tensor(b!) mean, Tensor(c!)? mean_rest, Tensor(d!)? second, "
      "Tensor(e!)? second_rest, Tensor x, Tensor label, Tensor positions) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) { m.impl("class_moments", TORCH_BOX(&class_moments)); }
