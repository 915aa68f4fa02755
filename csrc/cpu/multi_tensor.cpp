// multi_tensor on CPU: one threaded pass over lists of tensors, as if each list were one long array.
//
// The i-th tensors of all lists have the same size. They are laid end to end, each from a multiple of ALIGN elements
// on, and cut into spans of equal length: a task each, whatever the tensors' sizes. Tensors in fp32 and bf16 are worked
// on where they lie; blocks of others are brought to fp32 (float64 where one of the i-th tensors is float64) in buffers
// that stay in cache, and rounded back. Sums are kept in double per span and added in order: they do not depend on the
// threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/bf16.h"
#include "cpu/simd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t SPAN = 1 << 16;        // elements of a task
constexpr int64_t COPY_SPAN = 1 << 20;   // bytes of a task that copies
constexpr int64_t ALIGN = 64;            // elements or bytes that no task shares with another
constexpr int64_t BLOCK = 1024;          // elements that are converted at a time
constexpr int64_t STREAMED = 1 << 24;    // bytes from which on a copy goes past the caches

struct Operand {
  char* data;
  ScalarType dtype;
};

template <size_t N>
struct Item {  // the i-th tensors of N lists
  int64_t start, size;
  bool wide;  // arithmetic in float64
  std::array<Operand, N> at;
};

template <size_t N>
struct Work {
  std::vector<Item<N>> items;
  int64_t total = 0;

  void add(int64_t size, const std::array<Operand, N>& at) {
    const bool wide = std::any_of(at.begin(), at.end(), [](const Operand& o) { return o.dtype == ScalarType::Double; });
    if (size > 0) items.push_back({total, size, wide, at});
    total += (size + ALIGN - 1) / ALIGN * ALIGN;
  }
  int64_t spans(int64_t length) const { return (total + length - 1) / length; }

  // f(span, item, first, last) for the part of each item in each span; spans in parallel.
  template <typename F>
  void each(int64_t length, const F& f) const {
    torch::stable::parallel_for(0, spans(length), 1, [&](int64_t begin, int64_t end) {
      auto item = std::partition_point(items.begin(), items.end(),
                                       [&](const Item<N>& i) { return i.start + i.size <= begin * length; });
      for (int64_t span = begin; span < end; ++span) {
        const int64_t stop = (span + 1) * length;
        for (; item != items.end() && item->start < stop; ++item) {
          f(span, *item, std::max<int64_t>(0, span * length - item->start), std::min(item->size, stop - item->start));
          if (item->start + item->size > stop) break;
        }
      }
    });
  }
};

template <size_t N>
Work<N> work(const std::array<const Tensors*, N>& lists) {
  Work<N> out;
  out.items.reserve(lists[0]->size());
  for (size_t i = 0; i < lists[0]->size(); ++i) {
    std::array<Operand, N> at;
    for (size_t k = 0; k < N; ++k) {
      const Tensor& t = (*lists[k])[i];
      at[k] = {static_cast<char*>(t.data_ptr()), t.scalar_type()};
    }
    out.add((*lists[0])[i].numel(), at);
  }
  return out;
}

FASTGUARD_INLINE double value(double x) { return x; }
FASTGUARD_INLINE float value(float x) { return x; }
FASTGUARD_INLINE float value(c10::Half x) { return static_cast<float>(x); }
FASTGUARD_INLINE float value(bf16 x) { return of_bf16(x); }

FASTGUARD_INLINE void set(double& to, double x) { to = x; }
FASTGUARD_INLINE void set(float& to, double x) { to = static_cast<float>(x); }
FASTGUARD_INLINE void set(float& to, float x) { to = x; }
FASTGUARD_INLINE void set(c10::Half& to, double x) { to = static_cast<c10::Half>(static_cast<float>(x)); }
FASTGUARD_INLINE void set(bf16& to, double x) { to = to_bf16(static_cast<float>(x)); }
FASTGUARD_INLINE void set(bf16& to, float x) { to = to_bf16(x); }

