// The gradients of LeNet's three linear layers for large batches on the tensor cores, in float16, bfloat16 and float32
// by way of TF32, in three launches: those of the layers' inputs one behind the other, with all weights in shared
// memory; those of the weights, slice by slice of the batch; the sums over the slices. Sums are accumulated in float32,
// and their order depends on the batch alone. What the layers pass on to each other is rounded as they round it.
//
// As matrix products of a library, with a mask behind two of them and three column sums, they took 350 us for 65536
// images in bfloat16 and 500 in TF32 on an H100. Counted here for an image, with 10 classes: the first launch reads 214
// values and writes 624, the second reads 828 and 360 of them again, by its parts, from L2. So the rate of the memory
// is what limits: 37 and 36 us in 16 bits, 73 and 73 in TF32. The products are 31 and 34, in TF32 59 and 67, which is
// 15 and 16 us, or 28 and 32, if a multiprocessor begins 0.62 of them a clock; the accesses of 128 bytes to shared
// memory, one a clock, 31 and 73, or 56 and 145, which is 9 and 21 us, or 16 and 42. The partial sums of 44 slices are
// 10 MB, written and read once, 7 us. One launch for both would be spared 650 values an image; but the sums of the
// first layer's weight gradient alone are three quarters of a multiprocessor's registers. No GPU has run these kernels
// yet.
#include "async_copy.cuh"
#include "lenet_tiles.cuh"
#include "slice_sums.cuh"
#include "tensor_core.cuh"

namespace lenet_ext::cuda {
namespace {

using lx::Pack;

constexpr int kMostClasses = 128;
constexpr unsigned kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 8;  // of a tile

constexpr int tiles_of(int values) { return lx::divide_up(values, kColumns); }
LX_DEVICE constexpr int padded(int values) { return lx::divide_up(values, kColumns) * kColumns; }
constexpr int kTiles1 = tiles_of(kHidden1), kTiles2 = tiles_of(kHidden2);

// ----------------------------------------------------------------------------------------- what lies between launches

constexpr int kParameters = 6;  // weight and bias of each layer

LX_DEVICE constexpr int size_of(int parameter, int classes) {
  const int outputs = parameter < 2 ? kHidden1 : parameter < 4 ? kHidden2 : classes;
  const int inputs = parameter < 2 ? kFeatures : parameter < 4 ? kHidden1 : kHidden2;
  return parameter % 2 == 0 ? outputs * inputs : outputs;
}
// Where a parameter begins among a slice's sums, the last one's end: their number.
LX_DEVICE constexpr int begin_of(int parameter, int classes) {
  int begin = 0;
  for (int i = 0; i < parameter; ++i) begin += size_of(i, classes);
  return begin;
}

// The gradients of the layers' outputs before ReLU, with zeros in the columns that fill the last tile; and the slices'
// sums.
template <typename T>
struct Workspace {
  T *grad1, *grad2, *grad3;  // [batch, 120], [batch, 88] and [batch, classes, or a few more]
  float* partials;           // [slices, sums]
  int64_t sums;              // even, so that two may be stored at once
  int64_t bytes;

  Workspace(void* begin, int64_t batch, int64_t classes, int64_t slices) {
    auto* next = static_cast<unsigned char*>(begin);
    bytes = 0;
    auto part = [&](int64_t size) {
      unsigned char* const at = begin == nullptr ? nullptr : next + bytes;
      bytes += size;
      return at;
    };
    const int outputs = static_cast<int>(classes);
    grad1 = reinterpret_cast<T*>(part(lx::taken<T>(batch * kHidden1)));
    grad2 = reinterpret_cast<T*>(part(lx::taken<T>(batch * padded(kHidden2))));
    grad3 = reinterpret_cast<T*>(part(lx::taken<T>(batch * padded(outputs))));
    sums = lx::divide_up(begin_of(kParameters, outputs), 2) * 2;
    partials = reinterpret_cast<float*>(part(lx::taken<float>(slices * sums)));
  }
};

// --------------------------------------------------------------------------------------- the gradients of the inputs

constexpr int kHalves = 2, kRows = 16 * kHalves;  // images of a warp: rows of two products

// Element i of a word of a step's depth; word: 0 for a lane's t-th, 1 for its (t + 4)-th. A lane has as a tile's result
// the columns 2 t and 2 t + 1: in 16 bits a word of the next product, in TF32 both of its words.
template <typename T>
LX_DEVICE int depth_at(int step, int word, int t, int i) {
  return lx::Operand<T>::kPerWord == 2 ? 16 * step + 8 * word + 2 * t + i : 8 * step + 2 * t + word;
}
template <typename T>
LX_DEVICE constexpr int steps_of(int depth) {
  return lx::divide_up(depth, 8 * lx::Operand<T>::kPerWord);
}

// A weight [outputs][inputs] as the operand that the gradient of the outputs is multiplied by; its first kResident
// tiles of 8 inputs are in shared memory, as [tile][step][lane][2]. Zeros behind its end.
//
// In pairs of tiles, a lane has as results the inputs 16 pair + 4 t to + 3, which are stored at once.
template <typename T, int kInputs, int kResident, bool kPairs>
struct ChainWeight {
  const T* weight;
  int outputs, steps;
  uint32_t* words;

