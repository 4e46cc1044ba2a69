// How a group norm is cut into blocks, for its forward and its backward.
//
// A block handles a slice of a sample: a few adjacent groups, which are some columns (see columns.cuh) of all pixels
// or, where they are too many for the registers of a block, of a chunk of them. The order in which a group is summed
// depends on lanes and on the columns of a group, and these on the image's shape and dtype; how many groups are in a
// slice depends on the batch too, so that there are enough blocks for the GPU. So a sample has the same bits in any
// batch.
#pragma once

#include "columns.cuh"

namespace ddpm {
namespace cuda {

constexpr int kNormThreads = 512;    // the most of a block whose slice is in registers
constexpr int kStreamThreads = 256;  // of one that reads a chunk of pixels
constexpr int kStreamRows = 16;      // of a thread, at least, where there are as many
constexpr int kMostChunks = 64;      // of a sample
constexpr int kEnoughBlocks = 256;   // about two a multiprocessor: from there on slices are made wider
constexpr int kLineBytes = 128;      // the widest slice's row
constexpr int kMostColumns = 64;     // of a group that is in registers

// Pixels that a thread can hold.
constexpr int most_rows(DType dtype) { return dtype == DType::f32 ? 8 : 16; }

struct NormLayout {
    int width;              // channels of a column: 4 or 1
    int columns;            // of a group
    int groups;             // of a slice, as its last one may have fewer
    int slices;             // of a sample
    int across;             // columns that a block handles at a time; all of the slice's, unless they are too many
    int lanes;              // pixels at a time
    int rows;               // pixels of a thread, in registers; 0: they are read as they are used
    int64_t chunk, chunks;  // pixels of a chunk; of a sample
    int threads;
};

inline int threads_for(int count) { return (count + 31) / 32 * 32; }

// Doubles the groups of a slice while its row is at most `bytes` long and it needs at most `threads` threads.
inline void widen_slice(NormLayout& layout, int64_t samples, int64_t groups, int bytes_of_column, int bytes,
                        int64_t threads, bool fill) {
    const auto fits = [&](int64_t wider) {
        const int64_t columns = wider * layout.columns;
        return wider <= groups && columns * layout.lanes <= threads && columns * bytes_of_column <= bytes &&
               (!fill || samples * ((groups + wider - 1) / wider) >= kEnoughBlocks);
    };
    layout.groups = 1;
    while (fits(2 * layout.groups)) layout.groups *= 2;
    layout.slices = int((groups + layout.groups - 1) / layout.groups);
    layout.across = layout.groups * layout.columns;
}

// aligned: columns of four may be used. registers: a slice may be held in them. A block has half of the most threads
// unless a group is wider, so that several fit on a multiprocessor.
inline NormLayout norm_layout(const GroupNorm& norm, bool aligned, bool registers) {
    const int most = most_rows(norm.dtype);
    const int64_t positions = norm.shape.positions, channels = norm.shape.channels / norm.groups;
    NormLayout layout = {};
    layout.width = aligned && channels % 4 == 0 && norm.x_channels % 4 == 0 ? 4 : 1;
    layout.columns = int(channels / layout.width);
    const int bytes = layout.width * size_of(norm.dtype);
    // So many pixels a thread that 256 images of 256 channels are one wave of blocks at 8x8 and at 4x4.
    const int fewest = positions >= 256 ? most : positions >= 64 ? most / 2 : 2;
    for (int rows = fewest; rows <= most; rows = rows < most / 2 ? most / 2 : 2 * rows) {
        const int64_t lanes = (positions + rows - 1) / rows;
        if (!registers || layout.width == 1 || lanes < 1 || lanes > kNormThreads / 4) continue;
        if (layout.columns > kMostColumns || lanes * layout.columns > kNormThreads) continue;
        if (norm.shape.elements() > 0x3FFFFFFF) continue;  // offsets within a sample have 32 bits
        layout.rows = rows, layout.lanes = int(lanes), layout.chunk = positions, layout.chunks = 1;
        widen_slice(layout, norm.shape.samples, norm.groups, bytes, kLineBytes, kNormThreads / 2, true);
        layout.threads = threads_for(layout.across * layout.lanes);
        return layout;
    }
    layout.lanes = 1;
    widen_slice(layout, norm.shape.samples, norm.groups, bytes, kLineBytes / 2, kStreamThreads, false);
    if (layout.across > kStreamThreads) layout.across = kStreamThreads;
    layout.lanes = kStreamThreads / layout.across;
    const int64_t spread = (positions + kMostChunks - 1) / kMostChunks;
    layout.chunk = layout.lanes * ((spread + layout.lanes - 1) / layout.lanes);
    if (layout.chunk < layout.lanes * kStreamRows) layout.chunk = layout.lanes * kStreamRows;
    layout.chunks = positions ? (positions + layout.chunk - 1) / layout.chunk : 1;
    layout.threads = threads_for(layout.across * layout.lanes);
    return layout;
}

// Calls in_registers(type, rows) or streamed(type, channels of a column), as was decided; the numbers are types.
template <class InRegisters, class Streamed>
void for_layout(const NormLayout& layout, DType dtype, InRegisters in_registers, Streamed streamed) {
    for_type(dtype, [&](auto types) {
        constexpr int kMost = most_rows(types.kFirst);
        switch (layout.rows) {
            case 2: return in_registers(types, Width<2>{});
            case kMost / 2: return in_registers(types, Width<kMost / 2>{});
            case kMost: return in_registers(types, Width<kMost>{});
        }
        return layout.width == 4 ? streamed(types, Width<4>{}) : streamed(types, Width<1>{});
    });
}

// The arguments of a launch: in single precision, and with what was decided.
template <class Arguments>
struct NormCall {
    Arguments args;
    NormLayout layout;
    float inverse_count, eps;
};

template <class Arguments>
NormCall<Arguments> norm_call(const Arguments& args, const NormLayout& layout, double eps) {
    const Shape& shape = args.norm.shape;
    const double count = double(shape.channels / args.norm.groups) * double(shape.positions);
    return NormCall<Arguments>{args, layout, float(1.0 / count), float(eps)};
}

// What this block handles, and where this thread is.
struct Slice {
    int64_t sample, chunk;
    int first, groups;  // groups: that there are
    int lane, column;   // column: the first of this thread's, of the slice
    bool inside;        // whether the lane is one

