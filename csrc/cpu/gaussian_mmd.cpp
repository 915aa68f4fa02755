// gaussian_mmd on CPU: inner products of samples and remade noise, and the gradient, chunk by chunk of features.
//
// Shapes: L layers, B samples, F features, T mask entries of F / T features, R = 2B rows (samples, then noise). A
// chunk is at most CHUNK features of one token, from a 64-feature boundary on; of it, only the samples that the mask
// keeps are read and only their noise is made, in a buffer that stays in cache. Partial Gram matrices belong to spans
// of chunks fixed by the shapes and the mask, and are summed in order: the result does not depend on the threads.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/philox.h"
#include "cpu/simd.h"

namespace {

using fastguard::NOISE_BLOCK;
using fastguard::NoiseKey;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t CHUNK = 1024;           // features made at a time
constexpr int64_t PARTIAL = 1 << 18;      // doubles of partial Gram matrices per layer, in 16 to 256 spans
constexpr int64_t TOGETHER = 4;           // rows that share one load of another

// 64 bytes of T: one AVX-512 register, two of AVX2, four of SSE or NEON, as the clone has them.
template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
};

template <typename T>
using vector_of = typename Vector<T>::type;

template <typename T>
FASTGUARD_INLINE vector_of<T> load(const T* p) {
  return *reinterpret_cast<const vector_of<T>*>(p);
}

template <typename T>
constexpr int64_t WIDTH = 64 / sizeof(T);

// out[u] = a . b[u * stride] over `width` features, a multiple of 64.
template <typename T, int64_t N>
FASTGUARD_INLINE void dots(const T* a, const T* b, int64_t stride, int64_t width, double* out) {
  vector_of<T> acc[N] = {};
  for (int64_t f = 0; f < width; f += WIDTH<T>) {
    const vector_of<T> v = load(a + f);
#pragma GCC unroll 4
    for (int64_t u = 0; u < N; ++u) acc[u] += v * load(b + u * stride + f);
  }
  for (int64_t u = 0; u < N; ++u) {
    double sum = 0;
    for (int64_t j = 0; j < WIDTH<T>; ++j) sum += acc[u][j];
    out[u] = sum;
  }
}

// Adds the inner products of n rows to the lower triangle of gram [R, R] at their places.
template <typename T>
FASTGUARD_INLINE void add_products(const T* rows, int64_t n, int64_t width, const int64_t* place, double* gram,
                                   int64_t R) {
  double sums[TOGETHER];
  for (int64_t i = 0; i < n; ++i) {
    const T* a = rows + i * CHUNK;
    double* out = gram + place[i] * R;
    int64_t j = 0;
    for (; j + TOGETHER <= i + 1; j += TOGETHER) {
      dots<T, TOGETHER>(a, rows + j * CHUNK, CHUNK, width, sums);
      for (int64_t u = 0; u < TOGETHER; ++u) out[place[j + u]] += sums[u];
    }
    for (; j <= i; ++j) {
      dots<T, 1>(a, rows + j * CHUNK, CHUNK, width, sums);
      out[place[j]] += sums[0];
    }
  }
}

// out[u] = sum over the n rows of c[u * n + r] row_r.
template <typename T, int64_t N>
FASTGUARD_INLINE void combine(const T* rows, int64_t n, int64_t width, const T* c, T* out) {
  for (int64_t f = 0; f < width; f += WIDTH<T>) {
    vector_of<T> acc[N] = {};
    for (int64_t r = 0; r < n; ++r) {
      const vector_of<T> v = load(rows + r * CHUNK + f);
#pragma GCC unroll 4
      for (int64_t u = 0; u < N; ++u) acc[u] += v * c[u * n + r];
    }
#pragma GCC unroll 4
    for (int64_t u = 0; u < N; ++u) *reinterpret_cast<vector_of<T>*>(out + u * CHUNK + f) = acc[u];
  }
}

template <typename S, typename T>
FASTGUARD_INLINE void convert(const S* from, T* to, int64_t n) {
  for (int64_t f = 0; f < n; ++f) to[f] = static_cast<T>(from[f]);
}

