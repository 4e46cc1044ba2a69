// Dropout by sample, forward and backward alike: one read, one write; the mask is drawn on the way.
#include "../dropout.h"

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int64_t kBits = kBitsOfCounter * kCounters;  // elements of a noise block
static_assert(kBits == kRun, "a run of channels_last memory takes its bits from one block");

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lower half of a word comes first in memory");

// The words of counters first .. first + kCounters - 1, four each. Out of line, as normal_block() is.
static __attribute__((noinline)) void words_block(uint32_t first, const BlockKey& keys, void* out) {
    alignas(64) uint32_t radius[kPairs], angle[kPairs];
    philox_block(first, keys, radius, angle);
    words_in_order(radius, angle, out);
}

// The bits of the block of counters that was drawn last: the runs of a sample that is not channels_last are as short as
// its channels are few, and many of them share a block.
struct DrawnBits {
    alignas(64) uint16_t bits[kBits];
    int64_t block = -1;

    void draw(int64_t wanted, const BlockKey& key) {
        if (wanted == block) return;
        words_block(uint32_t(wanted * kCounters), key, bits);
        block = wanted;
    }
};

void dropout(const DropoutArgs& given, void*, int threads) {
    const DropoutArgs args = turned(given);
    const bool planar = args.x.channels_last || args.out.channels_last;
    const uint32_t dropped = args.dropped;
    const float scale = args.scale;
    parallel_chunks(args.shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        const BlockKey key = block_key(key_of(args, sample));
        DrawnBits drawn;
        Buffer x_buffer, out_buffer;
        for_each_run(args.shape, planar, sample, chunk, [&](const Run& run) {
            const float* const x = load(args.x, args.shape, run, x_buffer);
            float* const out = destination(args.out, args.shape, run, out_buffer);
            for (int done = 0; done < run.length;) {
                const int64_t element = run.element + done;
                const int lane = int(element % kBits), left = run.length - done;
                const int count = left < kBits - lane ? left : int(kBits) - lane;
                drawn.draw(element / kBits, key);
                const uint16_t* const bits = drawn.bits + lane;
                for (int i = 0; i < count; ++i) out[done + i] = ddpm::dropout(x[done + i], bits[i], dropped, scale);
                done += count;
            }
            store(args.out, args.shape, run, out);
        });
    });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