    static __device__ __forceinline__ Slice of_block(const GroupNorm& norm, const NormLayout& layout) {
        Slice slice;
        const unsigned slices = unsigned(layout.slices), chunks = unsigned(layout.chunks);
        slice.first = int(blockIdx.x % slices) * layout.groups;
        slice.chunk = blockIdx.x / slices % chunks;
        slice.sample = blockIdx.x / slices / chunks;
        slice.groups = int(norm.groups) - slice.first < layout.groups ? int(norm.groups) - slice.first : layout.groups;
        slice.lane = int(threadIdx.x) / layout.across;
        slice.column = int(threadIdx.x) % layout.across;
        slice.inside = slice.lane < layout.lanes;
        return slice;
    }
    __device__ __forceinline__ int64_t statistics(const GroupNorm& norm, int group) const {
        return 3 * (sample * norm.groups + first + group);
    }
};

// Where a column is in the images that are like x, or (joined) like what is joined to it; and in those like y.
struct Place {
    int64_t channel;
    bool joined;
    int64_t offset, stride;

    static __device__ __forceinline__ Place of(const GroupNorm& norm, int64_t sample, int64_t channel) {
        const bool joined = channel >= norm.x_channels;
        const int64_t stride = joined ? norm.shape.channels - norm.x_channels : norm.x_channels;
        const int64_t within = joined ? channel - norm.x_channels : channel;
        return Place{channel, joined, sample * norm.shape.positions * stride + within, stride};
    }
    static __device__ __forceinline__ Place of_y(const GroupNorm& norm, int64_t sample, int64_t channel) {
        const int64_t stride = norm.shape.channels;
        return Place{channel, false, sample * norm.shape.positions * stride + channel, stride};
    }
    __device__ __forceinline__ int64_t at(int64_t pixel) const { return offset + pixel * stride; }
    // What x alone has.
    template <class Data>
    __device__ __forceinline__ Data* of_x(Data* data) const {
        return joined ? nullptr : data;
    }
};

// A thread's cells of a column, every lanes-th pixel from the first one: kRows at most.
struct Cells {
    int64_t first;
    int step;