// The same bodies, cloned per instruction set for fp32 arithmetic; float64 serves exactness, not speed.
FASTGUARD_MULTIVERSION void add_products_(const float* rows, int64_t n, int64_t width, const int64_t* place,
                                          double* gram, int64_t R) {
  add_products(rows, n, width, place, gram, R);
}
void add_products_(const double* rows, int64_t n, int64_t width, const int64_t* place, double* gram, int64_t R) {
  add_products(rows, n, width, place, gram, R);
}
FASTGUARD_MULTIVERSION void combine_(const float* rows, int64_t n, int64_t width, const float* c, float* out) {
  combine<float, TOGETHER>(rows, n, width, c, out);
}
void combine_(const double* rows, int64_t n, int64_t width, const double* c, double* out) {
  combine<double, TOGETHER>(rows, n, width, c, out);
}
FASTGUARD_MULTIVERSION void noise_(float* z, uint32_t first, int64_t blocks, uint32_t sample, const NoiseKey& key) {
  fastguard::noise_blocks(z, first, blocks, sample, key);
}
void noise_(double* z, uint32_t first, int64_t blocks, uint32_t sample, const NoiseKey& key) {
  fastguard::noise_blocks(z, first, blocks, sample, key);
}
FASTGUARD_MULTIVERSION void convert_(const c10::BFloat16* from, float* to, int64_t n) { convert(from, to, n); }
FASTGUARD_MULTIVERSION void convert_(const c10::Half* from, float* to, int64_t n) { convert(from, to, n); }
FASTGUARD_MULTIVERSION void convert_(const float* from, c10::BFloat16* to, int64_t n) { convert(from, to, n); }
FASTGUARD_MULTIVERSION void convert_(const float* from, c10::Half* to, int64_t n) { convert(from, to, n); }
void convert_(const float* from, float* to, int64_t n) { std::copy_n(from, n, to); }
void convert_(const double* from, double* to, int64_t n) { std::copy_n(from, n, to); }

template <typename T>
struct Buffer {  // whole rows of CHUNK features, on cache lines
  explicit Buffer(int64_t rows)
      : data(static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(rows * CHUNK) * sizeof(T))), &std::free) {}
  T* row(int64_t i) const { return data.get() + i * CHUNK; }
  std::unique_ptr<T, decltype(&std::free)> data;
};

struct Chunk {  // features first..last-1 of one token; base is the 64-feature boundary at or before first
  int64_t token, base, first, last;
  int64_t width() const { return (last - base + NOISE_BLOCK - 1) / NOISE_BLOCK * NOISE_BLOCK; }
};

struct Problem {  // S: dtype of x
  int64_t L, B, F, T;
  const void* x;
  int64_t stride_l, stride_b;
  const bool* mask;    // [B, T] or null
  const void* noise;   // [L, B, F] in the arithmetic's dtype, or null
  uint64_t seed;
  int64_t call, layer, sample_offset;

  bool keeps(int64_t b, int64_t t) const { return mask == nullptr || mask[b * T + t]; }
  NoiseKey key(int64_t l) const {
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(layer + l),
            static_cast<uint32_t>(call)};
  }
  // Chunks of the tokens that some sample keeps, or of all.
  std::vector<Chunk> chunks(bool all) const {
    std::vector<Chunk> out;
    const int64_t D = F / T;
    for (int64_t t = 0; t < T; ++t) {
      bool live = all;
      for (int64_t b = 0; b < B && !live; ++b) live = keeps(b, t);
      if (!live) continue;
      for (int64_t first = t * D; first < (t + 1) * D;) {
        const int64_t base = first / NOISE_BLOCK * NOISE_BLOCK, last = std::min((t + 1) * D, base + CHUNK);
        out.push_back({t, base, first, last});
        first = last;
      }
    }
    return out;
  }
};

