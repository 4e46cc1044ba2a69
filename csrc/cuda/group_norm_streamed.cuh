// Group norm of slices that do not fit into a block's registers, in two launches. Blocks sum chunks of pixels about a
// pivot, the mean of 32 of the group's values; then blocks add the chunks' sums up and normalise.
#pragma once

#include "group_norm.cuh"

namespace ddpm {
namespace cuda {
namespace {

constexpr int kBatch = 4;  // pixels that a thread loads before it uses the first

// A warp's sum, in every lane.
__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) value = add(value, __shfl_xor_sync(0xFFFFFFFFu, value, half));
    return value;
}

// One value of a group, at any of its channels.
template <DType kType>
__device__ __forceinline__ float value_at(const GroupNorm& norm, int64_t sample, int64_t channel, int64_t pixel) {
    const Place place = Place::of(norm, sample, channel);
    Cell<kType, 1> x, residual = {};
    x.load(place.joined ? norm.joined : norm.x, place.at(pixel));
    if (const void* const from = place.of_x(norm.residual)) residual.load(from, place.at(pixel));
    const float added = place.joined ? 0.0f : value_of(norm.added, sample, channel);
    return add(add(x.get(0), residual.get(0)), added);
}

// The pivots of the slice's groups: of values that are spread over pixels and channels, the same for each chunk.
template <DType kType>
__device__ __forceinline__ void find_pivots(const GroupNorm& norm, const Slice& slice, float* pivots) {
    const int lane = int(threadIdx.x % 32);
    const int64_t channels = norm.shape.channels / norm.groups, positions = norm.shape.positions;
    for (int group = int(threadIdx.x / 32); group < slice.groups; group += int(blockDim.x / 32)) {
        const int64_t channel = (slice.first + group) * channels + lane * channels / 32;
        const float value = positions ? value_at<kType>(norm, slice.sample, channel, lane * positions / 32) : 0.0f;
        const float sum = sum_warp(value);
        if (lane == 0) pivots[group] = mul(sum, 0.03125f);
    }
    __syncthreads();
}

// Calls visit(pixel, (x + residual)[kV]) for this thread's pixels of a column in the block's chunk.
template <DType kType, int kV, class Visit>
__device__ __forceinline__ void for_each_pixel(const GroupNorm& norm, const NormLayout& layout, const Slice& slice,
                                               const Place& place, Visit visit) {
    const void* const from = place.joined ? norm.joined : norm.x;
    const void* const residual = place.of_x(norm.residual);
    const int64_t start = slice.chunk * layout.chunk, all = norm.shape.positions;
    const int64_t end = start + layout.chunk < all ? start + layout.chunk : all;
    for (int64_t pixel = start + slice.lane; pixel < end; pixel += kBatch * layout.lanes) {
        Cell<kType, kV> x[kBatch] = {}, r[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (pixel + i * layout.lanes < end) x[i].load(from, place.at(pixel + i * layout.lanes));
        if (residual) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (pixel + i * layout.lanes < end) r[i].load(residual, place.at(pixel + i * layout.lanes));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (pixel + i * layout.lanes >= end) continue;
            float v[kV];
#pragma unroll
            for (int c = 0; c < kV; ++c) v[c] = add(x[i].get(c), r[i].get(c));
            visit(pixel + i * layout.lanes, v);
        }
    }
}

// Blocks of a multiprocessor. On an H200 four of 64 registers a thread are 1.25 times as fast as three of 72, which the
// compiler makes where it is free to. fp32 takes more registers, and so does rounding to bf16 on Turing; with 64 the
// one for compute 12.0 spills.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1200)
template <DType kType, int kV>
constexpr int kStreamBlocks = 2;
#else
template <DType kType, int kV>
constexpr int kStreamBlocks = kType == DType::f32 ? 2 : 4;
#endif

// workspace: [N, groups, chunks, 2], and then the pivots [N, groups].
template <DType kType, int kV>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks<kType, kV>)
    group_norm_parts_kernel(const NormCall<GroupNormArgs> call, float* workspace) {
    __shared__ float pivots[kStreamThreads], sums[2 * kStreamThreads];
    const GroupNorm& norm = call.args.norm;
    const NormLayout& layout = call.layout;
    const Slice slice = Slice::of_block(norm, layout);
    find_pivots<kType>(norm, slice, pivots);
    const int width = slice.groups * layout.columns;
    float differences = 0.0f, squares = 0.0f;
    if (slice.inside) {
        for (int column = slice.column; column < width; column += layout.across) {  // more than one, of one group
            const int64_t channel = (int64_t(slice.first) * layout.columns + column) * kV;
            const Place place = Place::of(norm, slice.sample, channel);
            const float pivot = pivots[column / layout.columns];
            void* const total = place.of_x(call.args.total);
            // v - pivot is v - added minus these two.
            float added[kV], base[kV], lost[kV];
            read_added<kV>(norm, slice, place, added);
#pragma unroll
            for (int c = 0; c < kV; ++c) two_sum(pivot, total ? 0.0f : -added[c], base[c], lost[c]);
            for_each_pixel<kType, kV>(norm, layout, slice, place, [&](int64_t pixel, float (&v)[kV]) {
                if (total) {
                    Cell<kType, kV> rounded;
#pragma unroll
                    for (int c = 0; c < kV; ++c) v[c] = add(v[c], added[c]);
                    rounded.put(v);
                    rounded.store(total, place.at(pixel));
#pragma unroll
                    for (int c = 0; c < kV; ++c) v[c] = rounded.get(c);
                }
#pragma unroll
                for (int c = 0; c < kV; ++c) v[c] = add(add(v[c], -base[c]), -lost[c]);
                differences = add(differences, sum_cell<kV>([&](int c) { return v[c]; }));
                squares = add(squares, sum_cell<kV>([&](int c) { return mul(v[c], v[c]); }));
            });
        }
    }
    const int columns = layout.columns < layout.across ? layout.columns : layout.across;
    const int group = slice.column / columns, row = slice.lane * columns + slice.column % columns;
    if (slice.inside) {
        sums[2 * (row * layout.groups + group)] = differences;
        sums[2 * (row * layout.groups + group) + 1] = squares;
    }
    sum_rows(sums, layout.lanes * columns, 2 * layout.groups);
    if (int(threadIdx.x) >= slice.groups) return;
    const int64_t index = slice.sample * norm.groups + slice.first + threadIdx.x;
    workspace[2 * (index * layout.chunks + slice.chunk)] = sums[2 * threadIdx.x];
    workspace[2 * (index * layout.chunks + slice.chunk) + 1] = sums[2 * threadIdx.x + 1];
    if (slice.chunk == 0) workspace[2 * norm.shape.samples * norm.groups * layout.chunks + index] = pivots[threadIdx.x];
}