template <typename S>
constexpr ScalarType DTYPE = ScalarType::Double;
template <>
constexpr ScalarType DTYPE<float> = ScalarType::Float;
template <>
constexpr ScalarType DTYPE<bf16> = ScalarType::BFloat16;
template <>
constexpr ScalarType DTYPE<c10::Half> = ScalarType::Half;

// Kernels on what is stored as fp32 or bf16: clones per instruction set are plain functions, one per combination.

struct Adam {  // see scalars.py
  double decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps;
};

template <typename T, typename P, typename G, typename M>
FASTGUARD_INLINE void adam(P* __restrict p, const G* __restrict g, M* __restrict m, M* __restrict v, const Adam& a,
                           int64_t n) {
  const T decay = static_cast<T>(a.decay), mean_weight = static_cast<T>(a.mean_weight),
          square_keep = static_cast<T>(a.square_keep), square_weight = static_cast<T>(a.square_weight),
          step_size = static_cast<T>(a.step_size), unbias = static_cast<T>(1 / a.root_correction),
          eps = static_cast<T>(a.eps);
  for (int64_t i = 0; i < n; ++i) {
    const T gradient = value(g[i]), before = value(m[i]);
    const T mean = before + mean_weight * (gradient - before);
    const T square = square_keep * value(v[i]) + square_weight * gradient * gradient;
    set(m[i], mean);
    set(v[i], square);
    set(p[i], decay * value(p[i]) - step_size * mean / (std::sqrt(square) * unbias + eps));
  }
}
FASTGUARD_MULTIVERSION void adam_(float* p, const float* g, float* m, float* v, const Adam& a, int64_t n) {
  adam<float>(p, g, m, v, a, n);
}
FASTGUARD_MULTIVERSION void adam_(bf16* p, const bf16* g, bf16* m, bf16* v, const Adam& a, int64_t n) {
  adam<float>(p, g, m, v, a, n);
}
FASTGUARD_MULTIVERSION void adam_(bf16* p, const bf16* g, float* m, float* v, const Adam& a, int64_t n) {
  adam<float>(p, g, m, v, a, n);
}
void adam_(double* p, const double* g, double* m, double* v, const Adam& a, int64_t n) {
  adam<double>(p, g, m, v, a, n);
}

// Sixteen fp32 numbers: out of fp32 in their order; out of bf16, `a` holds those of even and `b` those of odd place,
// which takes a shift and a mask where GCC would make a chain of shuffles. Passed by reference: a vector wider than the
// baseline's registers has no place in a call.
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(32), aligned(2), may_alias));
struct Pair {
  Lanes a, b;
};
constexpr int64_t PAIR = 16;