    __device__ __forceinline__ Cells(const Place& place, int lane, int lanes)
        : first(place.at(lane)), step(lanes * int(place.stride)) {}
    __device__ __forceinline__ int64_t at(int i) const { return first + i * step; }
};

template <int kV>
__device__ __forceinline__ void read_added(const GroupNorm& norm, const Slice& slice, const Place& place,
                                           float (&added)[kV]) {
    read_entries<kV>(place.joined ? Rows{} : norm.added, slice.sample, place.channel, added);
}

__device__ __forceinline__ NormStatistics read_statistics(const GroupNorm& norm, const Slice& slice, int group) {
    const float* const from = norm.statistics + slice.statistics(norm, group);
    return NormStatistics{from[0], from[1], from[2]};
}

// group: counted over all samples.
__device__ __forceinline__ void write_statistics(const GroupNorm& norm, int64_t group, const NormStatistics& made) {
    float* const to = norm.statistics + 3 * group;
    to[0] = made.centre, to[1] = made.rest, to[2] = made.rstd;
}

// Weight and bias of kV channels, with scale and shift in them: they can be read while statistics are computed.
template <int kV>
__device__ __forceinline__ void read_affine(const GroupNorm& norm, int64_t sample, int64_t channel, float (&factor)[kV],
                                            float (&offset)[kV]) {
    float scale[kV], shift[kV];
    read_entries<kV>(norm.weight, sample, channel, factor);
    read_entries<kV>(norm.bias, sample, channel, offset);
    read_entries<kV>(norm.scale, sample, channel, scale);
    read_entries<kV>(norm.shift, sample, channel, shift);
#pragma unroll
    for (int c = 0; c < kV; ++c) norm_spread(factor[c], offset[c], scale[c], shift[c]);
}

// What is done to kV channels: see ../group_norm.h. x - centre is v minus the group's mean, but for `rest`.
template <int kV>
struct Channels {
    float centre[kV], rest[kV], gain[kV], offset[kV];

    // gain and offset are what read_affine gave.
    __device__ __forceinline__ void apply(const NormStatistics& group, const float (&added)[kV]) {
#pragma unroll
        for (int c = 0; c < kV; ++c) {
            const NormStatistics of_x = without_added(group, added[c]);
            const NormChannel channel = norm_channel(of_x, gain[c], offset[c]);
            centre[c] = of_x.centre, rest[c] = of_x.rest, gain[c] = channel.gain, offset[c] = channel.offset;
        }
    }
    __device__ __forceinline__ float difference(int c, float x) const { return add(x, -centre[c]); }
    __device__ __forceinline__ float mapped(int c, float d) const { return fused(d, gain[c], offset[c]); }
};

// Weight and bias of a slice's channels, with scale and shift in them, and what is added: each is read by one thread,
// and all threads share them. So they take no registers while these hold the image.
struct Affine {
    float factor[4 * kMostColumns], offset[4 * kMostColumns], added[4 * kMostColumns];

    // From the slice's first channel on. A barrier must follow.
    __device__ __forceinline__ void read(const GroupNorm& norm, int64_t sample, int channel, int channels,
                                         bool with_added) {
        for (int i = int(threadIdx.x); i < channels; i += int(blockDim.x)) {
            float f[1], o[1];
            read_affine<1>(norm, sample, channel + i, f, o);
            factor[i] = f[0], offset[i] = o[0];
            added[i] = with_added && channel + i < norm.x_channels ? value_of(norm.added, sample, channel + i) : 0.0f;
        }
    }
    __device__ __forceinline__ void apply(int column, const NormStatistics& group, Channels<4>& channels) const {
        float of_column[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            channels.gain[c] = factor[4 * column + c], channels.offset[c] = offset[4 * column + c];
            of_column[c] = added[4 * column + c];
        }
        channels.apply(group, of_column);
    }
};

// Calls visit(i) for the `count` rows of a thread, which are kRows where kWhole. The end is looked for every kBatch
// rows: across a branch the compiler moves nothing, and without one it widens more values at once than it has
// registers.
template <bool kWhole, int kRows, int kBatch = 4, class Visit>
__device__ __forceinline__ void for_each_row(int count, Visit visit) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if ((!kWhole || i % kBatch == 0) && i >= count) return;
        visit(i);
    }
}

}  // namespace cuda
}  // namespace ddpm
