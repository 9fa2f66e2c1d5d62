// csrc/common/neighbour.cpp under a clock of its own: test_neighbour.py builds and runs this.
#include <cstdio>
#include <thread>
#include <vector>

#include "common/neighbour.h"

using namespace lenet_ext::cpu;
using std::chrono::microseconds;
using std::chrono::milliseconds;

namespace {

int failures = 0;
Clock::time_point now{};

void expect(bool held_up, const char* when) {
  if (is_held_up(now) == held_up) return;
  ++failures;
  printf("%s: %s\n", when, held_up ? "not held up" : "held up");
}

// How long one is alone after a region that was held up.
milliseconds pause_after_a_wait() {
  note_region(milliseconds(4), microseconds(200), now);
  const Clock::time_point begin = now;
  while (is_held_up(now)) now += milliseconds(1);
  return std::chrono::duration_cast<milliseconds>(now - begin);
}

void expect_pause(int expected, const char* when) {
  const auto pause = pause_after_a_wait().count();
  if (pause == expected) return;
  ++failures;
  printf("%s: alone for %d ms, expected %d\n", when, static_cast<int>(pause), expected);
}

}  // namespace

int main() {
  now += milliseconds(1000);
  expect(false, "at first");
  note_region(microseconds(60), microseconds(40), now);
  expect(false, "after a thread that took some time to wake");
  note_region(milliseconds(2), milliseconds(5), now);
  expect(false, "after a long region whose last piece was long");
  int pause = 20;
  for (int i = 0; i < 5; ++i, pause *= 2) expect_pause(pause, "each time twice as long");
  expect_pause(320, "but not longer than this");
  for (int i = 0; i < 1000; ++i) note_region(microseconds(20), microseconds(200), now);
  expect_pause(320, "after many good regions in a moment, which a thread does before it loses its core");
  for (int i = 0; i < 2000; ++i) {
    now += milliseconds(1);
    note_region(microseconds(20), microseconds(200), now);
  }
  expect(false, "after good regions");
  expect_pause(20, "after two seconds of them");
  // Several callers at once: nothing to see but for ThreadSanitizer.
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([begin = now] {
      for (int j = 0; j < 1000; ++j) {
        if (!is_held_up(begin)) note_region(microseconds(j % 40 == 0 ? 4000 : 20), microseconds(200), begin);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  return failures;
}
