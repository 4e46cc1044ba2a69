// How Winograd's kernels lay out what they compute between an image and a result. Everything is cut alike: tiles (4x4
// pixels) into blocks, channels that are summed over into strips, channels that vectors run over into panels.
#pragma once

#include "../ops.h"

namespace ddpm {

constexpr int kWinogradTiles = 64, kWinogradStrip = 64, kWinogradPanel = 32, kWinogradPoints = 36;

// Floats from one of the 36 points to the next, of `width` channels. It is 64 bytes more than they take: otherwise the
// points would compete for a few sets of the cache.
constexpr int64_t winograd_point(int width) { return kWinogradTiles * width + 16; }
constexpr int64_t kWinogradStripSize = kWinogradPoints * winograd_point(kWinogradStrip);
constexpr int64_t kWinogradPanelSize = kWinogradPoints * winograd_point(kWinogradPanel);
// The same of the products of two panels, 32 by 32.
constexpr int64_t kWinogradPair = kWinogradPanel * kWinogradPanel + 16;
constexpr int64_t kWinogradPairSize = kWinogradPoints * kWinogradPair;

// Blocks of a gradient by the weight that are transformed at a time: the sums of all filters are fetched once for them.
constexpr int64_t kWinogradBlocks = 4;

template <class Arguments>
int64_t winograd_tiles(const Arguments& args) {
    return args.samples * ((args.height + 3) / 4) * ((args.width + 3) / 4);
}
inline int64_t winograd_strips(int64_t channels) { return (channels + kWinogradStrip - 1) / kWinogradStrip; }
inline int64_t winograd_panels(int64_t channels) { return (channels + kWinogradPanel - 1) / kWinogradPanel; }

// The bytes of a core's second cache.
int64_t cache_bytes();

// Tiles in a block: a point's tiles take half of the cache at most, beside the filters that pass by. Blocks are alike,
// because a micro-kernel of few rows is a slow one. No result of a convolution depends on it.
inline int64_t winograd_block(const WinogradArgs& args) {
    const int64_t tiles = winograd_tiles(args), fitting = cache_bytes() / 2 / (4 * args.channels + 1);
    const int64_t most = fitting < 16 ? 16 : fitting < kWinogradTiles ? fitting : kWinogradTiles;
    const int64_t blocks = (tiles + most - 1) / most;
    return blocks ? (tiles + blocks - 1) / blocks : 1;
}

// Floats for a block's transformed tiles [strips, 36, tiles, 64] and its products [panels, 36, tiles, 32].
inline int64_t winograd_block_floats(const WinogradArgs& args) {
    return winograd_strips(args.channels) * kWinogradStripSize +
           winograd_panels(args.out_channels) * kWinogradPanelSize;
}

// Room for a block a thread.
inline int64_t workspace_bytes(const WinogradArgs& args, int threads) {
    const int64_t size = winograd_block(args), blocks = (winograd_tiles(args) + size - 1) / size;
    return 4 * (blocks < threads ? blocks : threads) * winograd_block_floats(args);
}

// Room for the tiles of kWinogradBlocks blocks of image and gradient, [panels, 36, tiles, 32], and for the gradients by
// all filters [panels of out_channels, panels of channels, 36, 32, 32].
inline int64_t workspace_bytes(const WinogradWeightArgs& args, int) {
    const int64_t blocks = (winograd_tiles(args) + kWinogradTiles - 1) / kWinogradTiles;
    const int64_t inputs = winograd_panels(args.channels), outputs = winograd_panels(args.out_channels);
    const int64_t held = blocks < kWinogradBlocks ? blocks : kWinogradBlocks;
    return 4 * (held * (inputs + outputs) * kWinogradPanelSize + inputs * outputs * kWinogradPairSize);
}

}  // namespace ddpm
