// A 3x3 convolution by Winograd's F(4x4, 3x3). A block of tiles is transformed; then, point by point, its products with
// all filters are formed; then these are transformed back to pixels.
//
// The filters are more than a core's caches hold: 9 MiB of 256 by 256 channels. Each is fetched once a block, in the
// order of memory, and serves all of the block's tiles. So the more tiles the better, but those of one point (64 KiB of
// 256 channels), which every panel of filters meets, have to stay in the second cache. With 28 tiles, and all panels of
// a block one after the other, so that its tiles at all points passed by once a panel, it took 1.4 times as long (256
// channels at 16x16, Zen 3).
#include "winograd.h"

namespace ddpm {
namespace DDPM_ISA {

static inline void output_rows(const float* __restrict from, int64_t distance, float* __restrict y0,
                               float* __restrict y1, float* __restrict y2, float* __restrict y3) {
    const float* __restrict m0 = from;
    const float* __restrict m1 = from + distance;
    const float* __restrict m2 = from + 2 * distance;
    const float* __restrict m3 = from + 3 * distance;
    const float* __restrict m4 = from + 4 * distance;
    const float* __restrict m5 = from + 5 * distance;
#pragma omp simd
    for (int k = 0; k < kWinogradPanel; ++k)
        ddpm::winograd_output(m0[k], m1[k], m2[k], m3[k], m4[k], m5[k], y0[k], y1[k], y2[k], y3[k]);
}

// A panel's products of one tile, from `channel` on, to pixels.
template <class Storage>
static void transform_output(const WinogradArgs& args, const Tile& tile, int64_t channel, const float* products) {
    using Type = typename Storage::Type;
    const int length = at_most(args.out_channels - channel, kWinogradPanel);
    Type* const image =
        static_cast<Type*>(args.out) + tile.sample * args.height * args.width * args.out_channels + channel;
    alignas(64) float columns[4][6][kWinogradPanel], outputs[4][kWinogradPanel], bias[kWinogradPanel] = {};
    for (int k = 0; args.bias && k < length; ++k) bias[k] = args.bias[channel + k];
    constexpr int64_t distance = winograd_point(kWinogradPanel);
    for (int j = 0; j < 6; ++j)
        output_rows(products + j * distance, 6 * distance, columns[0][j], columns[1][j], columns[2][j], columns[3][j]);
    for (int i = 0; i < 4 && tile.row + i < args.height; ++i) {
        output_rows(columns[i][0], kWinogradPanel, outputs[0], outputs[1], outputs[2], outputs[3]);
        for (int j = 0; j < 4 && tile.column + j < args.width; ++j) {
            const float* __restrict y = outputs[j];
            Type* __restrict pixel = image + ((tile.row + i) * args.width + tile.column + j) * args.out_channels;
            for (int k = 0; k < length; ++k) pixel[k] = Storage::store(y[k] + bias[k]);
        }
    }
}

// A block's products at one point with the filters of one panel. Each strip of channels is summed separately, which
// takes 1% of the time: so a network's error is 1.7e-6, and 2.7e-6 with one long sum.
static void multiply_block(const WinogradArgs& args, int tiles, int point, int64_t panel, const float* block,
                           float* products) {
    const float* filters = args.filters + (panel * kWinogradPoints + point) * args.channels * kWinogradPanel;
    const float* strip = block + point * winograd_point(kWinogradStrip);
    for (int64_t channel = 0; channel < args.channels; channel += kWinogradStrip) {
        const int length = at_most(args.channels - channel, kWinogradStrip);
        multiply_all<kWinogradStrip, 1>(tiles, strip, filters, length, products, channel > 0);
        strip += kWinogradStripSize;
        filters += length * kWinogradPanel;
    }
}

template <class Storage>
static void convolve(const WinogradArgs& args, float* workspace, int threads) {
    const int64_t tiles = winograd_tiles(args), size = winograd_block(args), blocks = (tiles + size - 1) / size;
    const int64_t strips = winograd_strips(args.channels), panels = winograd_panels(args.out_channels);
    const int64_t room = winograd_block_floats(args);
    const Pixels image{args.image, args.height, args.width, args.channels};
    // As many blocks at a time as there are threads. All threads share the work on them evenly.
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < blocks; first += threads) {
        const int64_t count = at_most(blocks - first, threads), begin = first * size;
        const int64_t end = begin + at_most(tiles - begin, count * size);
#pragma omp for collapse(2) schedule(static)
        for (int64_t index = begin; index < end; ++index)
            for (int64_t strip = 0; strip < strips; ++strip) {
                const int64_t block = (index - begin) / size, row = (index - begin) % size;
                float* const to = workspace + block * room + strip * kWinogradStripSize + row * kWinogradStrip;
                transform<Storage, 6, kWinogradStrip>(image, tile_at(args, index), strip * kWinogradStrip, to);
            }
#pragma omp for collapse(3) schedule(static)
        for (int64_t block = 0; block < count; ++block)
            for (int point = 0; point < kWinogradPoints; ++point)
                for (int64_t panel = 0; panel < panels; ++panel) {
                    float* const from = workspace + block * room;
                    float* const products = from + strips * kWinogradStripSize + panel * kWinogradPanelSize;
                    multiply_block(args, at_most(end - begin - block * size, size), point, panel, from,
                                   products + point * winograd_point(kWinogradPanel));
                }
#pragma omp for collapse(2) schedule(static)
        for (int64_t index = begin; index < end; ++index)
            for (int64_t panel = 0; panel < panels; ++panel) {
                const int64_t block = (index - begin) / size, row = (index - begin) % size;
                const float* const products =
                    workspace + block * room + strips * kWinogradStripSize + panel * kWinogradPanelSize;
                transform_output<Storage>(args, tile_at(args, index), panel * kWinogradPanel,
                                          products + row * kWinogradPanel);
            }
    }
}

void winograd(const WinogradArgs& args, void* workspace, int threads) {
    for_storage(args.dtype,
                [&](auto storage) { convolve<decltype(storage)>(args, static_cast<float*>(workspace), threads); });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
