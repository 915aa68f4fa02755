// representation_distance on CPU: each row's distance from its reference, and the gradient, in one pass over the rows.
//
// Shapes: L layers, N rows, D features. Both kinds are one computation on p x - q y, the difference of two scaled rows:
// for l2 both factors are 1, for a cosine they are the inverse norms. It is taken as p (x - y) + (p - q) y, which is 0
// to the bit where the rows are equal, contracted to fused multiply-adds or not. Rows are read CHUNK features at a
// time; sums are fp32 within a chunk and double across chunks. A cosine reads a row twice, the second time from cache.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/simd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t CHUNK = 1024;       // features at a time
constexpr int64_t GRAIN = 1 << 14;    // features of a task, at least
constexpr int64_t LANES = 32;         // partial sums, so that additions do not wait for each other

template <typename T>
FASTGUARD_INLINE double total(const T* lanes) {
  double sum = 0;
  for (int64_t j = 0; j < LANES; ++j) sum += lanes[j];
  return sum;
}

// Sums of squares of x and of y.
template <typename T>
FASTGUARD_INLINE void squares(const T* x, const T* y, int64_t n, double* out) {
  T of_x[LANES] = {}, of_y[LANES] = {};
  int64_t f = 0;
  for (; f + LANES <= n; f += LANES) {
    for (int64_t j = 0; j < LANES; ++j) of_x[j] += x[f + j] * x[f + j];
    for (int64_t j = 0; j < LANES; ++j) of_y[j] += y[f + j] * y[f + j];
  }
  for (int64_t j = 0; f + j < n; ++j) {
    of_x[j] += x[f + j] * x[f + j];
    of_y[j] += y[f + j] * y[f + j];
  }
  out[0] += total(of_x);
  out[1] += total(of_y);
}

// Sum of squares of p x - q y, with r = p - q.
template <typename T>
FASTGUARD_INLINE double differences(const T* x, const T* y, T p, T r, int64_t n) {
  T lanes[LANES] = {};
  int64_t f = 0;
  for (; f + LANES <= n; f += LANES) {
    for (int64_t j = 0; j < LANES; ++j) {
      const T d = p * (x[f + j] - y[f + j]) + r * y[f + j];
      lanes[j] += d * d;
    }
  }
  for (int64_t j = 0; f + j < n; ++j) {
    const T d = p * (x[f + j] - y[f + j]) + r * y[f + j];
    lanes[j] += d * d;
  }
  return total(lanes);
}

// out = c (p x - q y - s x).
template <typename T>
FASTGUARD_INLINE void gradients(const T* x, const T* y, T p, T r, T s, T c, int64_t n, T* out) {
  for (int64_t f = 0; f < n; ++f) out[f] = c * ((p * (x[f] - y[f]) + r * y[f]) - s * x[f]);
}

// The same bodies, cloned per instruction set for fp32 arithmetic; float64 serves exactness, not speed.
FASTGUARD_MULTIVERSION void squares_(const float* x, const float* y, int64_t n, double* out) { squares(x, y, n, out); }
void squares_(const double* x, const double* y, int64_t n, double* out) { squares(x, y, n, out); }
FASTGUARD_MULTIVERSION double differences_(const float* x, const float* y, float p, float r, int64_t n) {
  return differences(x, y, p, r, n);
}
double differences_(const double* x, const double* y, double p, double r, int64_t n) {
  return differences(x, y, p, r, n);
}
FASTGUARD_MULTIVERSION void gradients_(const float* x, const float* y, float p, float r, float s, float c, int64_t n,
                                       float* out) {
  gradients(x, y, p, r, s, c, n, out);
}
void gradients_(const double* x, const double* y, double p, double r, double s, double c, int64_t n, double* out) {
  gradients(x, y, p, r, s, c, n, out);
}

