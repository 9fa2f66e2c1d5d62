// Fused convolution, ReLU and max pooling: output channels in the lanes.
//
// For a block of output channels, convolution rows are computed tile by tile in registers: a tile is `columns`
// neighbouring outputs, each a vector of output channels, and every input value is broadcast against the weights
// of its tap. A finished row goes to a ring of rows in the L1 cache, as many as one row of pooling windows spans;
// from there the windows are reduced and only the pooled values (and winner codes) are stored.
// Overlapping windows cost nothing extra, and no more of the convolution's output than the ring ever exists.
#pragma once

#include "padded_image.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// How the output channels of a group are cut into blocks of `vectors` vectors of `lanes` lanes.
struct ChannelBlocks {
  int lanes, vectors, width;  // width = lanes * vectors channels
  int64_t per_group, total;
};

template <typename A>
ChannelBlocks channel_blocks(const ConvPoolShape& s) {
  const int64_t channels = s.out_channels / s.groups;
  int lanes = kLanes<A>, vectors = 1;
  if (lanes >= 8 && channels <= lanes / 2) {
    lanes /= 2;  // few channels: half a vector wastes fewer lanes
  } else if (divide_up(channels, lanes) % 2 == 0) {
    vectors = 2;  // each broadcast input then serves two multiply-adds
  }
  const int64_t per_group = divide_up(channels, lanes * vectors);
  return {lanes, vectors, lanes * vectors, per_group, per_group * s.groups};
}

struct ForwardPlan {
  ChannelBlocks blocks;
  int64_t taps;          // kernel_h * kernel_w
  int64_t channels;      // input channels of a group
  int64_t ring;          // convolution rows kept for one row of pooling windows
  int64_t bands;         // pieces of an image (in pooled rows) that are independent units of work
  int64_t band_rows;     // pooled rows in each
  int64_t padded_rows;   // padded input rows that a band can touch
  int64_t packed_block;  // elements of a channel block in `packed`: bias, then weights [channel][tap][width]
};

template <typename A>
ForwardPlan forward_plan(const ConvPoolShape& s) {
  ForwardPlan p;
  p.blocks = channel_blocks<A>(s);
  p.taps = s.kernel_h * s.kernel_w;
  p.channels = s.in_channels / s.groups;
  p.ring = (s.pool_kernel_h - 1) * s.pool_dilation_h + 1;
  // Few large images: cut them so that several threads have work. A fixed rule, not the number of threads, decides.
  const double work = 2.0 * s.out_channels * s.conv_h * s.conv_w * p.channels * p.taps;
  const int64_t wanted = work > 4e6 && s.batch < 8 ? divide_up(8, max_of<int64_t>(s.batch, 1)) : 1;
  p.band_rows = divide_up(s.out_h, min_of(wanted, s.out_h));
  p.bands = divide_up(s.out_h, p.band_rows);
  const int64_t conv_rows = min_of(s.conv_h, (p.band_rows - 1) * s.pool_stride_h + p.ring);
  p.padded_rows = (conv_rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  p.packed_block = round_up(p.blocks.width * (1 + p.channels * p.taps), 64 / sizeof(A));
  return p;
}

template <typename T>
int64_t forward_packed_bytes(const ConvPoolShape& s) {
  using A = Accumulator<T>;
  const ForwardPlan p = forward_plan<A>(s);
  return p.blocks.total * p.packed_block * sizeof(A);
}

template <typename T>
void forward_prepare(const ConvPoolForward<T>& job, void* packed) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  const ForwardPlan p = forward_plan<A>(s);
  const int width = p.blocks.width;
  const int64_t group_channels = s.out_channels / s.groups, depth = p.channels * p.taps;
  A* to = static_cast<A*>(packed);
  for (int64_t block = 0; block < p.blocks.total; ++block, to += p.packed_block) {
    const int64_t in_group = block % p.blocks.per_group * width;
    const int64_t first = block / p.blocks.per_group * group_channels + in_group;
    const int64_t count = min_of<int64_t>(width, group_channels - in_group);
    A* weights = to + width;
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = job.bias != nullptr ? widen(job.bias[first + lane]) : A(0);
    const T* from = job.weight + first * depth;
    if constexpr (sizeof(T) == sizeof(A)) {
      transpose_plane(from, count, depth, depth, weights, width);
    } else {
      for (int64_t lane = 0; lane < count; ++lane) {
        for (int64_t k = 0; k < depth; ++k) weights[k * width + lane] = widen(from[lane * depth + k]);
      }
    }
    for (int64_t lane = count; lane < width; ++lane) {
      to[lane] = 0;
      for (int64_t k = 0; k < depth; ++k) weights[k * width + lane] = 0;
    }
  }
}

