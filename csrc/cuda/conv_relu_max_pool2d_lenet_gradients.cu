// The gradients of LeNet's two layers on the tensor cores, each layer on its own: float16, bfloat16, and float32 by way
// of TF32. The products are those of the whole network (lenet_tensor_core_gradients.cuh), in the same order; what lies
// between the layers is rounded to the storage type, and in TF32 again where it is an operand. So the gradients of the
// weights are bit by bit those of the whole network.
//
// What is not finite reaches what it reaches in PyTorch, whose products are dense, too: zeros of windows times a weight
// or a pixel that is not finite are NaN.
//
// Counted as in lenet_tensor_core_backward.cu, for an image: conv2 475 products, 770 clocks of a multiprocessor, and
// 690 accesses to shared memory, in TF32 950 products, 1,530 clocks, and 1,440; conv1 124 products, 200 clocks, and
// 470, in TF32 247, 400 clocks, and 730. No GPU has run these kernels yet.
#include "conv_relu_max_pool2d_lenet.cuh"
#include "lenet_tensor_core_gradients.cuh"

namespace lenet_ext::cuda {
namespace {

template <typename T>
struct Layer {
  int64_t batch, slice_images;
  const T *grad_output, *input, *weight;
  const uint8_t* indices;
  T* grad_input;
  float* partials;  // [slices][out_channels][taps of all input channels, bias]

  explicit Layer(const ConvPoolBackward& c)
      : batch(c.shape.batch),
        slice_images(c.slice_images),
        grad_output(static_cast<const T*>(c.grad_output)),
        input(static_cast<const T*>(c.input)),
        weight(static_cast<const T*>(c.weight)),
        indices(c.indices),
        grad_input(static_cast<T*>(c.grad_input)),
        partials(static_cast<float*>(c.workspace)) {}
};

// block -> one slice of the batch, two images at a time, in TF32 one, while what the next ones need arrives. Shared
// memory: 46 KB, in TF32 38 KB.
template <typename T>
__global__ void __launch_bounds__(kGradientThreads, 2) lenet_tensor_core_conv1_gradients_kernel(Layer<T> layer) {
  using Pass = GradientPass<T, GradientsOf::kConv1>;
  LX_SMEM(shared);
  const Pass pass(shared);
  pass.prepare();
  Conv1WeightSums<Pass> sums;
  each_pass<Pass>(
      layer.batch, layer.slice_images,
      [&](int64_t first, int present) {
        pass.fetch({layer.input + first * Conv1::kImage, nullptr, layer.grad_output + first * Conv1::kPooled, nullptr,
                    layer.indices + first * Conv1::kPooled, nullptr},
                   present);
      },
      [&](int present) {
        load_pixels(pass, present);
        load_patches(pass, present);
      },
      [&](int64_t, int) { sums.add(pass); });
  static_assert(Conv1WeightSums<Pass>::kBandFloats * 4 <= Pass::kPatchesTaken);
  float* const partial = layer.partials + int64_t{blockIdx.x} * (Conv1::kOut * (kTaps + 1));
  sums.finish(reinterpret_cast<float*>(pass.patches), [&](int at, float sum) { partial[at] = sum; });
}

// A patch's gradients, rounded, to where they belong: two neighbouring positions at once.
template <typename Pass>
struct ToInput {
  typename Pass::Stored* grad_input;  // of the first image
  int present;

