// What the user allows float32 arithmetic to be, as torch's own kernels ask. The one place that reads these flags.
#pragma once

#include <ATen/Context.h>

namespace lenet_ext {

// Whether convolutions may round their operands to TF32: torch.backends.cudnn.allow_tf32 (torch's default is yes), or
// its fp32_precision. Asked by operation, because asking without one fails in torch 2.9 and later if the user set
// convolutions and RNNs apart.
inline bool allows_tf32_convolutions() {
  return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV) && !at::NoTF32Guard::should_disable_tf32();
}

// Whether matrix products may: torch.backends.cuda.matmul.allow_tf32 (torch's default is no), or its fp32_precision.
inline bool allows_tf32_products() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32 &&
         !at::NoTF32Guard::should_disable_tf32();
}

}  // namespace lenet_ext