// What a tile kernel reads; constant over an image.
template <typename A>
struct ConvRows {
  const A* image;  // of the current group and band
  int64_t row_stride, plane_stride;
  const int32_t* tap_offsets;  // of each tap in the image
  int64_t taps, channels;
  int64_t channels_at_once;  // added up by themselves
  const A* weights;
  const A* bias;
};

// --8<-- [start:conv-tile]
// `columns` convolution outputs of one row, each `vectors` vectors of output channels.
template <typename A, int lanes, int vectors, int columns>
void conv_tile(const ConvRows<A>& rows, const A* image, A* out) {
  using V = Vec<A, lanes>;
  const A* weights = rows.weights;
  for (int64_t begin = 0; begin < rows.channels; begin += rows.channels_at_once) {
    V sum[columns][vectors];
    LENET_EXT_UNROLL for (int x = 0; x < columns; ++x) {
      LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
        sum[x][v] = begin == 0 ? load<V>(rows.bias + v * lanes) : V{};
    }
    const int64_t end = min_of(begin + rows.channels_at_once, rows.channels);
    for (int64_t c = begin; c < end; ++c, image += rows.plane_stride) {
      for (int64_t tap = 0; tap < rows.taps; ++tap, weights += vectors * lanes) {
        const A* in = image + rows.tap_offsets[tap];
        V weight[vectors];
        LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
          weight[v] = load<V>(weights + v * lanes);
        LENET_EXT_UNROLL for (int x = 0; x < columns; ++x) {
          const V value = broadcast<V>(in[x]);
          LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
            sum[x][v] += weight[v] * value;
        }
      }
    }
    LENET_EXT_UNROLL for (int x = 0; x < columns; ++x) {
      LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v) {
        A* to = out + (x * vectors + v) * lanes;
        store(to, begin == 0 ? sum[x][v] : load<V>(to) + sum[x][v]);
      }
    }
  }
}
// --8<-- [end:conv-tile]

template <typename A>
using ConvTile = void (*)(const ConvRows<A>&, const A* image, A* out);

// The widest tile whose sums stay in registers beside the weights and the broadcast value.
template <int vectors>
constexpr int kMaxColumns = kRegisters == 32 ? 14 : (vectors == 1 ? 12 : 6);

template <typename A, int lanes, int vectors>
ConvTile<A> conv_tile_of(int64_t columns) {
  switch (columns) {
#define LENET_EXT_CASE(n) \
  case n:                 \
    return conv_tile<A, lanes, vectors, min_of(n, kMaxColumns<vectors>)>;
    LENET_EXT_CASE(1)
    LENET_EXT_CASE(2)
    LENET_EXT_CASE(3)
    LENET_EXT_CASE(4)
    LENET_EXT_CASE(5)
    LENET_EXT_CASE(6)
    LENET_EXT_CASE(7)
    LENET_EXT_CASE(8)
    LENET_EXT_CASE(9)
    LENET_EXT_CASE(10)
    LENET_EXT_CASE(11)
    LENET_EXT_CASE(12)
    LENET_EXT_CASE(13)
    LENET_EXT_CASE(14)
#undef LENET_EXT_CASE
  }
  return nullptr;
}

