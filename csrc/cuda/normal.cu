// Standard normals from their counters alone.
#include "kernels.h"
#include "launch.cuh"

namespace ddpm {
namespace cuda {
namespace {

template <class Access, DType kOut>
__global__ void __launch_bounds__(kThreads) normal_kernel(const NormalArgs args) {
    const int64_t tile = this_tile();
    if (tile >= Access::tiles(args.shape)) return;
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        const NoiseKey key = key_of(args.noise, sample);
        float z[Access::kValues];
        Access::noise(args.noise, key, args.shape, sample, tile, z);
        Access::template store<kOut>(args.out, args.shape, sample, tile, z);
    }
}

}  // namespace

int normal(const NormalArgs& args, float*, void* stream) {
    cudaError_t error = cudaSuccess;
    choose(EqualPairs{}, layout_of(args.shape, args.noise.given, {args.out}), args.out.dtype, args.out.dtype,
           [&](auto access, auto types) {
               using Access = decltype(access);
               error = launch(normal_kernel<Access, types.kSecond>, grid_for(Access::tiles(args.shape)),
                              args.shape.samples, stream, args);
           });
    return error;
}

}  // namespace cuda
}  // namespace ddpm
