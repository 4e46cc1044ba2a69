// The backward of every loss: what its forward left behind, times a factor per sample and group of channels.
#include "kernels.h"
#include "launch.cuh"

namespace ddpm {
namespace cuda {
namespace {

template <class Access, int kGroups, DType kType>
__global__ void __launch_bounds__(kThreads) loss_backward_kernel(const LossBackwardArgs args) {
    const int64_t tile = this_tile();
    if (tile >= Access::tiles(args.shape)) return;
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        float values[kGroups * Access::kValues];
        Access::template load<kType, kGroups>(args.stored, args.shape, sample, tile, values);
#pragma unroll
        for (int i = 0; i < kGroups * Access::kValues; ++i)
            values[i] = mul(values[i], args.scale[sample * kGroups + i / Access::kValues]);
        Access::template store<kType, kGroups>(args.grad, args.shape, sample, tile, values);
    }
}

template <int kGroups>
cudaError_t run(const LossBackwardArgs& args, void* stream) {
    cudaError_t error = cudaSuccess;
    choose(EqualPairs{}, layout_of(args.shape, Image{}, {args.stored, args.grad}), args.stored.dtype, args.grad.dtype,
           [&](auto access, auto types) {
               using Access = decltype(access);
               error = launch(loss_backward_kernel<Access, kGroups, types.kSecond>, grid_for(Access::tiles(args.shape)),
                              args.shape.samples, stream, args);
           });
    return error;
}

}  // namespace

int loss_backward(const LossBackwardArgs& args, float*, void* stream) {
    LossBackwardArgs call = args;
    call.shape.channels /= call.groups;  // of one group, as the other ops have it
    if (call.groups == 1 && call.stored.channels_last && call.grad.channels_last)
        call.stored.channels_last = call.grad.channels_last = false;  // one factor a sample: in the order of memory
    return call.groups == 2 ? run<2>(call, stream) : run<1>(call, stream);
}

}  // namespace cuda
}  // namespace ddpm
