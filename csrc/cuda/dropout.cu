// Dropout by sample, forward and backward alike: a thread of channels_last memory takes the eight elements of a
// counter.
#include "../dropout.h"

#include "columns.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace ddpm {
namespace cuda {
namespace {

template <class Access, DType kType>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const DropoutArgs args) {
    constexpr int kValues = Access::kValues;
    static_assert(kBitsOfCounter % kValues == 0, "a tile takes its bits from one counter");
    const int64_t tile = this_tile();
    if (tile >= Access::tiles(args.shape)) return;
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        float values[kValues];
        Access::template load<kType>(args.x, args.shape, sample, tile, values);
        const NoiseKey key = key_of(args, sample);
        uint32_t words[4] = {uint32_t(tile * kValues / kBitsOfCounter), key.c1, key.c2, key.c3};
        philox4x32_10(words[0], words[1], words[2], words[3], key.key0, key.key1);
        if (kValues == 4 && tile % 2) words[0] = words[2], words[1] = words[3];
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            const uint32_t bits = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFu;
            values[i] = ddpm::dropout(values[i], bits, args.dropped, args.scale);
        }
        Access::template store<kType>(args.out, args.shape, sample, tile, values);
    }
}

template <class Access, DType kType>
cudaError_t run(const DropoutArgs& args, void* stream) {
    return launch(dropout_kernel<Access, kType>, grid_for(Access::tiles(args.shape)), args.shape.samples, stream, args);
}

// The images as [N, positions, channels]: there the order of the elements is the logical one, channels_last memory is
// contiguous, and contiguous memory is channels_last.
DropoutArgs turned(const DropoutArgs& args) {
    DropoutArgs call = args;
    const bool one = args.shape.channels == 1 || args.shape.positions == 1;  // both formats are the same
    call.shape.channels = args.shape.positions;
    call.shape.positions = args.shape.channels;
    call.x.channels_last = !one && !args.x.channels_last;
    call.out.channels_last = !one && !args.out.channels_last;
    return call;
}

}  // namespace

int dropout(const DropoutArgs& given, float*, void* stream) {
    const DropoutArgs args = turned(given);
    if (layout_of(args.shape, Image{}, {args.x, args.out}) != Layout::flat || args.x.dtype != args.out.dtype)
        return run<Any, DType::f32>(args, stream);
    cudaError_t error = cudaSuccess;
    for_type(args.x.dtype, [&](auto types) { error = run<Flat, types.kFirst>(args, stream); });
    return error;
}

}  // namespace cuda
}  // namespace ddpm
