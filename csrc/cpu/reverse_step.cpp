// One sampler step: x_t, the network's output and (for multi-step samplers) the previous x_0 in; x_{t-1} out, with
// the copy of it that the network will read and the prediction of x_0 where they are wanted.
#include "../reverse_step.h"

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

void reverse_step(const ReverseStepArgs& args, void*, int threads) {
    const StepRow row = step_row(args.table.entries + kStepColumns * *args.step);
    const bool planar = channels_last(args.x) || channels_last(args.output) || channels_last(args.x0_previous) ||
                        channels_last(args.noise.given) || channels_last(args.x_next) || channels_last(args.x0) ||
                        channels_last(args.x_model);
    const bool noisy = row.sigma != 0.0f;  // a step without noise draws none
    const bool learned = noisy && args.groups == 2 && row.spread != 0.0f;
    const Shape wide = widened(args.shape, args.groups);
    parallel_chunks(args.shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        const BlockKey key = noisy ? key_of(args.noise, sample) : BlockKey{};
        Buffer x_buffer, output_buffer, previous_buffer, z_buffer, x0_buffer, next_buffer;
        for_each_run(args.shape, planar, sample, chunk, [&](const Run& run) {
            float* const x0 = row_of(args.x0, args.shape, run, x0_buffer);
            float* const next = is_colour(args.x_model, args.shape)
                                    ? row_of(args.x_model, args.shape, run, next_buffer)
                                    : destination(args.x_next, args.shape, run, next_buffer);
            const float* const x = load(args.x, args.shape, run, x_buffer);
            const float* const output = load(args.output, wide, run, output_buffer);
            for (int i = 0; i < run.length; ++i) {
                x0[i] = predicted_x0(row, x[i], output[i]);
                next[i] = step_mean(row, x[i], x0[i]);
            }
            if (args.x0_previous.data) {
                const float* const previous = load(args.x0_previous, args.shape, run, previous_buffer);
                for (int i = 0; i < run.length; ++i) next[i] = add(next[i], mul(row.b_previous, previous[i]));
            }
            if (learned) {
                const float* const v = load(args.output, wide, second_group(args.shape, run), output_buffer);
                const float* const z = noise_of(args.noise, key, args.shape, run, z_buffer);
                for (int i = 0; i < run.length; ++i) next[i] = add(next[i], mul(step_deviation(row, v[i]), z[i]));
            } else if (noisy) {
                const float* const z = noise_of(args.noise, key, args.shape, run, z_buffer);
                for (int i = 0; i < run.length; ++i) next[i] = add(next[i], mul(row.sigma, z[i]));
            }
            store(args.x_next, args.shape, run, next);
            if (args.x0.data) store(args.x0, args.shape, run, x0);
            if (args.x_model.data) store(args.x_model, args.shape, run, next);
        });
    });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
