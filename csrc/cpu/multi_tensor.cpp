// multi_tensor on CPU: one threaded pass over lists of tensors, as if each list were one long array.
//
// The i-th tensors of all lists have the same size. They are laid end to end, each from a multiple of ALIGN elements on,
// and cut into spans of equal length: a task each, whatever the tensors' sizes. Within a span, blocks of a tensor
// are brought to fp32 (float64 where one of the i-th tensors is float64) in buffers that stay in cache, computed
// on, and rounded back. Sums are kept in double per span and added in order: they do not depend on the threads.
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

#include "cpu/simd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t SPAN = 1 << 16;        // elements of a task
constexpr int64_t COPY_SPAN = 1 << 20;   // bytes of a task that copies
constexpr int64_t ALIGN = 64;            // elements or bytes that no task shares with another
constexpr int64_t BLOCK = 1024;          // elements worked on at a time
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

// bf16 by its bits, so that conversions vectorise; NaN becomes the quiet NaN, as in torch.
FASTGUARD_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? 0x7FC0U : rounded);
}
FASTGUARD_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

FASTGUARD_MULTIVERSION void widen(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(from[i]);
}
FASTGUARD_MULTIVERSION void narrow(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}
FASTGUARD_MULTIVERSION void round_bf16(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = from_bf16(to_bf16(x[i]));
}
FASTGUARD_MULTIVERSION void widen(const c10::Half* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}
FASTGUARD_MULTIVERSION void narrow(const float* from, c10::Half* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<c10::Half>(from[i]);
}
void widen(const uint16_t* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(from[i]);
}
void narrow(const double* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(static_cast<float>(from[i]));
}
void round_bf16(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = from_bf16(to_bf16(static_cast<float>(x[i])));
}
void widen(const c10::Half* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}
void narrow(const double* from, c10::Half* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<c10::Half>(static_cast<float>(from[i]));
}