template <typename S, typename T>
FASTGUARD_INLINE void convert(const S* from, T* to, int64_t n) {
  for (int64_t f = 0; f < n; ++f) to[f] = static_cast<T>(from[f]);
}
FASTGUARD_MULTIVERSION void convert_(const c10::BFloat16* from, float* to, int64_t n) { convert(from, to, n); }
FASTGUARD_MULTIVERSION void convert_(const c10::Half* from, float* to, int64_t n) { convert(from, to, n); }
FASTGUARD_MULTIVERSION void convert_(const float* from, c10::BFloat16* to, int64_t n) { convert(from, to, n); }
FASTGUARD_MULTIVERSION void convert_(const float* from, c10::Half* to, int64_t n) { convert(from, to, n); }
template <typename S, typename T>  // a reference in a dtype that no model has
void convert_(const S* from, T* to, int64_t n) {
  convert(from, to, n);
}

// n features as T: where they lie, or converted into the buffer.
template <typename S, typename T>
const T* features(const S* from, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    convert_(from, buffer, n);
    return buffer;
  }
}

struct Problem {
  int64_t L, N, D;
  const void *a, *b;
  int64_t a_layer, a_row, b_layer, b_row;  // strides
  const bool* mask;                        // [N] or null
  bool cosine;

  template <typename S>
  const S* row_a(int64_t i) const {
    return static_cast<const S*>(a) + i / N * a_layer + i % N * a_row;
  }
  template <typename S>
  const S* row_b(int64_t i) const {
    return static_cast<const S*>(b) + i / N * b_layer + i % N * b_row;
  }
  bool keeps(int64_t i) const { return mask == nullptr || mask[i % N]; }

  // f(i) for every row i of the L N.
  template <typename F>
  void rows(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, D));
    torch::stable::parallel_for(0, L * N, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
};

// Calls f(x, y, first, n) on the chunks of row i, as T.
template <typename A, typename B, typename T, typename F>
void chunks(const Problem& p, int64_t i, T* buffer, const F& f) {
  const A* a = p.row_a<A>(i);
  const B* b = p.row_b<B>(i);
  for (int64_t first = 0; first < p.D; first += CHUNK) {
    const int64_t n = std::min(CHUNK, p.D - first);
    f(features(a + first, buffer, n), features(b + first, buffer + CHUNK, n), first, n);
  }
}

// distance [L, N]; inverse [2, L, N]: 1 / |a| and 1 / |b|, both 0 where either row is zero or masked.
template <typename A, typename B, typename T>
void distances_of(const Problem& p, T* distance, T* inverse) {
  p.rows([&](int64_t i) {
    alignas(64) T buffer[2 * CHUNK];
    T scale_a = 1, scale_b = 1;
    distance[i] = 0;
    if (p.cosine) {
      double norms[2] = {};
      if (p.keeps(i)) {
        chunks<A, B>(p, i, buffer, [&](const T* x, const T* y, int64_t, int64_t n) { squares_(x, y, n, norms); });
      }
      const bool dead = norms[0] == 0 || norms[1] == 0;
      inverse[i] = scale_a = dead ? T(0) : static_cast<T>(1 / std::sqrt(norms[0]));
      inverse[p.L * p.N + i] = scale_b = dead ? T(0) : static_cast<T>(1 / std::sqrt(norms[1]));
      if (dead) {
        distance[i] = p.keeps(i) ? T(1) : T(0);
        return;
      }
    }
    if (!p.keeps(i)) return;
    double sum = 0;
    chunks<A, B>(p, i, buffer, [&](const T* x, const T* y, int64_t, int64_t n) {
      sum += differences_(x, y, scale_a, scale_a - scale_b, n);
    });
    distance[i] = static_cast<T>(p.cosine ? sum / 2 : std::sqrt(sum));
  });
}

