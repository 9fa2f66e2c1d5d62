// Other processes on our cores. At the end of a parallel region everybody waits for everybody, also for a thread that
// has lost its core: beside one busy process two threads can take ten times as long as one. A region that was held up
// is noticed, and the caller then works alone for a while, which the results do not depend on.
#pragma once

#include <chrono>

namespace lenet_ext::cpu {

using Clock = std::chrono::steady_clock;

// Whether a thread alone is the better choice for now.
bool is_held_up(Clock::time_point now);

// To be told after each parallel region: how long the first thread to be done waited for the others, and how long it
// may.
void note_region(Clock::duration wait, Clock::duration usual, Clock::time_point now);

}  // namespace lenet_ext::cpu