  static LX_DEVICE constexpr int64_t count(int outputs) { return int64_t{kResident} * steps_of<T>(outputs) * 64; }

  LX_DEVICE ChainWeight(const T* of, int depth, unsigned char*& shared)
      : weight(of), outputs(depth), steps(steps_of<T>(depth)), words(lx::take<uint32_t>(shared, count(depth))) {}

  LX_DEVICE uint32_t word(int tile, int step, int which, int lane) const {
    const int n = lane / 4;
    const int input = kPairs ? tile / 2 * 16 + n / 2 * 4 + tile % 2 * 2 + n % 2 : tile * kColumns + n;
    return lx::operand_word<T>([&](int i) {
      const int k = depth_at<T>(step, which, lane % 4, i);
      return k < outputs && input < kInputs ? weight[k * kInputs + input] : T{};
    });
  }
  __device__ __forceinline__ void prepare() const {
    const int all = static_cast<int>(count(outputs));
#pragma unroll 4
    for (int at = threadIdx.x; at < all; at += kThreads) {
      words[at] = word(at / 64 / steps, at / 64 % steps, at % 2, at / 2 % 32);
    }
  }
  LX_DEVICE Pack<uint32_t, 2> operand(int tile, int step) const {
    const int lane = threadIdx.x % 32;
    if (tile < kResident) return lx::load_pack<2>(words + ((tile * steps + step) * 32 + lane) * 2);
    return {{word(tile, step, 0, lane), word(tile, step, 1, lane)}};
  }
};

// In TF32 the second layer's last tiles and the third layer, 9 KB with 10 classes, are read from the L1 cache.
template <typename T>
struct Chain {
  static constexpr bool kAll = sizeof(T) == 2;
  using Weight1 = ChainWeight<T, kFeatures, kFeatures / kColumns, true>;
  using Weight2 = ChainWeight<T, kHidden1, kAll ? kTiles1 : kTiles1 - 2, false>;
  using Weight3 = ChainWeight<T, kHidden2, kAll ? kTiles2 : 0, false>;

  static int64_t shared_bytes(int64_t classes) {
    return lx::taken<uint32_t>(Weight1::count(kHidden1)) + lx::taken<uint32_t>(Weight2::count(kHidden2)) +
           lx::taken<uint32_t>(Weight3::count(static_cast<int>(classes)));
  }
};

// Where ReLU let a lane's columns of a row pass, the gradient does: bits 2 tile and 2 tile + 1. As in the layers, a NaN
// lets it pass; what is no column does not.
template <int kWidth, typename T>
LX_DEVICE uint32_t open_columns(const T* row) {
  uint32_t open = 0;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < lx::divide_up(kWidth, kColumns); ++tile) {
    const int column = tile * kColumns + 2 * t;
    if (column >= kWidth) continue;
    const Pack<T, 2> values = lx::load_pack<2>(row + column);
#pragma unroll
    for (int i = 0; i < 2; ++i) open |= static_cast<uint32_t>(!(lx::widen(values[i]) <= 0)) << (2 * tile + i);
  }
  // Or the compiler keeps what was loaded in place of a bit.
  return static_cast<uint32_t>(lx::computed_here(static_cast<int>(open)));
}

// A tile's results, rows g and g + 8, behind the mask: as (half of) a step's operand, and to the rows `image` and
// image + 8 of `stored`, if there are such images.
template <int kWidth, typename T, int kSteps>
__device__ __forceinline__ void pass_on(uint32_t (&to)[kSteps][4], int tile, const float (&sums)[4],
                                        const uint32_t* open, T* __restrict__ stored, int image, int batch) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float values[2];
    const bool present = image + 8 * i < batch;
    T* const row = stored + int64_t{image + 8 * i} * kWidth + tile * kColumns + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int k = 0; k < 2; ++k) values[k] = open[i] >> (2 * tile + k) & 1 ? sums[2 * i + k] : 0.0f;
    if constexpr (sizeof(T) == 2) {
      const uint32_t word = lx::rounded_word<T, false>(values[0], values[1]);
      to[tile / 2][tile % 2 * 2 + i] = word;
      if (present) *reinterpret_cast<uint32_t*>(row) = word;
    } else {
      to[tile][i] = lx::bits_of(lx::to_tf32(values[0])), to[tile][i + 2] = lx::bits_of(lx::to_tf32(values[1]));
      if (present) *reinterpret_cast<Pack<float, 2>*>(row) = {{values[0], values[1]}};
    }
  }
}

