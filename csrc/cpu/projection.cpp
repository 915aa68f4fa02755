// project_out and add_project_rms_norm on CPU: rows without their part in a few orthonormal directions.
//
// Shapes: N rows, D features, G bases of K directions. Both ops take blocks of a few rows that share a basis through the
// same steps, in a buffer that stays in cache: read (and add), CHUNK features of each row at a time, with the products
// of the chunk with the directions; take the combination of the directions away, again by chunks; norm; write. So a
// chunk of the directions is read from near caches by all rows of the block, and each row's memory once. Products are
// fp32 in LANES partial sums within a chunk and double across chunks; a row's result does not depend on its block.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
#include "cpu/simd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t CHUNK = 512;      // features at a time
constexpr int64_t MAX_ROWS = 8;     // of a block
constexpr int64_t MAX_K = 64;       // directions
constexpr int64_t GRAIN = 1 << 14;  // elements of a task, at least
constexpr int64_t LANES = 8;        // elements of a vector
constexpr int64_t SUMS = 32;        // partial sums of a reduction

// Rows and directions of a block are few and known: unrolled before their sums are given registers, not after.
#define UNROLLED _Pragma("GCC unroll 8")

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <typename T>
using vec = typename Vector<T>::type;

template <typename T>
FASTGUARD_INLINE void load(vec<T>& v, const T* p) {
  std::memcpy(&v, p, sizeof v);
}

// c [R][MAX_K] += h [R] . q [K], over n features of rows `step` apart.
template <int R, int K, typename T>
FASTGUARD_INLINE void products(const T* h, const T* q, int64_t step, int64_t n, double* c) {
  vec<T> sums[R][K] = {};
  T ends[R][K] = {};
  int64_t f = 0;
  for (; f + LANES <= n; f += LANES) {
    vec<T> x[R];
    UNROLLED for (int r = 0; r < R; ++r) load(x[r], h + r * step + f);
    UNROLLED for (int k = 0; k < K; ++k) {
      vec<T> y;
      load(y, q + k * step + f);
      UNROLLED for (int r = 0; r < R; ++r) sums[r][k] += x[r] * y;
    }
  }
  for (; f < n; ++f) {
    UNROLLED for (int k = 0; k < K; ++k) {
      UNROLLED for (int r = 0; r < R; ++r) ends[r][k] += h[r * step + f] * q[k * step + f];
    }
  }
  UNROLLED for (int r = 0; r < R; ++r) {
    UNROLLED for (int k = 0; k < K; ++k) {
      double sum = ends[r][k];
      for (int64_t j = 0; j < LANES; ++j) sum += sums[r][k][j];
      c[r * MAX_K + k] += sum;
    }
  }
}

// h [R] -= c [R][MAX_K] q [K].
template <int R, int K, typename T>
FASTGUARD_INLINE void remove(T* h, const T* q, int64_t step, int64_t n, const T* c) {
  int64_t f = 0;
  for (; f + LANES <= n; f += LANES) {
    vec<T> x[R];
    UNROLLED for (int r = 0; r < R; ++r) load(x[r], h + r * step + f);
    UNROLLED for (int k = 0; k < K; ++k) {
      vec<T> y;
      load(y, q + k * step + f);
      UNROLLED for (int r = 0; r < R; ++r) x[r] -= c[r * MAX_K + k] * y;
    }
    UNROLLED for (int r = 0; r < R; ++r) std::memcpy(h + r * step + f, &x[r], sizeof x[r]);
  }
  for (; f < n; ++f) {
    UNROLLED for (int r = 0; r < R; ++r) {
      UNROLLED for (int k = 0; k < K; ++k) h[r * step + f] -= c[r * MAX_K + k] * q[k * step + f];
    }
  }
}

template <typename T>
FASTGUARD_INLINE void all_products(const T* h, int64_t rows, const T* q, int64_t K, int64_t step, int64_t n, double* c) {
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) products<2, 4>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
    if (r < rows) products<1, 4>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
  }
  for (; k < K; ++k) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) products<4, 1>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
    for (; r < rows; ++r) products<1, 1>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
  }
}

template <typename T>
FASTGUARD_INLINE void remove_all(T* h, int64_t rows, const T* q, int64_t K, int64_t step, int64_t n, const T* c) {
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) remove<2, 4>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
    if (r < rows) remove<1, 4>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
  }
  for (; k < K; ++k) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) remove<4, 1>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
    for (; r < rows; ++r) remove<1, 1>(h + r * step, q + k * step, step, n, c + r * MAX_K + k);
  }
}