  template <typename Sums>
  __device__ __forceinline__ void operator()(int image, int y, int x, int t, const Sums& sums) const {
    using T = typename Pass::Stored;
    if (image >= present) return;
    T* const to = grad_input + image * Conv2::kImage + 2 * t * Conv1::kWindows + 2 * y * Conv2::kSize + 2 * x;
#pragma unroll
    for (int dy = 0; dy < 2; ++dy) {
      const Pack<float, 2> left = sums(dy, 0), right = sums(dy, 1);
#pragma unroll
      for (int channel = 0; channel < 2; ++channel) {
        T* const at = to + channel * Conv1::kWindows + dy * Conv2::kSize;
        if constexpr (Pass::kPerWord == 2) {
          *reinterpret_cast<uint32_t*>(at) = lx::rounded_word<T, false>(left[channel], right[channel]);
        } else {
          *reinterpret_cast<Pack<float, 2>*>(at) = {{left[channel], right[channel]}};
        }
      }
    }
  }
};

// block -> as above. Shared memory: 39 KB, in TF32 46 KB; less for one of the gradients alone.
template <typename T, GradientsOf kOf>
__global__ void __launch_bounds__(kGradientThreads, 2) lenet_tensor_core_conv2_gradients_kernel(Layer<T> layer) {
  using Pass = GradientPass<T, kOf>;
  LX_SMEM(shared);
  const Pass pass(shared);
  pass.prepare();
  auto compute = [&](const auto& add_weights, const auto& store_input) {
    each_pass<Pass>(
        layer.batch, layer.slice_images,
        [&](int64_t first, int present) {
          const T* const input = Pass::kOfWeights ? layer.input + first * Conv2::kImage : nullptr;
          pass.fetch({nullptr, input, nullptr, layer.grad_output + first * Conv2::kPooled, nullptr,
                      layer.indices + first * Conv2::kPooled},
                     present);
        },
        [&](int present) {
          if constexpr (Pass::kOfWeights) load_pooled(pass, present);
          load_gradients(pass, present);
        },
        [&](int64_t first, int present) {
          add_weights();
          store_input(first, present);
        });
  };
  auto with_weights = [&](const auto& store_input) {
    if constexpr (Pass::kOfWeights) {
      Conv2WeightSums<Pass> sums;
      compute([&] { sums.add(pass); }, store_input);
      float* const partial = layer.partials + int64_t{blockIdx.x} * (Conv2::kOut * (Conv2::kWeights + 1));
      sums.finish([&](int at, float sum) { partial[at] = sum; });
    } else {
      compute([] {}, store_input);
    }
  };
  if constexpr (Pass::kOfInput) {
    const PooledGradient<Pass> gradient(layer.weight);
    gradient.look_at(pass, layer.weight);
    with_weights([&](int64_t first, int present) {
      T* const to = layer.grad_input + first * Conv2::kImage;
      if (gradient.all_finite(pass)) {
        gradient.compute(pass, ToInput<Pass>{to, present});
      } else {
        compute_without_rim(pass, layer.weight, present, [&](int at, float sum) { to[at] = lx::narrow<T>(sum); });
      }
    });
  } else {
    with_weights([](int64_t, int) {});
  }
}

template <typename T, GradientsOf kOf>
void launch_conv2(LaunchResult& result, const ConvPoolBackward& call, unsigned slices, cudaStream_t stream) {
  lx::launch(result, "lenet_tensor_core_conv2_gradients_kernel", lenet_tensor_core_conv2_gradients_kernel<T, kOf>,
             slices, kGradientThreads, GradientPass<T, kOf>::shared_bytes(), stream, Layer<T>(call));
}

template <typename T>
LaunchResult gradients(const ConvPoolBackward& call, cudaStream_t stream) {
  LaunchResult result;
  const unsigned slices = static_cast<unsigned>(lx::divide_up(call.shape.batch, call.slice_images));
  if (is_layer<Conv1>(call.shape)) {
    lx::launch(result, "lenet_tensor_core_conv1_gradients_kernel", lenet_tensor_core_conv1_gradients_kernel<T>, slices,
               kGradientThreads, GradientPass<T, GradientsOf::kConv1>::shared_bytes(), stream, Layer<T>(call));
  } else if (call.grad_weight == nullptr) {
    launch_conv2<T, GradientsOf::kConv2Input>(result, call, slices, stream);
  } else if (call.grad_input == nullptr) {
    launch_conv2<T, GradientsOf::kConv2Weights>(result, call, slices, stream);
  } else {
    launch_conv2<T, GradientsOf::kConv2>(result, call, slices, stream);
  }
  return result;
}

template <typename T>
bool supported() {
  static_assert(GradientPass<T, GradientsOf::kConv1>::shared_bytes() <= lx::kDefaultSharedBytes);
  static_assert(GradientPass<T, GradientsOf::kConv2>::shared_bytes() <= lx::kDefaultSharedBytes);
  return lx::has_tensor_cores(lenet_tensor_core_conv1_gradients_kernel<T>);
}

}  // namespace

bool has_lenet_tensor_core_gradients(DType dtype, const ConvPoolShape& shape) {
  if (!has_lenet_kernels(dtype, shape)) return false;
  LENET_DISPATCH(dtype, supported)
}

LaunchResult launch_lenet_tensor_core_gradients(DType dtype, const ConvPoolBackward& call, cudaStream_t stream) {
  LENET_DISPATCH(dtype, gradients, call, stream)
}

}  // namespace lenet_ext::cuda