// Fills rows with the kept samples of a chunk and then their noise, zero outside the token; returns how many samples,
// and where each row stands among the R.
template <typename S, typename T>
int64_t fill(const Problem& p, int64_t l, const Chunk& chunk, const Buffer<T>& rows, int64_t* place) {
  int64_t kept = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    if (p.keeps(b, chunk.token)) place[kept++] = b;
  }
  const int64_t width = chunk.width(), lead = chunk.first - chunk.base, n = chunk.last - chunk.first;
  const auto trim = [&](T* row) {
    std::fill_n(row, lead, T(0));
    std::fill(row + lead + n, row + width, T(0));
  };
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t b = place[i];
    place[kept + i] = p.B + b;
    T* row = rows.row(i);
    convert_(static_cast<const S*>(p.x) + l * p.stride_l + b * p.stride_b + chunk.first, row + lead, n);
    trim(row);
    T* z = rows.row(kept + i);
    if (p.noise != nullptr) {
      convert_(static_cast<const T*>(p.noise) + (l * p.B + b) * p.F + chunk.first, z + lead, n);
    } else {
      noise_(z, static_cast<uint32_t>(chunk.base / NOISE_BLOCK), width / NOISE_BLOCK,
             static_cast<uint32_t>(p.sample_offset + b), p.key(l));
    }
    trim(z);
  }
  return kept;
}

template <typename S, typename T>
void gram_of(const Problem& p, T* gram) {
  const int64_t R = 2 * p.B;
  const std::vector<Chunk> chunks = p.chunks(false);
  const auto n = static_cast<int64_t>(chunks.size());
  const int64_t spans = std::min(n, std::clamp<int64_t>(PARTIAL / (R * R), 16, 256));
  std::vector<double> partial(p.L * spans * R * R, 0.0);
  torch::stable::parallel_for(0, p.L * spans, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> rows(R);
    std::vector<int64_t> place(R);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t l = task / spans, span = task % spans;
      for (int64_t c = span * n / spans; c < (span + 1) * n / spans; ++c) {
        const int64_t kept = fill<S>(p, l, chunks[c], rows, place.data());
        add_products_(rows.row(0), 2 * kept, chunks[c].width(), place.data(), partial.data() + task * R * R, R);
      }
    }
  });
  for (int64_t l = 0; l < p.L; ++l) {
    for (int64_t i = 0; i < R; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0;
        for (int64_t s = 0; s < spans; ++s) sum += partial[((l * spans + s) * R + i) * R + j];
        gram[(l * R + i) * R + j] = gram[(l * R + j) * R + i] = static_cast<T>(sum);
      }
    }
  }
}

// dx [L, B, F] = mask * (coefficients [L, B, R] @ rows).
template <typename S, typename T>
void gradient_of(const Problem& p, const T* coefficients, S* dx) {
  const int64_t R = 2 * p.B;
  const std::vector<Chunk> chunks = p.chunks(true);
  const auto n = static_cast<int64_t>(chunks.size());
  torch::stable::parallel_for(0, p.L * n, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> rows(R), out(TOGETHER);
    std::vector<int64_t> place(R);
    std::vector<T> c(TOGETHER * R);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t l = task / n;
      const Chunk& chunk = chunks[task % n];
      const int64_t kept = fill<S>(p, l, chunk, rows, place.data()), width = chunk.last - chunk.first;
      S* to = dx + l * p.B * p.F + chunk.first;
      for (int64_t b = 0; b < p.B; ++b) {
        if (!p.keeps(b, chunk.token)) std::fill_n(to + b * p.F, width, S(0.0F));
      }
      for (int64_t i = 0; i < kept; i += TOGETHER) {
        const int64_t together = std::min(TOGETHER, kept - i);
        for (int64_t u = 0; u < TOGETHER; ++u) {
          const T* from = coefficients + (l * p.B + place[i + std::min(u, together - 1)]) * R;
          for (int64_t r = 0; r < 2 * kept; ++r) c[u * 2 * kept + r] = from[place[r]];
        }
        combine_(rows.row(0), 2 * kept, chunk.width(), c.data(), out.row(0));
        for (int64_t u = 0; u < together; ++u) {
          convert_(out.row(u) + (chunk.first - chunk.base), to + place[i + u] * p.F, width);
        }
      }
    }
  });
}

Problem problem(const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& noise, int64_t seed,
                int64_t call, int64_t layer, int64_t sample_offset) {
  return {x.size(0), x.size(1), x.size(2), mask.has_value() ? mask->size(1) : 1,
          x.const_data_ptr(), x.stride(0), x.stride(1),
          mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
          noise.has_value() ? noise->const_data_ptr() : nullptr,
          static_cast<uint64_t>(seed), call, layer, sample_offset};
}

