// The gradient of a 3x3 convolution by its weight, by the transpose of Winograd's algorithm: at each of the 36 points
// it is a product of the tiles of the gradient and those of the image, summed over the tiles. Nine numbers of a filter
// take 36 products a tile where the definition takes 144.
//
// The tiles of a block are summed separately, and blocks are added up in their order: so the result depends neither on
// the number of threads nor on how many blocks are transformed at a time.
#include "winograd.h"

namespace ddpm {
namespace DDPM_ISA {

// Where the parts of the workspace are.
struct Places {
    float *image, *grad;  // [blocks, panels, 36, tiles, 32]
    float* sums;          // [panels of grad, panels of image, 36, 32, 32]
    int64_t inputs, outputs;
};

static inline Places places_of(const WinogradWeightArgs& args, int64_t blocks, float* workspace) {
    Places places{};
    places.inputs = winograd_panels(args.channels), places.outputs = winograd_panels(args.out_channels);
    places.image = workspace;
    places.grad = places.image + blocks * places.inputs * kWinogradPanelSize;
    places.sums = places.grad + blocks * places.outputs * kWinogradPanelSize;
    return places;
}

static inline void tap_rows(const float* __restrict from, int64_t distance, float* __restrict g0, float* __restrict g1,
                            float* __restrict g2) {
    const float* __restrict m0 = from;
    const float* __restrict m1 = from + distance;
    const float* __restrict m2 = from + 2 * distance;
    const float* __restrict m3 = from + 3 * distance;
    const float* __restrict m4 = from + 4 * distance;
    const float* __restrict m5 = from + 5 * distance;
#pragma omp simd
    for (int c = 0; c < kWinogradPanel; ++c)
        ddpm::winograd_taps(m0[c], m1[c], m2[c], m3[c], m4[c], m5[c], g0[c], g1[c], g2[c]);
}

// The nine taps of one filter in a panel of channels from its 36 sums.
static void transform_taps(const WinogradWeightArgs& args, int64_t out, int64_t channel, const float* sums) {
    alignas(64) float columns[3][6][kWinogradPanel], taps[3][kWinogradPanel];
    for (int j = 0; j < 6; ++j)
        tap_rows(sums + j * kWinogradPair, 6 * kWinogradPair, columns[0][j], columns[1][j], columns[2][j]);
    const int length = at_most(args.channels - channel, kWinogradPanel);
    for (int i = 0; i < 3; ++i) {
        tap_rows(columns[i][0], kWinogradPanel, taps[0], taps[1], taps[2]);
        for (int j = 0; j < 3; ++j) {
            float* const to = args.weight + (out * 9 + 3 * i + j) * args.channels + channel;
            for (int c = 0; c < length; ++c) to[c] = taps[j][c];
        }
    }
}

// Adds the products of `count` blocks of tiles, `tiles` in all, to the sums of a panel of filters at one point.
static void multiply_blocks(const WinogradWeightArgs& args, const Places& places, int64_t count, int64_t tiles,
                            int point, int64_t output, bool add) {
    const int64_t from = point * winograd_point(kWinogradPanel);
    const int rows = at_most(args.out_channels - output * kWinogradPanel, kWinogradPanel);
    for (int64_t input = 0; input < places.inputs; ++input) {
        float* const sums = places.sums + (output * places.inputs + input) * kWinogradPairSize + point * kWinogradPair;
        for (int64_t block = 0; block < count; ++block)
            multiply_all<1, kWinogradPanel>(
                rows, places.grad + (block * places.outputs + output) * kWinogradPanelSize + from,
                places.image + (block * places.inputs + input) * kWinogradPanelSize + from,
                at_most(tiles - block * kWinogradTiles, kWinogradTiles), sums, add || block > 0);
    }
}

template <class Storage>
static void sum_tiles(const WinogradWeightArgs& args, float* workspace, int threads) {
    const int64_t tiles = winograd_tiles(args), blocks = (tiles + kWinogradTiles - 1) / kWinogradTiles;
    const int64_t held = at_most(blocks, kWinogradBlocks);
    const Places places = places_of(args, held, workspace);
    const Pixels image{args.image, args.height, args.width, args.channels};
    const Pixels grad{args.grad, args.height, args.width, args.out_channels};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t first = 0; first < blocks; first += held) {
            const int64_t count = at_most(blocks - first, held), begin = first * kWinogradTiles;
            const int64_t end = begin + at_most(tiles - begin, count * kWinogradTiles);
#pragma omp for collapse(2) schedule(static)
            for (int64_t index = begin; index < end; ++index)
                for (int64_t panel = 0; panel < places.inputs + places.outputs; ++panel) {
                    const int64_t block = (index - begin) / kWinogradTiles, row = (index - begin) % kWinogradTiles;
                    const int64_t to = row * kWinogradPanel, output = panel - places.inputs;
                    const Tile tile = tile_at(args, index);
                    if (output < 0)
                        transform<Storage, 6, kWinogradPanel>(
                            image, tile, panel * kWinogradPanel,
                            places.image + (block * places.inputs + panel) * kWinogradPanelSize + to);
                    else
                        transform<Storage, 4, kWinogradPanel>(
                            grad, tile, output * kWinogradPanel,
                            places.grad + (block * places.outputs + output) * kWinogradPanelSize + to);
                }
#pragma omp for collapse(2) schedule(static)
            for (int point = 0; point < kWinogradPoints; ++point)
                for (int64_t output = 0; output < places.outputs; ++output)
                    multiply_blocks(args, places, count, end - begin, point, output, first > 0);
        }
#pragma omp for collapse(2) schedule(static)
        for (int64_t out = 0; out < args.out_channels; ++out)
            for (int64_t input = 0; input < places.inputs; ++input) {
                const int64_t output = out / kWinogradPanel, row = out % kWinogradPanel;
                transform_taps(
                    args, out, input * kWinogradPanel,
                    places.sums + (output * places.inputs + input) * kWinogradPairSize + row * kWinogradPanel);
            }
    }
}

void winograd_weight_gradient(const WinogradWeightArgs& args, void* workspace, int threads) {
    if (!winograd_tiles(args)) {
        for (int64_t i = 0; i < 9 * args.out_channels * args.channels; ++i) args.weight[i] = 0.0f;
        return;
    }
    for_storage(args.dtype,
                [&](auto storage) { sum_tiles<decltype(storage)>(args, static_cast<float*>(workspace), threads); });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
