// The gradient of a group norm where a slice does not fit into a block's registers, in three launches: sums over chunks
// of pixels, their sums over the chunks with the groups' means, and the gradient.
#pragma once

#include "group_norm.cuh"

namespace ddpm {
namespace cuda {
namespace {

constexpr int kSums = 4;            // over pixels, of each channel
constexpr int kGroupThreads = 128;  // of a block that adds up the chunks of a group

template <bool kSilu, int kV>
__device__ __forceinline__ float before_silu(const Channels<kV>& channels, int c, float d, float dy) {
    return kSilu ? mul(dy, silu_derivative(channels.mapped(c, d))) : dy;
}

// Of the gradient through mean and variance, for kV channels of a group.
template <int kV>
struct Through {
    float slope, level[kV];

    // by_g, by_gn: the means over the group of gain times g, and of gain times g n.
    __device__ __forceinline__ void find(const NormStatistics& group, const Channels<kV>& channels, float by_g,
                                         float by_gn) {
        slope = mul(group.rstd, by_gn);
#pragma unroll
        for (int c = 0; c < kV; ++c) level[c] = add(by_g, -mul(slope, channels.rest[c]));
    }
};

// The sums over pixels of kV channels: of g, of g d, of d, and of grad_total.
template <int kV>
struct GradientSums {
    float g[kV], gn[kV], d[kV], more[kV];  // gn: of g d, until it is normalised

