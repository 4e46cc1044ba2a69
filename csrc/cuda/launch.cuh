// A launch is a grid of (tiles of a sample) x (samples). No division is needed to find either, and a block's noise has
// one key.
#pragma once

#include <cuda_runtime.h>

#include "access.cuh"

namespace ddpm {
namespace cuda {

constexpr int kThreads = 128;        // the most threads of a block, in a kernel without a reduction
constexpr int64_t kSamples = 65535;  // the most that a grid's second dimension takes; for more samples, kernels loop

struct Grid {
    int64_t blocks;  // over a sample
    int threads;
};

// As many threads as a sample has tiles, in whole warps, up to a limit.
inline Grid grid_for(int64_t tiles, int limit = kThreads) {
    const int64_t threads = (tiles + 31) / 32 * 32 < limit ? (tiles + 31) / 32 * 32 : limit;
    return Grid{(tiles + threads - 1) / threads, int(threads)};
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, int64_t samples, void* stream,
                   const Arguments&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(grid.blocks), unsigned(samples < kSamples ? samples : kSamples));
    config.blockDim = dim3(unsigned(grid.threads));
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// This thread's tile.
__device__ __forceinline__ int64_t this_tile() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// An entry of a table, or NaN outside of it.
template <int kColumns>
__device__ __forceinline__ void read_row(const Table& table, int64_t index, float (&row)[kColumns]) {
    const bool inside = index >= 0 && index < table.rows;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row[i] = inside ? table.entries[index * kColumns + i] : as_float(0x7FC00000u);
}

}  // namespace cuda
}  // namespace ddpm
