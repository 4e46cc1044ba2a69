// Standard normals from their counters alone.
#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

void normal(const NormalArgs& args, void*, int threads) {
    const bool planar = args.out.channels_last;
    parallel_chunks(args.shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        const BlockKey key = key_of(args.noise, sample);
        Buffer z_buffer, out_buffer;
        for_each_run(args.shape, planar, sample, chunk, [&](const Run& run) {
            float* const values = destination(args.out, args.shape, run, out_buffer);
            if (whole_blocks(run)) {
                draw(key, run, values);
            } else {
                const float* const z = draw(key, run, z_buffer.values);
                for (int i = 0; i < run.length; ++i) values[i] = z[i];
            }
            store(args.out, args.shape, run, values);
        });
    });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
