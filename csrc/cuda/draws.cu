// A training step's draws, a thread a sample; and the losses that importance sampling remembers, a thread a timestep.
//
// Each of these threads reads all of the batch's losses, in order, and takes its own timestep's. So nothing has to be
// sorted or counted, and none writes where another one does. All threads of a warp read the same word at a time: with
// 128 samples that is a few microseconds, where sorting takes more than ten launches.
#include "../draws.h"

#include "kernels.h"
#include "launch.cuh"

namespace ddpm {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads) draw_timesteps_kernel(const DrawArgs args) {
    const int64_t sample = this_tile();
    if (sample < args.shape.samples) draw_sample(args, sample);
}

__global__ void __launch_bounds__(kThreads) record_losses_kernel(const RecordArgs args) {
    const int64_t own = this_tile(), slots = args.shape.channels;
    if (own >= args.shape.samples) return;
    const int64_t before = args.counts[own];
    int64_t count = before;
    for (int64_t i = 0; i < args.losses_count; ++i) {
        const float loss = args.losses[i];
        if (args.t[i] != own || !is_finite(loss)) continue;
        args.history[own * slots + modulo(count, slots)] = loss;
        ++count;
    }
    if (count != before) args.counts[own] = count;
}

}  // namespace

int draw_timesteps(const DrawArgs& args, float*, void* stream) {
    return launch(draw_timesteps_kernel, grid_for(args.shape.samples), 1, stream, args);
}

int record_losses(const RecordArgs& args, float*, void* stream) {
    return launch(record_losses_kernel, grid_for(args.shape.samples), 1, stream, args);
}

}  // namespace cuda
}  // namespace ddpm
