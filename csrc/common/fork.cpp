// What a process that forks hands on. GNU's OpenMP runtime keeps a thread's helpers between parallel regions. A forked
// child inherits the list of them, but not the threads, and its first parallel region, ours or torch's, would wait for
// them without end. So the thread that forks lets its helpers go first; parent and child begin new ones where they need
// them. Clang's runtime cares for its children itself.
#ifndef __clang__
#include <omp.h>
#include <pthread.h>

namespace {

// Refused within a parallel region, which no child could continue anyway.
void release_helpers() { omp_pause_resource_all(omp_pause_hard); }

[[maybe_unused]] const int registered = pthread_atfork(release_helpers, nullptr, nullptr);

}  // namespace
#endif