// da [L, N, D]. l2: grad / distance (a - b). cosine, with unit vectors u, v: grad / |a| (u - v - distance u).
template <typename A, typename B, typename T>
void gradient_of(const Problem& p, const T* grad, const T* distance, const T* inverse, A* da) {
  p.rows([&](int64_t i) {
    alignas(64) T buffer[2 * CHUNK], out[CHUNK];
    A* to = da + i * p.D;
    const T scale_a = p.cosine ? inverse[i] : T(1), scale_b = p.cosine ? inverse[p.L * p.N + i] : T(1);
    if (!p.keeps(i) || (p.cosine ? scale_a == 0 && scale_b == 0 : distance[i] == 0)) {
      std::fill_n(to, p.D, A(0.0F));
      return;
    }
    const T c = p.cosine ? grad[i] * scale_a : grad[i] / distance[i];
    const T s = p.cosine ? distance[i] * scale_a : T(0);
    chunks<A, B>(p, i, buffer, [&](const T* x, const T* y, int64_t first, int64_t n) {
      if constexpr (std::is_same_v<A, T>) {
        gradients_(x, y, scale_a, scale_a - scale_b, s, c, n, to + first);
      } else {
        gradients_(x, y, scale_a, scale_a - scale_b, s, c, n, out);
        convert_(out, to + first, n);
      }
    });
  });
}

// Calls f with a value of the dtype of x.
template <typename F>
void by_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double());
    case ScalarType::Float: return f(float());
    case ScalarType::BFloat16: return f(c10::BFloat16());
    case ScalarType::Half: return f(c10::Half());
    default: STD_TORCH_CHECK(false, "a, b: expected float64, float32, bfloat16 or float16");
  }
}

// Calls f with values of the dtypes of a, of b and of the arithmetic.
template <typename F>
void by_dtypes(const Tensor& a, const Tensor& b, const F& f) {
  by_dtype(a, [&](auto x) {
    using Wide = std::conditional_t<std::is_same_v<decltype(x), double>, double, float>;
    by_dtype(b, [&](auto y) { f(x, y, Wide()); });
  });
}

Problem problem(const Tensor& a, const Tensor& b, const std::optional<Tensor>& mask, bool cosine) {
  return {a.size(0), a.size(1), a.size(2), a.const_data_ptr(), b.const_data_ptr(),
          a.stride(0), a.stride(1), b.stride(0), b.stride(1),
          mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, cosine};
}

void distances(const Tensor& a, const Tensor& b, const std::optional<Tensor>& mask, bool cosine,
               const Tensor& distance, const Tensor& inverse) {
  const Problem p = problem(a, b, mask, cosine);
  by_dtypes(a, b, [&](auto x, auto y, auto t) {
    using T = decltype(t);
    distances_of<decltype(x), decltype(y)>(p, static_cast<T*>(distance.mutable_data_ptr()),
                                           static_cast<T*>(inverse.mutable_data_ptr()));
  });
}

void gradient(const Tensor& grad, const Tensor& a, const Tensor& b, const std::optional<Tensor>& mask,
              const Tensor& distance, const Tensor& inverse, bool cosine, const Tensor& da) {
  const Problem p = problem(a, b, mask, cosine);
  by_dtypes(a, b, [&](auto x, auto y, auto t) {
    using T = decltype(t);
    gradient_of<decltype(x), decltype(y)>(p, static_cast<const T*>(grad.const_data_ptr()),
                                          static_cast<const T*>(distance.const_data_ptr()),
                                          static_cast<const T*>(inverse.const_data_ptr()),
                                          static_cast<decltype(x)*>(da.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def(
      "representation_distance(Tensor a, Tensor b, Tensor? mask, bool cosine, Tensor(a!) distance, "
      "Tensor(b!) inverse) -> ()");
  m.def(
      "representation_distance_backward(Tensor grad, Tensor a, Tensor b, Tensor? mask, Tensor distance, "
      "Tensor inverse, bool cosine, Tensor(a!) da) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("representation_distance", TORCH_BOX(&distances));
  m.impl("representation_distance_backward", TORCH_BOX(&gradient));
}
