// abs_weight_grad_ on CPU: sums over samples of |G|, G^2 and G, where G = grad_out^T input over a sample's rows.
//
// Shapes: O outputs, I inputs. A task is a part of the weight. It takes the rows block by block, KC at a time, packed as
// fp32 into panels as wide as the register tile of MR outputs by NR inputs: all of its outputs, then a panel of inputs
// at a time. The register tile holds G of one sample from its first row to its last, then goes into the sums: per sample
// they are read and written once, by short samples in L1, since a block holds several of those. What a sample longer
// than a block has so far waits in `carry`. Narrow floats become fp32 on the way into the panels.
//
// Each element is one chain of additions, rows in order, then samples in order, wherever blocks and tiles end: its bits
// depend neither on the threads nor on padding.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
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

constexpr int64_t KC = 256;  // rows of a block: a panel of inputs takes half of L1
constexpr int64_t MC = 576;  // outputs of a task, at most: what a panel of inputs, once packed, is good for
constexpr int64_t NC = 768;  // inputs of a task, at most
constexpr int64_t MIN = 48;  // outputs or inputs of a task, if it is made smaller for the sake of more threads

// Some rows of one sample.
struct Piece {
  int64_t first, rows;
  bool begins, ends;  // whether the sample does with them
};
// Pieces that are packed together.
struct Block {
  int64_t piece, pieces, rows;
};

// Tiles of the sums, [MR, NR], rows `step` apart; null where not wanted.
template <typename T>
struct Sums {
  T *score, *squared, *signed_;
  int64_t step;
};

#define UNROLLED _Pragma("GCC unroll 16")