// The sum of f(i) over n features.
template <typename T, typename F>
FASTGUARD_INLINE double sum_of(int64_t n, const F& f) {
  T lanes[SUMS] = {};
  int64_t i = 0;
  for (; i + SUMS <= n; i += SUMS) {
    for (int64_t j = 0; j < SUMS; ++j) lanes[j] += f(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += f(i + j);
  double sum = 0;
  for (int64_t j = 0; j < SUMS; ++j) sum += lanes[j];
  return sum;
}

template <typename T>
FASTGUARD_INLINE double squares(const T* x, T mean, int64_t n) {
  return sum_of<T>(n, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
}
template <typename T>
FASTGUARD_INLINE double sum(const T* x, int64_t n) {
  return sum_of<T>(n, [&](int64_t i) { return x[i]; });
}
// Sum of x y.
template <typename T>
FASTGUARD_INLINE double product(const T* x, const T* y, int64_t n) {
  return sum_of<T>(n, [&](int64_t i) { return x[i] * y[i]; });
}
// Sum of w g (x - mean).
template <typename T>
FASTGUARD_INLINE double weighted(const T* w, const T* g, const T* x, T mean, int64_t n) {
  return sum_of<T>(n, [&](int64_t i) { return w[i] * g[i] * (x[i] - mean); });
}
template <typename T>
FASTGUARD_INLINE void normed(const T* x, T mean, T inverse, const T* w, const T* b, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * inverse * w[i] + b[i];
}
template <typename T>
FASTGUARD_INLINE void scaled(T* x, T by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= by;
}
// out = a x + b y.
template <typename T>
FASTGUARD_INLINE void combination(T a, const T* x, T b, const T* y, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a * x[i] + b * y[i];
}
// x and g as they are; x becomes the norm's gradient there, dw and db grow. u = (x - mean) inverse;
// x <- inverse (w g - m - u s).
template <typename T>
FASTGUARD_INLINE void norm_gradient(T* __restrict x, const T* __restrict g, const T* __restrict w, T mean, T inverse, T m,
                                    T s, int64_t n, T* __restrict dw, T* __restrict db) {
  for (int64_t i = 0; i < n; ++i) {
    const T u = (x[i] - mean) * inverse;
    dw[i] += g[i] * u;
    db[i] += g[i];
    x[i] = inverse * (w[i] * g[i] - m - u * s);
  }
}

template <typename S, typename T>
FASTGUARD_INLINE T value(S x) {
  if constexpr (std::is_same_v<S, bf16>) {
    return static_cast<T>(of_bf16(x));
  } else {
    return static_cast<T>(x);
  }
}
template <typename S, typename T>
FASTGUARD_INLINE void set(const S* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value<S, T>(from[i]);
}
template <typename S, typename T>
FASTGUARD_INLINE void add(const S* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += value<S, T>(from[i]);
}
// to <- from as it is stored; from <- what was stored.
template <typename S, typename T>
FASTGUARD_INLINE void store(T* from, S* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<S, bf16>) {
      to[i] = to_bf16(static_cast<float>(from[i]));
    } else {
      to[i] = static_cast<S>(static_cast<std::conditional_t<std::is_same_v<S, T>, T, float>>(from[i]));
    }
    from[i] = value<S, T>(to[i]);
  }
}

// The same bodies, cloned per instruction set for fp32 arithmetic; float64 serves exactness, not speed.
#define BODY(RETURN, NAME, PARAMETERS_FLOAT, PARAMETERS_DOUBLE, CALL) \
  FASTGUARD_MULTIVERSION RETURN NAME##_ PARAMETERS_FLOAT { return NAME CALL; } \
  RETURN NAME##_ PARAMETERS_DOUBLE { return NAME CALL; }

BODY(void, all_products, (const float* h, int64_t rows, const float* q, int64_t K, int64_t step, int64_t n, double* c),
     (const double* h, int64_t rows, const double* q, int64_t K, int64_t step, int64_t n, double* c),
     (h, rows, q, K, step, n, c))
BODY(void, remove_all, (float* h, int64_t rows, const float* q, int64_t K, int64_t step, int64_t n, const float* c),
     (double* h, int64_t rows, const double* q, int64_t K, int64_t step, int64_t n, const double* c),
     (h, rows, q, K, step, n, c))
BODY(double, squares, (const float* x, float mean, int64_t n), (const double* x, double mean, int64_t n), (x, mean, n))
BODY(double, sum, (const float* x, int64_t n), (const double* x, int64_t n), (x, n))
BODY(double, product, (const float* x, const float* y, int64_t n), (const double* x, const double* y, int64_t n),
     (x, y, n))
BODY(double, weighted, (const float* w, const float* g, const float* x, float mean, int64_t n),
     (const double* w, const double* g, const double* x, double mean, int64_t n), (w, g, x, mean, n))
BODY(void, normed, (const float* x, float mean, float inverse, const float* w, const float* b, int64_t n, float* out),
     (const double* x, double mean, double inverse, const double* w, const double* b, int64_t n, double* out),
     (x, mean, inverse, w, b, n, out))
BODY(void, scaled, (float* x, float by, int64_t n), (double* x, double by, int64_t n), (x, by, n))
BODY(void, combination, (float a, const float* x, float b, const float* y, int64_t n, float* out),
     (double a, const double* x, double b, const double* y, int64_t n, double* out), (a, x, b, y, n, out))
BODY(void, norm_gradient,
     (float* x, const float* g, const float* w, float mean, float inverse, float m, float s, int64_t n, float* dw,
      float* db),
     (double* x, const double* g, const double* w, double mean, double inverse, double m, double s, int64_t n,
      double* dw, double* db),
     (x, g, w, mean, inverse, m, s, n, dw, db))
BODY(void, set, (const bf16* from, float* to, int64_t n), (const bf16* from, double* to, int64_t n), (from, to, n))
BODY(void, set, (const c10::Half* from, float* to, int64_t n), (const c10::Half* from, double* to, int64_t n),
     (from, to, n))
BODY(void, add, (const float* from, float* to, int64_t n), (const float* from, double* to, int64_t n), (from, to, n))
BODY(void, add, (const bf16* from, float* to, int64_t n), (const bf16* from, double* to, int64_t n), (from, to, n))
BODY(void, add, (const c10::Half* from, float* to, int64_t n), (const c10::Half* from, double* to, int64_t n),
     (from, to, n))
BODY(void, store, (float* from, bf16* to, int64_t n), (double* from, bf16* to, int64_t n), (from, to, n))
BODY(void, store, (float* from, c10::Half* to, int64_t n), (double* from, c10::Half* to, int64_t n), (from, to, n))
#undef BODY

// No, 1, 2 or 4 directions and fp32 or bf16 throughout: no buffer. A block of R rows is read for the products, read again from
// cache for what is left, which is stored as it comes, and the stored rows once more for the norm.

typedef uint16_t bits16 __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t bits32 __attribute__((vector_size(LANES * sizeof(uint32_t))));

FASTGUARD_INLINE void load(vec<float>& v, const bf16* p) {
  bits16 narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const bits32 wide = __builtin_convertvector(narrow, bits32) << 16;
  std::memcpy(&v, &wide, sizeof v);
}
// Stores v; v becomes what was stored.
FASTGUARD_INLINE void store_vector(vec<float>& v, float* p) { std::memcpy(p, &v, sizeof v); }
FASTGUARD_INLINE void store_vector(vec<float>& v, bf16* p) {
  bits32 bits;
  std::memcpy(&bits, &v, sizeof bits);
  const bits32 rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const bits32 nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;  // all ones where it is
  const bits32 kept = (rounded & ~nan) | (nan & 0x7FC0U);
  const bits16 narrow = __builtin_convertvector(kept, bits16);
  std::memcpy(p, &narrow, sizeof narrow);
  const bits32 wide = kept << 16;
  std::memcpy(&v, &wide, sizeof v);
}
FASTGUARD_INLINE float one(float x) { return x; }
FASTGUARD_INLINE float one(bf16 x) { return of_bf16(x); }
FASTGUARD_INLINE float store_one(float x, float* p) { return *p = x; }
FASTGUARD_INLINE float store_one(float x, bf16* p) { return of_bf16(*p = to_bf16(x)); }
FASTGUARD_INLINE double total(const vec<float>& v) {
  double sum = 0;
  for (int64_t j = 0; j < LANES; ++j) sum += v[j];
  return sum;
}

template <typename S>
struct Direct {
  const S *x, *update;  // update may be null
  int64_t x_step, update_step, D;
  const float* q;  // [K, D]
  int64_t K;
  float scale;
  S *stream, *out;  // out may be null: no norm
  int64_t stream_step;
  const float *weight, *bias;
  bool centred;  // a layer norm
  double eps;
};

template <int R, int K, bool UPDATE, typename S>
FASTGUARD_INLINE void direct_rows(const Direct<S>& a, int64_t i) {
  const S *x = a.x + i * a.x_step, *u = UPDATE ? a.update + i * a.update_step : nullptr;
  S* to = a.stream + i * a.stream_step;
  const int64_t D = a.D;
  float c[R][K + 1];
  if constexpr (K > 0) {
    double sums[R][K] = {};
    for (int64_t first = 0; first < D; first += CHUNK) {
      const int64_t end = std::min(D, first + CHUNK);
      vec<float> part[R][K] = {};
      float ends[R][K] = {};
      int64_t f = first;
      for (; f + LANES <= end; f += LANES) {
        vec<float> h[R], y;
        UNROLLED for (int r = 0; r < R; ++r) {
          load(h[r], x + r * a.x_step + f);
          if constexpr (UPDATE) {
            load(y, u + r * a.update_step + f);
            h[r] += y;
          }
        }
        UNROLLED for (int k = 0; k < K; ++k) {
          load(y, a.q + k * D + f);
          UNROLLED for (int r = 0; r < R; ++r) part[r][k] += h[r] * y;
        }
      }
      for (; f < end; ++f) {
        UNROLLED for (int r = 0; r < R; ++r) {
          float h = one(x[r * a.x_step + f]);
          if constexpr (UPDATE) h += one(u[r * a.update_step + f]);
          UNROLLED for (int k = 0; k < K; ++k) ends[r][k] += h * a.q[k * D + f];
        }
      }
      UNROLLED for (int r = 0; r < R; ++r) {
        UNROLLED for (int k = 0; k < K; ++k) sums[r][k] += total(part[r][k]) + ends[r][k];
      }
    }
    UNROLLED for (int r = 0; r < R; ++r) {
      UNROLLED for (int k = 0; k < K; ++k) c[r][k] = static_cast<float>(sums[r][k]) * a.scale;
    }
  }
  double squared[R] = {}, summed[R] = {};
  for (int64_t first = 0; first < D; first += CHUNK) {
    const int64_t end = std::min(D, first + CHUNK);
    vec<float> part[R] = {}, plain[R] = {};
    float ends[R] = {}, plain_ends[R] = {};
    int64_t f = first;
    for (; f + LANES <= end; f += LANES) {
      vec<float> h[R], y;
      UNROLLED for (int r = 0; r < R; ++r) {
        load(h[r], x + r * a.x_step + f);
        if constexpr (UPDATE) {
          load(y, u + r * a.update_step + f);
          h[r] += y;
        }
      }
      UNROLLED for (int k = 0; k < K; ++k) {
        load(y, a.q + k * D + f);
        UNROLLED for (int r = 0; r < R; ++r) h[r] -= c[r][k] * y;
      }
      UNROLLED for (int r = 0; r < R; ++r) {
        store_vector(h[r], to + r * a.stream_step + f);
        part[r] += h[r] * h[r];
        plain[r] += h[r];
      }
    }
    for (; f < end; ++f) {
      UNROLLED for (int r = 0; r < R; ++r) {
        float h = one(x[r * a.x_step + f]);
        if constexpr (UPDATE) h += one(u[r * a.update_step + f]);
        UNROLLED for (int k = 0; k < K; ++k) h -= c[r][k] * a.q[k * D + f];
        h = store_one(h, to + r * a.stream_step + f);
        ends[r] += h * h;
        plain_ends[r] += h;
      }
    }
    UNROLLED for (int r = 0; r < R; ++r) {
      squared[r] += total(part[r]) + ends[r];
      summed[r] += total(plain[r]) + plain_ends[r];
    }
  }
  if (a.out == nullptr) return;
  UNROLLED for (int r = 0; r < R; ++r) {
    const S* h = to + r * a.stream_step;
    S* out = a.out + (i + r) * D;
    float mean = 0;
    if (a.centred) {
      mean = static_cast<float>(summed[r] / static_cast<double>(D));
      squared[r] = 0;
      for (int64_t first = 0; first < D; first += CHUNK) {
        const int64_t end = std::min(D, first + CHUNK);
        vec<float> part = {}, y;
        float ends = 0;
        int64_t f = first;
        for (; f + LANES <= end; f += LANES) {
          load(y, h + f);
          y -= mean;
          part += y * y;
        }
        for (; f < end; ++f) ends += (one(h[f]) - mean) * (one(h[f]) - mean);
        squared[r] += total(part) + ends;
      }
    }
    const float inverse = static_cast<float>(1 / std::sqrt(squared[r] / static_cast<double>(D) + a.eps));
    int64_t f = 0;
    for (; f + LANES <= D; f += LANES) {
      vec<float> y, w;
      load(y, h + f);
      load(w, a.weight + f);
      y = (y - mean) * inverse * w;
      if (a.bias != nullptr) {
        load(w, a.bias + f);
        y += w;
      }
      store_vector(y, out + f);
    }
    for (; f < D; ++f) {
      const float y = (one(h[f]) - mean) * inverse * a.weight[f];
      store_one(a.bias != nullptr ? y + a.bias[f] : y, out + f);
    }
  }
}

template <bool UPDATE, typename S>
FASTGUARD_INLINE void direct_block(const Direct<S>& a, int64_t i, int64_t rows, bool projected) {
  if (projected && rows == 2) {
    switch (a.K) {
      case 1: return direct_rows<2, 1, UPDATE>(a, i);
      case 2: return direct_rows<2, 2, UPDATE>(a, i);
      default: return direct_rows<2, 4, UPDATE>(a, i);
    }
  }
  for (int64_t r = i; r < i + rows; ++r) {
    switch (projected ? a.K : 0) {
      case 0: direct_rows<1, 0, UPDATE>(a, r); break;
      case 1: direct_rows<1, 1, UPDATE>(a, r); break;
      case 2: direct_rows<1, 2, UPDATE>(a, r); break;
      default: direct_rows<1, 4, UPDATE>(a, r);
    }
  }
}
// Rows i and, where there are two, i + 1, which share the basis a.q.
template <typename S>
FASTGUARD_INLINE void direct(const Direct<S>& a, int64_t i, int64_t rows, bool projected) {
  if (a.update != nullptr) {
    direct_block<true>(a, i, rows, projected);
  } else {
    direct_block<false>(a, i, rows, projected);
  }
}
// Not for AVX-512: vectors are of 32 bytes as they are, and memory is what they wait for.
FASTGUARD_AVX2 void direct_(const Direct<float>& a, int64_t i, int64_t rows, bool projected) {
  direct(a, i, rows, projected);
}
FASTGUARD_AVX2 void direct_(const Direct<bf16>& a, int64_t i, int64_t rows, bool projected) {
  direct(a, i, rows, projected);
}

// Calls f with a pointer to what lies at `data` in a dtype.
template <typename F>
void by_dtype(const void* data, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double: return f(static_cast<const double*>(data));
    case ScalarType::Float: return f(static_cast<const float*>(data));
    case ScalarType::BFloat16: return f(static_cast<const bf16*>(data));
    case ScalarType::Half: return f(static_cast<const c10::Half*>(data));
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

// Rows of a matrix, or of none.
struct Rows {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t step = 0;

  Rows() = default;
  explicit Rows(const Tensor& t) : data(t.data_ptr()), dtype(t.scalar_type()), step(t.dim() > 1 ? t.stride(0) : 0) {}
  explicit Rows(const Maybe& t) {
    if (t.has_value()) *this = Rows(*t);
  }
  explicit operator bool() const { return data != nullptr; }

  // n features of row i from `first` on.
  template <typename T>
  void read(int64_t i, int64_t first, int64_t n, T* to) const {
    by_dtype(data, dtype, [&](auto* from) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
      from += i * step + first;
      if constexpr (std::is_same_v<S, T>) {
        std::memcpy(to, from, n * sizeof(T));
      } else if constexpr (std::is_same_v<S, bf16> || std::is_same_v<S, c10::Half>) {
        set_(from, to, n);
      } else {
        set(from, to, n);
      }
    });
  }
  template <typename T>
  void add_to(int64_t i, int64_t first, int64_t n, T* to) const {
    by_dtype(data, dtype, [&](auto* from) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
      from += i * step + first;
      if constexpr (std::is_same_v<S, double>) {
        add(from, to, n);
      } else {
        add_(from, to, n);
      }
    });
  }
  // Writes; from <- what was written.
  template <typename T>
  void write(int64_t i, int64_t first, int64_t n, T* from) const {
    by_dtype(data, dtype, [&](const auto* type) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      S* to = static_cast<S*>(data) + i * step + first;
      if constexpr (std::is_same_v<S, T>) {
        std::memcpy(to, from, n * sizeof(T));
      } else if constexpr (std::is_same_v<S, bf16> || std::is_same_v<S, c10::Half>) {
        store_(from, to, n);
      } else {
        store(from, to, n);
      }
    });
  }
};

