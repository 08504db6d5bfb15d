// drift_statistics on tensor cores, D = head_dim. Both kernels multiply a tile of 64 keys with
// lanes of a pass, four warps with 16 keys each:
//   log_sum     a block takes a head and the 16 lanes of a kind and runs over the keys; where
//               window_attention's sums are given, the old kind alone
//   statistics  a block takes 64 keys and all lanes and runs over the heads: mass and cosines grow
//               in registers
// Nothing is copied ahead: the other blocks of the SM fill the time.
// The subtle thing: old lanes see overwritten keys as they were. The first kernel leaves those out
// of the tiles of the cache and takes k_old as further tiles; in the second a thread's address of a
// key fragment's row points into k_old's tile instead.
#pragma once

#include "attention_tile.cuh"
#include "drift_lanes.cuh"

namespace elastic_cache::cuda::drift {

using attention::bf16;
using attention::copy_tile;
using attention::score_tile;
using attention::Scores;
using attention::Tile;

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * kWarpSize;
constexpr int kKeysPerWarp = kTileKeys / kNumWarps;
static_assert(kKeysPerWarp == 16, "a warp's scores are two B fragments wide");

// As many as T = 1024 gives the statistics at 32 layers: one wave. It leaves 128 registers a thread
// and 56 KB.
constexpr int kBlocksPerSm = 4;

template <int D, int kNumLanes = kLanes>
using Queries = bf16[kNumLanes][D + kRowPad];

// A thread's place in the fragments of its warp's products: rows `row` and `row` + 8 of 16 lanes,
// keys key(0) .. key(3) of the tile.
struct Place {
  int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int row = lane / 4;

  __device__ int key(int i) const { return warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2 + i % 2; }
};

// Where the queries of a pass's lanes begin, of head 0; null for a lane without a row.
__device__ inline void find_queries(const DriftStatisticsParams& p, const Sequence& q, int pass,
                                    const bf16** from) {
  for (int lane = static_cast<int>(threadIdx.x); lane < kLanes; lane += kNumThreads) {
    const int row = q.row(p, pass, lane);
    const auto* all = static_cast<const bf16*>(lane < kOldLanes ? p.q_cache : p.q_old);
    from[lane] = row < 0 ? nullptr : all + q.query(p, lane, row) * p.num_heads * p.head_dim;
  }
}

// Starts copying a head's queries of kNumLanes lanes from `first` on, to `to(lane, column)`; zeros
// where there is none.
template <int D, int kNumLanes, class To>
__device__ inline void copy_queries(const DriftStatisticsParams& p, const bf16* const* from,
                                    int head, int first, const To& to) {
  constexpr int kVectors = D / 8, kCount = kNumLanes * kVectors;
#pragma unroll
  for (int i = 0; i < (kCount + kNumThreads - 1) / kNumThreads; ++i) {
    const int at = i * kNumThreads + static_cast<int>(threadIdx.x);
    if (kCount % kNumThreads != 0 && at >= kCount) break;
    const int lane = first + at / kVectors, column = at % kVectors * 8;
    const bf16* query = from[lane];
    const bool is_valid = query != nullptr;
    copy_async(to(lane, column),
               is_valid ? query + head * D + column : static_cast<const bf16*>(p.q_cache),
               is_valid);
  }
}

// ---- log_sum ----

constexpr int kLogSumLanes = kPassRows;
// Small blocks, eight an SM (at 32 heads and layers one wave), fill each other's waiting.
constexpr int kLogSumBlocksPerSm = 8;
constexpr int kTileWords = kTileKeys / 32;  // of the marks

// The tiles a head's lanes of a kind run over: those of the cache and, for old ones, of k_old.
template <int D>
class KeyTiles {
 public:
  __device__ KeyTiles(const DriftStatisticsParams& p, const Sequence& q, int kv_head, bool is_old)
      : stride_(static_cast<int>(p.num_kv_heads) * D),
        num_keys_(q.end_key - q.first_key),
        num_rows_(is_old && q.num_tracked > 0 ? q.end - q.begin : 0),
        num_cached_((num_keys_ + kTileKeys - 1) / kTileKeys),
        count_(num_cached_ + (num_rows_ + kTileKeys - 1) / kTileKeys),
        keys_(static_cast<const bf16*>(p.k_cache) + (q.first_cached + q.first_key) * stride_ +
              kv_head * D),
        old_(static_cast<const bf16*>(p.k_old) + (q.first_old + q.begin) * stride_ + kv_head * D) {}