// The words of a step that no tile fills.
template <typename T, int kSteps>
LX_DEVICE void clear_rest(uint32_t (&words)[kSteps][4], int tiles) {
  if (sizeof(T) == 2 && tiles % 2 == 1) words[kSteps - 1][2] = words[kSteps - 1][3] = 0;
}

// warp -> 32 images at a time. Shared memory, with 10 classes: 129 KB in 16 bits, 223 KB in TF32, one block a
// multiprocessor.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    lenet_linear_grad_inputs_kernel(LenetLinearGradientsOf<T> call, T* __restrict__ grad1, T* __restrict__ grad2,
                                    T* __restrict__ grad3) {
  LX_SMEM(shared);
  const int classes = static_cast<int>(call.classes);
  const typename Chain<T>::Weight1 weight1(call.weights[0], kHidden1, shared);
  const typename Chain<T>::Weight2 weight2(call.weights[1], kHidden2, shared);
  const typename Chain<T>::Weight3 weight3(call.weights[2], classes, shared);
  weight1.prepare(), weight2.prepare(), weight3.prepare();
  __syncthreads();

  constexpr int kSteps1 = steps_of<T>(kHidden1), kSteps2 = steps_of<T>(kHidden2);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Neighbouring warps of a small batch are in different blocks, so that all multiprocessors have work.
  const int batch = static_cast<int>(call.batch), stride = static_cast<int>(gridDim.x) * kWarps * kRows;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x) * kRows; first < batch;
       first += stride) {
    const int image = first + g;  // and 8, 16 and 24 behind it
    auto row_of = [&](int i) { return int64_t{image + 8 * i < batch ? image + 8 * i : batch - 1}; };
    uint32_t open1[2 * kHalves], open2[2 * kHalves];
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      open2[i] = open_columns<kHidden2>(call.hidden2 + row_of(i) * kHidden2);
      open1[i] = open_columns<kHidden1>(call.hidden1 + row_of(i) * kHidden1);
      __syncwarp();  // or the compiler loads all rows at once, for which sm_100 has no registers
    }

    float sums2[kHalves][kTiles2][4] = {};
#pragma unroll 1
    for (int step = 0; step < weight3.steps; ++step) {
      uint32_t a[kHalves][4];
#pragma unroll
      for (int i = 0; i < 4 * kHalves; ++i) {
        const int row = i / 2, which = i % 2;
        a[row / 2][row % 2 + 2 * which] = lx::operand_word<T>([&](int k) {
          const int column = depth_at<T>(step, which, t, k);
          const T value = column < classes ? call.grad_output[row_of(row) * classes + column] : T{};
          if (image + 8 * row < batch && column < padded(classes)) {
            grad3[int64_t{image + 8 * row} * padded(classes) + column] = value;
          }
          return value;
        });
      }
#pragma unroll
      for (int tile = 0; tile < kTiles2; ++tile) {
        const Pack<uint32_t, 2> b = weight3.operand(tile, step);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          lx::multiply_accumulate<T>(sums2[half][tile], a[half], b[0], b[1]);
        }
      }
    }
    uint32_t between2[kHalves][kSteps2][4], between1[kHalves][kSteps1][4];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int tile = 0; tile < kTiles2; ++tile) {
        pass_on<padded(kHidden2)>(between2[half], tile, sums2[half][tile], open2 + 2 * half, grad2, image + 16 * half,
                                  batch);
      }
      clear_rest<T>(between2[half], kTiles2);
      clear_rest<T>(between1[half], kTiles1);
    }
    // The last tiles first, while registers are free: their weights may have to come from further away.