// f(first, n) for every chunk of D features.
template <typename F>
void chunks(int64_t D, const F& f) {
  for (int64_t first = 0; first < D; first += CHUNK) f(first, std::min(CHUNK, D - first));
}

template <typename T>
struct Basis {
  const T* data = nullptr;
  const int64_t* index = nullptr;
  int64_t K = 0, D = 0, each = 1;
  T scale = 0;

  Basis(const Maybe& basis, const Maybe& of, double by, int64_t n, int64_t width) : D(width), scale(static_cast<T>(by)) {
    if (!basis.has_value()) return;
    data = static_cast<const T*>(basis->const_data_ptr());
    K = basis->size(1);
    if (of.has_value()) {
      index = static_cast<const int64_t*>(of->const_data_ptr());
      each = n / of->size(0);
    }
  }
  // The basis of row i; null for none.
  const T* of(int64_t i) const {
    if (data == nullptr || index == nullptr) return data;
    const int64_t g = index[i / each];
    return g < 0 ? nullptr : data + g * K * D;
  }
  // f(i, rows, q) for blocks of at most so many rows from i on that share the basis q. A block of few directions, which
  // are soon read again, is short: its rows stay in the nearest cache.
  template <typename F>
  void blocks(int64_t begin, int64_t end, const F& f, int64_t most = 0) const {
    if (most == 0) most = data == nullptr ? 1 : (K <= 4 ? 2 : MAX_ROWS);
    for (int64_t i = begin; i < end;) {
      const T* q = of(i);
      int64_t rows = 1;
      while (rows < most && i + rows < end && of(i + rows) == q) ++rows;
      f(i, rows, q);
      i += rows;
    }
  }
};

