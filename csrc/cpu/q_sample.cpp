// Noising: one read of x_0, one write of x_t; the noise is drawn on the way.
#include "../q_sample.h"

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

void q_sample(const QSampleArgs& args, void*, int threads) {
    const bool planar = channels_last(args.x0) || channels_last(args.noise.given) || channels_last(args.out);
    parallel_chunks(args.shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        const float* const entry = args.table.entries + 2 * args.t[sample];
        const QSampleRow row{entry[0], entry[1]};
        const BlockKey key = key_of(args.noise, sample);
        Buffer x0_buffer, x_t_buffer, z_buffer;
        for_each_run(args.shape, planar, sample, chunk, [&](const Run& run) {
            const float* const x0 = load(args.x0, args.shape, run, x0_buffer);
            const float* const z = noise_of(args.noise, key, args.shape, run, z_buffer);
            float* const x_t = destination(args.out, args.shape, run, x_t_buffer);
            for (int i = 0; i < run.length; ++i) x_t[i] = ddpm::q_sample(row, x0[i], z[i]);
            store(args.out, args.shape, run, x_t);
        });
    });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
