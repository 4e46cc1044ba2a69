// The two transforms of a 3x3 convolution by Winograd's F(4x4, 3x3), on fp32 channels_last images: image to 36 matrices
// [tiles, channels], and the 36 products of these with the filters' back to an image. The products are a library's.
//
// Every loop runs over channels, which are contiguous in the image and in the matrices: the compiler vectorises it
// whole. A tile's channels go through in strips whose 6x6 intermediates stay in the L1 cache.
#include "../winograd.h"

#include "kernels.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int kStrip = 64;  // channels; 36 intermediates of each are 9 KiB

// Where a tile's four rows and columns of outputs start.
struct Tile {
    int64_t sample, row, column;
};

static inline Tile tile_at(const WinogradArgs& args, int64_t index) {
    const int64_t across = (args.width + 3) / 4, down = (args.height + 3) / 4;
    return Tile{index / (across * down), index / across % down * 4, index % across * 4};
}

static inline int strip_length(const WinogradArgs& args, int64_t channel) {
    return int(args.channels - channel < kStrip ? args.channels - channel : kStrip);
}

static inline void input_rows(const float* __restrict d0, const float* __restrict d1, const float* __restrict d2,
                              const float* __restrict d3, const float* __restrict d4, const float* __restrict d5,
                              float* __restrict to, int64_t distance, int length) {
    float *__restrict t0 = to, *__restrict t1 = to + distance, *__restrict t2 = to + 2 * distance,
          *__restrict t3 = to + 3 * distance, *__restrict t4 = to + 4 * distance, *__restrict t5 = to + 5 * distance;
#pragma omp simd  // `restrict` is not enough for g++ 12 where the distance is unknown: it left the loop scalar
    for (int c = 0; c < length; ++c)
        ddpm::winograd_input(d0[c], d1[c], d2[c], d3[c], d4[c], d5[c], t0[c], t1[c], t2[c], t3[c], t4[c], t5[c]);
}

static inline void output_rows(const float* __restrict from, int64_t distance, float* __restrict y0,
                               float* __restrict y1, float* __restrict y2, float* __restrict y3, int length) {
    const float *__restrict m0 = from, *__restrict m1 = from + distance, *__restrict m2 = from + 2 * distance,
                *__restrict m3 = from + 3 * distance, *__restrict m4 = from + 4 * distance,
                *__restrict m5 = from + 5 * distance;
#pragma omp simd
    for (int c = 0; c < length; ++c)
        ddpm::winograd_output(m0[c], m1[c], m2[c], m3[c], m4[c], m5[c], y0[c], y1[c], y2[c], y3[c]);
}

void winograd_input(const WinogradArgs& args, int threads) {
    const int64_t distance = args.tiles * args.channels;  // between matrices
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.tiles > 1)
    for (int64_t index = 0; index < args.tiles; ++index) {
        const Tile tile = tile_at(args, args.first + index);
        const float* const image = args.image + tile.sample * args.height * args.width * args.channels;
        alignas(64) static const float zeros[kStrip] = {};
        alignas(64) float columns[6][6][kStrip];  // transformed down the rows; [point][column]
        for (int64_t channel = 0; channel < args.channels; channel += kStrip) {
            const int length = strip_length(args, channel);
            for (int j = 0; j < 6; ++j) {
                const int64_t x = tile.column - 1 + j;
                const float* rows[6];
                for (int i = 0; i < 6; ++i) {
                    const int64_t y = tile.row - 1 + i;
                    const bool inside = y >= 0 && y < args.height && x >= 0 && x < args.width;
                    rows[i] = inside ? image + (y * args.width + x) * args.channels + channel : zeros;
                }
                input_rows(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], columns[0][j], 6 * kStrip, length);
            }
            float* const to = args.matrices + index * args.channels + channel;
            for (int i = 0; i < 6; ++i)
                input_rows(columns[i][0], columns[i][1], columns[i][2], columns[i][3], columns[i][4], columns[i][5],
                           to + 6 * i * distance, distance, length);
        }
    }
}

void winograd_output(const WinogradArgs& args, int threads) {
    const int64_t distance = args.tiles * args.channels;  // between matrices
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.tiles > 1)
    for (int64_t index = 0; index < args.tiles; ++index) {
        const Tile tile = tile_at(args, args.first + index);
        float* const image = args.image + tile.sample * args.height * args.width * args.channels;
        alignas(64) float columns[4][6][kStrip], outputs[4][4][kStrip];
        for (int64_t channel = 0; channel < args.channels; channel += kStrip) {
            const int length = strip_length(args, channel);
            const float* const from = args.matrices + index * args.channels + channel;
            for (int j = 0; j < 6; ++j)
                output_rows(from + j * distance, 6 * distance, columns[0][j], columns[1][j], columns[2][j],
                            columns[3][j], length);
            for (int i = 0; i < 4 && tile.row + i < args.height; ++i) {
                output_rows(columns[i][0], kStrip, outputs[i][0], outputs[i][1], outputs[i][2], outputs[i][3], length);
                for (int j = 0; j < 4 && tile.column + j < args.width; ++j) {
                    const int64_t offset = ((tile.row + i) * args.width + tile.column + j) * args.channels + channel;
                    const float* __restrict y = outputs[i][j];
                    float* __restrict pixel = image + offset;
                    if (args.bias) {
                        const float* __restrict bias = args.bias + channel;
                        for (int c = 0; c < length; ++c) pixel[c] = y[c] + bias[c];
                    } else {
                        for (int c = 0; c < length; ++c) pixel[c] = y[c];
                    }
                }
            }
        }
    }
}

}  // namespace DDPM_ISA
}  // namespace ddpm