#pragma unroll
    for (int tile = kTiles1 - 1; tile >= 0; --tile) {
      __syncwarp();  // or the compiler loads all tiles' weights at once, for which there are no registers
      float sums[kHalves][4];
#pragma unroll
      for (int step = 0; step < kSteps2; ++step) {
        const Pack<uint32_t, 2> b = weight2.operand(tile, step);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          if (step == 0) {
            lx::multiply<T>(sums[half], between2[half][step], b[0], b[1]);
          } else {
            lx::multiply_accumulate<T>(sums[half], between2[half][step], b[0], b[1]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        pass_on<kHidden1>(between1[half], tile, sums[half], open1 + 2 * half, grad1, image + 16 * half, batch);
      }
    }
#pragma unroll 1
    for (int pair = 0; pair < kFeatures / 16; ++pair) {
      float sums[kHalves][2][4];
#pragma unroll
      for (int step = 0; step < kSteps1; ++step) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const Pack<uint32_t, 2> b = weight1.operand(2 * pair + tile, step);
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            if (step == 0) {
              lx::multiply<T>(sums[half][tile], between1[half][step], b[0], b[1]);
            } else {
              lx::multiply_accumulate<T>(sums[half][tile], between1[half][step], b[0], b[1]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) {
        if (image + 8 * i >= batch) continue;
        const auto& of = sums[i / 2];
        const int k = i % 2 * 2;
        lx::store_narrow(call.grad_features + row_of(i) * kFeatures + 16 * pair + 4 * t,
                         {of[0][k], of[0][k + 1], of[1][k], of[1][k + 1]});
      }
    }
  }
}

// -------------------------------------------------------------------------------------- the gradients of the weights

// A block has 128 outputs of a layer and 128 of its inputs; a warp two products' 16 outputs and eight tiles of inputs.
constexpr int kParts1 = 4, kParts = kParts1 + 2;  // of the features, into which the first layer is cut; of all layers
constexpr int kWarpTiles = 8, kStageSteps = 4, kStages = 3;
constexpr int64_t kMostSlices = 44;  // for all parts two blocks on each of an H100's multiprocessors

// Images are in shared memory with all their values, those of the gradient and those of the input. The pitch is an odd
// number of vectors, and in words of TF32 8 behind a multiple of the banks: loads have no conflicts.
template <typename T>
struct Stage {
  static constexpr int kImages = kStageSteps * 8 * lx::Operand<T>::kPerWord;
  static constexpr int kPitch = (128 + kColumns) * sizeof(T), kBytes = kImages * kPitch;  // of each of the two
  static constexpr int64_t kShared = 2 * kStages * kBytes;
};

// A layer, or a part of its inputs: weight gradient[i][j] = sum over n of grad[n][i] * input[n][j].
template <typename T>
struct WeightJob {
  const T* grad;
  int grad_pitch, outputs;
  const T* input;
  int inputs, first_tile, end_tile;
  int weight;  // parameter; the next one is the bias

  LX_DEVICE WeightJob(const LenetLinearGradientsOf<T>& call, const T* grad1, const T* grad2, const T* grad3, int part) {
    if (part < kParts1) {
      constexpr int kTiles = kFeatures / kColumns;
      grad = grad1, grad_pitch = outputs = kHidden1;
      input = call.features, inputs = kFeatures, weight = 0;
      first_tile = part * kTiles / kParts1, end_tile = (part + 1) * kTiles / kParts1;
      return;
    }
    const bool second = part == kParts1;
    const int classes = static_cast<int>(call.classes);
    grad = second ? grad2 : grad3, outputs = second ? kHidden2 : classes, grad_pitch = padded(outputs);
    input = second ? call.hidden1 : call.hidden2, inputs = second ? kHidden1 : kHidden2;
    first_tile = 0, end_tile = lx::divide_up(inputs, kColumns), weight = second ? 2 : 4;
  }
};

// The block begins to copy `bytes`, a multiple of 8, of each of a stage's rows, which are `pitch` bytes apart; zeros
// for those that are not present. 16 bytes at a time, where all rows are aligned for that.
template <typename T>
__device__ __forceinline__ void fetch_rows(unsigned char* to, const T* from, int64_t pitch, int bytes, int present) {
  constexpr int kLanes = 128 * sizeof(T) / 16, kStep = kThreads / kLanes;
  const int at = static_cast<int>(threadIdx.x) % kLanes * 16;
  if (at >= bytes) return;
  const bool whole = pitch % 16 == 0;
  const auto* source = reinterpret_cast<const unsigned char*>(from) + at;
#pragma unroll
  for (int i = 0; i < Stage<T>::kImages / kStep; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kLanes + i * kStep;
    unsigned char* const target = to + row * Stage<T>::kPitch + at;
    if (row >= present) {
      *reinterpret_cast<Pack<uint32_t, 4>*>(target) = {};
    } else if (whole) {
      lx::copy_async<16>(target, source + row * pitch);
    } else {
      lx::copy_async<8>(target, source + row * pitch);
      if (at + 8 < bytes) lx::copy_async<8>(target + 8, source + row * pitch + 8);
    }
  }
}

template <typename T>
LX_DEVICE void add_values(float& sum, uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    sum += lx::float_of(word);
  } else {
    sum += lx::widen(T{static_cast<uint16_t>(word)});
    sum += lx::widen(T{static_cast<uint16_t>(word >> 16)});
  }
}

