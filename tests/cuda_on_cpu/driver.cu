// Every kernel of csrc/cuda against plain loops in float64, without torch, so that a sanitizer sees nothing but our
// code:
//   - on the CPU, against the stand-in for CUDA in this directory, under AddressSanitizer and UBSan (build.py), with
//     each case run under several schedules of its threads;
//   - on a GPU, built by nvcc, under compute-sanitizer (benchmarks/gpu_check.py).
// Usage: driver [most schedules]. Prints one line for each failure, and the plain closing line "N passed, N failed".
#include <cstdio>
#include <cstdlib>
#include <string>

#include "driver_lenet.cuh"

int main(int argc, char** argv) {
  if (argc > 1) schedules = atoi(argv[1]);
  const DType all[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  for (const DType dtype : all) {
    const std::string suffix = " dtype " + std::to_string(static_cast<int>(dtype));
    test_convolution("odd" + suffix, dtype, odd(2));
    test_convolution("plain" + suffix, dtype, plain(3, 3, 9, 5, 3));
    test_convolution("one window" + suffix, dtype, one_window());
    test_product(dtype, 5, 37, 70, false, true);
    test_product(dtype, 37, 33, 3, true, true);
    test_product(dtype, 16, 32, 130, true, false);
    test_average(dtype, average(false, true, 0));
    test_average(dtype, average(true, false, 0));
    test_average(dtype, average(true, true, 5));
  }
  for (const int64_t batch : {1, 3, 13}) {
    const std::string suffix = " batch " + std::to_string(batch);
    test_convolution("conv1" + suffix, DType::kFloat32, plain(batch, 1, 32, 6, 5));
    test_convolution("conv2" + suffix, DType::kFloat32, plain(batch, 6, 14, 16, 5));
  }
  test_lenet(DType::kFloat32, false, {1, 10, false});
  test_lenet(DType::kFloat32, false, {5, 128, true});
  // Blocks of two images and of four; the last block is not full.
  for (const int64_t batch : {129, 257}) {
    const std::string suffix = " batch " + std::to_string(batch);
    test_convolution("conv1" + suffix, DType::kFloat32, plain(batch, 1, 32, 6, 5));
    test_convolution("conv2" + suffix, DType::kFloat32, plain(batch, 6, 14, 16, 5));
    test_lenet(DType::kFloat32, false, {batch, 10, true});
  }
  test_lenet(DType::kFloat32, false, {257, 10, false});  // which looks for no winners
  const LenetForwardOf<void> none{};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (lenet_cluster_blocks(dtype, 1, 1, 1) == 0) break;  // on this GPU
    for (const int cluster : {2, 4, 8}) {
      expect(launch_lenet_cluster_forward(dtype, none, cluster, {}).error == cudaSuccess, "no image");
      test_lenet(dtype, false, {1, 10, false, false, false, cluster});
      test_lenet(dtype, false, {3, 128, true, true, false, cluster});
      test_lenet(dtype, false, {3, 1, true, false, true, cluster});
    }
    test_lenet(dtype, false, {17, 7, false, false, false, 8});  // clusters with two images
  }
  test_rounding_to_tf32();
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    test_small_product(dtype);
    for (const int64_t batch : {1, 3, 17}) {
      test_tensor_core_layer(dtype, plain(batch, 1, 32, 6, 5), batch != 3);
      test_tensor_core_layer(dtype, plain(batch, 6, 14, 16, 5), batch != 3);
    }
    test_lenet(dtype, true, {1, 10, false});
    test_lenet(dtype, true, {3, 128, true, true, false});
    test_lenet(dtype, true, {3, 10, true, false, true});
    test_lenet(dtype, true, {17, 1, true});
    test_lenet(dtype, true, {33, 10, false, true});
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const bool has_kernels = dtype == DType::kFloat32
                                 ? has_lenet_lean_convolutions(dtype, 1) && has_lenet_tf32_linears()
                                 : has_lenet_lean_forward(dtype, 1, 128);
    if (!has_kernels) continue;  // for want of shared memory on this GPU
    const LaunchResult nothing = dtype == DType::kFloat32 ? launch_lenet_lean_convolutions({}, {})
                                                          : launch_lenet_lean_forward(dtype, none, nullptr, {});
    expect(nothing.error == cudaSuccess, "no image");
    test_lenet(dtype, true, {1, 10, false, false, false, 0, true});
    test_lenet(dtype, true, {3, 128, false, true, false, 0, true});
    test_lenet(dtype, true, {35, 7, false, false, true, 0, true});
    test_lenet(dtype, true, {17, 1, false, false, false, 0, true});
    test_lenet(dtype, true, {3, 128, true, true, false, 0, true});
    test_lenet(dtype, true, {35, 7, true, false, true, 0, true});
  }
  for (const int64_t batch : {1, 2, 3, 17, 33}) test_lenet_backward(DType::kFloat32, batch, 10, 0, batch % 2 == 0);
  test_convolution("conv1 float16", DType::kFloat16, plain(2, 1, 32, 6, 5));
  test_convolution("conv2 bfloat16", DType::kBFloat16, plain(2, 6, 14, 16, 5));
  schedules = 3;  // the tests of the operator, which run every case under each, do not come to slices of several images
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    test_lenet_backward(dtype, 5, 1, 2, false);    // pairs of images, the last alone
    test_lenet_backward(dtype, 17, 128, 9, true);  // passes of 4, 4 and 1 images
    test_lenet_backward(dtype, 3, 127, 3, true);   // a pass that is not full
    test_lenet_backward(dtype, 2, 128, 1, true);   // passes of one image
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (!has_lenet_tensor_core_backward(dtype, 1)) continue;  // on this GPU
    expect(launch_lenet_tensor_core_backward(dtype, {}, {}).error == cudaSuccess, "no image");
    test_lenet_tensor_core_backward(dtype, 1, 2);
    test_lenet_tensor_core_backward(dtype, 4, 2);
    test_lenet_tensor_core_backward(dtype, 9, 4);  // several passes; a slice of one image
    test_lenet_tensor_core_backward(dtype, 7, 8);  // in 16 bits, four passes, the last with one image
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (!has_lenet_tensor_core_gradients(dtype, plain(1, 6, 14, 16, 5))) continue;  // on this GPU
    test_tensor_core_gradients(dtype, plain(5, 1, 32, 6, 5), 4);  // several passes; a slice of one image
    test_tensor_core_gradients(dtype, plain(5, 6, 14, 16, 5), 4);
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (!has_lenet_linear_gradients(dtype, 128)) continue;  // on this GPU
    expect(launch_lenet_linear_gradients(dtype, {}, {}).error == cudaSuccess, "no image");
    test_lenet_linear_gradients(dtype, 1, 1, 64);
    // The third layer's operands take several steps; a slice of one image.
    test_lenet_linear_gradients(dtype, 3, 128, 2);
  }
  // Several stages, the last not full.
  if (has_lenet_linear_gradients(DType::kBFloat16, 7)) test_lenet_linear_gradients(DType::kBFloat16, 140, 7, 140);
  test_lenet_step({1, 1, 10, 1, Loss::kCrossEntropy, Optimizer::kSgd, false});
  test_lenet_step({2, 3, 128, 1, Loss::kCrossEntropy, Optimizer::kAdamW, true});
  test_lenet_step({5, 1, 128, 2, Loss::kCrossEntropy, Optimizer::kSgd, true});
  test_lenet_step({7, 3, 33, 2, Loss::kCrossEntropy, Optimizer::kAdam, true});
  test_lenet_step({5, 1, 1, 3, Loss::kMeanSquaredError, Optimizer::kAdam, false});
  test_lenet_step({6, 3, 10, 5, Loss::kMeanSquaredError, Optimizer::kAdamW, true});
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
