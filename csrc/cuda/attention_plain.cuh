// The plain form of attention's part kernel, for any dtype and any even head_dim: a warp a lane, a
// thread a key. It is the kernel to read first, and the one float32 uses.
#pragma once

#include "attention_parts.cuh"

namespace elastic_cache::cuda::attention {

constexpr int kPlainLanes = 8;

// Keys and values begin .. begin + count - 1 of a sequence into shared memory. Contains barriers.
template <class T>
__device__ void stage(const WindowAttentionParams& p, int64_t first_slot, int count, int kv_head,
                      float* keys, float* values) {
  const int dim = static_cast<int>(p.head_dim);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count * dim; i += static_cast<int>(blockDim.x)) {
    const int key = i / dim, d = i % dim;
    const int64_t at = ((first_slot + key) * p.num_kv_heads + kv_head) * dim + d;
    keys[key * (dim + 1) + d] = to_float(static_cast<const T*>(p.k_cache)[at]);
    values[key * dim + d] = to_float(static_cast<const T*>(p.v_cache)[at]);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kPlainLanes* kWarpSize, 2)
    attention_plain_part_kernel(const WindowAttentionParams p, const Parts parts) {
  extern __shared__ float plain_memory[];
  __shared__ int32_t sequences[kPlainLanes];
  __shared__ float weights[kPlainLanes][kWarpSize];
  wait_for_previous();
  const int dim = static_cast<int>(p.head_dim);
  const int thread = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  float* keys = plain_memory;                    // [32, D + 1]
  float* values = keys + kWarpSize * (dim + 1);  // [32, D]
  float* query = values + kWarpSize * dim + warp * 2 * dim;
  float* out = query + dim;
  const int split = static_cast<int>(blockIdx.y), kv_head = static_cast<int>(blockIdx.z);
  const LaneMap lanes(p, kv_head);
  const int lane = static_cast<int>(blockIdx.x) * kPlainLanes + warp, slot = lanes.slot(p, lane);
  if (thread == 0) sequences[warp] = lanes.sequence(p, lane);
  const T* from = static_cast<const T*>(p.q_cache) +
                  (int64_t{max(slot, 0)} * lanes.num_heads + lanes.head(lane)) * p.head_dim;
  for (int d = thread; d < dim; d += kWarpSize) query[d] = slot < 0 ? 0.0f : to_float(from[d]);
  __syncthreads();

  const float factor = p.scale * kLog2E;
  for (int sequence = next_sequence(sequences, kPlainLanes, -1); sequence != kNoSequence;
       sequence = next_sequence(sequences, kPlainLanes, sequence)) {
    const KeySpan span = split_keys(keys_of(p.key_range, sequence), split, parts.num_splits);
    float top = -INFINITY, sum = 0.0f;
    for (int d = thread; d < dim; d += kWarpSize) out[d] = 0.0f;
    for (int begin = span.begin; begin < span.end; begin += kWarpSize) {
      const int count = min(span.end - begin, kWarpSize);
      stage<T>(p, sequence * p.capacity + begin, count, kv_head, keys, values);
      float score = -INFINITY;
      if (thread < count) {
        score = 0.0f;
        for (int d = 0; d < dim; ++d) score += query[d] * keys[thread * (dim + 1) + d];
        score *= factor;
      }
      const float before = top;
      top = fmaxf(top, warp_reduce(score, [](float a, float b) { return fmaxf(a, b); }));
      const float rescale = exp2f(before - top), weight = exp2f(score - top);
      sum = sum * rescale + warp_reduce(weight, Sum{});
      weights[warp][thread] = weight;
      __syncwarp();
      for (int d = thread; d < dim; d += kWarpSize) {
        float total = out[d] * rescale;
        for (int key = 0; key < count; ++key) total += weights[warp][key] * values[key * dim + d];
        out[d] = total;
      }
      __syncwarp();
    }
    if (sequences[warp] != sequence) continue;
    const int64_t item = split * p.num_rows * p.num_heads + lanes.item(lane);
    if (thread == 0) parts.softmax[item] = make_float2(top, sum);
    for (int d = thread; d < dim && sum > 0.0f; d += kWarpSize) parts.out[item * dim + d] = out[d];
  }
}

}  // namespace elastic_cache::cuda::attention