// Calls f with a pointer to element `first` of an operand, of the type that its dtype is stored in.
template <typename F>
void typed(const Operand& o, int64_t first, const F& f) {
  switch (o.dtype) {
    case ScalarType::Double: return f(reinterpret_cast<double*>(o.data) + first);
    case ScalarType::Float: return f(reinterpret_cast<float*>(o.data) + first);
    case ScalarType::BFloat16: return f(reinterpret_cast<uint16_t*>(o.data) + first);
    case ScalarType::Half: return f(reinterpret_cast<c10::Half*>(o.data) + first);
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

template <typename T, typename S>
constexpr bool SAME = std::is_same_v<T, S>;
template <typename S>
constexpr bool HALF = SAME<S, uint16_t> || SAME<S, c10::Half>;

// Elements [first, first + n) as T.
template <typename T>
void load(const Operand& o, int64_t first, int64_t n, T* to) {
  typed(o, first, [&](const auto* p) {
    if constexpr (HALF<std::remove_cvref_t<decltype(*p)>>) {
      widen(p, to, n);
    } else {
      std::copy_n(p, n, to);
    }
  });
}

template <typename T>
constexpr ScalarType DTYPE = SAME<T, double> ? ScalarType::Double : ScalarType::Float;

// The same where they lie if they are T, else in the buffer.
template <typename T>
T* read(const Operand& o, int64_t first, int64_t n, T* buffer) {
  if (o.dtype == DTYPE<T>) return reinterpret_cast<T*>(o.data) + first;
  load(o, first, n, buffer);
  return buffer;
}

// Writes back what `read` put into a buffer; what was worked on in place is there already.
template <typename T>
void write(const Operand& o, int64_t first, int64_t n, const T* from) {
  typed(o, first, [&](auto* p) {
    using S = std::remove_pointer_t<decltype(p)>;
    if constexpr (SAME<T, S>) {
      if (p != from) std::copy_n(from, n, p);
    } else if constexpr (HALF<S>) {
      narrow(from, p, n);
    } else {
      std::copy_n(from, n, p);
    }
  });
}

// Rounds values to those of a dtype.
template <typename T>
void round_to(ScalarType dtype, T* x, int64_t n) {
  if (dtype == ScalarType::BFloat16) {
    round_bf16(x, n);
  } else if (dtype == ScalarType::Half) {
    c10::Half narrowed[BLOCK];
    narrow(x, narrowed, n);
    widen(narrowed, x, n);
  } else if (SAME<T, double> && dtype == ScalarType::Float) {
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(x[i]);
  }
}

// Sums in double of products of fp32 numbers, exact but for the additions.
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef double EightDoubles __attribute__((vector_size(64)));

// Returned by reference: a vector wider than the baseline's registers has no place in a call.
FASTGUARD_INLINE void widen(const float* p, EightDoubles& out) {
  out = __builtin_convertvector(*reinterpret_cast<const Eight*>(p), EightDoubles);
}
FASTGUARD_INLINE double across(const EightDoubles& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

FASTGUARD_MULTIVERSION double dot_of(const float* a, const float* b, int64_t n) {
  EightDoubles sum[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
#pragma GCC unroll 4
    for (int64_t u = 0; u < 4; ++u) {
      EightDoubles x, y;
      widen(a + i + 8 * u, x);
      widen(b + i + 8 * u, y);
      sum[u] += x * y;
    }
  }
  double rest = 0;
  for (; i < n; ++i) rest += static_cast<double>(a[i]) * b[i];
  return across((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}
double dot_of(const double* a, const double* b, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t u = 0; u < 4; ++u) sum[u] += a[i + u] * b[i + u];
  }
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <typename T>
FASTGUARD_INLINE void axpy(T* a, const T* t, T weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += weight * t[i];
}
FASTGUARD_MULTIVERSION void axpy_(float* a, const float* t, float weight, int64_t n) { axpy(a, t, weight, n); }
void axpy_(double* a, const double* t, double weight, int64_t n) { axpy(a, t, weight, n); }

// step = scale * direction, moved = base + step.
template <typename T>
FASTGUARD_INLINE void move(const T* __restrict base, const T* __restrict direction, T scale, T* __restrict step,
                           T* __restrict moved, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    step[i] = scale * direction[i];
    moved[i] = base[i] + step[i];
  }
}
FASTGUARD_MULTIVERSION void move_(const float* base, const float* direction, float scale, float* step, float* moved,
                                  int64_t n) {
  move(base, direction, scale, step, moved, n);
}
void move_(const double* base, const double* direction, double scale, double* step, double* moved, int64_t n) {
  move(base, direction, scale, step, moved, n);
}

// sums += step^2, (now - old)^2, step * (now - old)
FASTGUARD_MULTIVERSION void compare(const float* step, const float* now, const float* old, int64_t n, double* sums) {
  EightDoubles intended = {}, realised = {}, both = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    EightDoubles s, r, before;
    widen(step + i, s);
    widen(now + i, r);
    widen(old + i, before);
    r -= before;
    intended += s * s;
    realised += r * r;
    both += s * r;
  }
  sums[0] += across(intended);
  sums[1] += across(realised);
  sums[2] += across(both);
  for (; i < n; ++i) {
    const double s = step[i], r = static_cast<double>(now[i]) - old[i];
    sums[0] += s * s;
    sums[1] += r * r;
    sums[2] += s * r;
  }
}
void compare(const double* step, const double* now, const double* old, int64_t n, double* sums) {
  for (int64_t i = 0; i < n; ++i) {
    const double r = now[i] - old[i];
    sums[0] += step[i] * step[i];
    sums[1] += r * r;
    sums[2] += step[i] * r;
  }
}

struct Adam {  // see scalars.py
  double decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps;
};

template <typename T>
FASTGUARD_INLINE void adam(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v, const Adam& a,
                           int64_t n) {
  const T decay = static_cast<T>(a.decay), mean_weight = static_cast<T>(a.mean_weight),
          square_keep = static_cast<T>(a.square_keep), square_weight = static_cast<T>(a.square_weight),
          step_size = static_cast<T>(a.step_size), unbias = static_cast<T>(1 / a.root_correction),
          eps = static_cast<T>(a.eps);
  for (int64_t i = 0; i < n; ++i) {
    const T mean = m[i] + mean_weight * (g[i] - m[i]);
    const T square = square_keep * v[i] + square_weight * g[i] * g[i];
    m[i] = mean;
    v[i] = square;
    p[i] = decay * p[i] - step_size * mean / (std::sqrt(square) * unbias + eps);
  }
}
FASTGUARD_MULTIVERSION void adam_(float* p, const float* g, float* m, float* v, const Adam& a, int64_t n) {
  adam(p, g, m, v, a, n);
}
void adam_(double* p, const double* g, double* m, double* v, const Adam& a, int64_t n) { adam(p, g, m, v, a, n); }

template <typename T, size_t K>
struct Buffers {
  alignas(64) T block[K][BLOCK];
  T* operator[](size_t k) { return block[k]; }
};

// Calls f(at, n, zero) for each block of [first, last); zero is of the arithmetic's type.
template <size_t N, typename F>
void blocks(const Item<N>& item, int64_t first, int64_t last, const F& f) {
  for (int64_t at = first; at < last; at += BLOCK) {
    const int64_t n = std::min(BLOCK, last - at);
    if (item.wide) {
      f(at, n, double());
    } else {
      f(at, n, float());
    }
  }
}

void add_up(const std::vector<double>& partial, const Tensor& out) {
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  const auto width = static_cast<size_t>(out.numel());
  std::fill_n(to, width, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) to[i % width] += partial[i];
}

// out [1], float64.
void dot(const Tensors& a, const Tensors& b, const Tensor& out) {
  const auto all = work<2>({&a, &b});
  std::vector<double> partial(all.spans(SPAN), 0.0);
  all.each(SPAN, [&](int64_t span, const Item<2>& item, int64_t first, int64_t last) {
    const bool square = item.at[0].data == item.at[1].data && item.at[0].dtype == item.at[1].dtype;
    blocks(item, first, last, [&](int64_t at, int64_t n, auto zero) {
      using T = decltype(zero);
      Buffers<T, 2> buffer;
      const T* x = read(item.at[0], at, n, buffer[0]);
      const T* y = square ? x : read(item.at[1], at, n, buffer[1]);
      partial[span] += dot_of(x, y, n);
    });
  });
  add_up(partial, out);
}

void accumulate(const Tensors& accumulators, const Tensors& tensors, double weight) {
  work<2>({&accumulators, &tensors}).each(SPAN, [&](int64_t, const Item<2>& item, int64_t first, int64_t last) {
    blocks(item, first, last, [&](int64_t at, int64_t n, auto zero) {
      using T = decltype(zero);
      Buffers<T, 2> buffer;
      T* a = read(item.at[0], at, n, buffer[0]);
      axpy_(a, read(item.at[1], at, n, buffer[1]), static_cast<T>(weight), n);
      write(item.at[0], at, n, a);
    });
  });
}

// out [3], float64.
void perturb(const Tensors& tensors, const Tensors& directions, const Tensors& source, double scale,
             std::optional<ScalarType> through, const Tensor& out) {
  const auto all = work<3>({&tensors, &directions, source.empty() ? &tensors : &source});
  std::vector<double> partial(3 * all.spans(SPAN), 0.0);
  all.each(SPAN, [&](int64_t span, const Item<3>& item, int64_t first, int64_t last) {
    const auto& [to, direction, base] = item.at;
    blocks(item, first, last, [&](int64_t at, int64_t n, auto zero) {
      using T = decltype(zero);
      Buffers<T, 5> buffer;
      T *step = buffer[0], *now = buffer[1], *old = buffer[2];
      load(to, at, n, old);
      const T* from = base.data == to.data ? old : read(base, at, n, buffer[3]);
      move_(from, read(direction, at, n, buffer[4]), static_cast<T>(scale), step, now, n);
      round_to(to.dtype, now, n);
      write(to, at, n, now);
      if (through.has_value()) {
        round_to(*through, old, n);
        round_to(*through, now, n);
      }
      compare(step, now, old, n, &partial[3 * span]);
    });
  });
  add_up(partial, out);
}

void adamw(const Tensors& params, const Tensors& grads, const Tensors& means, const Tensors& squares, double decay,
           double mean_weight, double square_keep, double square_weight, double step_size, double root_correction,
           double eps) {
  const Adam scalars{decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps};
  const auto all = work<4>({&params, &grads, &means, &squares});
  all.each(SPAN, [&](int64_t, const Item<4>& item, int64_t first, int64_t last) {
    blocks(item, first, last, [&](int64_t at, int64_t n, auto zero) {
      using T = decltype(zero);
      Buffers<T, 4> buffer;
      std::array<T*, 4> x;
      for (size_t k = 0; k < 4; ++k) x[k] = read(item.at[k], at, n, buffer[k]);
      adam_(x[0], x[1], x[2], x[3], scalars, n);
      for (size_t k : {0, 2, 3}) write(item.at[k], at, n, x[k]);
    });
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
  m.impl("multi_tensor_dot", TORCH_BOX(&dot));
  m.impl("multi_tensor_accumulate", TORCH_BOX(&accumulate));
  m.impl("multi_tensor_perturb", TORCH_BOX(&perturb));
  m.impl("multi_tensor_adamw", TORCH_BOX(&adamw));
  m.impl("multi_tensor_copy", TORCH_BOX(&copy));
}