  __device__ int count() const { return count_; }
  __device__ void copy(int tile, Tile<D>& to) const {
    const bool is_cached = tile < num_cached_;
    const int first = (is_cached ? tile : tile - num_cached_) * kTileKeys;
    copy_tile<D, kNumThreads>(to, (is_cached ? keys_ : old_) + int64_t{first} * stride_, stride_,
                              (is_cached ? num_keys_ : num_rows_) - first);
  }
  // A bit a key of all tiles: whether the lanes see it. Contains barriers.
  __device__ void mark(const DriftStatisticsParams& p, const Sequence& q, uint32_t* marks) const {
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < count_ * kTileWords; i += kNumThreads) {
      const int num_left = num_keys_ - i * 32;
      const bool is_cached = i < num_cached_ * kTileWords;
      marks[i] = !is_cached || num_left <= 0 ? 0u : num_left < 32 ? (1u << num_left) - 1 : ~0u;
    }
    __syncthreads();
    for (int i = thread; i < num_rows_; i += kNumThreads) {
      const int key = q.position(p, q.begin + i) - q.first_key;
      if (key < 0 || key >= num_keys_) continue;
      atomicAnd(marks + key / 32, ~(1u << key % 32));
      atomicOr(marks + num_cached_ * kTileWords + i / 32, 1u << i % 32);
    }
    __syncthreads();
  }

 private:
  int stride_;
  int num_keys_;
  int num_rows_;
  int num_cached_;
  int count_;
  const bf16* keys_;
  const bf16* old_;
};

template <int D>
struct alignas(16) LogSumShared {
  KeyTiles<D> tiles;  // here, as registers are few
  alignas(16) Tile<D> keys;
  alignas(16) Queries<D, kLogSumLanes> queries;
  const bf16* from[kLanes];
  Softmax parts[kNumWarps][kLogSumLanes];
};

// What this thread's keys give its two lanes.
struct LogSumState {
  Softmax seen[2];

  // A tile's scores, and the marks of its keys from this thread's first on.
  __device__ void add(const Scores<kLogSumLanes>& score, uint32_t marks, float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Softmax& mine = seen[half];
      float x[4], top = mine.top;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_seen = (marks >> (i / 2 * 8 + i % 2) & 1) != 0;
        x[i] = is_seen ? score[0][i / 2][half * 2 + i % 2] * factor : -INFINITY;
        top = fmaxf(top, x[i]);
      }
      if (top == -INFINITY) continue;
      mine.sum *= exp2_flush(mine.top - top);
      mine.top = top;
#pragma unroll
      for (int i = 0; i < 4; ++i) mine.sum += exp2_flush(x[i] - top);
    }
  }
};

// Over the block's keys -> log-sum-exp of its lanes, `from` and `lse` those of them. Contains
// barriers.
__device__ inline void write_log_sums(const Place& at, LogSumState& state,
                                      Softmax (&parts)[kNumWarps][kLogSumLanes],
                                      const bf16* const* from, float* lse) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Softmax& mine = state.seen[half];
    mine.add_lane(1);
    mine.add_lane(2);
    if (at.lane % 4 == 0) parts[at.warp][half * 8 + at.row] = mine;
  }
  __syncthreads();
  if (const int i = static_cast<int>(threadIdx.x); i < kLogSumLanes) {
    Softmax all = parts[0][i];
    for (int warp = 1; warp < kNumWarps; ++warp) all.add(parts[warp][i]);
    lse[i] = from[i] == nullptr ? INFINITY : all.log_sum();
  }
  __syncthreads();
}