// A row of the convolution cut into tiles of (nearly) equal width.
template <typename A>
struct RowTiles {
  int64_t count, wide;  // the first `wide` tiles have one column more
  int64_t columns;
  ConvTile<A> tile, wide_tile;
};

template <typename A, int lanes, int vectors>
RowTiles<A> row_tiles(int64_t width) {
  RowTiles<A> t;
  t.count = divide_up(width, kMaxColumns<vectors>);
  t.columns = width / t.count;
  t.wide = width % t.count;
  t.tile = conv_tile_of<A, lanes, vectors>(t.columns);
  t.wide_tile = t.wide > 0 ? conv_tile_of<A, lanes, vectors>(t.columns + 1) : nullptr;
  return t;
}

template <typename A>
void conv_row(const RowTiles<A>& tiles, const ConvRows<A>& rows, const A* image, int width, A* out) {
  for (int64_t t = 0; t < tiles.count; ++t) {
    const bool wide = t < tiles.wide;
    (wide ? tiles.wide_tile : tiles.tile)(rows, image, out);
    const int64_t columns = tiles.columns + (wide ? 1 : 0);
    image += columns;
    out += columns * width;
  }
}

// The positions of one pooling window along one axis that lie inside the convolution's output.
struct WindowRange {
  int64_t begin, end;  // window positions
  int64_t start;       // convolution coordinate of window position 0 (may be negative)
};

LENET_EXT_INLINE WindowRange window_range(int64_t out, int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                                          int64_t dilation) {
  const int64_t start = out * stride - pad;
  const int64_t begin = start < 0 ? divide_up(-start, dilation) : 0;
  const int64_t end = min_of(kernel, divide_up(size - start, dilation));  // no window starts beyond the output
  return {min_of(begin, kernel), max_of(end, min_of(begin, kernel)), start};
}

LENET_EXT_INLINE WindowRange window_rows(const ConvPoolShape& s, int64_t y) {
  return window_range(y, s.conv_h, s.pool_kernel_h, s.pool_stride_h, s.pool_pad_h, s.pool_dilation_h);
}
LENET_EXT_INLINE WindowRange window_columns(const ConvPoolShape& s, int64_t x) {
  return window_range(x, s.conv_w, s.pool_kernel_w, s.pool_stride_w, s.pool_pad_w, s.pool_dilation_w);
}

// One pooled row of one channel block: reads convolution rows whose columns are `stride` apart, writes [out_w][width]
// values and codes.
template <typename A, int lanes, bool with_indices>
void pool_row(const ConvPoolShape& s, const A* const* conv_rows, const WindowRange& rows, int vectors, int64_t stride,
              A* values, typename IntegerOf<A>::type* codes) {
  using V = Vec<A, lanes>;
  using I = IntVec<A, lanes>;
  const int width = lanes * vectors;
  for (int64_t x = 0; x < s.out_w; ++x) {
    const WindowRange columns = window_columns(s, x);
    for (int v = 0; v < vectors; ++v) {
      A* value = values + x * width + v * lanes;
      if (rows.begin == rows.end || columns.begin == columns.end) {
        // Nothing but padding (possible with a dilated window): stock gives -infinity, and no gradient flows.
        store(value, broadcast<V>(static_cast<A>(-__builtin_inf())));
        if (with_indices) store(codes + x * width + v * lanes, I{} + kDead);
        continue;
      }
      V best{};
      I code{};
      bool first = true;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const A* row = conv_rows[i] + v * lanes;
        for (int64_t j = columns.begin; j < columns.end; ++j) {
          const V candidate = load<V>(row + (columns.start + j * s.pool_dilation_w) * stride);
          if (first) {
            best = candidate;
            if (with_indices) code = I{} + static_cast<typename IntegerOf<A>::type>(i * s.pool_kernel_w + j);
            first = false;
            continue;
          }
          offer(best, code, candidate, static_cast<int>(i * s.pool_kernel_w + j));
        }
      }
      close_relu(best, code, kDead);
      store(value, best);
      if (with_indices) store(codes + x * width + v * lanes, code);
    }
  }
}