// The block's rows h [rows][D] without their part in q; read(first, n) fills a chunk of all of them, and done(first, n)
// takes it.
template <typename T, typename Read, typename Done>
void project(const Basis<T>& b, const T* q, T* h, int64_t rows, const Read& read, const Done& done) {
  double c[MAX_ROWS * MAX_K] = {};
  T by[MAX_ROWS * MAX_K];
  chunks(b.D, [&](int64_t first, int64_t n) {
    read(first, n);
    if (q != nullptr) all_products_(h + first, rows, q + first, b.K, b.D, n, c);
    if (q == nullptr) done(first, n);
  });
  if (q == nullptr) return;
  for (int64_t i = 0; i < rows * MAX_K; ++i) by[i] = static_cast<T>(c[i]) * b.scale;
  chunks(b.D, [&](int64_t first, int64_t n) {
    remove_all_(h + first, rows, q + first, b.K, b.D, n, by);
    done(first, n);
  });
}

template <typename F>
void parallel_rows(int64_t n, int64_t width, const F& f) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)), f);
}

// Calls f with a value of the dtype in which x is worked on.
template <typename F>
void by_wide(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) {
    f(double());
  } else {
    f(float());
  }
}

// Whether the direct kernels take it, for which all tensors have the dtype S; then f does, with a Direct<S>.
template <typename F>
bool directly(const Tensor& x, const Maybe& update, const Basis<float>& b, const F& f) {
  if (b.K > 4 || b.K == 3 || (update.has_value() && update->scalar_type() != x.scalar_type())) return false;
  auto call = [&](auto type) {
    using S = decltype(type);
    Direct<S> a = {};
    a.x = static_cast<const S*>(x.const_data_ptr());
    a.x_step = x.stride(0);
    if (update.has_value()) {
      a.update = static_cast<const S*>(update->const_data_ptr());
      a.update_step = update->stride(0);
    }
    a.D = b.D;
    a.K = b.K;
    a.scale = b.scale;
    f(a);
  };
  if (x.scalar_type() == ScalarType::Float) {
    call(float());
  } else if (x.scalar_type() == ScalarType::BFloat16) {
    call(bf16());
  } else {
    return false;
  }
  return true;
}