// blockIdx = (kind * heads + head, sequence, layer); the one kind is the old one where the others'
// sums are given.
template <int D>
__global__ void __launch_bounds__(kNumThreads, kLogSumBlocksPerSm)
    log_sum_kernel(const DriftStatisticsParams p, const Layout layout) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& sh = *reinterpret_cast<LogSumShared<D>*>(memory);
  auto* marks = reinterpret_cast<uint32_t*>(memory + sizeof(LogSumShared<D>));
  wait_for_previous();
  const int num_heads = static_cast<int>(p.num_heads);
  const int head = static_cast<int>(blockIdx.x) % num_heads;
  const int kind = static_cast<int>(blockIdx.x) / num_heads;
  const int first = p.lse != nullptr ? kOldLanes : kind * kPassRows;
  const int s = static_cast<int>(blockIdx.y), layer = static_cast<int>(blockIdx.z);
  const Sequence q(p, layer, s);
  const KeyTiles<D>& tiles = sh.tiles;
  if (threadIdx.x == 0) sh.tiles = KeyTiles<D>(p, q, head / q.group, first == kOldLanes);
  __syncthreads();
  tiles.mark(p, q, marks);
  const Place at;
  const int num_passes = q.num_passes();
  for (int pass = 0; pass < num_passes; ++pass) {
    const Sequence rows(p, layer, s);  // anew: saves registers
    find_queries(p, rows, pass, sh.from);
    if (const int lane = static_cast<int>(threadIdx.x); p.lse != nullptr && lane < kOldLanes) {
      layout.lse[lse_index(p, layout, layer, s, pass, head) + lane] =
          given_log_sum(p, rows, rows.row(p, pass, lane), head);
    }
    __syncthreads();
    LogSumState state;
    const int num_rows = first == kWindowLanes ? rows.num_window : rows.num_tracked;
    const int num_tiles = pass * kPassRows < num_rows ? tiles.count() : 0;
    if (num_tiles > 0) {  // else nobody would wait for them
      copy_queries<D, kLogSumLanes>(p, sh.from, head, first, [&](int lane, int column) {
        return &sh.queries[lane - first][column];
      });
    }
    for (int tile = 0; tile < num_tiles; ++tile) {
      tiles.copy(tile, sh.keys);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      Scores<kLogSumLanes> score;
      score_tile<D, kLogSumLanes>(&sh.keys[at.warp * kKeysPerWarp + b_row()][b_column()],
                                  sh.queries, score);
      state.add(score, marks[tile * kTileWords + at.key(0) / 32] >> at.key(0) % 32,
                p.scale * kLog2E);
      __syncthreads();  // the buffer is free
    }
    write_log_sums(at, state, sh.parts, sh.from + first,
                   layout.lse + lse_index(p, layout, layer, s, pass, head) + first);
  }
}

// ---- statistics ----

// Of the 64 keys from position `first` on: which row of k_old each was, -1 for one that has not
// been overwritten. Whether there is any. Contains barriers.
__device__ inline bool find_old_rows(const DriftStatisticsParams& p, const Sequence& q, int first,
                                     int32_t* old_rows) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTileKeys) old_rows[thread] = -1;
  __syncthreads();
  bool has_found = false;
  for (int r = q.begin + thread; r < q.end && p.k_old != nullptr; r += kNumThreads) {
    const int position = q.position(p, r);
    if (position < first || position >= first + kTileKeys) continue;
    old_rows[position - first] = r;
    has_found = true;
  }
  return __syncthreads_or(has_found) != 0;
}

// Starts copying a head's keys of a block as they were, to `to(key, column)`; only those that were
// overwritten.
template <int D, class To>
__device__ inline void copy_old_keys(const DriftStatisticsParams& p, const Sequence& q,
                                     int64_t kv_head, const int32_t* old_rows, const To& to) {
  constexpr int kVectors = D / 8;
  const auto* old_keys = static_cast<const bf16*>(p.k_old) + kv_head * D;
  const int64_t stride = p.num_kv_heads * D;
#pragma unroll
  for (int i = 0; i < kTileKeys * kVectors / kNumThreads; ++i) {
    const int at = i * kNumThreads + static_cast<int>(threadIdx.x);
    const int key = at / kVectors, column = at % kVectors * 8, row = old_rows[key];
    if (row < 0) continue;
    copy_async(to(key, column), old_keys + (q.first_old + row) * stride + column, true);
  }
}

// Starts copying the log-sum-exps of a pass's lanes.
__device__ inline void copy_log_sums(const float* from, float* to) {
  const int at = static_cast<int>(threadIdx.x) * 4;
  if (at < kLanes) copy_async(to + at, from + at, true);
}

// The sum of a block's cosines; thread 0 stores it.
__device__ inline void store_cosines(const DriftStatisticsParams& p, const Layout& layout,
                                     double cosines, double* reduced) {
  const double total = block_sum(cosines, reduced);
  const int64_t at = int64_t{blockIdx.z} * p.num_sequences + blockIdx.y;
  if (threadIdx.x == 0) layout.cosines[at * layout.num_blocks + blockIdx.x] = total;
}

template <int D>
struct alignas(16) StatisticsShared {
  Tile<D> keys;
  Tile<D> old_keys;  // of overwritten keys alone
  Queries<D> queries;
  float lse[kLanes];
  const bf16* from[kLanes];
  int32_t old_rows[kTileKeys];  // of k_old, -1 for a key that was not overwritten
  double reduced[kNumWarps];
};

// A block's keys, `first` and the 63 after it, over all heads of a layer.
template <int D>
class KeyBlock {
 public:
  __device__ KeyBlock(const DriftStatisticsParams& p, const Layout& layout, const Sequence& q,
                      int layer, int first, StatisticsShared<D>& sh)
      : p_(p),
        layout_(layout),
        q_(q),
        layer_(layer),
        first_(first),
        sh_(sh),
        has_old_(find_old_rows(p, q, first, sh.old_rows)) {}