// A warp's sums: rows are outputs, columns inputs, the depth is images.
template <typename T>
class WeightTiles {
  using Rows = lx::Transposed<T>;
  static constexpr int kPitch = Stage<T>::kPitch;

 public:
  // The outputs from `output` on, and the tiles of inputs from the `tile`-th on.
  __device__ __forceinline__ WeightTiles(int output, int tile) {
    const int column = Rows::column(16);  // the other columns of a matrix are next to the first
#pragma unroll
    for (int i = 0; i < Rows::kNamed; ++i) {
      const int matrix = Rows::matrix(i);
      grad_at_[i] = (matrix / 2 * Rows::kRows + Rows::row()) * kPitch + column +
                    (output + matrix % 2 * kColumns) * static_cast<int>(sizeof(T));
      input_at_[i] = (matrix % 2 * Rows::kRows + Rows::row()) * kPitch + column +
                     (tile + matrix / 2) * kColumns * static_cast<int>(sizeof(T));
    }
  }

  // tiles: that are there, 8 at most.
  __device__ __forceinline__ void add(const unsigned char* grad, const unsigned char* input, int tiles, bool bias) {
    const unsigned char *of_grad[Rows::kNamed], *of_input[Rows::kNamed];
#pragma unroll
    for (int i = 0; i < Rows::kNamed; ++i) of_grad[i] = grad + grad_at_[i], of_input[i] = input + input_at_[i];
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) {
      const int below = step * 2 * Rows::kRows * kPitch;
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lx::load_transposed<T>(a[half], of_grad, below + half * 16 * static_cast<int>(sizeof(T)));
        if (bias) {
#pragma unroll
          for (int i = 0; i < 4; ++i) add_values<T>(bias_[half][i % 2], a[half][i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) a[half][i] = lx::operand_word<T>(a[half][i]);
      }
#pragma unroll
      for (int tile = 0; tile < kWarpTiles; tile += 2) {
        if (tile >= tiles) continue;
        uint32_t b[4];
        lx::load_transposed<T>(b, of_input, below + tile * kColumns * static_cast<int>(sizeof(T)));
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = lx::operand_word<T>(b[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          lx::multiply_accumulate<T>(sums_[half][tile], a[half], b[0], b[1]);
          lx::multiply_accumulate<T>(sums_[half][tile + 1], a[half], b[2], b[3]);
        }
      }
    }
  }

  // store(output, input, two sums) and store_bias(output, sum), counted from the warp's first ones.
  template <typename Store, typename StoreBias>
  __device__ __forceinline__ void finish(bool bias, Store store, StoreBias store_bias) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const int half = row / 2, k = row % 2;
#pragma unroll
      for (int tile = 0; tile < kWarpTiles; ++tile) {
        store(row * 8 + g, tile * kColumns + 2 * t,
              Pack<float, 2>{{sums_[half][tile][2 * k], sums_[half][tile][2 * k + 1]}});
      }
      if (!bias) continue;
      float sum = bias_[half][k];
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (t == 0) store_bias(row * 8 + g, sum);
    }
  }

 private:
  int grad_at_[Rows::kNamed], input_at_[Rows::kNamed];
  float sums_[2][kWarpTiles][4] = {}, bias_[2][2] = {};
};

