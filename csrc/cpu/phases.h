// Several loops in one parallel region: a barrier between two loops costs a fraction of what it
// costs to leave one region and enter the next, and the loops of a layer are short.
#pragma once

#include "common.h"

namespace elastic_cache {

// One thread of a region; all of them run the same code.
class Team {
 public:
  Team(int index, int size) : index_(index), size_(size) {}

  // f(begin, end) with this thread's part of [0, n).
  template <class F>
  void share(int64_t n, const F& f) const {
    const int64_t begin = n * index_ / size_, end = n * (index_ + 1) / size_;
    if (begin < end) f(begin, end);
  }

  // Returns when every thread of the team has come here.
  void wait() const {
    if (size_ == 1) return;
#pragma omp barrier
  }

 private:
  int index_, size_;
};

// f(team) on every thread, or on this one alone if the work, which takes one core about
// `nanoseconds`, is too little to share.
template <class F>
void with_team(double nanoseconds, const F& f) {
#ifdef _OPENMP
  if (is_worth_sharing(nanoseconds)) {
#pragma omp parallel
    f(Team(omp_get_thread_num(), omp_get_num_threads()));
    return;
  }
#endif
  f(Team(0, 1));
}

}  // namespace elastic_cache
