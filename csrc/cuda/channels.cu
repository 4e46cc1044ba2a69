// What surrounds a network's convolutions and norms, on channels_last images: a bias for each channel, sums over all
// but the channels, and the gradients of a norm's parameters from its sums.
#include "columns.cuh"
#include "kernels.h"

namespace ddpm {
namespace cuda {
namespace {

constexpr int kChannelThreads = 256;
constexpr int kRowsOfThread = 16;  // pixels, at least, where there are as many
constexpr int kBatch = 4;          // that a thread loads before it uses the first
constexpr int kRowBytes = 128;     // a warp reads rows of at most so many bytes
constexpr int64_t kMostParts = 512;

// A block of threads on some columns of a matrix [rows, channels]: `across` columns and `lanes` rows at a time.
struct Cut {
    int width, columns, across, lanes, slices;
    int64_t rows, chunk, chunks;  // rows of a block; blocks over them
};

Cut cut_of(int64_t rows, int64_t channels, DType dtype, bool aligned, int64_t most_chunks) {
    Cut cut = {};
    cut.width = aligned && channels % 4 == 0 ? 4 : 1;
    cut.columns = int(channels / cut.width);
    const int widest = kRowBytes / (cut.width * size_of(dtype));
    cut.across = cut.columns < widest ? cut.columns : widest;
    cut.lanes = kChannelThreads / cut.across;
    cut.slices = (cut.columns + cut.across - 1) / cut.across;
    cut.rows = rows;
    cut.chunk = cut.lanes * kRowsOfThread;
    const int64_t spread = (rows + most_chunks - 1) / most_chunks;
    if (cut.chunk < spread) cut.chunk = (spread + cut.lanes - 1) / cut.lanes * cut.lanes;
    cut.chunks = rows ? (rows + cut.chunk - 1) / cut.chunk : 1;
    return cut;
}

// Calls visit(offset, the row) for the thread's rows of this block, from loads(offset, i) of kBatch rows at a time.
template <class Load, class Use>
__device__ __forceinline__ void for_each_row(const Cut& cut, int64_t chunk, int lane, Load load, Use use) {
    const int64_t start = chunk * cut.chunk, end = start + cut.chunk < cut.rows ? start + cut.chunk : cut.rows;
    for (int64_t row = start + lane; row < end; row += kBatch * cut.lanes) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (row + i * cut.lanes < end) load(i, row + i * cut.lanes);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (row + i * cut.lanes < end) use(i, row + i * cut.lanes);
    }
}

// Grid: slices, chunks, samples.
template <DType kType, int kV>
__global__ void __launch_bounds__(kChannelThreads) add_bias_kernel(const AddBiasArgs args, const Cut cut) {
    const unsigned slices = unsigned(cut.slices), chunks = unsigned(cut.chunks);
    const int64_t sample = blockIdx.x / slices / chunks;
    const int lane = int(threadIdx.x) / cut.across;
    const int column = int(blockIdx.x % slices) * cut.across + int(threadIdx.x) % cut.across;
    if (lane >= cut.lanes || column >= cut.columns) return;
    float bias[kV];
    read_entries<kV>(args.bias, sample, int64_t(column) * kV, bias);
    const int64_t channels = args.shape.channels, first = sample * cut.rows * channels + int64_t(column) * kV;
    Cell<kType, kV> x[kBatch], residual[kBatch] = {};
    for_each_row(
        cut, blockIdx.x / slices % chunks, lane,
        [&](int i, int64_t row) {
            x[i].load(args.x, first + row * channels);
            if (args.residual) residual[i].load(args.residual, first + row * channels);
        },
        [&](int i, int64_t row) {
            float sum[kV];
#pragma unroll
            for (int c = 0; c < kV; ++c) sum[c] = add(add(x[i].get(c), residual[i].get(c)), bias[c]);
            Cell<kType, kV> out;
            out.put(sum);
            out.store(args.out, first + row * channels);
        });
}

// Grid: slices, chunks. Writes the sums of a chunk, [chunks, channels].
template <DType kType, int kV>
__global__ void __launch_bounds__(kChannelThreads, 4)  // without the 4, fp32 spills for 10.0
    channel_sums_kernel(const ChannelSumsArgs args, const Cut cut, float* parts) {
    __shared__ float shared[kChannelThreads * kV];
    const unsigned slices = unsigned(cut.slices);
    const int64_t chunk = blockIdx.x / slices, channels = args.shape.channels;
    const int lane = int(threadIdx.x) / cut.across, within = int(threadIdx.x) % cut.across;
    const int column = int(blockIdx.x % slices) * cut.across + within;
    const bool inside = lane < cut.lanes && column < cut.columns;
    float sums[kV] = {};
    if (inside) {
        Cell<kType, kV> values[kBatch];
        for_each_row(
            cut, chunk, lane,
            [&](int i, int64_t row) { values[i].load(args.image, row * channels + int64_t(column) * kV); },
            [&](int i, int64_t) {
#pragma unroll
                for (int c = 0; c < kV; ++c) sums[c] = add(sums[c], values[i].get(c));
            });
    }
    if (lane < cut.lanes) {
#pragma unroll
        for (int c = 0; c < kV; ++c) shared[(lane * cut.across + within) * kV + c] = sums[c];
    }
    sum_rows(shared, cut.lanes, cut.across * kV);
    if (!inside || lane) return;
#pragma unroll
    for (int c = 0; c < kV; ++c) parts[chunk * channels + int64_t(column) * kV + c] = shared[within * kV + c];
}

// A block handles 32 channels, of which a lane adds up every eighth row.
constexpr int kLanes = kChannelThreads / 32;

__global__ void __launch_bounds__(kChannelThreads)
    add_parts_kernel(const float* parts, int64_t count, int64_t channels, float* out) {
    __shared__ float shared[kChannelThreads];
    const int64_t channel = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
    float sum = 0.0f;
    if (channel < channels)
        for (int64_t i = threadIdx.x / 32; i < count; i += kLanes) sum = add(sum, parts[i * channels + channel]);
    shared[threadIdx.x] = sum;
    sum_rows(shared, kLanes, 32);
    if (threadIdx.x < 32 && channel < channels) out[channel] = shared[threadIdx.x];
}

__global__ void __launch_bounds__(kChannelThreads) group_norm_parameters_kernel(const GroupNormParametersArgs args) {
    __shared__ float shared[2 * kChannelThreads];
    const int64_t channels = args.channels, channel = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
    float dweight = 0.0f, dbias = 0.0f;
    if (channel < channels) {
        const float weight = value_of(args.weight, 0, channel), bias = value_of(args.bias, 0, channel);
        for (int64_t n = threadIdx.x / 32; n < args.samples; n += kLanes) {
            const int64_t at = n * channels + channel;
            const float sum_g = args.sums[at], sum_gn = args.sums[args.samples * channels + at];
            const float spread = add(1.0f, value_of(args.scale, n, channel));
            dweight = fused(spread, sum_gn, dweight);
            dbias = fused(spread, sum_g, dbias);
            if (args.dscale) args.dscale[at] = fused(weight, sum_gn, mul(bias, sum_g));
            if (args.dshift) args.dshift[at] = sum_g;
        }
    }
    shared[2 * threadIdx.x] = dweight, shared[2 * threadIdx.x + 1] = dbias;
    sum_rows(shared, kLanes, 64);
    if (threadIdx.x >= 32 || channel >= channels) return;
    args.dweight[channel] = shared[2 * threadIdx.x];
    args.dbias[channel] = shared[2 * threadIdx.x + 1];
}

Cut cut_of(const ChannelSumsArgs& args) {
    return cut_of(args.shape.samples * args.shape.positions, args.shape.channels, args.dtype,
                  in_fours(args.image, args.dtype), kMostParts);
}

}  // namespace

int64_t workspace(const ChannelSumsArgs& args) {
    const Cut cut = cut_of(args);
    return cut.chunks > 1 ? cut.chunks * args.shape.channels : 0;
}

int channel_sums(const ChannelSumsArgs& args, float* workspace, void* stream) {
    if (!args.shape.channels) return cudaSuccess;
    const Cut cut = cut_of(args);
    float* const parts = cut.chunks > 1 ? workspace : args.out;
    cudaError_t error = cudaSuccess;
    for_type(args.dtype, [&](auto types) {
        constexpr DType kType = types.kFirst;
        error = launch_blocks(cut.width == 4 ? channel_sums_kernel<kType, 4> : channel_sums_kernel<kType, 1>,
                              cut.slices * cut.chunks, kChannelThreads, stream, args, cut, parts);
    });
    if (error != cudaSuccess || cut.chunks == 1) return error;
    const int64_t channels = args.shape.channels;
    return launch_blocks(add_parts_kernel, (channels + 31) / 32, kChannelThreads, stream,
                         static_cast<const float*>(parts), cut.chunks, channels, args.out);
}

int add_bias(const AddBiasArgs& args, float*, void* stream) {
    if (!args.shape.samples || !args.shape.elements()) return cudaSuccess;
    const bool aligned =
        in_fours(args.x, args.dtype) && in_fours(args.residual, args.dtype) && in_fours(args.out, args.dtype);
    const Cut cut = cut_of(args.shape.positions, args.shape.channels, args.dtype, aligned, 0x7FFFFFFF);
    cudaError_t error = cudaSuccess;
    for_type(args.dtype, [&](auto types) {
        constexpr DType kType = types.kFirst;
        error = launch_blocks(cut.width == 4 ? add_bias_kernel<kType, 4> : add_bias_kernel<kType, 1>,
                              cut.slices * cut.chunks * args.shape.samples, kChannelThreads, stream, args, cut);
    });
    return error;
}

int group_norm_parameters(const GroupNormParametersArgs& args, float*, void* stream) {
    if (!args.channels) return cudaSuccess;
    return launch_blocks(group_norm_parameters_kernel, (args.channels + 31) / 32, kChannelThreads, stream, args);
}

}  // namespace cuda
}  // namespace ddpm
