// What the kernels of Winograd's algorithm share: tiles of images at the 36 points, and the product that takes nearly
// all of the time. Images may be stored in any dtype; everything is computed in fp32 and rounded once.
//
// The files that include this are the only ones that are compiled with contraction, so their results are not the same
// bits on every instruction set. But they are summed in one order, whatever the number of threads.
#pragma once

#include "../winograd.h"

#include "../storage.h"
#include "kernels.h"

namespace ddpm {
namespace DDPM_ISA {

// The micro-kernel's sums: rows by vectors, which together with a row of vectors and one value fill the registers. A
// panel's 32 columns are read in one go where they fit, because they come from the second cache (on Zen 3, 256
// channels: 80 GFLOP/s with 3 rows of 4 vectors, 71 with 6 of 2).
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kRows = 14;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 4, kRows = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 8, kRows = 3;
#else
constexpr int kLanes = 4, kVectors = 2, kRows = 6;
#endif

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

template <class Arguments>
static inline Tile tile_at(const Arguments& args, int64_t index) {
    const int64_t across = (args.width + 3) / 4, down = (args.height + 3) / 4;
    return Tile{index / (across * down), index / across % down * 4, index % across * 4};
}

static inline int at_most(int64_t count, int64_t most) { return int(count < most ? count : most); }

// Calls run(Storage()) for the dtype that images are stored in.
template <class Run>
static inline void for_storage(DType dtype, Run run) {
    switch (dtype) {
        case DType::bf16: return run(Bf16());
        case DType::f16: return run(Fp16());
        default: return run(Fp32());
    }
}

// B^T of six rows of an image, or A of four rows of a gradient, at six points that are `distance` floats apart.
template <class Storage>
static inline void to_points(const typename Storage::Type* const (&d)[6], float* __restrict to, int64_t distance,
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
template <class Storage>
static inline void to_points(const typename Storage::Type* const (&y)[4], float* __restrict to, int64_t distance,
                             int length) {
    const typename Storage::Type* __restrict y0 = y[0];
    const typename Storage::Type* __restrict y1 = y[1];
    const typename Storage::Type* __restrict y2 = y[2];
    const typename Storage::Type* __restrict y3 = y[3];
    float* __restrict t0 = to;
    float* __restrict t1 = to + distance;
    float* __restrict t2 = to + 2 * distance;
    float* __restrict t3 = to + 3 * distance;
    float* __restrict t4 = to + 4 * distance;
    float* __restrict t5 = to + 5 * distance;
#pragma omp simd
    for (int c = 0; c < length; ++c)
        ddpm::winograd_gradient(Storage::load(y0[c]), Storage::load(y1[c]), Storage::load(y2[c]), Storage::load(y3[c]),
                                t0[c], t1[c], t2[c], t3[c], t4[c], t5[c]);
}

// An image [samples, height, width, channels].
struct Pixels {
    const void* data;
    int64_t height, width, channels;
};

// A square of kSize by kSize pixels, `width` of their channels from `channel` on, at each of the 36 points, which are
// winograd_point(width) floats apart. The six by six pixels of an image begin one above and left of the tile's outputs;
// four by four are those of a gradient. What lies outside of the image is zero, and so is what is missing of a panel.
template <class Storage, int kSize, int width>
static void transform(const Pixels& image, const Tile& tile, int64_t channel, float* to) {
    using Type = typename Storage::Type;
    constexpr int kBefore = kSize == 6 ? 1 : 0;
    const int length = at_most(image.channels - channel, width);
    const int filled = (length + kWinogradPanel - 1) / kWinogradPanel * kWinogradPanel;
    const Type* const data =
        static_cast<const Type*>(image.data) + tile.sample * image.height * image.width * image.channels + channel;
    alignas(64) static const Type zeros[width] = {};
    alignas(64) float columns[6][kSize][width];  // transformed down the rows; [point][column]
    for (int j = 0; j < kSize; ++j) {
        const int64_t x = tile.column - kBefore + j;
        const Type* rows[kSize];
        for (int i = 0; i < kSize; ++i) {
            const int64_t y = tile.row - kBefore + i;
            const bool inside = y >= 0 && y < image.height && x >= 0 && x < image.width;
            rows[i] = inside ? data + (y * image.width + x) * image.channels : zeros;
        }
        to_points<Storage>(rows, columns[0][j], kSize * width, length);
        for (int i = 0; length < filled && i < 6; ++i)
            for (int c = length; c < filled; ++c) columns[i][j][c] = 0.0f;
    }
    for (int i = 0; i < 6; ++i) {
        const float* row[kSize];
        for (int j = 0; j < kSize; ++j) row[j] = columns[i][j];
        to_points<Fp32>(row, to + 6 * i * winograd_point(width), winograd_point(width), filled);
    }
}

// products[row][column] = sum over `length` of values[row * kRowStride + i * kStep] * panel[i][column], or that added
// to what is there.
template <int rows, int kRowStride, int kStep>
static void multiply(const float* values, const float* panel, int length, float* products, bool add) {
    for (int column = 0; column < kWinogradPanel; column += kVectors * kLanes) {
        Vector sums[rows][kVectors] = {};
        const float* vectors = panel + column;
        for (int i = 0; i < length; ++i, vectors += kWinogradPanel) {
            const Vector* const here = reinterpret_cast<const Vector*>(vectors);
            Vector row[kVectors];
            for (int v = 0; v < kVectors; ++v) row[v] = here[v];
            for (int r = 0; r < rows; ++r) {
                const float value = values[r * kRowStride + i * kStep];
                for (int v = 0; v < kVectors; ++v) sums[r][v] += value * row[v];
            }
        }
        for (int r = 0; r < rows; ++r) {
            Vector* const to = reinterpret_cast<Vector*>(products + r * kWinogradPanel + column);
            for (int v = 0; v < kVectors; ++v) to[v] = add ? to[v] + sums[r][v] : sums[r][v];
        }
    }
}

// The same for a number of rows that is known at run time, up to kRows.
template <int kRowStride, int kStep, int rows = kRows>
static inline void multiply_few(int count, const float* values, const float* panel, int length, float* products,
                                bool add) {
    if (count == rows) return multiply<rows, kRowStride, kStep>(values, panel, length, products, add);
    if constexpr (rows > 1) multiply_few<kRowStride, kStep, rows - 1>(count, values, panel, length, products, add);
}

// The same for any number of rows, in groups that are alike.
template <int kRowStride, int kStep>
static inline void multiply_all(int count, const float* values, const float* panel, int length, float* products,
                                bool add) {
    const int groups = (count + kRows - 1) / kRows;
    for (int group = 0; group < groups; ++group) {
        const int begin = group * count / groups, end = (group + 1) * count / groups;
        multiply_few<kRowStride, kStep>(end - begin, values + begin * kRowStride, panel, length,
                                        products + begin * kWinogradPanel, add);
    }
}

}  // namespace DDPM_ISA
}  // namespace ddpm
