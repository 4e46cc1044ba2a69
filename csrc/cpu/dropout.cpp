// Dropout by sample, forward and backward alike: one read, one write; the mask is drawn on the way. In the order of the
// elements, which is that of channels_last memory, a run takes its bits as they are drawn.
#include "../dropout.h"

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int64_t kBits = kBitsOfCounter * kCounters;  // elements of a noise block
static_assert(kBits == kRun, "a run takes its bits from one block");

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lower half of a word comes first in memory");

// The words of counters first .. first + kCounters - 1, four each. Out of line, as normal_block() is.
static __attribute__((noinline)) void words_block(uint32_t first, const BlockKey& keys, void* out) {
    alignas(64) uint32_t radius[kPairs], angle[kPairs];
    philox_block(first, keys, radius, angle);
    words_in_order(radius, angle, out);
}

static inline void apply(const DropoutArgs& args, const uint16_t* bits, int count, const float* x, float* out) {
    const uint32_t dropped = args.dropped;
    const float scale = args.scale;
    for (int i = 0; i < count; ++i) out[i] = ddpm::dropout(x[i], bits[i], dropped, scale);
}

// Both images in the order of the elements.
static inline void in_order(const DropoutArgs& given, int threads) {
    DropoutArgs args = given;
    args.shape.positions = args.shape.elements();
    args.shape.channels = 1;
    args.x.channels_last = args.out.channels_last = false;
    parallel_chunks(args.shape, false, threads, [&](int64_t sample, int64_t chunk) {
        const BlockKey key = block_key(key_of(args, sample));
        Buffer x_buffer, out_buffer;
        alignas(64) uint16_t bits[kBits];
        for_each_run(args.shape, false, sample, chunk, [&](const Run& run) {
            const float* const x = load(args.x, args.shape, run, x_buffer);
            float* const out = destination(args.out, args.shape, run, out_buffer);
            words_block(uint32_t(run.element / kBitsOfCounter), key, bits);
            apply(args, bits, run.length, x, out);
            store(args.out, args.shape, run, out);
        });
    });
}

constexpr int64_t kPixels = 32, kStrip = 256;  // of a tile, and channels of it at a time: 16 KiB of bits

// Draws the bits of a tile of `pixels` pixels from `first` on, of the channels `begin` to `end`: [channels, kPixels].
static inline void draw_tile(const BlockKey& key, int64_t channels, int64_t first, int pixels, int64_t begin,
                             int64_t end, uint16_t* tile) {
    alignas(64) uint16_t bits[kBits];
    int64_t block = -1;
    for (int p = 0; p < pixels; ++p) {
        for (int64_t c = begin; c < end; ++c) {
            const int64_t element = (first + p) * channels + c;
            if (element / kBits != block) {
                block = element / kBits;
                words_block(uint32_t(block * kCounters), key, bits);
            }
            tile[(c - begin) * kPixels + p] = bits[element % kBits];
        }
    }
}

// Some image is contiguous: its runs are the pixels of one channel.
static inline void by_channels(const DropoutArgs& args, int threads) {
    const Shape& shape = args.shape;
    const int64_t tiles = (shape.positions + kPixels - 1) / kPixels, units = shape.samples * tiles;
    const bool serial = threads <= 1 || units <= 1 || shape.samples * shape.elements() < kSerial;
#pragma omp parallel for schedule(static) num_threads(threads) if (!serial)
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t sample = unit / tiles, first = unit % tiles * kPixels;
        const int pixels = int(shape.positions - first < kPixels ? shape.positions - first : kPixels);
        const BlockKey key = block_key(key_of(args, sample));
        alignas(64) uint16_t tile[kStrip * kPixels];
        float x[kPixels], out[kPixels];
        for (int64_t begin = 0; begin < shape.channels; begin += kStrip) {
            const int64_t end = begin + kStrip < shape.channels ? begin + kStrip : shape.channels;
            draw_tile(key, shape.channels, first, pixels, begin, end, tile);
            for (int64_t c = begin; c < end; ++c) {
                const Run run{sample, c * shape.positions + first, c, first, pixels, 0};
                load_numbers(args.x, place_of(args.x, shape, run), pixels, x);
                apply(args, tile + (c - begin) * kPixels, pixels, x, out);
                store_numbers(args.out, place_of(args.out, shape, run), pixels, out);
            }
        }
    }
}

void dropout(const DropoutArgs& args, void*, int threads) {
    const bool one = args.shape.channels == 1 || args.shape.positions == 1;  // both formats are the same
    if (one || (args.x.channels_last && args.out.channels_last))
        in_order(args, threads);
    else
        by_channels(args, threads);
}

}  // namespace DDPM_ISA
}  // namespace ddpm
