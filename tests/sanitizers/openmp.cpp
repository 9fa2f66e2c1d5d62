// GNU OpenMP for ThreadSanitizer, to be loaded before it: the runtime was not built for the sanitizer, which therefore
// does not see that a parallel region begins after what came before it and ends before what comes after it. Each region
// goes to the runtime's own function with just that said. Within a region threads have nothing to order them.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

namespace {

struct Region {
  void (*body)(void*);
  void* data;
  char begin, end;  // their addresses are what threads meet at
};

void run(void* given) {
  auto* region = static_cast<Region*>(given);
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

}  // namespace

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto runtime = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{body, data, 0, 0};
  __tsan_release(&region.begin);
  runtime(run, &region, threads, flags);
  __tsan_acquire(&region.end);
}