template <DType kType, int kV>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks<kType, kV>)
    group_norm_apply_kernel(const NormCall<GroupNormArgs> call, const float* workspace) {
    __shared__ NormStatistics statistics[kStreamThreads];
    const GroupNorm& norm = call.args.norm;
    const NormLayout& layout = call.layout;
    const Slice slice = Slice::of_block(norm, layout);
    const int lane = int(threadIdx.x % 32);
    for (int group = int(threadIdx.x / 32); group < slice.groups; group += int(blockDim.x / 32)) {
        const int64_t index = slice.sample * norm.groups + slice.first + group;
        const float* const parts = workspace + 2 * index * layout.chunks;
        float differences = 0.0f, squares = 0.0f;
        for (int64_t chunk = lane; chunk < layout.chunks; chunk += 32) {
            differences = add(differences, parts[2 * chunk]);
            squares = add(squares, parts[2 * chunk + 1]);
        }
        differences = sum_warp(differences), squares = sum_warp(squares);
        if (lane > 0) continue;
        const float pivot = workspace[2 * norm.shape.samples * norm.groups * layout.chunks + index];
        statistics[group] = norm_statistics(pivot, differences, squares, call.inverse_count, call.eps);
        if (slice.chunk == 0) write_statistics(norm, index, statistics[group]);
    }
    __syncthreads();
    const int width = slice.groups * layout.columns;
    if (!slice.inside) return;
    for (int column = slice.column; column < width; column += layout.across) {
        const int64_t channel = (int64_t(slice.first) * layout.columns + column) * kV;
        const Place place = Place::of(norm, slice.sample, channel);
        float added[kV];
        Channels<kV> channels;
        read_added<kV>(norm, slice, place, added);
        const Place of_y = Place::of_y(norm, slice.sample, channel);
        read_affine<kV>(norm, slice.sample, channel, channels.gain, channels.offset);
        channels.apply(statistics[column / layout.columns], added);
        for_each_pixel<kType, kV>(norm, layout, slice, place, [&](int64_t pixel, float (&v)[kV]) {
#pragma unroll
            for (int c = 0; c < kV; ++c) {
                const float u = channels.mapped(c, channels.difference(c, v[c]));
                v[c] = norm.silu ? silu(u) : u;
            }
            Cell<kType, kV> y;
            y.put(v);
            y.store(call.args.y, of_y.at(pixel));
        });
    }
}

template <DType kType, int kV>
cudaError_t run_streamed(NormCall<GroupNormArgs> call, float* workspace, void* stream) {
    const int64_t blocks = call.args.norm.shape.samples * call.layout.slices * call.layout.chunks;
    const cudaError_t error =
        launch_blocks(group_norm_parts_kernel<kType, kV>, blocks, call.layout.threads, stream, call, workspace);
    if (error != cudaSuccess) return error;
    if (call.args.total) {  // it is there now
        call.args.norm.x = call.args.total;
        call.args.norm.residual = nullptr;
        call.args.norm.added = Rows{};
    }
    return launch_blocks(group_norm_apply_kernel<kType, kV>, blocks, call.layout.threads, stream, call, workspace);
}

}  // namespace
}  // namespace cuda
}  // namespace ddpm