// The commonest window, 2x2 with stride 2 and no padding, without the loops.
template <typename A, int lanes, bool with_indices>
void pool_row_2x2(const ConvPoolShape& s, const A* const* conv_rows, const WindowRange&, int vectors, int64_t stride,
                  A* values, typename IntegerOf<A>::type* codes) {
  using V = Vec<A, lanes>;
  using I = IntVec<A, lanes>;
  const int width = lanes * vectors;
  for (int64_t x = 0; x < s.out_w; ++x) {
    for (int v = 0; v < vectors; ++v) {
      const A* top = conv_rows[0] + 2 * x * stride + v * lanes;
      const A* bottom = conv_rows[1] + 2 * x * stride + v * lanes;
      const V first = load<V>(top), candidates[3] = {load<V>(top + stride), load<V>(bottom), load<V>(bottom + stride)};
      if (!with_indices) {
        const V greatest = max_of_four(first, candidates[0], candidates[1], candidates[2]);
        store(values + x * width + v * lanes, relu(greatest));
        continue;
      }
      V best = first;
      I code{};
      LENET_EXT_UNROLL for (int i = 0; i < 3; ++i)
        offer(best, code, candidates[i], i + 1);
      close_relu(best, code, kDead);
      store(values + x * width + v * lanes, best);
      store(codes + x * width + v * lanes, code);
    }
  }
}

template <typename A>
using PoolRow = void (*)(const ConvPoolShape&, const A* const* conv_rows, const WindowRange&, int vectors,
                         int64_t stride, A* values, typename IntegerOf<A>::type* codes);

LENET_EXT_INLINE bool is_plain_2x2(const ConvPoolShape& s) {
  return s.pool_kernel_h == 2 && s.pool_kernel_w == 2 && s.pool_stride_h == 2 && s.pool_stride_w == 2 &&
         s.pool_pad_h == 0 && s.pool_pad_w == 0 && s.pool_dilation_h == 1 && s.pool_dilation_w == 1 &&
         2 * s.out_h <= s.conv_h && 2 * s.out_w <= s.conv_w;
}

template <typename A, int lanes>
PoolRow<A> pool_row_for(const ConvPoolShape& s, bool with_indices) {
  if (is_plain_2x2(s)) return with_indices ? pool_row_2x2<A, lanes, true> : pool_row_2x2<A, lanes, false>;
  return with_indices ? pool_row<A, lanes, true> : pool_row<A, lanes, false>;
}

template <typename A>
struct ForwardScratch {
  A* image;
  A* ring;
  A* values;
  typename IntegerOf<A>::type* codes;
  const A** ring_rows;
  int32_t* tap_offsets;
  int64_t bytes;
};

template <typename A>
ForwardScratch<A> forward_scratch(const ConvPoolShape& s, const ForwardPlan& p, char* base) {
  ForwardScratch<A> scratch{};
  char* at = base;
  auto take = [&at](int64_t bytes) {
    char* from = at;
    at += round_up(bytes, 64);
    return from;
  };
  const PlanarLayout layout = planar_layout(s, p.padded_rows);
  scratch.image = reinterpret_cast<A*>(take(layout.plane_stride * s.in_channels * sizeof(A)));
  scratch.ring = reinterpret_cast<A*>(take(p.ring * s.conv_w * p.blocks.width * sizeof(A)));
  scratch.values = reinterpret_cast<A*>(take(s.out_w * p.blocks.width * sizeof(A)));
  scratch.codes = reinterpret_cast<typename IntegerOf<A>::type*>(take(s.out_w * p.blocks.width * sizeof(A)));
  scratch.ring_rows = reinterpret_cast<const A**>(take(s.pool_kernel_h * sizeof(A*)));
  scratch.tap_offsets = reinterpret_cast<int32_t*>(take(p.taps * sizeof(int32_t)));
  scratch.bytes = at - base;
  return scratch;
}

