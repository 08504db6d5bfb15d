// Sizes that were chosen rather than derived, each with its reason. [c] arithmetic, not measured.
#pragma once

#include <algorithm>
#include <cstdint>

namespace elastic_cache::cuda {

// Keys of an attention tile. Four tiles of K and V at head_dim 128 are 128 KB: all bytes a block
// needs at 1024 keys and 32 heads are then on their way at once [c].
inline constexpr int kTileKeys = 64;

// Blocks that attention wants for one tile of rows: one on each of an H100's or H200's 132 SMs.
// A constant, and not what the device at hand has: results are to be the same on all.
inline constexpr int64_t kAttentionBlocks = 132;

// Blocks of a streamed product that is not split: one on each SM of an H100 or H200. Fewer columns
// than they take are split over k, among two blocks or three; of clusters of four only 30 fit [m].
inline constexpr int kStreamBlocks = 132;

// The combining kernel keeps one split a lane of a warp.
inline constexpr int64_t kMaxAttentionSplits = 32;

// Into how many parts the keys of a sequence are cut. It must not depend on the rows: then a row's
// result does not depend on what else is computed with it. Of several sequences it is expected that
// all are at work, each in a block a head.
inline int64_t attention_splits(int64_t num_kv_heads, int64_t capacity, int64_t num_sequences) {
  const int64_t tiles = (capacity + kTileKeys - 1) / kTileKeys;
  const int64_t wanted = kAttentionBlocks / std::max<int64_t>(num_kv_heads * num_sequences, 1);
  return std::max<int64_t>(1, std::min({wanted, tiles, kMaxAttentionSplits}));
}

// Logits of a block: 126,464 of them are 16 parts, so that the 16 rows of a window fill an H200.
inline constexpr int64_t kVocabularyPart = 8192;

}  // namespace elastic_cache::cuda
