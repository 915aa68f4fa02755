// head_kl on CPU: everything between the matrix products, on one tile of logits and differences of logits.
//
// Shapes: R rows of a tile (at most 128), V vocabulary. The products themselves are torch's; see
// src/fastguard/ops/head_kl/portable.py for the tile loop, for how a row is summed, and for the same arithmetic in torch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/simd.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t LANES = 16;    // independent accumulators: one AVX-512 or two AVX2 registers of floats
constexpr int64_t CHUNK = 2048;  // of both arrays together it fits L1; its partial sums are carried on in double

FASTGUARD_INLINE float exponential(float x) { return fg_expf(x); }
FASTGUARD_INLINE double exponential(double x) { return std::exp(x); }

template <typename T>
struct Head {  // what turns a raw product into a logit
  const T* bias;
  T scale, softcap;
};

// (exp(-u) - 1 + u) / u^2 for |u| < 1/2, to rounding.
FASTGUARD_INLINE float phi_series(float u) {
  float p = 2.7557319e-6F;  // 1/9!
  p = 2.4801587e-5F - u * p;
  p = 1.9841270e-4F - u * p;
  p = 1.3888889e-3F - u * p;
  p = 8.3333333e-3F - u * p;
  p = 4.1666667e-2F - u * p;
  p = 1.6666667e-1F - u * p;
  return 0.5F - u * p;
}
FASTGUARD_INLINE double phi_series(double u) {
  double factorial = 1307674368000.0, p = 1.0 / factorial;  // 15!
  for (int k = 15; k > 2; --k) {
    factorial /= k;
    p = 1.0 / factorial - u * p;
  }
  return p;
}

// e (exp(-u) - 1) and e (exp(-u) - 1 + u), where other = e exp(-u).
template <typename T>
FASTGUARD_INLINE T first_order(T u, T e, T other, T* second) {
  const T series = e * u * u * phi_series(u), weighted = e * u;
  const bool near = u < T(0.5) && u > T(-0.5);
  const T far = other - e;
  *second = near ? series : far + weighted;
  return near ? series - weighted : far;
}

// tanh to rounding: its series near 0, where the exponential form cancels; exact limits at both ends.
template <typename T>
FASTGUARD_INLINE T hyperbolic(T y);
template <>
FASTGUARD_INLINE float hyperbolic(float y) {
  const float q = y * y;
  const float near = y * (1.0F + q * (-3.3333333e-1F + q * (1.3333333e-1F + q * (-5.3968254e-2F + q * 2.1869489e-2F))));
  const float far = 1.0F - 2.0F / (fg_expf(2.0F * y) + 1.0F);
  return q < 0.0625F ? near : far;
}
template <>
FASTGUARD_INLINE double hyperbolic(double y) { return std::tanh(y); }

// Raw products in place to the teacher's logits and how far they are above the student's.
template <typename T>
FASTGUARD_INLINE void to_logits(T* z, T* d, int64_t first, int64_t n, const Head<T>& head) {
  if (head.bias != nullptr) {
    for (int64_t v = 0; v < n; ++v) z[v] += head.bias[first + v];
  }
  if (head.scale != T(1)) {
    for (int64_t v = 0; v < n; ++v) {
      z[v] *= head.scale;
      d[v] *= head.scale;
    }
  }
  if (head.softcap != T(0)) {
    const T inverse = T(1) / head.softcap;
    for (int64_t v = 0; v < n; ++v) {
      const T t = hyperbolic(z[v] * inverse), s = hyperbolic((z[v] - d[v]) * inverse);
      z[v] = head.softcap * t;
      d[v] = head.softcap * hyperbolic(d[v] * inverse) * (T(1) - t * s);  // tanh a - tanh b
    }
  }
}

struct Sums {  // of a part of a row, relative to the largest logits in it
  double top_t, top_s, s_t, s_s, u, a, b;
};

// The sums of two parts of a row, relative to the larger of their maxima each.
inline Sums rebased(const Sums& x, double top_t, double top_s) {
  // exp(z - top) shrinks by shrink; u becomes u + v, v = (x.top_t - top_t) - (x.top_s - top_s).
  const double drop_t = x.top_t - top_t, drop_s = x.top_s - top_s, v = drop_t - drop_s;
  const double shrink_t = std::exp(drop_t), shrink_s = std::exp(drop_s);
  double second = 0;
  const double first = first_order(v, shrink_t, shrink_s, &second);
  return {top_t,
          top_s,
          shrink_t * x.s_t,
          shrink_s * x.s_s,
          shrink_t * (x.u + v * x.s_t),
          shrink_s * x.a + first * x.s_t,
          shrink_t * x.b + first * x.a + second * x.s_t};
}