template <typename T>
int64_t forward_scratch_bytes(const ConvPoolShape& s) {
  using A = Accumulator<T>;
  return forward_scratch<A>(s, forward_plan<A>(s), nullptr).bytes;
}

template <typename T>
int64_t forward_units(const ConvPoolShape& s) {
  return s.batch * forward_plan<Accumulator<T>>(s).bands;
}

template <typename T>
struct PooledOutput {
  T* values;
  uint8_t* indices;  // null: not wanted
  Strides4 strides;
  int64_t out_w;
};

// One pooled row from [out_w][width] to the output's own strides.
template <typename T, int lanes>
void store_row(const PooledOutput<T>& job, int64_t n, int64_t channel, int64_t count, int64_t y, int width,
               const Accumulator<T>* values, const typename IntegerOf<Accumulator<T>>::type* codes) {
  const Strides4& st = job.strides;
  const int64_t offset = n * st.n + channel * st.c + y * st.h;
  if constexpr (kIsFloat<T>) {
    if (st.w == 1) {
      for (int64_t lane = 0; lane < count; lane += lanes) {
        const int64_t at = offset + lane * st.c, in_block = min_of<int64_t>(lanes, count - lane);
        transpose_row<lanes>(values + lane, job.out_w, width, in_block, job.values + at, st.c);
        if (job.indices == nullptr) continue;
        transpose_row<lanes>(codes + lane, job.out_w, width, in_block, job.indices + at, st.c);
      }
      return;
    }
  }
  if (st.c == 1) {
    for (int64_t x = 0; x < job.out_w; ++x) {
      T* out = job.values + offset + x * st.w;
      for (int64_t lane = 0; lane < count; ++lane) out[lane] = narrow<T>(values[x * width + lane]);
      if (job.indices == nullptr) continue;
      uint8_t* code = job.indices + offset + x * st.w;
      for (int64_t lane = 0; lane < count; ++lane) code[lane] = static_cast<uint8_t>(codes[x * width + lane]);
    }
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    T* out = job.values + offset + lane * st.c;
    for (int64_t x = 0; x < job.out_w; ++x) out[x * st.w] = narrow<T>(values[x * width + lane]);
  }
  if (job.indices == nullptr) return;
  for (int64_t lane = 0; lane < count; ++lane) {
    uint8_t* out = job.indices + offset + lane * st.c;
    for (int64_t x = 0; x < job.out_w; ++x) out[x * st.w] = static_cast<uint8_t>(codes[x * width + lane]);
  }
}

