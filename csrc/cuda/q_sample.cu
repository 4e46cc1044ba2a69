// Noising: one read of x_0, one write of x_t; the noise is drawn on the way.
#include "../q_sample.h"

#include "kernels.h"
#include "launch.cuh"

namespace ddpm {
namespace cuda {
namespace {

template <class Access, DType kX0, DType kOut>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(const QSampleArgs args) {
    const int64_t tile = this_tile();
    if (tile >= Access::tiles(args.shape)) return;
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        const NoiseKey key = key_of(args.noise, sample);
        float entry[2], x0[Access::kValues], z[Access::kValues];
        Access::template load<kX0>(args.x0, args.shape, sample, tile, x0);
        read_row(args.table, args.t[sample], entry);
        Access::noise(args.noise, key, args.shape, sample, tile, z);
        const QSampleRow row{entry[0], entry[1]};
#pragma unroll
        for (int i = 0; i < Access::kValues; ++i) z[i] = ddpm::q_sample(row, x0[i], z[i]);
        Access::template store<kOut>(args.out, args.shape, sample, tile, z);
    }
}

}  // namespace

int q_sample(const QSampleArgs& args, float*, void* stream) {
    cudaError_t error = cudaSuccess;
    choose(TrainingPairs{}, layout_of(args.shape, args.noise.given, {args.x0, args.out}), args.x0.dtype, args.out.dtype,
           [&](auto access, auto types) {
               using Access = decltype(access);
               error = launch(q_sample_kernel<Access, types.kFirst, types.kSecond>, grid_for(Access::tiles(args.shape)),
                              args.shape.samples, stream, args);
           });
    return error;
}

}  // namespace cuda
}  // namespace ddpm
