#include "common/neighbour.h"

#include <algorithm>
#include <atomic>

namespace lenet_ext::cpu {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// A thread that sleeps wakes within a tenth of this; one that has lost its core is back after milliseconds.
constexpr microseconds kHeldUp(300);
// Alone for so long after the first time, and twice as long each further time, so that trying again costs little.
constexpr milliseconds kFirstPause(20);
constexpr int kMostDoublings = 5;
constexpr int kGoodRegions = 32;  // in a row, that take back one doubling

std::atomic<Clock::rep> alone_until{0};
std::atomic<int> doublings{0}, good_regions{0};

}  // namespace

bool is_held_up(Clock::time_point now) {
  return now.time_since_epoch().count() < alone_until.load(std::memory_order_relaxed);
}

void note_region(Clock::duration work, Clock::duration wait, Clock::time_point now) {
  // Several threads may be here at once; what they mix up is how long to be cautious, and nothing else.
  int level = doublings.load(std::memory_order_relaxed);
  if (wait > kHeldUp && wait > work / 2) {
    const Clock::time_point end = now + kFirstPause * (1 << level);
    alone_until.store(end.time_since_epoch().count(), std::memory_order_relaxed);
    doublings.store(std::min(level + 1, kMostDoublings), std::memory_order_relaxed);
    good_regions.store(0, std::memory_order_relaxed);
  } else if (level > 0 && good_regions.fetch_add(1, std::memory_order_relaxed) + 1 >= kGoodRegions) {
    doublings.store(level - 1, std::memory_order_relaxed);
    good_regions.store(0, std::memory_order_relaxed);
  }
}

}  // namespace lenet_ext::cpu