inline Sums merged(const Sums& x, const Sums& y) {
  const double top_t = std::max(x.top_t, y.top_t), top_s = std::max(x.top_s, y.top_s);
  const Sums p = rebased(x, top_t, top_s), q = rebased(y, top_t, top_s);
  return {top_t, top_s, p.s_t + q.s_t, p.s_s + q.s_s, p.u + q.u, p.a + q.a, p.b + q.b};
}

template <typename T>
FASTGUARD_INLINE Sums sum_chunk(T* z, T* d, int64_t first, int64_t n, const Head<T>& head) {
  to_logits(z, d, first, n, head);
  T top_t[LANES], top_s[LANES];
  for (int64_t j = 0; j < LANES; ++j) top_t[j] = top_s[j] = -std::numeric_limits<T>::infinity();
  int64_t v = 0;
  for (; v + LANES <= n; v += LANES) {
    for (int64_t j = 0; j < LANES; ++j) {
      const T s = z[v + j] - d[v + j];
      top_t[j] = top_t[j] < z[v + j] ? z[v + j] : top_t[j];
      top_s[j] = top_s[j] < s ? s : top_s[j];
    }
  }
  for (; v < n; ++v) {
    const T s = z[v] - d[v];
    top_t[0] = top_t[0] < z[v] ? z[v] : top_t[0];
    top_s[0] = top_s[0] < s ? s : top_s[0];
  }
  T mt = top_t[0], ms = top_s[0];
  for (int64_t j = 1; j < LANES; ++j) {
    mt = mt < top_t[j] ? top_t[j] : mt;
    ms = ms < top_s[j] ? top_s[j] : ms;
  }
  const T centre = mt - ms;
  T s_t[LANES] = {}, s_s[LANES] = {}, su[LANES] = {}, sa[LANES] = {}, sb[LANES] = {};
  for (v = 0; v + LANES <= n; v += LANES) {
    for (int64_t j = 0; j < LANES; ++j) {
      const T e_t = exponential(z[v + j] - mt), e_s = exponential(z[v + j] - d[v + j] - ms), u = d[v + j] - centre;
      T second;
      const T difference = first_order(u, e_t, e_s, &second);
      s_t[j] += e_t;
      s_s[j] += e_s;
      su[j] += e_t * u;
      sa[j] += difference;
      sb[j] += second;
    }
  }
  for (; v < n; ++v) {
    const T e_t = exponential(z[v] - mt), e_s = exponential(z[v] - d[v] - ms), u = d[v] - centre;
    T second;
    const T difference = first_order(u, e_t, e_s, &second);
    s_t[0] += e_t;
    s_s[0] += e_s;
    su[0] += e_t * u;
    sa[0] += difference;
    sb[0] += second;
  }
  // The centre as the elements saw it: mt - ms may have been rounded.
  Sums out{static_cast<double>(mt), static_cast<double>(mt) - static_cast<double>(centre), 0, 0, 0, 0, 0};
  for (int64_t j = 0; j < LANES; ++j) {
    out.s_t += s_t[j];
    out.s_s += s_s[j];
    out.u += su[j];
    out.a += sa[j];
    out.b += sb[j];
  }
  return out;
}

// The gradient at the student's raw products of a chunk, into d.
template <typename T>
FASTGUARD_INLINE void gradient_chunk(T* z, T* d, int64_t first, int64_t n, const Head<T>& head, T lse, T gap, T grad) {
  to_logits(z, d, first, n, head);
  const T lse_s = lse - gap, factor = grad * head.scale;
  if (head.softcap == T(0)) {
    for (int64_t v = 0; v < n; ++v) {
      T second;
      const T u = d[v] - gap;
      d[v] = factor * first_order(u, exponential(z[v] - lse), exponential(z[v] - d[v] - lse_s), &second);
    }
    return;
  }
  const T inverse = T(1) / head.softcap;
  for (int64_t v = 0; v < n; ++v) {
    T second;
    const T u = d[v] - gap, s = z[v] - d[v], y = s * inverse;
    d[v] = factor * (T(1) - y * y) * first_order(u, exponential(z[v] - lse), exponential(s - lse_s), &second);
  }
}