template <typename T, int lanes, int vectors>
void forward_run_as(const ConvPoolForward<T>& job, const ForwardPlan& p, const void* packed, char* scratch_base,
                    int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  const int width = lanes * vectors;
  const ForwardScratch<A> scratch = forward_scratch<A>(s, p, scratch_base);
  const RowTiles<A> tiles = row_tiles<A, lanes, vectors>(s.conv_w);
  const PoolRow<A> pool = pool_row_for<A, lanes>(s, job.indices != nullptr);
  const PooledOutput<T> pooled{job.output, job.indices, job.output_strides, s.out_w};

  // A contiguous row of the arithmetic type without padding is read where it is.
  const bool in_place = sizeof(T) == sizeof(A) && s.stride_w == 1 && job.input_strides.w == 1 && s.pad_top == 0 &&
                        s.pad_left == 0 && padded_height(s) <= s.height && padded_width(s) <= s.width;
  const PlanarLayout layout =
      in_place ? PlanarLayout{0, job.input_strides.h, job.input_strides.c} : planar_layout(s, p.padded_rows);
  for (int64_t ky = 0, tap = 0; ky < s.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < s.kernel_w; ++kx, ++tap) {
      const int64_t column = kx * s.dilation_w;
      scratch.tap_offsets[tap] = static_cast<int32_t>(ky * s.dilation_h * layout.row_stride +
                                                      column % s.stride_w * layout.phase_length + column / s.stride_w);
    }
  }

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / p.bands, band = unit % p.bands;
    const int64_t y_begin = band * p.band_rows, y_end = min_of(y_begin + p.band_rows, s.out_h);
    // The convolution rows that this band's windows cover.
    const int64_t conv_begin = max_of<int64_t>(y_begin * s.pool_stride_h - s.pool_pad_h, 0);
    const int64_t conv_end = min_of(s.conv_h, (y_end - 1) * s.pool_stride_h - s.pool_pad_h + p.ring);
    const T* input = job.input + n * job.input_strides.n;
    const A* image;
    if (in_place) {
      image = reinterpret_cast<const A*>(input) + conv_begin * s.stride_h * layout.row_stride;
    } else {
      const int64_t rows_end = (conv_end - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
      gather_planar(s, input, job.input_strides, conv_begin * s.stride_h, rows_end, layout, scratch.image);
      image = scratch.image;
    }

    for (int64_t block = 0; block < p.blocks.total; ++block) {
      const int64_t group = block / p.blocks.per_group, in_group = block % p.blocks.per_group * width;
      const int64_t count = min_of<int64_t>(width, s.out_channels / s.groups - in_group);
      const A* bias = static_cast<const A*>(packed) + block * p.packed_block;
      const ConvRows<A> rows{image + group * p.channels * layout.plane_stride,
                             layout.row_stride,
                             layout.plane_stride,
                             scratch.tap_offsets,
                             p.taps,
                             p.channels,
                             at_once(p.channels, max_of<int64_t>(kTermsAtOnce / p.taps, 1)),
                             bias + width,
                             bias};
      int64_t computed = conv_begin;  // convolution rows before this one are (or were) in the ring
      for (int64_t y = y_begin; y < y_end; ++y) {
        const WindowRange window = window_rows(s, y);
        const bool empty = window.begin == window.end;
        const int64_t needed = empty ? computed : window.start + (window.end - 1) * s.pool_dilation_h + 1;
        computed = max_of(computed, window.start);  // rows between windows that do not touch are skipped
        for (; computed < needed; ++computed) {
          conv_row(tiles, rows, rows.image + (computed - conv_begin) * s.stride_h * layout.row_stride, width,
                   scratch.ring + computed % p.ring * s.conv_w * width);
        }
        for (int64_t i = window.begin; i < window.end; ++i) {
          scratch.ring_rows[i] = scratch.ring + (window.start + i * s.pool_dilation_h) % p.ring * s.conv_w * width;
        }
        pool(s, scratch.ring_rows, window, vectors, width, scratch.values, scratch.codes);
        store_row<T, lanes>(pooled, n, group * (s.out_channels / s.groups) + in_group, count, y, width, scratch.values,
                            scratch.codes);
      }
    }
  }
}

template <typename T>
void forward_run(const ConvPoolForward<T>& job, const void* packed, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int full = kLanes<A>, half = kLanes<A> >= 8 ? kLanes<A> / 2 : kLanes<A>;
  const ForwardPlan p = forward_plan<A>(job.shape);
  char* base = static_cast<char*>(scratch);
  if (p.blocks.lanes != full) {
    forward_run_as<T, half, 1>(job, p, packed, base, begin, end);
  } else if (p.blocks.vectors == 1) {
    forward_run_as<T, full, 1>(job, p, packed, base, begin, end);
  } else {
    forward_run_as<T, full, 2>(job, p, packed, base, begin, end);
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
