// Each sequence is one left-to-right scan per kind of row. Positions claimed by an earlier kind are
// marked, so that no kind lists them again: a claimed position takes no place in the window either.
#include "elastic_cache/select_rows.h"

#include <algorithm>
#include <vector>

namespace elastic_cache {
namespace {

// Appends to a list of fixed length, and remembers whether everything fitted.
class RowList {
 public:
  RowList(int32_t* data, int64_t size) : data_(data), size_(size) {}
  void append(int64_t value) {
    if (count_ < size_) data_[count_] = static_cast<int32_t>(value);
    ++count_;
  }
  int64_t count() const { return count_; }
  bool has_fitted() const { return count_ <= size_; }
  void pad() const { std::fill(data_ + count_, data_ + size_, -1); }

 private:
  int32_t* data_;
  int64_t size_;
  int64_t count_ = 0;
};

// What the layers chose for sequence s, as a mark per position.
void mark_tracked(const SelectRowsParams& p, int64_t s, std::vector<char>& is_tracked) {
  std::fill(is_tracked.begin(), is_tracked.end(), 0);
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const int32_t* chosen = p.tracked + (l * p.num_sequences + s) * p.track_num;
    for (int64_t i = 0; i < p.track_num; ++i) {
      if (chosen[i] >= 0 && chosen[i] < p.capacity) is_tracked[static_cast<size_t>(chosen[i])] = 1;
    }
  }
}

void select_sequence(const SelectRowsParams& p, int64_t s, const std::vector<char>& is_tracked,
                     RowList& rows, RowList& window_rows) {
  const bool* masked = p.masked + s * p.capacity;
  const bool* committed = p.committed + s * p.capacity;
  int32_t* segment = p.segments + s * kSegmentColumns;
  std::fill(segment, segment + kSegmentColumns, 0);
  segment[kSegmentBegin] = static_cast<int32_t>(rows.count());

  const auto waits = [&](int64_t i) {
    return masked[i] && !committed[i] && !is_tracked[static_cast<size_t>(i)];
  };
  int64_t first = 0;
  while (first < p.capacity && !waits(first)) ++first;
  if (first == p.capacity || p.window[s] <= 0) return;

  const int64_t slot = s * p.capacity;
  for (int64_t i = 0; i < p.capacity; ++i) {
    if (!is_tracked[static_cast<size_t>(i)]) continue;
    rows.append(slot + i);
    ++segment[kSegmentTracked];
  }
  for (int64_t i = 0; i < p.capacity; ++i) {
    if (!committed[i] || is_tracked[static_cast<size_t>(i)]) continue;
    rows.append(slot + i);
    ++segment[kSegmentCommitted];
  }
  for (int64_t i = first; i < p.capacity; ++i) {
    if (!waits(i)) continue;
    if (segment[kSegmentWindow] < p.window[s]) {
      window_rows.append(rows.count());
      ++segment[kSegmentWindow];
    } else if (segment[kSegmentLookahead] < p.lookahead[s]) {
      ++segment[kSegmentLookahead];
    } else {
      break;
    }
    rows.append(slot + i);
  }
}

}  // namespace

bool select_rows_cpu(const SelectRowsParams& params) {
  RowList rows(params.rows, params.max_rows);
  RowList window_rows(params.window_rows, params.max_window);
  std::vector<char> is_tracked(static_cast<size_t>(params.capacity));
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    mark_tracked(params, s, is_tracked);
    select_sequence(params, s, is_tracked, rows, window_rows);
  }
  if (!rows.has_fitted() || !window_rows.has_fitted()) return false;
  rows.pad();
  window_rows.pad();
  return true;
}

}  // namespace elastic_cache