  // Mass of this thread's keys, over its rows; the cosines of its rows and keys.
  __device__ double run(float (&mass)[4]) const {
    double cosines = 0.0;
    const int num_heads = static_cast<int>(p_.num_heads);
    for (int pass = 0; pass < q_.num_passes(); ++pass) {
      find_queries(p_, q_, pass, sh_.from);
      __syncthreads();
      Products products[2][4];
      for (int head = 0; head < num_heads; ++head) {
        copy_head(pass, head);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        add_head(mass, products);
        __syncthreads();  // the buffers are free
      }
      cosines += sum_cosines(products);
      __syncthreads();
    }
    return cosines;
  }

 private:
  __device__ bool is_valid(int key) const {
    return first_ + key >= q_.first_key && first_ + key < q_.end_key;
  }

  // Starts copying what the 48 lanes of a head need.
  __device__ void copy_head(int pass, int head) const {
    const int64_t kv_head = head / q_.group;
    const int64_t stride = p_.num_kv_heads * D;
    const auto* keys = static_cast<const bf16*>(p_.k_cache);
    copy_tile<D, kNumThreads>(sh_.keys, keys + (q_.first_cached + first_) * stride + kv_head * D,
                              stride, q_.end_key - first_);
    if (has_old_) {
      copy_old_keys<D>(p_, q_, kv_head, sh_.old_rows,
                       [&](int key, int column) { return &sh_.old_keys[key][column]; });
    }
    copy_queries<D, kLanes>(p_, sh_.from, head, 0,
                            [&](int lane, int column) { return &sh_.queries[lane][column]; });
    copy_log_sums(layout_.lse + lse_index(p_, layout_, layer_, q_.index, pass, head), sh_.lse);
  }

  __device__ void add_head(float (&mass)[4], Products (&products)[2][4]) const {
    const Place at;
    const float factor = p_.scale * kLog2E;
    const int key = at.warp * kKeysPerWarp + b_row();
    const bf16* key_row = &sh_.keys[key][b_column()];
    const bf16* old_key_row = sh_.old_rows[key] < 0 ? key_row : &sh_.old_keys[key][b_column()];
    Scores<kOldLanes> now;
    Scores<kPassRows> before;
    score_tile<D, kOldLanes>(key_row, sh_.queries, now);
    score_tile<D, kPassRows>(old_key_row, sh_.queries + kOldLanes, before);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* lse = sh_.lse + half * 8 + at.row;
      const float window = lse[kWindowLanes], tracked = lse[kTrackedLanes], old = lse[kOldLanes];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto weight = [&](const float (&score)[2][4], float log_sum) {
          return exp2_flush(score[i / 2][half * 2 + i % 2] * factor - log_sum);
        };
        mass[i] += weight(now[0], window);
        products[half][i].add(weight(before[0], old), weight(now[1], tracked));
      }
    }
  }

  __device__ double sum_cosines(const Products (&products)[2][4]) const {
    const Place at;
    double total = 0.0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (sh_.from[kTrackedLanes + half * 8 + at.row] == nullptr) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (is_valid(at.key(i))) total += products[half][i].cosine();
      }
    }
    return total;
  }

  const DriftStatisticsParams& p_;
  const Layout& layout_;
  const Sequence& q_;
  int layer_;
  int first_;
  StatisticsShared<D>& sh_;
  bool has_old_;  // whether any of the keys was overwritten
};

// blockIdx = (key / 64, sequence, layer).
template <int D>
__global__ void __launch_bounds__(kNumThreads, kBlocksPerSm)
    statistics_kernel(const DriftStatisticsParams p, const Layout layout) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& sh = *reinterpret_cast<StatisticsShared<D>*>(memory);
  wait_for_previous();
  const int s = static_cast<int>(blockIdx.y), layer = static_cast<int>(blockIdx.z);
  const Sequence q(p, layer, s);
  const int first = static_cast<int>(blockIdx.x) * kTileKeys;
  float mass[4] = {};
  double cosines = 0.0;
  if (max(first, q.first_key) < min(first + kTileKeys, q.end_key)) {
    const KeyBlock<D> keys(p, layout, q, layer, first, sh);
    cosines = keys.run(mass);
  }
  const Place at;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) {
      mass[i] += __shfl_xor_sync(kFullWarp, mass[i], offset);
    }
    const int position = first + at.key(i);
    const bool is_key = position >= q.first_key && position < q.end_key;
    if (at.row == 0 && position < p.capacity) {
      p.mass[q.first_cached + position] = is_key ? mass[i] : 0.0f;
    }
  }
  store_cosines(p, layout, cosines, sh.reduced);
}

}  // namespace elastic_cache::cuda::drift