template <typename S>
void run_directly(const Direct<S>& a, const Basis<float>& b, int64_t n) {
  parallel_rows(n, a.D, [&](int64_t begin, int64_t end) {
    Direct<S> own = a;
    b.blocks(
        begin, end,
        [&](int64_t i, int64_t rows, const float* q) {
          own.q = q;
          direct_(own, i, rows, q != nullptr);
        },
        2);
  });
}

void project_out(const Tensor& x, const Tensor& basis, const Maybe& index, double scale, bool preserve,
                 const Tensor& out) {
  if (!preserve && x.scalar_type() != ScalarType::Double && out.scalar_type() == x.scalar_type()) {
    const Basis<float> b(basis, index, scale, x.size(0), x.size(1));
    const bool done = directly(x, std::nullopt, b, [&](auto& a) {
      a.stream = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(a.x)>>*>(out.mutable_data_ptr());
      a.stream_step = out.stride(0);
      run_directly(a, b, x.size(0));
    });
    if (done) return;
  }
  by_wide(x, [&](auto t) {
    using T = decltype(t);
    const int64_t N = x.size(0), D = x.size(1);
    const Basis<T> b(basis, index, scale, N, D);
    const Rows from(x), to(out);
    parallel_rows(N, D, [&](int64_t begin, int64_t end) {
      std::vector<T> buffer(MAX_ROWS * D);
      T* h = buffer.data();
      b.blocks(begin, end, [&](int64_t i, int64_t rows, const T* q) {
        double before[MAX_ROWS] = {}, after[MAX_ROWS] = {};
        const bool lengths = preserve && q != nullptr;
        project(
            b, q, h, rows,
            [&](int64_t first, int64_t n) {
              for (int64_t r = 0; r < rows; ++r) {
                from.read(i + r, first, n, h + r * D + first);
                if (lengths) before[r] += squares_(h + r * D + first, T(0), n);
              }
            },
            [&](int64_t first, int64_t n) {
              for (int64_t r = 0; r < rows; ++r) {
                if (lengths) {
                  after[r] += squares_(h + r * D + first, T(0), n);
                } else {
                  to.write(i + r, first, n, h + r * D + first);
                }
              }
            });
        for (int64_t r = 0; lengths && r < rows; ++r) {
          const T by = after[r] == 0 ? T(0) : static_cast<T>(std::sqrt(before[r]) / std::sqrt(after[r]));
          scaled_(h + r * D, by, D);
          to.write(i + r, 0, D, h + r * D);
        }
      });
    });
  });
}

