// The backward of every loss: what its forward left behind, times a factor per sample and group of channels.
#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int64_t kPattern =
    64;  // channels up to which a pair of channels_last images is handled in the order of memory

void loss_backward(const LossBackwardArgs& args, void*, int threads) {
    Shape shape = args.shape;
    Image from = args.stored, to = args.grad;
    const int64_t per_group = shape.channels / args.groups;
    const auto factor = [&](int64_t sample, int64_t channel) {
        return args.scale[sample * args.groups + channel / per_group];
    };
    if (from.channels_last && to.channels_last && (args.groups == 1 || shape.channels <= kPattern)) {
        // In memory order the factors repeat every pixel.
        from.channels_last = to.channels_last = false;
        parallel_chunks(shape, false, threads, [&](int64_t sample, int64_t chunk) {
            alignas(64) float pattern[kRun + kPattern];
            const int64_t period = args.groups == 1 ? 1 : shape.channels;
            for (int64_t i = 0; i < kRun + period; ++i) pattern[i] = factor(sample, i % period);
            Buffer buffer, grad_buffer;
            for_each_run(shape, false, sample, chunk, [&](const Run& run) {
                const float* const stored = load(from, shape, run, buffer);
                float* const grad = destination(to, shape, run, grad_buffer);
                const float* const scale = pattern + run.element % period;
                for (int i = 0; i < run.length; ++i) grad[i] = mul(stored[i], scale[i]);
                store(to, shape, run, grad);
            });
        });
        return;
    }
    const bool planar = channels_last(from) || channels_last(to);
    if (!planar) {  // a group of a contiguous sample is as good as a sample
        shape.samples *= args.groups;
        shape.channels = per_group;
    }
    parallel_chunks(shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        Buffer buffer, grad_buffer;
        for_each_run(shape, planar, sample, chunk, [&](const Run& run) {
            const float scale = planar ? factor(sample, run.channel) : args.scale[sample];
            const float* const stored = load(from, shape, run, buffer);
            float* const grad = destination(to, shape, run, grad_buffer);
            for (int i = 0; i < run.length; ++i) grad[i] = mul(stored[i], scale);
            store(to, shape, run, grad);
        });
    });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