// block -> one slice of the batch and a part of the weights. Shared memory: 102 KB, two blocks a multiprocessor.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_linear_grad_weights_kernel(LenetLinearGradientsOf<T> call, const T* __restrict__ grad1,
                                     const T* __restrict__ grad2, const T* __restrict__ grad3,
                                     float* __restrict__ partials, int64_t sums) {
  using S = Stage<T>;
  LX_SMEM(shared);
  const int classes = static_cast<int>(call.classes);
  const int64_t slice = blockIdx.x / kParts;
  const int part = static_cast<int>(blockIdx.x % kParts);  // of one slice at the same time
  const WeightJob<T> job(call, grad1, grad2, grad3, part);
  const int64_t begin = slice * call.slice_images;
  const int64_t end = begin + call.slice_images < call.batch ? begin + call.slice_images : call.batch;
  const int trips = static_cast<int>(lx::divide_up<int64_t>(end - begin, S::kImages));

  const int first_input = job.first_tile * kColumns;
  const int columns =
      job.end_tile * kColumns < job.inputs ? job.end_tile * kColumns - first_input : job.inputs - first_input;
  auto fetch = [&](int trip) {
    if (trip < trips) {
      unsigned char* const to = shared + trip % kStages * 2 * S::kBytes;
      const int64_t image = begin + int64_t{trip} * S::kImages;
      const int present = static_cast<int>(end - image < S::kImages ? end - image : S::kImages);
      constexpr int kBytes = sizeof(T);
      fetch_rows(to, job.grad + image * job.grad_pitch, job.grad_pitch * kBytes, job.grad_pitch * kBytes, present);
      fetch_rows(to + S::kBytes, job.input + image * job.inputs + first_input, job.inputs * kBytes, columns * kBytes,
                 present);
    }
    lx::end_copy_group();
  };

  const int warp = threadIdx.x / 32, output = warp % 4 * 32, tile = warp / 4 * kWarpTiles;
  const int tiles = job.end_tile - job.first_tile - tile;
  const bool bias = part % kParts1 == 0 || part == kParts1 + 1, sums_bias = bias && warp < 4;
  WeightTiles<T> result(output, tile);
#pragma unroll
  for (int trip = 0; trip < kStages - 1; ++trip) fetch(trip);
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
    lx::wait_for_copies<kStages - 2>();
    __syncthreads();  // this trip's images are there, and all warps are done with the last one's
    fetch(trip + kStages - 1);
    const unsigned char* const from = shared + trip % kStages * 2 * S::kBytes;
    if (output < job.outputs) result.add(from, from + S::kBytes, tiles, sums_bias);
  }

  float* const partial = partials + slice * sums;
  float* const weight = partial + begin_of(job.weight, classes);
  float* const of_bias = partial + begin_of(job.weight + 1, classes);
  result.finish(
      sums_bias,
      [&](int row, int column, const Pack<float, 2>& values) {
        const int i = output + row, j = tile * kColumns + column;
        if (i >= job.outputs || j >= columns) return;
        *reinterpret_cast<Pack<float, 2>*>(weight + i * job.inputs + first_input + j) = values;
      },
      [&](int row, float sum) {
        if (output + row < job.outputs) of_bias[output + row] = sum;
      });
}

// ------------------------------------------------------------------------------------------- the sums over the slices

template <typename T>
struct LinearGradients {
  T* of[kParameters];
};

