// The regression losses and output - target, of which the gradient is made, in one pass: see ../cpu/diffusion_loss.cpp.
#include "../diffusion_loss.h"

#include "kernels.h"
#include "reduce.cuh"

namespace ddpm {
namespace cuda {
namespace {

struct FinishLoss {
    static __device__ void apply(const LossArgs& args, int64_t sample, const float (&sums)[1]) {
        float entry[3];
        read_row(args.table, args.t[sample], entry);
        args.loss[sample] = mul(entry[2], divide(sums[0], float(args.shape.elements())));
    }
};

template <class Access, DType kX0, DType kOutput>
__global__ void __launch_bounds__(kSumThreads, 1) diffusion_loss_kernel(const LossArgs args, float* workspace) {
    const int64_t tiles = Access::tiles(args.shape), first = blockIdx.x * kPartTiles;
    const int64_t end = first + kPartTiles < tiles ? first + kPartTiles : tiles;
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        const NoiseKey key = key_of(args.noise, sample);
        float entry[3], sum[1] = {0.0f};
        read_row(args.table, args.t[sample], entry);
        const LossRow row{entry[0], entry[1], entry[2]};
        for (int64_t tile = first + threadIdx.x; tile < end; tile += blockDim.x) {
            float output[Access::kValues], x0[Access::kValues], z[Access::kValues];
            Access::template load<kOutput>(args.output, args.shape, sample, tile, output);
            Access::template load<kX0>(args.x0, args.shape, sample, tile, x0);
            Access::noise(args.noise, key, args.shape, sample, tile, z);
#pragma unroll
            for (int i = 0; i < Access::kValues; ++i) z[i] = loss_residual(row, output[i], x0[i], z[i]);
            if (args.residual.data) Access::template store<kOutput>(args.residual, args.shape, sample, tile, z);
            const int inside = Access::inside(args.shape, tile);
            sum[0] = add(sum[0], sum_tree<Access::kValues>([&](int i) { return i < inside ? mul(z[i], z[i]) : 0.0f; }));
        }
        finish_part<FinishLoss>(args, workspace, sample, sum);
    }
}

}  // namespace

int diffusion_loss(const LossArgs& args, float* workspace, void* stream) {
    cudaError_t error = cudaSuccess;
    choose(TrainingPairs{}, layout_of(args.shape, args.noise.given, {args.output, args.x0, args.residual}),
           args.x0.dtype, args.output.dtype, [&](auto access, auto types) {
               using Access = decltype(access);
               error = launch_sums<FinishLoss, 1>(diffusion_loss_kernel<Access, types.kFirst, types.kSecond>,
                                                  Access::tiles(args.shape), args, workspace, stream);
           });
    return error;
}

}  // namespace cuda
}  // namespace ddpm