    __device__ __forceinline__ void add_value(int c, float difference, float gradient) {
        g[c] = add(g[c], gradient);
        gn[c] = fused(gradient, difference, gn[c]);
        d[c] = add(d[c], difference);
    }
    // values: [rows, kSums, columns, kV]
    __device__ __forceinline__ void write(float* values, int row, int columns, int column) const {
        float* const to = values + row * (kSums * columns * kV) + column * kV;
#pragma unroll
        for (int c = 0; c < kV; ++c) {
            to[c] = g[c], to[columns * kV + c] = gn[c], to[2 * columns * kV + c] = d[c];
            to[3 * columns * kV + c] = more[c];
        }
    }
    __device__ __forceinline__ void read(const float* from, int columns, int column) {
        from += column * kV;
#pragma unroll
        for (int c = 0; c < kV; ++c) {
            g[c] = from[c], gn[c] = from[columns * kV + c], d[c] = from[2 * columns * kV + c];
            more[c] = from[3 * columns * kV + c];
        }
    }
    __device__ __forceinline__ void normalise(const NormStatistics& group, const Channels<kV>& channels) {
#pragma unroll
        for (int c = 0; c < kV; ++c) gn[c] = mul(group.rstd, add(gn[c], -mul(channels.rest[c], g[c])));
    }
    // The results. That of dL/dv follows from the others.
    __device__ __forceinline__ void store(const GroupNormBackwardArgs& args, int64_t sample, int64_t channel,
                                          const Channels<kV>& channels, const Through<kV>& through) const {
        const Shape& shape = args.norm.shape;
        const int64_t all = shape.samples * shape.channels;
        float* const to = args.sums + sample * shape.channels + channel;
#pragma unroll
        for (int c = 0; c < kV; ++c) {
            const float by_mean = fused(through.slope, d[c], mul(float(shape.positions), through.level[c]));
            const bool some = shape.positions > 0;  // otherwise the statistics are NaN, and the sums 0
            to[c] = g[c], to[all + c] = some ? gn[c] : 0.0f;
            to[2 * all + c] = some ? add(fused(channels.gain[c], g[c], -by_mean), more[c]) : 0.0f;
        }
    }
};

template <int kV>
__device__ __forceinline__ Channels<kV> read_channels(const GroupNorm& norm, const Place& place, int64_t sample,
                                                      const NormStatistics& group) {
    Channels<kV> channels;
    float added[kV];
    read_entries<kV>(place.joined ? Rows{} : norm.added, sample, place.channel, added);
    read_affine<kV>(norm, sample, place.channel, channels.gain, channels.offset);
    channels.apply(group, added);
    return channels;
}

// Calls visit(pixel, x[kV], dy[kV]) for this thread's pixels of a column in the block's chunk.
template <DType kType, int kV, class Visit>
__device__ __forceinline__ void for_each_gradient(const GroupNormBackwardArgs& args, const NormLayout& layout,
                                                  const Slice& slice, const Place& place, Visit visit) {
    constexpr int kBatch = 4;
    const void* const from = place.joined ? args.norm.joined : args.norm.x;
    const Place of_y = Place::of_y(args.norm, slice.sample, place.channel);
    const int64_t start = slice.chunk * layout.chunk, all = args.norm.shape.positions;
    const int64_t end = start + layout.chunk < all ? start + layout.chunk : all;
    for (int64_t pixel = start + slice.lane; pixel < end; pixel += kBatch * layout.lanes) {
        Cell<kType, kV> x[kBatch] = {}, grad[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (pixel + i * layout.lanes >= end) continue;
            x[i].load(from, place.at(pixel + i * layout.lanes));
            grad[i].load(args.grad, of_y.at(pixel + i * layout.lanes));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (pixel + i * layout.lanes < end) visit(pixel + i * layout.lanes, x[i], grad[i]);
    }
}

// workspace: [N, chunks, kSums, C], and then [N, groups, 2]: by_g and by_gn of Through.
template <DType kType, int kV>
__global__ void __launch_bounds__(kStreamThreads, 2)
    gradient_parts_kernel(const NormCall<GroupNormBackwardArgs> call, float* workspace) {
    __shared__ float shared[kSums * kV * kStreamThreads];
    const GroupNorm& norm = call.args.norm;
    const NormLayout& layout = call.layout;
    const Slice slice = Slice::of_block(norm, layout);
    const int width = slice.groups * layout.columns;
    float* const to = workspace + (slice.sample * layout.chunks + slice.chunk) * (kSums * norm.shape.channels);
    for (int start = 0; start < width; start += layout.across) {  // more than one, of one group
        const int column = start + slice.column;
        const bool inside = slice.inside && column < width;
        const int64_t channel = (int64_t(slice.first) * layout.columns + (inside ? column : 0)) * kV;
        const Place place = Place::of(norm, slice.sample, channel);
        const NormStatistics group = read_statistics(norm, slice, inside ? column / layout.columns : 0);
        const Channels<kV> channels = read_channels<kV>(norm, place, slice.sample, group);
        const void* const grad_total = place.of_x(call.args.grad_total);
        GradientSums<kV> sums = {};
        if (inside) {
            for_each_gradient<kType, kV>(
                call.args, layout, slice, place, [&](int64_t pixel, const auto& x, const auto& dy) {
                    Cell<kType, kV> more = {};
                    if (grad_total) more.load(grad_total, place.at(pixel));
#pragma unroll
                    for (int c = 0; c < kV; ++c) {
                        const float d = channels.difference(c, x.get(c));
                        sums.add_value(c, d, norm.silu ? before_silu<true>(channels, c, d, dy.get(c)) : dy.get(c));
                        sums.more[c] = add(sums.more[c], more.get(c));
                    }
                });
        }
        __syncthreads();  // shared may still be read
        if (slice.inside) sums.write(shared, slice.lane, layout.across, slice.column);
        sum_rows(shared, layout.lanes, kSums * kV * layout.across);
        if (!inside || slice.lane) continue;
        sums.read(shared, layout.across, slice.column);
        sums.write(to + channel, 0, int(norm.shape.channels / kV), 0);
    }
}

// A block adds up the chunks of one group of one sample, a thread those of a channel.
__global__ void __launch_bounds__(kGroupThreads)
    gradient_finish_kernel(const NormCall<GroupNormBackwardArgs> call, float* workspace) {
    __shared__ float shared[2 * kGroupThreads];
    const GroupNorm& norm = call.args.norm;
    const int64_t sample = blockIdx.x / unsigned(norm.groups), group = blockIdx.x % unsigned(norm.groups);
    const int64_t channels = norm.shape.channels, of_group = channels / norm.groups;
    const float* const from = norm.statistics + 3 * int64_t(blockIdx.x);
    const NormStatistics statistics{from[0], from[1], from[2]};
    const auto read = [&](int64_t channel, Channels<1>& mapped) {
        mapped = read_channels<1>(norm, Place::of(norm, sample, channel), sample, statistics);
        GradientSums<1> sums = {};
        for (int64_t chunk = 0; chunk < call.layout.chunks; ++chunk) {
            const float* const part = workspace + (sample * call.layout.chunks + chunk) * (kSums * channels) + channel;
            sums.g[0] = add(sums.g[0], part[0]);
            sums.gn[0] = add(sums.gn[0], part[channels]);
            sums.d[0] = add(sums.d[0], part[2 * channels]);
            sums.more[0] = add(sums.more[0], part[3 * channels]);
        }
        sums.normalise(statistics, mapped);
        return sums;
    };
    Channels<1> mapped;
    float by_g = 0.0f, by_gn = 0.0f;
    for (int64_t c = threadIdx.x; c < of_group; c += blockDim.x) {
        const GradientSums<1> sums = read(group * of_group + c, mapped);
        by_g = add(by_g, mul(mapped.gain[0], sums.g[0]));
        by_gn = add(by_gn, mul(mapped.gain[0], sums.gn[0]));
    }
    shared[2 * threadIdx.x] = by_g, shared[2 * threadIdx.x + 1] = by_gn;
    sum_rows(shared, int(blockDim.x), 2);
    by_g = mul(shared[0], call.inverse_count), by_gn = mul(shared[1], call.inverse_count);
    for (int64_t c = threadIdx.x; c < of_group; c += blockDim.x) {
        const GradientSums<1> sums = read(group * of_group + c, mapped);
        Through<1> through;
        through.find(statistics, mapped, by_g, by_gn);
        sums.store(call.args, sample, group * of_group + c, mapped, through);
    }
    if (threadIdx.x) return;
    float* const to = workspace + norm.shape.samples * call.layout.chunks * kSums * channels + 2 * int64_t(blockIdx.x);
    to[0] = by_g, to[1] = by_gn;
}

template <DType kType, int kV>
__global__ void __launch_bounds__(kStreamThreads, 2)
    gradient_apply_kernel(const NormCall<GroupNormBackwardArgs> call, const float* workspace) {
    const GroupNorm& norm = call.args.norm;
    const NormLayout& layout = call.layout;
    const Slice slice = Slice::of_block(norm, layout);
    const int width = slice.groups * layout.columns;
    if (!slice.inside) return;
    for (int column = slice.column; column < width; column += layout.across) {
        const int64_t channel = (int64_t(slice.first) * layout.columns + column) * kV;
        const Place place = Place::of(norm, slice.sample, channel);
        void* const to = place.joined ? call.args.djoined : call.args.dx;
        if (!to) continue;
        const int group = column / layout.columns;
        const NormStatistics statistics = read_statistics(norm, slice, group);
        const Channels<kV> channels = read_channels<kV>(norm, place, slice.sample, statistics);
        const float* const by = workspace + norm.shape.samples * layout.chunks * kSums * norm.shape.channels +
                                2 * (slice.sample * norm.groups + slice.first + group);
        Through<kV> through;
        through.find(statistics, channels, by[0], by[1]);
        const void* const grad_total = place.of_x(call.args.grad_total);
        for_each_gradient<kType, kV>(
            call.args, layout, slice, place, [&](int64_t pixel, const auto& x, const auto& dy) {
                Cell<kType, kV> more = {}, made;
                if (grad_total) more.load(grad_total, place.at(pixel));
                float dx[kV];
#pragma unroll
                for (int c = 0; c < kV; ++c) {
                    const float d = channels.difference(c, x.get(c));
                    const float g = norm.silu ? before_silu<true>(channels, c, d, dy.get(c)) : dy.get(c);
                    dx[c] = add(norm_gradient(g, d, channels.gain[c], through.slope, through.level[c]), more.get(c));
                }
                made.put(dx);
                made.store(to, place.at(pixel));
            });
    }
}

template <DType kType, int kV>
cudaError_t run_streamed(const NormCall<GroupNormBackwardArgs>& call, float* workspace, void* stream) {
    const NormLayout& layout = call.layout;
    const int64_t samples = call.args.norm.shape.samples, blocks = samples * layout.slices * layout.chunks;
    cudaError_t error =
        launch_blocks(gradient_parts_kernel<kType, kV>, blocks, layout.threads, stream, call, workspace);
    if (error != cudaSuccess) return error;
    const int64_t channels = call.args.norm.shape.channels / call.args.norm.groups;
    const int threads = channels < kGroupThreads ? threads_for(int(channels)) : kGroupThreads;
    error = launch_blocks(gradient_finish_kernel, samples * call.args.norm.groups, threads, stream, call, workspace);
    if (error != cudaSuccess) return error;
    return launch_blocks(gradient_apply_kernel<kType, kV>, blocks, layout.threads, stream, call, workspace);
}

}  // namespace
}  // namespace cuda
}  // namespace ddpm
