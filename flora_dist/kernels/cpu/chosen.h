// SPDX-License-Identifier: Apache-2.0
// What operators are written with: the kernels of this CPU, and a tensor's memory.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "plan.h"

namespace flora {

const Kernels* kernels_baseline();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#endif

using torch::stable::Tensor;
using Numbers = std::vector<double>;
using Integers = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

// The newest set of instructions that this CPU has.
inline const Kernels* choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kernels_avx512();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return kernels_avx2();
#endif
  return kernels_baseline();
}

inline const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* data(const Maybe& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

}  // namespace flora