FASTGUARD_INLINE void get(const float* p, Pair& x) {
  x.a = *reinterpret_cast<const Lanes*>(p);
  x.b = *reinterpret_cast<const Lanes*>(p + 8);
}
FASTGUARD_INLINE void get(const bf16* p, Pair& x) {
  const Bits bits = *reinterpret_cast<const Bits*>(p), even = bits << 16, odd = bits & 0xFFFF0000U;
  x.a = reinterpret_cast<const Lanes&>(even);
  x.b = reinterpret_cast<const Lanes&>(odd);
}
// In the order that `like` is read in.
FASTGUARD_INLINE void get(const float* p, const float*, Pair& x) { get(p, x); }
FASTGUARD_INLINE void get(const bf16* p, const bf16*, Pair& x) { get(p, x); }
FASTGUARD_INLINE void get(const float* p, const bf16*, Pair& x) {
  Pair y;
  get(p, y);
#if defined(__clang__)
  x.a = __builtin_shufflevector(y.a, y.b, 0, 2, 4, 6, 8, 10, 12, 14);
  x.b = __builtin_shufflevector(y.a, y.b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  x.a = __builtin_shuffle(y.a, y.b, Bits{0, 2, 4, 6, 8, 10, 12, 14});
  x.b = __builtin_shuffle(y.a, y.b, Bits{1, 3, 5, 7, 9, 11, 13, 15});
#endif
}
FASTGUARD_INLINE void round_bf16(Lanes& x) {
  const Bits bits = reinterpret_cast<const Bits&>(x);
  Bits rounded = bits + 0x7FFFU + ((bits >> 16) & 1U);
  rounded = (bits & 0x7FFFFFFFU) > 0x7F800000U ? Bits{} + 0x7FC00000U : rounded & 0xFFFF0000U;
  x = reinterpret_cast<const Lanes&>(rounded);
}
// Stores x and leaves in it what was stored.
FASTGUARD_INLINE void put(float* p, Pair& x) {
  *reinterpret_cast<Lanes*>(p) = x.a;
  *reinterpret_cast<Lanes*>(p + 8) = x.b;
}
FASTGUARD_INLINE void put(bf16* p, Pair& x) {
  round_bf16(x.a);
  round_bf16(x.b);
  *reinterpret_cast<Bits*>(p) = reinterpret_cast<const Bits&>(x.a) >> 16 | reinterpret_cast<const Bits&>(x.b);
}

// a += weight * t. Whole cache lines at a time: a tenth faster than the loop that GCC makes of the last line.
template <typename S>
FASTGUARD_INLINE void axpy(S* __restrict a, const S* __restrict t, float weight, int64_t n) {
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    Pair sum, x;
    get(a + i, sum);
    get(t + i, x);
    sum.a += weight * x.a;
    sum.b += weight * x.b;
    put(a + i, sum);
  }
  for (; i < n; ++i) set(a[i], value(a[i]) + weight * value(t[i]));
}
FASTGUARD_MULTIVERSION void axpy_(float* a, const float* t, float w, int64_t n) { axpy(a, t, w, n); }
FASTGUARD_MULTIVERSION void axpy_(bf16* a, const bf16* t, float w, int64_t n) { axpy(a, t, w, n); }
FASTGUARD_MULTIVERSION void axpy_(float* __restrict a, const bf16* __restrict t, float w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += w * value(t[i]);
}
void axpy_(double* a, const double* t, double w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += w * t[i];
}

// Sums of products: eight to a lane in fp32, then in double. An error of a few 2^-24 of a run, less of many.
struct Sum {
  Lanes run[2] = {};
  Doubles total = {};
  FASTGUARD_INLINE void add(const Pair& x, const Pair& y) {
    run[0] += x.a * y.a;
    run[1] += x.b * y.b;
  }
  FASTGUARD_INLINE void end_run() {
    total += __builtin_convertvector(run[0] + run[1], Doubles);
    run[0] = run[1] = Lanes{};
  }
  FASTGUARD_INLINE double value() const {
    return ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]));
  }
};
constexpr int64_t RUN = 8 * PAIR;

template <typename S>
FASTGUARD_INLINE double dot_of(const S* a, const S* b, int64_t n) {
  Sum first, second;
  int64_t i = 0;
  for (; i + 2 * RUN <= n; i += 2 * RUN) {
    for (int64_t u = i; u < i + 2 * RUN; u += 2 * PAIR) {
      Pair x, y;
      get(a + u, x);
      get(b + u, y);
      first.add(x, y);
      get(a + u + PAIR, x);
      get(b + u + PAIR, y);
      second.add(x, y);
    }
    first.end_run();
    second.end_run();
  }
  double rest = 0;
  for (; i < n; ++i) rest += static_cast<double>(value(a[i])) * value(b[i]);
  return first.value() + second.value() + rest;
}
FASTGUARD_MULTIVERSION double dot_(const float* a, const float* b, int64_t n) { return dot_of(a, b, n); }
FASTGUARD_MULTIVERSION double dot_(const bf16* a, const bf16* b, int64_t n) { return dot_of(a, b, n); }
FASTGUARD_MULTIVERSION double square_(const float* a, int64_t n) { return dot_of(a, a, n); }
FASTGUARD_MULTIVERSION double square_(const bf16* a, int64_t n) { return dot_of(a, a, n); }
double dot_(const double* a, const double* b, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t u = 0; u < 4; ++u) sum[u] += a[i + u] * b[i + u];
  }
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
double square_(const double* a, int64_t n) { return dot_(a, a, n); }

