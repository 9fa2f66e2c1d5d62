// An operator as the dispatcher knows it. What is called through it passes autograd, autocast, torch.func and tracers;
// kernels never do that (they call each other as C++ functions), derivatives always do.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace lenet_ext {

template <typename Function>
c10::TypedOperatorHandle<Function> operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace lenet_ext