// dx [N, D] of the norm-preserving form: z = x - scale (x Q^T) Q, y = z |x| / |z|.
void project_out_backward(const Tensor& grad, const Tensor& x, const Tensor& basis, const Maybe& index, double scale,
                          const Tensor& dx) {
  by_wide(x, [&](auto t) {
    using T = decltype(t);
    const int64_t N = x.size(0), D = x.size(1);
    const Basis<T> b(basis, index, scale, N, D);
    const Rows from(x), of(grad), to(dx);
    parallel_rows(N, D, [&](int64_t begin, int64_t end) {
      std::vector<T> buffer(2 * MAX_ROWS * D), one(D);
      T *z = buffer.data(), *g = z + MAX_ROWS * D;
      b.blocks(begin, end, [&](int64_t i, int64_t rows, const T* q) {
        double before[MAX_ROWS] = {}, after[MAX_ROWS] = {}, along[MAX_ROWS] = {};
        project(
            b, q, z, rows,
            [&](int64_t first, int64_t n) {
              for (int64_t r = 0; r < rows; ++r) {
                from.read(i + r, first, n, z + r * D + first);
                of.read(i + r, first, n, g + r * D + first);
                before[r] += squares_(z + r * D + first, T(0), n);
              }
            },
            [&](int64_t first, int64_t n) {
              for (int64_t r = 0; r < rows; ++r) {
                after[r] += squares_(z + r * D + first, T(0), n);
                along[r] += product_(z + r * D + first, g + r * D + first, n);
              }
            });
        // g <- the gradient at z: |x| / |z| (g - (u . g) u) with u = z / |z|.
        for (int64_t r = 0; q != nullptr && r < rows; ++r) {
          const double length = std::sqrt(before[r]), left = std::sqrt(after[r]);
          const double ratio = left == 0 ? 0 : length / left;
          along[r] = left == 0 ? 0 : along[r] / left;
          combination_(static_cast<T>(ratio), g + r * D, static_cast<T>(left == 0 ? 0 : -ratio * along[r] / left),
                       z + r * D, D, g + r * D);
        }
        project(b, q, g, rows, [](int64_t, int64_t) {}, [](int64_t, int64_t) {});
        for (int64_t r = 0; r < rows; ++r) {
          if (q != nullptr) {  // what goes through |x|
            const double length = std::sqrt(before[r]);
            from.read(i + r, 0, D, one.data());
            combination_(T(1), g + r * D, static_cast<T>(length == 0 ? 0 : along[r] / length), one.data(), D,
                         g + r * D);
          }
          to.write(i + r, 0, D, g + r * D);
        }
      });
    });
  });
}

