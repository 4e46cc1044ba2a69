// Sums per sample in an order that is fixed by the sample's shape: no atomics, so a loss has the same bits every time,
// in any batch. A block sums a part of a sample; where a sample is one part (up to 8,192 elements of a contiguous one)
// that block writes the result and there is one launch, otherwise a second one adds the parts.
#pragma once

#include "../functions.h"

#include "launch.cuh"

namespace ddpm {
namespace cuda {

constexpr int kSumThreads = 384;      // at most, of a block that sums: a CIFAR-10 image in one iteration
constexpr int64_t kPartTiles = 1024;  // of a part
constexpr int kFinishThreads = 256;

// Sums every thread's values into thread 0's, as a tree. The block size must be a multiple of 32.
template <int kCount>
__device__ __forceinline__ void sum_block(float (&values)[kCount]) {
    __shared__ float of_warp[kCount][32];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int half = 16; half > 0; half /= 2)
            values[i] = add(values[i], __shfl_xor_sync(0xFFFFFFFFu, values[i], half));
    const int warps = blockDim.x / 32;
    if (warps == 1) return;
    __syncthreads();  // of_warp may still be read for the sample before
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (threadIdx.x % 32 == 0) of_warp[i][threadIdx.x / 32] = values[i];
    __syncthreads();
    if (threadIdx.x >= 32) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        values[i] = int(threadIdx.x) < warps ? of_warp[i][threadIdx.x] : 0.0f;
#pragma unroll
        for (int half = 16; half > 0; half /= 2)
            values[i] = add(values[i], __shfl_xor_sync(0xFFFFFFFFu, values[i], half));
    }
}

// The sum of value(i) for i < kCount, as a tree.
template <int kCount, class Value>
DDPM_FN float sum_tree(Value value) {
    if constexpr (kCount == 1) {
        return value(0);
    } else {
        constexpr int kHalf = kCount / 2;
        return add(sum_tree<kHalf>(value), sum_tree<kCount - kHalf>([&](int i) { return value(kHalf + i); }));
    }
}

// What a block has summed of a sample becomes the result, or is stored for the second launch.
template <class Finish, class Args, int kCount>
__device__ __forceinline__ void finish_part(const Args& args, float* workspace, int64_t sample, float (&sums)[kCount]) {
    sum_block(sums);
    if (threadIdx.x > 0) return;
    if (gridDim.x == 1) {
        Finish::apply(args, sample, sums);
        return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) workspace[(sample * gridDim.x + blockIdx.x) * kCount + i] = sums[i];
}

template <class Finish, class Args, int kCount>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const Args args, const float* workspace, int64_t parts) {
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        float sums[kCount] = {}, lost[kCount] = {};
        for (int64_t part = threadIdx.x; part < parts; part += blockDim.x) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {  // what rounding loses is kept (Kahan 1965)
                const float next = add(workspace[(sample * parts + part) * kCount + i], -lost[i]);
                const float sum = add(sums[i], next);
                lost[i] = add(add(sum, -sums[i]), -next);
                sums[i] = sum;
            }
        }
        sum_block(sums);
        if (threadIdx.x == 0) Finish::apply(args, sample, sums);
    }
}

// Launches a kernel that ends in finish_part, and the second one where a sample is in more than one part.
template <class Finish, int kCount, class Args>
cudaError_t launch_sums(void (*kernel)(Args, float*), int64_t tiles, const Args& args, float* workspace, void* stream) {
    const int64_t samples = args.shape.samples, parts = (tiles + kPartTiles - 1) / kPartTiles;
    const int threads = grid_for(tiles < kPartTiles ? tiles : kPartTiles, kSumThreads).threads;
    const cudaError_t error = launch(kernel, Grid{parts, threads}, samples, stream, args, workspace);
    if (parts == 1 || error != cudaSuccess) return error;
    return launch(finish_kernel<Finish, Args, kCount>, Grid{1, grid_for(parts, kFinishThreads).threads}, samples,
                  stream, args, workspace, parts);
}

}  // namespace cuda
}  // namespace ddpm