// Calls f with a value of the dtype of x and one of the arithmetic's.
template <typename F>
void by_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double(), double());
    case ScalarType::Float: return f(float(), float());
    case ScalarType::BFloat16: return f(c10::BFloat16(), float());
    case ScalarType::Half: return f(c10::Half(), float());
    default: STD_TORCH_CHECK(false, "x: expected float64, float32, bfloat16 or float16");
  }
}

void gram(const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& noise, int64_t seed,
          int64_t call, int64_t layer, int64_t sample_offset, const Tensor& out) {
  const Problem p = problem(x, mask, noise, seed, call, layer, sample_offset);
  by_dtype(x, [&](auto s, auto t) {
    gram_of<decltype(s), decltype(t)>(p, static_cast<decltype(t)*>(out.mutable_data_ptr()));
  });
}

void gradient(const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& noise, int64_t seed,
              int64_t call, int64_t layer, int64_t sample_offset, const Tensor& coefficients, const Tensor& dx) {
  const Problem p = problem(x, mask, noise, seed, call, layer, sample_offset);
  by_dtype(x, [&](auto s, auto t) {
    gradient_of<decltype(s), decltype(t)>(p, static_cast<const decltype(t)*>(coefficients.const_data_ptr()),
                                          static_cast<decltype(s)*>(dx.mutable_data_ptr()));
  });
}

// Noise [B, F] of one layer, fp32 or float64.
void noise(int64_t seed, int64_t call, int64_t layer, int64_t sample_offset, const Tensor& out) {
  const int64_t B = out.size(0), F = out.size(1), per_row = (F + CHUNK - 1) / CHUNK;
  const Problem p{1, B, F, 1, nullptr, 0, 0, nullptr, nullptr, static_cast<uint64_t>(seed), call, layer, sample_offset};
  by_dtype(out, [&](auto, auto t) {
    using T = decltype(t);
    T* z = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, B * per_row, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> row(1);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / per_row, first = task % per_row * CHUNK, n = std::min(CHUNK, F - first);
        noise_(row.row(0), static_cast<uint32_t>(first / NOISE_BLOCK), (n + NOISE_BLOCK - 1) / NOISE_BLOCK,
               static_cast<uint32_t>(sample_offset + b), p.key(0));
        std::copy_n(row.row(0), n, z + b * F + first);
      }
    });
  });
}

// Raw words [N, 4] of counters [N, 4], as int64: what ties these kernels to the published test vectors.
void words(const Tensor& counter, int64_t seed, const Tensor& out) {
  const auto* from = static_cast<const int64_t*>(counter.const_data_ptr());
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < counter.size(0); ++i) {
    uint32_t c[4];
    for (int64_t k = 0; k < 4; ++k) c[k] = static_cast<uint32_t>(from[4 * i + k]);
    fastguard::philox4x32(c[0], c[1], c[2], c[3], static_cast<uint32_t>(seed),
                          static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
    for (int64_t k = 0; k < 4; ++k) to[4 * i + k] = c[k];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def(
      "gaussian_mmd_gram(Tensor x, Tensor? mask, Tensor? noise, int seed, int call, int layer, int sample_offset, "
      "Tensor(a!) gram) -> ()");
  m.def(
      "gaussian_mmd_gradient(Tensor x, Tensor? mask, Tensor? noise, int seed, int call, int layer, "
      "int sample_offset, Tensor coefficients, Tensor(a!) dx) -> ()");
  m.def("gaussian_noise(int seed, int call, int layer, int sample_offset, Tensor(a!) noise) -> ()");
  m.def("philox4x32(Tensor counter, int seed, Tensor(a!) words) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) {
  m.impl("gaussian_mmd_gram", TORCH_BOX(&gram));
  m.impl("gaussian_mmd_gradient", TORCH_BOX(&gradient));
  m.impl("gaussian_noise", TORCH_BOX(&noise));
  m.impl("philox4x32", TORCH_BOX(&words));
}