enum Kind : int64_t { RMS = 0, RMS_OFFSET = 1, LAYER = 2 };

// A norm's weight and bias [D] as the arithmetic reads them.
template <typename T>
struct Norm {
  std::vector<T> weight, bias;
  int64_t kind;
  double eps;

  Norm(const Maybe& w, const Maybe& b, int64_t which, double epsilon, int64_t D)
      : weight(D, T(1)), bias(D, T(0)), kind(which), eps(epsilon) {
    if (w.has_value()) Rows(w).read(0, 0, D, weight.data());
    if (w.has_value() && kind == RMS_OFFSET) {
      for (T& x : weight) x += T(1);
    }
    if (b.has_value()) Rows(b).read(0, 0, D, bias.data());
  }
  // The mean (0 but for a layer norm) and the inverse deviation of a row whose features have this sum and squares.
  void of(const T* h, double total, double squared, int64_t D, T* mean, T* inverse) const {
    *mean = 0;
    if (kind == LAYER) {
      *mean = static_cast<T>(total / static_cast<double>(D));
      squared = 0;
      chunks(D, [&](int64_t first, int64_t n) { squared += squares_(h + first, *mean, n); });
    }
    *inverse = static_cast<T>(1 / std::sqrt(squared / static_cast<double>(D) + eps));
  }
};

void add_project_rms_norm(const Tensor& residual, const Tensor& update, const Maybe& basis, const Maybe& index,
                          const Maybe& weight, const Maybe& bias, double eps, double scale, int64_t kind,
                          const Tensor& stream, const Tensor& out) {
  if (residual.scalar_type() != ScalarType::Double) {
    const int64_t N = residual.size(0), D = residual.size(1);
    const Basis<float> b(basis, index, scale, N, D);
    const bool done = directly(residual, update, b, [&](auto& a) {
      const Norm<float> norm(weight, bias, kind, eps, D);
      using S = std::remove_const_t<std::remove_pointer_t<decltype(a.x)>>;
      a.stream = static_cast<S*>(stream.mutable_data_ptr());
      a.stream_step = D;
      a.out = static_cast<S*>(out.mutable_data_ptr());
      a.weight = norm.weight.data();
      a.bias = bias.has_value() ? norm.bias.data() : nullptr;
      a.centred = kind == LAYER;
      a.eps = eps;
      run_directly(a, b, N);
    });
    if (done) return;
  }
  by_wide(residual, [&](auto t) {
    using T = decltype(t);
    const int64_t N = residual.size(0), D = residual.size(1);
    const Basis<T> b(basis, index, scale, N, D);
    const Norm<T> norm(weight, bias, kind, eps, D);
    const Rows from(residual), more(update), to(stream), also(out);
    parallel_rows(N, D, [&](int64_t begin, int64_t end) {
      std::vector<T> buffer(MAX_ROWS * D);
      T* h = buffer.data();
      alignas(64) T y[CHUNK];
      b.blocks(begin, end, [&](int64_t i, int64_t rows, const T* q) {
        double total[MAX_ROWS] = {}, squared[MAX_ROWS] = {};
        project(
            b, q, h, rows,
            [&](int64_t first, int64_t n) {
              for (int64_t r = 0; r < rows; ++r) {
                from.read(i + r, first, n, h + r * D + first);
                more.add_to(i + r, first, n, h + r * D + first);
              }
            },
            [&](int64_t first, int64_t n) {
              for (int64_t r = 0; r < rows; ++r) {
                T* part = h + r * D + first;
                to.write(i + r, first, n, part);  // the norm is of the stream as it is stored
                if (kind == LAYER) {
                  total[r] += sum_(part, n);
                } else {
                  squared[r] += squares_(part, T(0), n);
                }
              }
            });
        for (int64_t r = 0; r < rows; ++r) {
          T mean, inverse;
          norm.of(h + r * D, total[r], squared[r], D, &mean, &inverse);
          chunks(D, [&](int64_t first, int64_t n) {
            normed_(h + r * D + first, mean, inverse, norm.weight.data() + first, norm.bias.data() + first, n, y);
            also.write(i + r, first, n, y);
          });
        }
      });
    });
  });
}

