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
constexpr int kMostDoublings = 4;

std::atomic<Clock::rep> alone_until{0};  // in the past: since when all has gone well
std::atomic<int> doublings{0};

}  // namespace

bool is_held_up(Clock::time_point now) {
  return now.time_since_epoch().count() < alone_until.load(std::memory_order_relaxed);
}

void note_region(Clock::duration wait, Clock::duration usual, Clock::time_point now) {
  // Several threads may be here at once; what they mix up is how long to be cautious, and nothing else.
  const int level = doublings.load(std::memory_order_relaxed);
  const Clock::duration pause = kFirstPause * (1 << level);
  if (wait > kHeldUp && wait > usual) {
    alone_until.store((now + pause).time_since_epoch().count(), std::memory_order_relaxed);
    doublings.store(std::min(level + 1, kMostDoublings), std::memory_order_relaxed);
  } else if (level > 0) {
    // In milliseconds, not in regions: a thread that has just woken keeps its core for many, and then loses it.
    const Clock::time_point since{Clock::duration(alone_until.load(std::memory_order_relaxed))};
    if (now - since < pause) return;
    alone_until.store(now.time_since_epoch().count(), std::memory_order_relaxed);
    doublings.store(level - 1, std::memory_order_relaxed);
  }
}

}  // namespace lenet_ext::cpu
