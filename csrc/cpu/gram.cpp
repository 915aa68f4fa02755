// gram_ on CPU: the half above the diagonal, copied from the half below it in squares that fit the first cache.
#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t SIDE = 32;  // of a square

template <typename T>
void mirror(T* matrix, int64_t n) {
  // Each square is written by one task alone, and what is read is below the diagonal, where nothing is written.
  torch::stable::parallel_for(0, (n + SIDE - 1) / SIDE, 1, [&](int64_t begin, int64_t end) {
    for (int64_t top = begin * SIDE; top < std::min(end * SIDE, n); top += SIDE) {
      const int64_t bottom = std::min(top + SIDE, n);
      for (int64_t left = top; left < n; left += SIDE) {
        const int64_t right = std::min(left + SIDE, n);
        for (int64_t i = top; i < bottom; ++i) {
          for (int64_t j = std::max(left, i + 1); j < right; ++j) matrix[i * n + j] = matrix[j * n + i];
        }
      }
    }
  });
}

void gram_mirror(const Tensor& gram) {
  const int64_t n = gram.size(0);
  if (gram.scalar_type() == ScalarType::Double) {
    mirror(static_cast<double*>(gram.mutable_data_ptr()), n);
  } else {
    STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Float, "gram: expected float32 or float64");
    mirror(static_cast<float*>(gram.mutable_data_ptr()), n);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) { m.def("gram_mirror(Tensor(a!) gram) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m) { m.impl("gram_mirror", TORCH_BOX(&gram_mirror)); }