// dh [N, D], the gradient at residual + update; partial [parts, 2, D]: of weight and bias, from as many parts of the rows.
void add_project_rms_norm_backward(const Maybe& grad_stream, const Maybe& grad_normed, const Tensor& stream,
                                   const Maybe& basis, const Maybe& index, const Maybe& weight, double eps,
                                   double scale, int64_t kind, const Tensor& dh, const Tensor& partial) {
  by_wide(stream, [&](auto t) {
    using T = decltype(t);
    const int64_t N = stream.size(0), D = stream.size(1), parts = partial.size(0);
    const Basis<T> b(basis, index, scale, N, D);
    const Norm<T> norm(weight, std::nullopt, kind, eps, D);
    const Rows from(stream), of_stream(grad_stream), of_normed(grad_normed), to(dh);
    T* sums = static_cast<T*>(partial.mutable_data_ptr());
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> buffer((MAX_ROWS + 1) * D);
      T *h = buffer.data(), *g = h + MAX_ROWS * D;
      for (int64_t part = begin; part < end; ++part) {
        T *dw = sums + part * 2 * D, *db = dw + D;
        b.blocks(part * N / parts, (part + 1) * N / parts, [&](int64_t i, int64_t rows, const T* q) {
          for (int64_t r = 0; of_normed && r < rows; ++r) {
            T* x = h + r * D;
            const T* w = norm.weight.data();
            double total = 0, squared = 0, m = 0, s = 0;
            chunks(D, [&](int64_t first, int64_t n) {
              from.read(i + r, first, n, x + first);
              of_normed.read(i + r, first, n, g + first);
              if (kind == LAYER) {
                total += sum_(x + first, n);
              } else {
                squared += squares_(x + first, T(0), n);
              }
            });
            T mean, inverse;
            norm.of(x, total, squared, D, &mean, &inverse);
            chunks(D, [&](int64_t first, int64_t n) {
              s += weighted_(w + first, g + first, x + first, mean, n);
              if (kind == LAYER) m += product_(w + first, g + first, n);
            });
            norm_gradient_(x, g, w, mean, inverse, static_cast<T>(m / static_cast<double>(D)),
                           static_cast<T>(s * inverse / static_cast<double>(D)), D, dw, db);
          }
          project(
              b, q, h, rows,
              [&](int64_t first, int64_t n) {
                for (int64_t r = 0; r < rows; ++r) {
                  T* part_of_row = h + r * D + first;
                  if (!of_normed) {
                    of_stream.read(i + r, first, n, part_of_row);
                  } else if (of_stream) {
                    of_stream.add_to(i + r, first, n, part_of_row);
                  }
                }
              },
              [&](int64_t first, int64_t n) {
                for (int64_t r = 0; r < rows; ++r) to.write(i + r, first, n, h + r * D + first);
              });
        });
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def("project_out(Tensor x, Tensor basis, Tensor? index, float scale, bool preserve, Tensor(a!) out) -> ()");
  m.def(
      "project_out_backward(Tensor grad, Tensor x, Tensor basis, Tensor? index, float scale, Tensor(a!) dx) -> ()");
  m.def(
      "add_project_rms_norm(Tensor residual, Tensor update, Tensor? basis, Tensor? index, Tensor? weight, Tensor? bias, "
      "float eps, float scale, int kind, Tensor(a!) stream, Tensor(b!) normed) -> ()");
  m.def(
      "add_project_rms_norm_backward(Tensor? grad_stream, Tensor? grad_normed, Tensor stream, Tensor? basis, "
      "Tensor? index, Tensor? weight, float eps, float scale, int kind, Tensor(a!) dh, Tensor(b!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("project_out", TORCH_BOX(&project_out));
  m.impl("project_out_backward", TORCH_BOX(&project_out_backward));
  m.impl("add_project_rms_norm", TORCH_BOX(&add_project_rms_norm));
  m.impl("add_project_rms_norm_backward", TORCH_BOX(&add_project_rms_norm_backward));
}