// t = source + scale * d for a multiple of RUN elements; without a source, t is its own. Adds to sums the products of
// the intended and the realised step; with `through`, the latter as bf16 has it.
template <typename T, typename D, typename S>
FASTGUARD_INLINE void move(T* __restrict t, const D* __restrict d, const S* __restrict source, float scale,
                           bool through, int64_t n, double* sums) {
  Sum intended, realised, both;
  for (int64_t i = 0; i < n; i += RUN) {
    for (int64_t u = i; u < i + RUN; u += PAIR) {
      Pair old, now, step;
      get(t + u, old);
      get(d + u, t, step);
      now = old;
      if (source != nullptr) get(source + u, t, now);
      step.a *= scale;
      step.b *= scale;
      now.a += step.a;
      now.b += step.b;
      put(t + u, now);
      if (through) {
        for (Lanes* x : {&old.a, &old.b, &now.a, &now.b}) round_bf16(*x);
      }
      now.a -= old.a;
      now.b -= old.b;
      intended.add(step, step);
      realised.add(now, now);
      both.add(step, now);
    }
    intended.end_run();
    realised.end_run();
    both.end_run();
  }
  sums[0] += intended.value();
  sums[1] += realised.value();
  sums[2] += both.value();
}
FASTGUARD_MULTIVERSION void move_(float* t, const float* d, const float* s, float scale, bool through, int64_t n,
                                  double* sums) {
  through ? move(t, d, s, scale, true, n, sums) : move(t, d, s, scale, false, n, sums);
}
FASTGUARD_MULTIVERSION void move_(bf16* t, const bf16* d, const bf16* s, float scale, bool, int64_t n,
                                  double* sums) {
  move(t, d, s, scale, false, n, sums);
}
FASTGUARD_MULTIVERSION void move_(bf16* t, const bf16* d, const float* s, float scale, bool, int64_t n,
                                  double* sums) {
  move(t, d, s, scale, false, n, sums);
}

// What serves the other combinations of dtypes: conversion by blocks.

