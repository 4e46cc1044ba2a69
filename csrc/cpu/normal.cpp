// Standard normals from their counters alone.
#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

void normal(const NormalArgs& args, void*, int threads) {
    const bool planar = args.out.channels_last;
    parallel_chunks(args.shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        const BlockKey key = key_of(args.noise, sample);
        for_each_run(args.shape, planar, sample, chunk, [&](const Run& run) {
            NoiseBuffer buffer;
            float* const values =
                whole_blocks(run) ? destination(args.out, args.shape, run, buffer.values) : buffer.values;
            store(args.out, args.shape, run, draw(key, run, values));
        });
    });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
