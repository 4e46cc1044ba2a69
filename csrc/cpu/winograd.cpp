// A 3x3 convolution by Winograd's F(4x4, 3x3). For a block of tiles the image is transformed; then, for each panel of
// output channels, the 36 products are formed and transformed back. Whatever is stored, it is computed in fp32 and
// rounded once.
//
// The filters are more than a core's caches hold: 9 MiB of 256 by 256 channels. Each is fetched once a block, in the
// order of memory, and the filters of a point (32 KiB a panel) serve all of the block's tiles. The transformed tiles
// are read once a panel and stay in the L2 cache, as a panel's products do. The micro-kernel keeps the sums of up to 14
// tiles by two vectors of output channels in registers, and takes one value of a tile and two vectors of filters at a
// time.
//
// This is the only file that is compiled with contraction, so its results are not the same bits on every instruction
// set. But an output's products are summed in one order, by strips of channels, whatever the batch and the number of
// threads.
#include "../winograd.h"

#include "../storage.h"
#include "kernels.h"

namespace ddpm {
namespace DDPM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 14;  // 28 sums and 3 operands in 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6;  // 12 and 3 in 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 14;
#else
constexpr int kLanes = 4, kRows = 6;
#endif

constexpr int64_t kStripSize = 36 * kWinogradPoint;

typedef float Vector __attribute__((vector_size(4 * kLanes), may_alias));

struct Fp32 {
    using Type = float;
    static DDPM_METHOD float load(float value) { return value; }
    static DDPM_METHOD float store(float value) { return value; }
};
struct Bf16 {
    using Type = uint16_t;
    static DDPM_METHOD float load(uint16_t bits) { return from_bf16(bits); }
    static DDPM_METHOD uint16_t store(float value) { return to_bf16(value); }
};
struct Fp16 {
    using Type = uint16_t;
    static DDPM_METHOD float load(uint16_t bits) { return from_f16(bits); }
    static DDPM_METHOD uint16_t store(float value) { return to_f16(value); }
};

// Where a tile's four rows and columns of outputs start.
struct Tile {
    int64_t sample, row, column;
};

static inline Tile tile_at(const WinogradArgs& args, int64_t index) {
    const int64_t across = (args.width + 3) / 4, down = (args.height + 3) / 4;
    return Tile{index / (across * down), index / across % down * 4, index % across * 4};
}

static inline int at_most(int64_t count, int64_t most) { return int(count < most ? count : most); }

template <class Storage>
static inline void input_rows(const typename Storage::Type* const (&d)[6], float* __restrict to, int64_t distance,
                              int length) {
    const typename Storage::Type* __restrict d0 = d[0];
    const typename Storage::Type* __restrict d1 = d[1];
    const typename Storage::Type* __restrict d2 = d[2];
    const typename Storage::Type* __restrict d3 = d[3];
    const typename Storage::Type* __restrict d4 = d[4];
    const typename Storage::Type* __restrict d5 = d[5];
    float* __restrict t0 = to;
    float* __restrict t1 = to + distance;
    float* __restrict t2 = to + 2 * distance;
    float* __restrict t3 = to + 3 * distance;
    float* __restrict t4 = to + 4 * distance;
    float* __restrict t5 = to + 5 * distance;
#pragma omp simd  // `restrict` is not enough for g++ 12 where the distance is unknown: it left the loop scalar
    for (int c = 0; c < length; ++c)
        ddpm::winograd_input(Storage::load(d0[c]), Storage::load(d1[c]), Storage::load(d2[c]), Storage::load(d3[c]),
                             Storage::load(d4[c]), Storage::load(d5[c]), t0[c], t1[c], t2[c], t3[c], t4[c], t5[c]);
}

// A tile's channels from `channel` on, `length` of them, at each of the 36 points.
template <class Storage>
static void transform_input(const WinogradArgs& args, const Tile& tile, int64_t channel, int length, float* to) {
    using Type = typename Storage::Type;
    const Type* const image =
        static_cast<const Type*>(args.image) + tile.sample * args.height * args.width * args.channels + channel;
    alignas(64) static const Type zeros[kWinogradStrip] = {};
    alignas(64) float columns[6][6][kWinogradStrip];  // transformed down the rows; [point][column]
    for (int j = 0; j < 6; ++j) {
        const int64_t x = tile.column - 1 + j;
        const Type* rows[6];
        for (int i = 0; i < 6; ++i) {
            const int64_t y = tile.row - 1 + i;
            const bool inside = y >= 0 && y < args.height && x >= 0 && x < args.width;
            rows[i] = inside ? image + (y * args.width + x) * args.channels : zeros;
        }
        input_rows<Storage>(rows, columns[0][j], 6 * kWinogradStrip, length);
    }
    for (int i = 0; i < 6; ++i) {
        const float* const row[6] = {columns[i][0], columns[i][1], columns[i][2],
                                     columns[i][3], columns[i][4], columns[i][5]};
        input_rows<Fp32>(row, to + 6 * i * kWinogradPoint, kWinogradPoint, length);
    }
}

// `rows` tiles' products with a point's filters of 32 output channels, summed over the channels. Each strip is summed
// separately, which takes 1% of the time: so a network's error is 1.7e-6, and 2.7e-6 with one long sum.
template <int rows>
static void multiply(const float* tiles, const float* filters, int64_t channels, float* products) {
    for (int column = 0; column < kWinogradPanel; column += 2 * kLanes) {
        const float* strip = tiles;
        const float* filter = filters + column;
        for (int64_t channel = 0; channel < channels; channel += kWinogradStrip, strip += kStripSize) {
            const int length = at_most(channels - channel, kWinogradStrip);
            Vector sums[rows][2] = {};
            for (int c = 0; c < length; ++c, filter += kWinogradPanel) {
                const Vector* const vectors = reinterpret_cast<const Vector*>(filter);
                const Vector low = vectors[0], high = vectors[1];
                for (int row = 0; row < rows; ++row) {
                    const float value = strip[row * kWinogradStrip + c];
                    sums[row][0] += value * low;
                    sums[row][1] += value * high;
                }
            }
            for (int row = 0; row < rows; ++row) {
                Vector* const vectors = reinterpret_cast<Vector*>(products + row * kWinogradPanel + column);
                vectors[0] = channel ? vectors[0] + sums[row][0] : sums[row][0];
                vectors[1] = channel ? vectors[1] + sums[row][1] : sums[row][1];
            }
        }
    }
}

// The same for a number of rows that is known at run time.
template <int rows = kRows>
static void multiply(int count, const float* tiles, const float* filters, int64_t channels, float* products) {
    if (count == rows) return multiply<rows>(tiles, filters, channels, products);
    if constexpr (rows > 1) multiply<rows - 1>(count, tiles, filters, channels, products);
}

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
static void transform_output(const WinogradArgs& args, const Tile& tile, int64_t channel, const float* products,
                             const float* __restrict bias) {
    using Type = typename Storage::Type;
    const int length = at_most(args.out_channels - channel, kWinogradPanel);
    Type* const image =
        static_cast<Type*>(args.out) + tile.sample * args.height * args.width * args.out_channels + channel;
    alignas(64) float columns[4][6][kWinogradPanel], outputs[4][kWinogradPanel];
    constexpr int64_t distance = kWinogradTiles * kWinogradPanel;
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

// A block's outputs in one panel of channels.
template <class Storage>
static void convolve_panel(const WinogradArgs& args, int64_t first, int tiles, int64_t panel, const float* block) {
    alignas(64) float products[36][kWinogradTiles * kWinogradPanel], bias[kWinogradPanel] = {};
    const float* filters = args.filters + panel * 36 * args.channels * kWinogradPanel;
    const int groups = (tiles + kRows - 1) / kRows;
    for (int point = 0; point < 36; ++point, filters += args.channels * kWinogradPanel)
        for (int group = 0; group < groups; ++group) {
            const int begin = group * tiles / groups, end = (group + 1) * tiles / groups;
            multiply(end - begin, block + point * kWinogradPoint + begin * kWinogradStrip, filters, args.channels,
                     products[point] + begin * kWinogradPanel);
        }
    const int64_t channel = panel * kWinogradPanel;
    if (args.bias)
        for (int k = 0; k < at_most(args.out_channels - channel, kWinogradPanel); ++k) bias[k] = args.bias[channel + k];
    for (int tile = 0; tile < tiles; ++tile)
        transform_output<Storage>(args, tile_at(args, first + tile), channel, &products[0][tile * kWinogradPanel],
                                  bias);
}

template <class Storage>
static void convolve(const WinogradArgs& args, float* workspace, int threads) {
    const int64_t tiles = winograd_tiles(args), blocks = winograd_blocks(args), strips = winograd_strips(args);
    const int64_t panels = (args.out_channels + kWinogradPanel - 1) / kWinogradPanel;
    if (!blocks) return;
    const int64_t size = (tiles + blocks - 1) / blocks;  // all alike: a micro-kernel of few rows is a slow one
    // As many blocks at a time as there are threads. Where they are fewer, threads share a block and part its panels.
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < blocks; first += threads) {
        const int64_t count = at_most(blocks - first, threads), begin = first * size;
        const int64_t end = begin + at_most(tiles - begin, count * size);
#pragma omp for collapse(2) schedule(static)
        for (int64_t index = begin; index < end; ++index)
            for (int64_t strip = 0; strip < strips; ++strip) {
                const int64_t block = (index - begin) / size, row = (index - begin) % size;
                const int64_t channel = strip * kWinogradStrip;
                float* const to = workspace + (block * strips + strip) * kStripSize + row * kWinogradStrip;
                transform_input<Storage>(args, tile_at(args, index), channel,
                                         at_most(args.channels - channel, kWinogradStrip), to);
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t block = 0; block < count; ++block)
            for (int64_t panel = 0; panel < panels; ++panel) {
                const int64_t start = begin + block * size;
                convolve_panel<Storage>(args, start, at_most(tiles - start, size), panel,
                                        workspace + block * strips * kStripSize);
            }
    }
}

void winograd(const WinogradArgs& args, void* workspace, int threads) {
    float* const tiles = static_cast<float*>(workspace);
    switch (args.dtype) {
        case DType::bf16: return convolve<Bf16>(args, tiles, threads);
        case DType::f16: return convolve<Fp16>(args, tiles, threads);
        default: return convolve<Fp32>(args, tiles, threads);
    }
}

}  // namespace DDPM_ISA
}  // namespace ddpm