template <typename V, typename T>
FASTGUARD_INLINE void load(V& v, const T* p) {
  std::memcpy(&v, p, sizeof v);
}
template <typename V, typename T>
FASTGUARD_INLINE void store(T* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

// Products of panels a [rows, MR] and b [rows, NR], NR being two vectors of BYTES, added to the sums piece by piece.
template <typename T, int BYTES, int MR>
FASTGUARD_INLINE void add_tile(const T* a, const T* b, const Piece* pieces, int64_t count, T* carry, Sums<T> sums) {
  typedef T vec __attribute__((vector_size(BYTES)));
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Bits bits __attribute__((vector_size(BYTES)));
  constexpr int64_t LANES = BYTES / sizeof(T), NR = 2 * LANES;
  constexpr Bits MAGNITUDE = ~(Bits(1) << (8 * sizeof(T) - 1));
  for (const T* to : {sums.score, sums.squared, sums.signed_}) {
    if (to == nullptr) continue;
    UNROLLED for (int r = 0; r < MR; ++r) __builtin_prefetch(to + r * sums.step, 1);
  }
  for (const Piece* end = pieces + count; pieces < end; ++pieces) {
    vec g[MR][2] = {};  // in registers throughout: only whole vectors of it are ever copied
    if (!pieces->begins) {
      UNROLLED for (int r = 0; r < MR; ++r) {
        UNROLLED for (int j = 0; j < 2; ++j) load(g[r][j], carry + r * NR + j * LANES);
      }
    }
    for (int64_t k = pieces->rows; k > 0; --k, a += MR, b += NR) {
      vec x[2];
      load(x[0], b);
      load(x[1], b + LANES);
      UNROLLED for (int r = 0; r < MR; ++r) {
        g[r][0] += a[r] * x[0];
        g[r][1] += a[r] * x[1];
      }
    }
    if (!pieces->ends) {
      UNROLLED for (int r = 0; r < MR; ++r) {
        UNROLLED for (int j = 0; j < 2; ++j) store(carry + r * NR + j * LANES, g[r][j]);
      }
      continue;
    }
#define ADD(SUM, TERM) \
  if (sums.SUM != nullptr) { \
    UNROLLED for (int r = 0; r < MR; ++r) { \
      UNROLLED for (int j = 0; j < 2; ++j) { \
        vec sum; \
        load(sum, sums.SUM + r * sums.step + j * LANES); \
        sum += TERM; \
        store(sums.SUM + r * sums.step + j * LANES, sum); \
      } \
    } \
  }
    ADD(signed_, g[r][j])
    ADD(squared, g[r][j] * g[r][j])
    ADD(score, (vec)((bits)g[r][j] & MAGNITUDE))
#undef ADD
  }
}

FASTGUARD_INLINE float value(float x) { return x; }
FASTGUARD_INLINE double value(double x) { return x; }
FASTGUARD_INLINE float value(bf16 x) { return of_bf16(x); }
FASTGUARD_INLINE float value(c10::Half x) { return static_cast<float>(x); }

// n features of `count` rows from their `first` on, and zeros up to a multiple of W, as panels [count, W]. A few rows are
// taken together, so that both what is read and what is written lies close.
template <int W, typename S, typename T>
FASTGUARD_INLINE void pack(const S* const* rows, int64_t count, int64_t first, int64_t n, T* to) {
  for (int64_t r0 = 0; r0 < count; r0 += 8) {
    const int64_t r1 = r0 + 8 < count ? r0 + 8 : count;
    T* panel = to;
    int64_t i = 0;
    for (; i + W <= n; i += W, panel += count * W) {
      for (int64_t r = r0; r < r1; ++r) {
        const S* x = rows[r] + first + i;
        if (r + 8 < count) __builtin_prefetch(rows[r + 8] + first + i);
        T v[W];  // which nothing aliases: read and written as vectors
        for (int j = 0; j < W; ++j) v[j] = value(x[j]);
        std::memcpy(panel + r * W, v, sizeof v);
      }
    }
    for (int64_t r = r0; i < n && r < r1; ++r) {
      for (int j = 0; j < W; ++j) panel[r * W + j] = i + j < n ? value(rows[r][first + i + j]) : T(0);
    }
  }
}

// What differs from one instruction set to the next.
template <typename S, typename T>
struct Kernel {
  int64_t mr, nr;
  void (*pack_a)(const S* const*, int64_t, int64_t, int64_t, T*);
  void (*pack_b)(const S* const*, int64_t, int64_t, int64_t, T*);
  void (*add)(const T*, const T*, const Piece*, int64_t, T*, const Sums<T>&);
};

#define KERNEL(S, T, NAME, TARGET, BYTES, MR) \
  TARGET void NAME##_a(const S* const* rows, int64_t count, int64_t first, int64_t n, T* to) { \
    pack<MR>(rows, count, first, n, to); \
  } \
  TARGET void NAME##_b(const S* const* rows, int64_t count, int64_t first, int64_t n, T* to) { \
    pack<2 * BYTES / sizeof(T)>(rows, count, first, n, to); \
  } \
  TARGET void NAME##_add(const T* a, const T* b, const Piece* p, int64_t n, T* carry, const Sums<T>& sums) { \
    add_tile<T, BYTES, MR>(a, b, p, n, carry, sums); \
  } \
  constexpr Kernel<S, T> NAME{MR, 2 * BYTES / sizeof(T), NAME##_a, NAME##_b, NAME##_add};

// Tiles that fill the registers: 12 sums of 16 vectors, or 28 of 32.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define KERNELS(S, T) \
  KERNEL(S, T, S##_base, , 16, 6) \
  KERNEL(S, T, S##_avx2, __attribute__((target("avx2,fma"))), 32, 6) \
  KERNEL(S, T, S##_avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 64, 14) \
  const Kernel<S, T>& kernel(const S*, const T*) { \
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) return S##_avx512; \
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? S##_avx2 : S##_base; \
  }
#else
#define KERNELS(S, T) \
  KERNEL(S, T, S##_base, , 16, 6) \
  const Kernel<S, T>& kernel(const S*, const T*) { return S##_base; }
#endif
using half = c10::Half;
KERNELS(double, double)
KERNELS(float, float)
KERNELS(bf16, float)
KERNELS(half, float)

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory for n numbers from a cache line on, of no particular value.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(n > 0 ? std::aligned_alloc(64, up(n * sizeof(T), 64)) : nullptr) {
    STD_TORCH_CHECK(n == 0 || data_ != nullptr, "abs_weight_grad_: no memory for ", n * sizeof(T), " bytes");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

// Rows of x [B, T, D] or [N, D], whose features are neighbours.
template <typename S>
struct Rows {
  const S* x;
  int64_t tokens, sample, token, width;

  explicit Rows(const Tensor& t)
      : x(static_cast<const S*>(t.const_data_ptr())),
        tokens(t.size(t.dim() - 2)),
        sample(t.dim() == 3 ? t.stride(0) : 0),
        token(t.stride(t.dim() - 2)),
        width(t.size(t.dim() - 1)) {}
  const S* operator[](int64_t row) const { return x + row / tokens * sample + row % tokens * token; }
};

// The samples in blocks of KC rows at most; one that fits in no block is cut.
std::pair<std::vector<Block>, std::vector<Piece>> blocks_of(const int64_t* bounds, int64_t samples, int64_t rows) {
  std::vector<Piece> pieces;
  std::vector<Block> blocks;
  const auto add = [&](const Piece& piece) {
    if (blocks.empty() || blocks.back().rows + piece.rows > KC) {
      blocks.push_back({static_cast<int64_t>(pieces.size()), 0, 0});
    }
    pieces.push_back(piece);
    blocks.back().pieces += 1;
    blocks.back().rows += piece.rows;
  };
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t begin = bounds[2 * b], end = bounds[2 * b + 1];
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= rows, "bounds: expected ascending rows within 0 to ", rows,
                    ", got ", begin, " to ", end);
    for (int64_t at = begin; at < end; at += KC) {
      add({at, std::min(KC, end - at), at == begin, at + KC >= end});
    }
  }
  return {std::move(blocks), std::move(pieces)};
}

// In how many parts to take outputs and inputs: few large ones, but so many that no thread idles for long.
std::pair<int64_t, int64_t> parts_of(int64_t O, int64_t I) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t m = (O + MC - 1) / MC, n = (I + NC - 1) / NC;
  while (m * n % threads != 0 && m * n < 4 * threads && std::max(O / m, I / n) > MIN) ++(O / m >= I / n ? m : n);
  return {m, n};
}

template <typename S, typename T>
void accumulate(const Sums<T>& sums, const Tensor& grad_out, const Tensor& input, const Tensor& bounds) {
  const Rows<S> dy(grad_out), x(input);
  const int64_t O = dy.width, I = x.width, rows = dy.tokens * (grad_out.dim() == 3 ? grad_out.size(0) : 1);
  const Kernel<S, T>& k = kernel(static_cast<const S*>(nullptr), static_cast<const T*>(nullptr));
  const auto [blocks, pieces] =
      blocks_of(static_cast<const int64_t*>(bounds.const_data_ptr()), bounds.size(0), rows);
  int64_t longest = 0;
  bool cut = false;
  for (const Block& block : blocks) longest = std::max(longest, block.rows);
  for (const Piece& piece : pieces) cut = cut || !piece.ends;
  const auto [m_parts, n_parts] = parts_of(O, I);
  const int64_t mc = up((O + m_parts - 1) / m_parts, k.mr), nc = up((I + n_parts - 1) / n_parts, k.nr);
  const int64_t across = (I + nc - 1) / nc, tasks = (O + mc - 1) / mc * across;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> a(longest * mc), b(longest * k.nr), carry(cut ? mc * nc : 0), edge(3 * k.mr * k.nr);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o0 = task / across * mc, i0 = task % across * nc;
      const int64_t m = std::min(mc, O - o0), n = std::min(nc, I - i0);
      for (const Block& block : blocks) {
        const Piece* of = pieces.data() + block.piece;
        const S *rows_a[KC], *rows_b[KC];
        int64_t at = 0;
        for (int64_t p = 0; p < block.pieces; ++p) {
          for (int64_t r = of[p].first; r < of[p].first + of[p].rows; ++r, ++at) {
            rows_a[at] = dy[r];
            rows_b[at] = x[r];
          }
        }
        k.pack_a(rows_a, block.rows, o0, m, a.get());
        for (int64_t i = 0; i < n; i += k.nr) {
          k.pack_b(rows_b, block.rows, i0 + i, std::min(k.nr, n - i), b.get());
          const int64_t share = i + k.nr < n ? (block.rows * k.mr + m - 1) / m : 0;
          for (int64_t o = 0; o < m; o += k.mr) {
            // The next panel comes near while this one is at work: its rows are pages apart, and no hardware sees it.
            const int64_t begin = o / k.mr * share, end = std::min(begin + share, block.rows);
            for (int64_t r = begin; r < end; ++r) __builtin_prefetch(rows_b[r] + i0 + i + k.nr);
            const T* panel = a.get() + o * block.rows;
            T* waiting = carry.get() + (cut ? i * mc + o * k.nr : 0);
            const int64_t start = (o0 + o) * I + i0 + i;
            const auto shifted = [&](T* to) { return to == nullptr ? nullptr : to + start; };
            const Sums<T> inside{shifted(sums.score), shifted(sums.squared), shifted(sums.signed_), I};
            const int64_t height = std::min(k.mr, m - o), width = std::min(k.nr, n - i);
            if (height == k.mr && width == k.nr) {
              k.add(panel, b.get(), of, block.pieces, waiting, inside);
              continue;
            }
            // A tile that sticks out goes by way of a whole one.
            T* const whole = edge.get();
            const int64_t size = k.mr * k.nr;
            const auto padded = [&](const T* to, int64_t at) { return to == nullptr ? nullptr : whole + at * size; };
            const Sums<T> outside{padded(sums.score, 0), padded(sums.squared, 1), padded(sums.signed_, 2), k.nr};
            const auto each = [&](const auto& copy) {
              for (const auto& [in, out] : {std::pair{inside.score, outside.score},
                                           {inside.squared, outside.squared},
                                           {inside.signed_, outside.signed_}}) {
                for (int64_t r = 0; in != nullptr && r < height; ++r) copy(in + r * I, out + r * k.nr);
              }
            };
            std::fill_n(whole, 3 * size, T(0));
            each([&](const T* in, T* out) { std::copy_n(in, width, out); });
            k.add(panel, b.get(), of, block.pieces, waiting, outside);
            each([&](T* in, const T* out) { std::copy_n(out, width, in); });
          }
        }
      }
    }
  });
}

void abs_weight_grad(const Maybe& score, const Maybe& squared, const Maybe& signed_, const Tensor& grad_out,
                     const Tensor& input, const Tensor& bounds) {
  const auto with = [&](auto source, auto sum) {
    using S = decltype(source);
    using T = decltype(sum);
    const auto data = [](const Maybe& t) { return t.has_value() ? static_cast<T*>(t->mutable_data_ptr()) : nullptr; };
    accumulate<S, T>({data(score), data(squared), data(signed_), 0}, grad_out, input, bounds);
  };
  switch (grad_out.scalar_type()) {
    case ScalarType::Double: with(double(), double()); break;
    case ScalarType::Float: with(float(), float()); break;
    case ScalarType::BFloat16: with(bf16(), float()); break;
    case ScalarType::Half: with(half(), float()); break;
    default: STD_TORCH_CHECK(false, "grad_out: expected float64, float32, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def(
      "abs_weight_grad(Tensor(a!)? score, Tensor(b!)? squared, Tensor(c!)? signed, Tensor grad_out, Tensor input, "
      "Tensor bounds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) { m.impl("abs_weight_grad", TORCH_BOX(&abs_weight_grad)); }
