// SPDX-License-Identifier: Apache-2.0
// Work shared among the threads of torch's pool, and each thread's scratch memory.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace flora {

// Below so many elements a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

// body(index) for each index, in any order, by as many threads as `elements` are worth. Whoever is free takes
// the next one: the machine's other work slows threads unevenly.
template <class Body>
void each(int64_t count, int64_t elements, const Body& body) {
  int64_t threads = std::min(count, elements / kElementsPerThread);
  if (threads > 1) threads = std::min<int64_t>(threads, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t index = 0; index < count; index++) body(index);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t index = next++; index < count; index = next++) body(index);
  });
}

// Kept by the thread: a step asks for it once per tile. Aligned, or a vector may lie across two lines of the cache.
inline float* scratch(int64_t floats) {
  constexpr int64_t kLine = 64;
  thread_local std::vector<float> kept;
  const auto needed = static_cast<size_t>(floats) + kLine / sizeof(float);
  if (kept.size() < needed) kept.resize(needed);
  const auto address = reinterpret_cast<uintptr_t>(kept.data());
  return reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
}

}  // namespace flora