// Calls f with a pointer to element `first` of an operand, of the type that its dtype is stored as.
template <typename F>
void typed(const Operand& o, int64_t first, const F& f) {
  switch (o.dtype) {
    case ScalarType::Double: return f(reinterpret_cast<double*>(o.data) + first);
    case ScalarType::Float: return f(reinterpret_cast<float*>(o.data) + first);
    case ScalarType::BFloat16: return f(reinterpret_cast<bf16*>(o.data) + first);
    case ScalarType::Half: return f(reinterpret_cast<c10::Half*>(o.data) + first);
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

template <typename T>
void load(const Operand& o, int64_t first, int64_t n, T* to) {
  typed(o, first, [&](const auto* p) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(value(p[i]));
  });
}

// Elements [first, first + n) as T: where they lie if they are T, else in the buffer.
template <typename T>
T* read(const Operand& o, int64_t first, int64_t n, T* buffer) {
  if (o.dtype == DTYPE<T>) return reinterpret_cast<T*>(o.data) + first;
  load(o, first, n, buffer);
  return buffer;
}

// Writes back what `read` put into a buffer; what was worked on where it lies is there already.
template <typename T>
void write(const Operand& o, int64_t first, int64_t n, const T* from) {
  typed(o, first, [&](auto* p) {
    if (static_cast<const void*>(p) == from) return;
    for (int64_t i = 0; i < n; ++i) set(p[i], from[i]);
  });
}

// Rounds values to those of a dtype.
template <typename T>
void round_to(ScalarType dtype, T* x, int64_t n) {
  if (dtype == DTYPE<T>) return;
  typed({nullptr, dtype}, 0, [&](auto* p) {
    std::remove_pointer_t<decltype(p)> rounded;
    for (int64_t i = 0; i < n; ++i) {
      set(rounded, x[i]);
      x[i] = static_cast<T>(value(rounded));
    }
  });
}

// Calls f(at, n, buffers) for each block of [first, last), with K buffers of the arithmetic's type.
template <size_t K, size_t N, typename F>
void blocks(const Item<N>& item, int64_t first, int64_t last, const F& f) {
  const auto each = [&](auto zero) {
    alignas(64) decltype(zero) buffers[K][BLOCK];
    for (int64_t at = first; at < last; at += BLOCK) f(at, std::min(BLOCK, last - at), buffers);
  };
  item.wide ? each(double()) : each(float());
}

// Whether the i-th tensors are stored as S..., in the lists' order.
template <typename... S, size_t N>
bool stored_as(const Item<N>& item) {
  static_assert(sizeof...(S) == N);
  const ScalarType dtypes[] = {DTYPE<S>...};
  for (size_t k = 0; k < N; ++k) {
    if (item.at[k].dtype != dtypes[k]) return false;
  }
  return true;
}

template <typename S>
S* at(const Operand& o, int64_t first) {
  return reinterpret_cast<S*>(o.data) + first;
}

void add_up(const std::vector<double>& partial, const Tensor& out) {
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  const auto width = static_cast<size_t>(out.numel());
  std::fill_n(to, width, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) to[i % width] += partial[i];
}

// out [1], float64.
void squared_norm(const Tensors& tensors, const Tensor& out) {
  const auto all = work<1>({&tensors});
  std::vector<double> partial(all.spans(SPAN), 0.0);
  all.each(SPAN, [&](int64_t span, const Item<1>& item, int64_t first, int64_t last) {
    const Operand& a = item.at[0];
    if (stored_as<float>(item)) {
      partial[span] += square_(at<float>(a, first), last - first);
    } else if (stored_as<bf16>(item)) {
      partial[span] += square_(at<bf16>(a, first), last - first);
    } else {
      blocks<1>(item, first, last, [&](int64_t begin, int64_t n, auto& buffer) {
        partial[span] += square_(read(a, begin, n, buffer[0]), n);
      });
    }
  });
  add_up(partial, out);
}

// out [1], float64.
void dot(const Tensors& a, const Tensors& b, const Tensor& out) {
  const auto all = work<2>({&a, &b});
  std::vector<double> partial(all.spans(SPAN), 0.0);
  all.each(SPAN, [&](int64_t span, const Item<2>& item, int64_t first, int64_t last) {
    const auto& [x, y] = item.at;
    if (stored_as<float, float>(item)) {
      partial[span] += dot_(at<float>(x, first), at<float>(y, first), last - first);
    } else if (stored_as<bf16, bf16>(item)) {
      partial[span] += dot_(at<bf16>(x, first), at<bf16>(y, first), last - first);
    } else {
      blocks<2>(item, first, last, [&, &x = x, &y = y](int64_t begin, int64_t n, auto& buffer) {
        partial[span] += dot_(read(x, begin, n, buffer[0]), read(y, begin, n, buffer[1]), n);
      });
    }
  });
  add_up(partial, out);
}

void accumulate(const Tensors& accumulators, const Tensors& tensors, double weight) {
  work<2>({&accumulators, &tensors}).each(SPAN, [&](int64_t, const Item<2>& item, int64_t first, int64_t last) {
    const auto& [a, t] = item.at;
    const auto w = static_cast<float>(weight);
    if (stored_as<float, float>(item)) {
      axpy_(at<float>(a, first), at<float>(t, first), w, last - first);
    } else if (stored_as<float, bf16>(item)) {
      axpy_(at<float>(a, first), at<bf16>(t, first), w, last - first);
    } else if (stored_as<bf16, bf16>(item)) {
      axpy_(at<bf16>(a, first), at<bf16>(t, first), w, last - first);
    } else {
      blocks<2>(item, first, last, [&, &a = a, &t = t](int64_t begin, int64_t n, auto& buffer) {
        using T = std::remove_cvref_t<decltype(buffer[0][0])>;
        T* sum = read(a, begin, n, buffer[0]);
        axpy_(sum, read(t, begin, n, buffer[1]), static_cast<T>(weight), n);
        write(a, begin, n, sum);
      });
    }
  });
}

// One item's part of `perturb`, by blocks.
void perturb_blocks(const Item<3>& item, int64_t first, int64_t last, double scale, std::optional<ScalarType> through,
                    double* sums) {
  const auto& [to, direction, base] = item.at;
  blocks<5>(item, first, last, [&, &to = to, &direction = direction, &base = base](int64_t begin, int64_t n, auto& x) {
    using T = std::remove_cvref_t<decltype(x[0][0])>;
    T *old = x[0], *now = x[1], *step = x[2];
    load(to, begin, n, old);
    const T* from = read(base, begin, n, x[3]);
    const T* d = read(direction, begin, n, x[4]);
    for (int64_t i = 0; i < n; ++i) {
      step[i] = static_cast<T>(scale) * d[i];
      now[i] = from[i] + step[i];
    }
    round_to(to.dtype, now, n);
    write(to, begin, n, now);
    round_to(through.value_or(DTYPE<T>), old, n);
    round_to(through.value_or(DTYPE<T>), now, n);
    for (int64_t i = 0; i < n; ++i) {
      const double s = step[i], r = static_cast<double>(now[i]) - old[i];
      sums[0] += s * s;
      sums[1] += r * r;
      sums[2] += s * r;
    }
  });
}

// out [3], float64.
void perturb(const Tensors& tensors, const Tensors& directions, const Tensors& source, double scale,
             std::optional<ScalarType> through, const Tensor& out) {
  const auto all = work<3>({&tensors, &directions, source.empty() ? &tensors : &source});
  std::vector<double> partial(3 * all.spans(SPAN), 0.0);
  all.each(SPAN, [&](int64_t span, const Item<3>& item, int64_t first, int64_t last) {
    const auto& [t, d, base] = item.at;
    double* sums = &partial[3 * span];
    const auto s = static_cast<float>(scale);
    const bool own = base.data == t.data, rounds = through == ScalarType::BFloat16;
    const int64_t n = through.has_value() && !rounds ? 0 : (last - first) / RUN * RUN;
    if (stored_as<float, float, float>(item)) {
      move_(at<float>(t, first), at<float>(d, first), own ? nullptr : at<float>(base, first), s, rounds, n, sums);
    } else if (stored_as<bf16, bf16, bf16>(item)) {
      move_(at<bf16>(t, first), at<bf16>(d, first), own ? nullptr : at<bf16>(base, first), s, rounds, n, sums);
    } else if (stored_as<bf16, bf16, float>(item)) {
      move_(at<bf16>(t, first), at<bf16>(d, first), at<float>(base, first), s, rounds, n, sums);
    } else {
      return perturb_blocks(item, first, last, scale, through, sums);
    }
    perturb_blocks(item, first + n, last, scale, through, sums);
  });
  add_up(partial, out);
}

void adamw(const Tensors& params, const Tensors& grads, const Tensors& means, const Tensors& squares, double decay,
           double mean_weight, double square_keep, double square_weight, double step_size, double root_correction,
           double eps) {
  const Adam scalars{decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps};
  const auto all = work<4>({&params, &grads, &means, &squares});
  all.each(SPAN, [&](int64_t, const Item<4>& item, int64_t first, int64_t last) {
    const auto& [p, g, m, v] = item.at;
    const int64_t n = last - first;
    if (stored_as<float, float, float, float>(item)) {
      adam_(at<float>(p, first), at<float>(g, first), at<float>(m, first), at<float>(v, first), scalars, n);
    } else if (stored_as<bf16, bf16, bf16, bf16>(item)) {
      adam_(at<bf16>(p, first), at<bf16>(g, first), at<bf16>(m, first), at<bf16>(v, first), scalars, n);
    } else if (stored_as<bf16, bf16, float, float>(item)) {
      adam_(at<bf16>(p, first), at<bf16>(g, first), at<float>(m, first), at<float>(v, first), scalars, n);
    } else {
      blocks<4>(item, first, last, [&](int64_t begin, int64_t count, auto& buffer) {
        using T = std::remove_cvref_t<decltype(buffer[0][0])>;
        std::array<T*, 4> x;
        for (size_t k = 0; k < 4; ++k) x[k] = read(item.at[k], begin, count, buffer[k]);
        adam_(x[0], x[1], x[2], x[3], scalars, count);
        for (size_t k : {0, 2, 3}) write(item.at[k], begin, count, x[k]);
      });
    }
  });
}

// Copies past the caches: lines that are not read first cost half of the traffic of writing.
void stream(char* to, const char* from, int64_t n) {
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(n, -reinterpret_cast<intptr_t>(to) & 63);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int64_t u = 0; u < 64; u += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + u),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + u)));
    }
  }
  std::memcpy(to + i, from + i, n - i);
  _mm_sfence();