// The same bodies, cloned per instruction set for float; float64 serves exactness, not speed.
FASTGUARD_MULTIVERSION Sums sum_chunk_(float* z, float* d, int64_t first, int64_t n, const Head<float>& head) {
  return sum_chunk(z, d, first, n, head);
}
Sums sum_chunk_(double* z, double* d, int64_t first, int64_t n, const Head<double>& head) {
  return sum_chunk(z, d, first, n, head);
}
FASTGUARD_MULTIVERSION void gradient_chunk_(float* z, float* d, int64_t first, int64_t n, const Head<float>& head,
                                            float lse, float gap, float grad) {
  gradient_chunk(z, d, first, n, head, lse, gap, grad);
}
void gradient_chunk_(double* z, double* d, int64_t first, int64_t n, const Head<double>& head, double lse, double gap,
                     double grad) {
  gradient_chunk(z, d, first, n, head, lse, gap, grad);
}

// x - log(1 + x): the double's rounding is far below what the sums carry, but for the float64 op.
inline double excess(double x) {
  if (std::abs(x) >= 0.1) return x - std::log1p(x);
  double series = 1.0 / 17;
  for (int k = 16; k > 1; --k) series = 1.0 / k - x * series;
  return x * x * series;
}

template <typename T>
void statistics_of(const Tensor& z_, const Tensor& d_, const Head<T>& head, T* out) {
  const int64_t R = z_.size(0), V = z_.size(1);
  T* z = static_cast<T*>(z_.mutable_data_ptr());
  T* d = static_cast<T*>(d_.mutable_data_ptr());
  torch::stable::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Sums row = sum_chunk_(z + n * V, d + n * V, 0, std::min(CHUNK, V), head);
      for (int64_t first = CHUNK; first < V; first += CHUNK) {
        row = merged(row, sum_chunk_(z + n * V + first, d + n * V + first, first, std::min(CHUNK, V - first), head));
      }
      const double x = row.a / row.s_t, ratio = std::log(row.s_s / row.s_t);
      const bool near = std::abs(x) < 0.5;
      const double kl = near ? row.b / row.s_t - excess(x) : row.u / row.s_t + ratio;
      out[n] = static_cast<T>(kl);
      out[R + n] = static_cast<T>(row.top_t + std::log(row.s_t));
      out[2 * R + n] = static_cast<T>((row.top_t - row.top_s) - (near ? std::log1p(x) : ratio));
    }
  });
}

template <typename T>
void gradient_of(const Tensor& z_, const Tensor& d_, const Head<T>& head, const T* row) {
  const int64_t R = z_.size(0), V = z_.size(1);
  T* z = static_cast<T*>(z_.mutable_data_ptr());
  T* d = static_cast<T*>(d_.mutable_data_ptr());
  torch::stable::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t first = 0; first < V; first += CHUNK) {
        gradient_chunk_(z + n * V + first, d + n * V + first, first, std::min(CHUNK, V - first), head, row[n],
                        row[R + n], row[2 * R + n]);
      }
    }
  });
}

template <typename T>
Head<T> head_of(const std::optional<Tensor>& bias, double scale, double softcap) {
  const T* b = bias.has_value() ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  return {b, static_cast<T>(scale), static_cast<T>(softcap)};
}

void statistics(const Tensor& z, const Tensor& d, const std::optional<Tensor>& bias, double scale, double softcap,
                const Tensor& out) {
  if (z.element_size() == 8) {
    statistics_of(z, d, head_of<double>(bias, scale, softcap), static_cast<double*>(out.mutable_data_ptr()));
  } else {
    statistics_of(z, d, head_of<float>(bias, scale, softcap), static_cast<float*>(out.mutable_data_ptr()));
  }
}

void gradient(const Tensor& z, const Tensor& d, const std::optional<Tensor>& bias, double scale, double softcap,
              const Tensor& row) {
  if (z.element_size() == 8) {
    gradient_of(z, d, head_of<double>(bias, scale, softcap), static_cast<const double*>(row.const_data_ptr()));
  } else {
    gradient_of(z, d, head_of<float>(bias, scale, softcap), static_cast<const float*>(row.const_data_ptr()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def(
      "head_kl_statistics(Tensor(a!) z, Tensor(b!) d, Tensor? bias, float scale, float softcap, Tensor(c!) out) -> ()");
  m.def(
      "head_kl_gradient(Tensor(a!) z, Tensor(b!) d, Tensor? bias, float scale, float softcap, Tensor row) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("head_kl_statistics", TORCH_BOX(&statistics));
  m.impl("head_kl_gradient", TORCH_BOX(&gradient));
}