// block -> 32 sums. Shared memory: a sum for each thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lenet_linear_sums_kernel(const float* __restrict__ partials, int64_t slices, int64_t sums, int classes,
                             const __grid_constant__ LinearGradients<T> gradients) {
  LX_SMEM(shared);
  const int64_t first = int64_t{blockIdx.x} * kSumsOfBlock;
  sum_slices(partials, slices, sums, first, lx::take<float>(shared, kThreads), [&](int64_t at, float sum) {
    int place = static_cast<int>(at);
#pragma unroll
    for (int parameter = 0; parameter < kParameters; ++parameter) {
      const int size = size_of(parameter, classes);
      if (place >= 0 && place < size) gradients.of[parameter][place] = lx::narrow<T>(sum);
      place -= size;
    }
  });
}

// ------------------------------------------------------------------------------------------------------- the launches

template <typename T>
LaunchResult backward(const LenetLinearGradientsOf<void>& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const int64_t slices = lx::divide_up(call.batch, call.slice_images);
  const Workspace<T> workspace(call.workspace, call.batch, call.classes, slices);
  LenetLinearGradientsOf<T> of{};
  of.batch = call.batch, of.classes = call.classes, of.slice_images = call.slice_images;
  of.grad_output = static_cast<const T*>(call.grad_output);
  for (int i = 0; i < 3; ++i) of.weights[i] = static_cast<const T*>(call.weights[i]);
  of.features = static_cast<const T*>(call.features);
  of.hidden1 = static_cast<const T*>(call.hidden1), of.hidden2 = static_cast<const T*>(call.hidden2);
  of.grad_features = static_cast<T*>(call.grad_features);
  LinearGradients<T> gradients;
  for (int i = 0; i < kParameters; ++i) gradients.of[i] = static_cast<T*>(call.gradients[i]);

  int device = 0, multiprocessors = 0;
  result.error = cudaGetDevice(&device);
  if (result.error == cudaSuccess) {
    result.error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const unsigned blocks = std::min(lx::grid_for(call.batch, kRows), static_cast<unsigned>(multiprocessors));
  lx::launch(result, "lenet_linear_grad_inputs_kernel", lenet_linear_grad_inputs_kernel<T>, blocks, kThreads,
             Chain<T>::shared_bytes(call.classes), stream, of, workspace.grad1, workspace.grad2, workspace.grad3);
  lx::launch(result, "lenet_linear_grad_weights_kernel", lenet_linear_grad_weights_kernel<T>,
             static_cast<unsigned>(slices * kParts), kThreads, Stage<T>::kShared, stream, of, workspace.grad1,
             workspace.grad2, workspace.grad3, workspace.partials, workspace.sums);
  lx::launch(result, "lenet_linear_sums_kernel", lenet_linear_sums_kernel<T>,
             static_cast<unsigned>(lx::divide_up<int64_t>(workspace.sums, kSumsOfBlock)), kThreads,
             lx::taken<float>(kThreads), stream, workspace.partials, slices, workspace.sums,
             static_cast<int>(call.classes), gradients);
  return result;
}

template <typename T>
bool supported(int64_t classes) {
  return lx::has_tensor_cores(lenet_linear_grad_inputs_kernel<T>) &&
         lx::fits_shared_memory(Chain<T>::shared_bytes(classes)) && lx::fits_shared_memory(Stage<T>::kShared);
}

template <typename T>
int64_t workspace_bytes(int64_t batch, int64_t classes, int64_t slice_images) {
  return Workspace<T>(nullptr, batch, classes, batch == 0 ? 0 : lx::divide_up(batch, slice_images)).bytes;
}

}  // namespace

bool has_lenet_linear_gradients(DType dtype, int64_t classes) {
  if (dtype == DType::kFloat64 || classes < 1 || classes > kMostClasses) return false;
  LENET_DISPATCH(dtype, supported, classes)
}

int64_t lenet_linear_gradients_slice_images(int64_t batch) {
  constexpr int64_t kEach = Stage<lx::bf16>::kImages;
  return lx::divide_up(batch, kEach * kMostSlices) * kEach;
}

int64_t lenet_linear_gradients_workspace(DType dtype, int64_t batch, int64_t classes, int64_t slice_images){
    LENET_DISPATCH(dtype, workspace_bytes, batch, classes, slice_images)}

LaunchResult launch_lenet_linear_gradients(DType dtype, const LenetLinearGradientsOf<void>& call, cudaStream_t stream) {
  LENET_DISPATCH(dtype, backward, call, stream)
}

}  // namespace lenet_ext::cuda
