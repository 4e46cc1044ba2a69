// A training step's draws, and the losses that importance sampling remembers: a few numbers a sample, on one thread.
#include "../draws.h"

#include "kernels.h"

namespace ddpm {
namespace DDPM_ISA {

void draw_timesteps(const DrawArgs& args, void*, int) {
    for (int64_t sample = 0; sample < args.shape.samples; ++sample) draw_sample(args, sample);
}

void record_losses(const RecordArgs& args, void*, int) {
    const int64_t slots = args.shape.channels;
    for (int64_t i = 0; i < args.losses_count; ++i) {
        if (!is_finite(args.losses[i])) continue;
        const int64_t t = args.t[i];
        args.history[t * slots + modulo(args.counts[t]++, slots)] = args.losses[i];
    }
}

}  // namespace DDPM_ISA
}  // namespace ddpm
