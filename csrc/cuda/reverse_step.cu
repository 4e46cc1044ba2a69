// One sampler step: see ../cpu/reverse_step.cpp. The row is chosen by a step index on the device.
#include "../reverse_step.h"

#include "kernels.h"
#include "launch.cuh"

namespace ddpm {
namespace cuda {
namespace {

// x_0 and the previous one are fp32, and the copy for the network is stored as its output is, where types are known at
// compile time.
template <class Access, int kGroups, DType kX, DType kOutput>
__global__ void __launch_bounds__(kThreads) reverse_step_kernel(const ReverseStepArgs args) {
    constexpr int kValues = Access::kValues;
    const int64_t tile = this_tile();
    if (tile >= Access::tiles(args.shape)) return;
    float entry[kStepColumns];
    read_row(args.table, *args.step, entry);
    const StepRow row = step_row(entry);
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        const NoiseKey key = key_of(args.noise, sample);
        float next[kValues], x0[kGroups * kValues], previous[kValues], z[kValues];
        Access::template load<kX>(args.x, args.shape, sample, tile, next);
        Access::template load<kOutput, kGroups>(args.output, args.shape, sample, tile, x0);
        if (args.x0_previous.data)
            Access::template load<DType::f32>(args.x0_previous, args.shape, sample, tile, previous);
        // Before anything that was loaded is used: the normals hide the latency. A step without noise draws none.
        const bool noisy = row.sigma != 0.0f;
        if (noisy) Access::noise(args.noise, key, args.shape, sample, tile, z);
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            x0[i] = predicted_x0(row, next[i], x0[i]);
            next[i] = step_mean(row, next[i], x0[i]);
        }
        if (args.x0_previous.data) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) next[i] = add(next[i], mul(row.b_previous, previous[i]));
        }
        if (noisy) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                float deviation = row.sigma;
                if constexpr (kGroups == 2)
                    deviation = row.spread != 0.0f ? step_deviation(row, x0[kValues + i]) : row.sigma;
                next[i] = add(next[i], mul(deviation, z[i]));
            }
        }
        Access::template store<kX>(args.x_next, args.shape, sample, tile, next);
        if (args.x_model.data) Access::template store<kOutput>(args.x_model, args.shape, sample, tile, next);
        if (args.x0.data) {
            float first[kValues];
#pragma unroll
            for (int i = 0; i < kValues; ++i) first[i] = x0[i];
            Access::template store<DType::f32>(args.x0, args.shape, sample, tile, first);
        }
    }
}

template <int kGroups>
cudaError_t run(const ReverseStepArgs& args, void* stream) {
    const Layout fitting = layout_of(args.shape, args.noise.given,
                                     {args.x, args.output, args.x0_previous, args.x_next, args.x0, args.x_model});
    const bool usual = (!args.x0_previous.data || args.x0_previous.dtype == DType::f32) &&
                       (!args.x_model.data || args.x_model.dtype == args.output.dtype);
    cudaError_t error = cudaSuccess;
    choose(SamplingPairs{}, usual ? fitting : Layout::any, args.x.dtype, args.output.dtype,
           [&](auto access, auto types) {
               using Access = decltype(access);
               error = launch(reverse_step_kernel<Access, kGroups, types.kFirst, types.kSecond>,
                              grid_for(Access::tiles(args.shape)), args.shape.samples, stream, args);
           });
    return error;
}

}  // namespace

int reverse_step(const ReverseStepArgs& args, float*, void* stream) {
    return args.groups == 2 ? run<2>(args, stream) : run<1>(args, stream);
}

}  // namespace cuda
}  // namespace ddpm