#else
  std::memcpy(to, from, n);
#endif
}

void copy(const Tensors& destinations, const Tensors& sources) {
  Work<2> all;
  for (size_t i = 0; i < destinations.size(); ++i) {
    const Tensor& t = destinations[i];
    const auto bytes = static_cast<int64_t>(t.numel() * t.element_size());
    all.add(bytes, {Operand{static_cast<char*>(t.data_ptr()), ScalarType::Byte},
                    Operand{static_cast<char*>(sources[i].data_ptr()), ScalarType::Byte}});
  }
  const bool streamed = all.total >= STREAMED;
  all.each(COPY_SPAN, [&](int64_t, const Item<2>& item, int64_t first, int64_t last) {
    char* to = item.at[0].data + first;
    const char* from = item.at[1].data + first;
    if (streamed) {
      stream(to, from, last - first);
    } else {
      std::memcpy(to, from, last - first);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def("multi_tensor_squared_norm(Tensor[] tensors, Tensor(a!) out) -> ()");
  m.def("multi_tensor_dot(Tensor[] a, Tensor[] b, Tensor(a!) out) -> ()");
  m.def("multi_tensor_accumulate(Tensor(a!)[] accumulators, Tensor[] tensors, float weight) -> ()");
  m.def(
      "multi_tensor_perturb(Tensor(a!)[] tensors, Tensor[] directions, Tensor[] source, float scale, "
      "ScalarType? through, Tensor(b!) out) -> ()");
  m.def(
      "multi_tensor_adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares, float decay, "
      "float mean_weight, float square_keep, float square_weight, float step_size, float root_correction, "
      "float eps) -> ()");
  m.def("multi_tensor_copy(Tensor(a!)[] destinations, Tensor[] sources) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("multi_tensor_squared_norm", TORCH_BOX(&squared_norm));
  m.impl("multi_tensor_dot", TORCH_BOX(&dot));
  m.impl("multi_tensor_accumulate", TORCH_BOX(&accumulate));
  m.impl("multi_tensor_perturb", TORCH_BOX(&perturb));
  m.impl("multi_tensor_adamw", TORCH_BOX(&adamw));
  m.impl("multi_tensor_copy", TORCH_BOX(&copy));
}
