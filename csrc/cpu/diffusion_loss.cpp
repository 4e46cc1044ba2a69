// The regression losses and their gradient in one pass over the network's output and x_0.
//
// The pass leaves output - target behind. The gradient is that times 2 weight / elements times the incoming
// gradient, all of it per sample: storing the residual rather than the scaled gradient keeps it near 1, where fp16
// has its precision, and needs no second look at x_0 or at the noise.
#include "../diffusion_loss.h"

#include "sums.h"

namespace ddpm {
namespace DDPM_ISA {

static inline bool is_planar(const LossArgs& args) {
    return channels_last(args.output) || channels_last(args.x0) || channels_last(args.noise.given) ||
           channels_last(args.residual);
}

void diffusion_loss(const LossArgs& args, void* workspace, int threads) {
    double* const partial = static_cast<double*>(workspace);
    const bool planar = is_planar(args);
    const int64_t chunks = chunks_of(args.shape, planar);
    parallel_chunks(args.shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        const float* const entry = args.table.entries + 3 * args.t[sample];
        const LossRow row{entry[0], entry[1], entry[2]};
        const BlockKey key = key_of(args.noise, sample);
        double sum = 0.0;
        Buffer output_buffer, x0_buffer, z_buffer, residual_buffer;
        for_each_run(args.shape, planar, sample, chunk, [&](const Run& run) {
            const float* const output = load(args.output, args.shape, run, output_buffer);
            const float* const x0 = load(args.x0, args.shape, run, x0_buffer);
            const float* const z = noise_of(args.noise, key, args.shape, run, z_buffer);
            const bool stored = args.residual.data;
            float* const residual =
                stored ? destination(args.residual, args.shape, run, residual_buffer) : residual_buffer.values;
            for (int i = 0; i < run.length; ++i) residual[i] = loss_residual(row, output[i], x0[i], z[i]);
            if (stored) store(args.residual, args.shape, run, residual);
            sum += sum_run(run.length, [&](int i) { return mul(residual[i], residual[i]); });
        });
        partial[sample * chunks + chunk] = sum;
    });
    for (int64_t sample = 0; sample < args.shape.samples; ++sample) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[sample * chunks + chunk];
        const double weight = args.table.entries[3 * args.t[sample] + 2];
        args.loss[sample] = float(weight * sum / double(args.shape.elements()));
    }
}

}  // namespace DDPM_ISA
}  // namespace ddpm
