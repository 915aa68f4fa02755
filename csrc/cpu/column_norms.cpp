// column_norms_ on CPU: sums of squares of features, in double, in one pass over the chosen rows.
//
// Shapes: N rows of B samples, I features. Features are divided among the threads, and a feature's sum runs over its
// rows in order: nothing depends on how many threads there are.
#include <algorithm>
#include <cstdint>

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

constexpr int64_t UNIT = 64;      // features that one thread has at least
constexpr int64_t CHUNK = 2048;   // features whose sums stay in the first cache
constexpr int64_t TOGETHER = 8;   // rows for which a sum is loaded and stored once

FASTGUARD_INLINE double value(double x) { return x; }
FASTGUARD_INLINE double value(float x) { return x; }
FASTGUARD_INLINE double value(c10::Half x) { return static_cast<float>(x); }
FASTGUARD_INLINE double value(bf16 x) { return of_bf16(x); }

template <int64_t ROWS, typename S>
FASTGUARD_INLINE void add_rows(const S* x, int64_t row, int64_t n, double* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) {
    double s = sum[i];
    for (int64_t r = 0; r < ROWS; ++r) s += value(x[r * row + i]) * value(x[r * row + i]);
    sum[i] = s;
  }
}
template <typename S>
FASTGUARD_INLINE void add(const S* x, int64_t row, int64_t rows, int64_t n, double* sum) {
  int64_t r = 0;
  for (; r + TOGETHER <= rows; r += TOGETHER) add_rows<TOGETHER>(x + r * row, row, n, sum);
  for (; r < rows; ++r) add_rows<1>(x + r * row, row, n, sum);
}

// The same body, cloned per instruction set.
#define BODY(S) \
  FASTGUARD_MULTIVERSION void add_(const S* x, int64_t row, int64_t rows, int64_t n, double* sum) { \
    add(x, row, rows, n, sum); \
  }
BODY(double)
BODY(float)
BODY(bf16)
#undef BODY
void add_(const c10::Half* x, int64_t row, int64_t rows, int64_t n, double* sum) { add(x, row, rows, n, sum); }

template <typename S>
void squares(const Tensor& x, const Tensor& bounds, const Tensor& out) {
  const S* from = static_cast<const S*>(x.const_data_ptr());
  const int64_t* at = static_cast<const int64_t*>(bounds.const_data_ptr());
  double* sums = static_cast<double*>(out.mutable_data_ptr());
  const int64_t I = x.size(1), row = x.stride(0), B = bounds.size(0), each = out.size(0);
  torch::stable::parallel_for(0, (I + UNIT - 1) / UNIT, 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * UNIT, I);
    for (int64_t b = 0; b < B; ++b) {
      const int64_t first = at[2 * b], rows = at[2 * b + 1] - first;
      for (int64_t i = begin * UNIT; i < stop; i += CHUNK) {
        add_(from + first * row + i, row, rows, std::min(CHUNK, stop - i), sums + b % each * I + i);
      }
    }
  });
}

void column_norms(const Tensor& x, const Tensor& bounds, const Tensor& out) {
  switch (x.scalar_type()) {
    case ScalarType::Double: squares<double>(x, bounds, out); break;
    case ScalarType::Float: squares<float>(x, bounds, out); break;
    case ScalarType::BFloat16: squares<bf16>(x, bounds, out); break;
    case ScalarType::Half: squares<c10::Half>(x, bounds, out); break;
    default: STD_TORCH_CHECK(false, "x: expected float64, float32, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) {
  m.def("column_norms(Tensor x, Tensor bounds, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) { m.impl("column_norms", TORCH_BOX(&column_norms)); }
