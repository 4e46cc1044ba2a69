// Group norm, scale-shift and SiLU of channels_last images,
//
//     y = silu(u),   u = ((x + added - mean) * rstd * weight + bias) * (1 + scale) + shift,
//
// and its gradient. A unit of work is some whole groups of one sample. Its channels are handled in strips, and every
// loop runs over a strip's channels, which are contiguous in memory. Each channel has its own sums over pixels: of a
// block of eight pixels in fp32, of blocks in double precision. So no result depends on how the work was divided.
#include "../group_norm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

// Of the threads of a parallel loop; without OpenMP there is one.
static inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

constexpr int kPixels = 8;

struct Unit {
    int64_t sample, first, end;  // channels
};

struct Strip {
    int64_t sample, channel, offset;  // offset: of its first element in the images
    int length;
};

// A channel of a sample: u = (x - centre - rest) * rstd * factor + offset. As an fp32 number the mean alone would be
// off by up to 2^-24 of itself, which is much of a standard deviation where that is small compared with it; x - centre
// loses nothing.
struct Channel {
    double centre, rest, rstd, factor, offset;
};

struct Statistics {
    double mean, rstd;
};

// A unit's groups, which are at most as many as a strip has channels.
struct Groups {
    int64_t first;  // channel
    int channels;   // of each
    int count;
    Statistics statistics[kNormStrip];
};

// The unit's groups; of no statistics as yet.
static inline Groups groups_of(const GroupNorm& norm, const Unit& unit) {
    const int channels = int(norm.shape.channels / norm.groups);
    return Groups{unit.first, channels, int((unit.end - unit.first) / channels), {}};
}

// Where the forward leaves the unit's statistics: the mean as the nearest fp32 number, what that loses, and rstd.
static inline float* stored_statistics(const GroupNorm& norm, const Unit& unit, const Groups& groups) {
    return norm.statistics + 3 * (unit.sample * norm.groups + unit.first / groups.channels);
}

static inline Channel channel_of(const GroupNorm& norm, const Statistics& statistics, int64_t sample, int64_t channel) {
    const double mean = statistics.mean - value_of(norm.added, sample, channel), centre = float(mean);
    const double spread = 1.0 + value_of(norm.scale, sample, channel);
    const double offset = value_of(norm.bias, sample, channel) * spread + value_of(norm.shift, sample, channel);
    return Channel{centre, mean - centre, statistics.rstd, value_of(norm.weight, sample, channel) * spread, offset};
}

template <class Visit>
static inline void for_each_group(Groups& groups, Visit visit) {
    for (int i = 0; i < groups.count; ++i) visit(i, groups.statistics[i]);
}

template <class Visit>
static inline void for_each_strip(const GroupNorm& norm, const Unit& unit, Visit visit) {
    for (int64_t c = unit.first; c < unit.end; c += kNormStrip)
        visit(Strip{unit.sample, c, unit.sample * norm.shape.elements() + c,
                    int(unit.end - c < kNormStrip ? unit.end - c : kNormStrip)});
}

// Calls visit(c, its group) for the strip's channels, c from 0.
template <class Visit>
static inline void for_each_channel(Groups& groups, const Strip& strip, Visit visit) {
    const int64_t within = strip.channel - groups.first;
    Statistics* group = groups.statistics + within / groups.channels;
    int64_t next = groups.channels - within % groups.channels;
    for (int c = 0; c < strip.length; ++c) {
        if (c == next) ++group, next += groups.channels;
        visit(c, *group);
    }
}

// Up to kPixels pixels of a strip in fp32: in the image itself, or in a buffer.
struct Block {
    alignas(64) float buffer[kPixels * kNormStrip];
    float* values;
    int64_t stride;  // from a pixel to the next
};

static inline void place(void* image, DType dtype, int64_t offset, int64_t channels, Block& block) {
    const bool in_place = dtype == DType::f32;
    block.values = in_place ? static_cast<float*>(image) + offset : block.buffer;
    block.stride = in_place ? channels : kNormStrip;
}

static inline void load(const GroupNorm& norm, const void* image, int64_t offset, int pixels, int length,
                        Block& block) {
    const int64_t channels = norm.shape.channels;
    place(const_cast<void*>(image), norm.dtype, offset, channels, block);
    if (norm.dtype == DType::f32) return;
    for (int p = 0; p < pixels; ++p) {
        const uint16_t* const from = static_cast<const uint16_t*>(image) + offset + p * channels;
        float* const to = block.values + p * block.stride;
        if (norm.dtype == DType::bf16)
            load_every<1>(from, 1, length, to, [](uint16_t v) { return from_bf16(v); });
        else
            load_every<1>(from, 1, length, to, [](uint16_t v) { return from_f16(v); });
    }
}

static inline void store(const GroupNorm& norm, void* image, int64_t offset, int pixels, int length,
                         const Block& block) {
    if (norm.dtype == DType::f32) return;
    for (int p = 0; p < pixels; ++p) {
        uint16_t* const to = static_cast<uint16_t*>(image) + offset + p * norm.shape.channels;
        const float* const from = block.values + p * block.stride;
        if (norm.dtype == DType::bf16)
            store_every<1>(to, 1, length, from, [](float v) { return to_bf16(v); });
        else
            store_every<1>(to, 1, length, from, [](float v) { return to_f16(v); });
    }
}

// Calls visit(p, pixels, offset) for the strip's pixels, kPixels at a time; offset: of the first one's in the images.
template <class Visit>
static inline void for_each_block(const GroupNorm& norm, const Strip& strip, Visit visit) {
    const int64_t positions = norm.shape.positions;
    for (int64_t p = 0; p < positions; p += kPixels)
        visit(p, int(positions - p < kPixels ? positions - p : kPixels), strip.offset + p * norm.shape.channels);
}

// sums[c] += the sum of value(pixel, c) over a block's pixels.
template <class Value>
static inline void add_pixels(int pixels, int length, double* __restrict sums, Value value) {
    if (pixels == kPixels) {
#pragma omp simd
        for (int c = 0; c < length; ++c) {
            float total = value(0, c);
#pragma GCC unroll 8
            for (int p = 1; p < kPixels; ++p) total = add(total, value(p, c));
            sums[c] += double(total);
        }
    } else {
        for (int p = 0; p < pixels; ++p) {
#pragma omp simd
            for (int c = 0; c < length; ++c) sums[c] += double(value(p, c));
        }
    }
}

// Calls visit(p, c) for a block's values.
template <class Visit>
static inline void for_each_value(int pixels, int length, Visit visit) {
    if (pixels == kPixels) {
#pragma omp simd
        for (int c = 0; c < length; ++c) {
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p) visit(p, c);
        }
    } else {
        for (int p = 0; p < pixels; ++p) {
#pragma omp simd
            for (int c = 0; c < length; ++c) visit(p, c);
        }
    }
}

static Groups find_statistics(const GroupNorm& norm, const Unit& unit, double eps) {
    const int64_t positions = norm.shape.positions;
    const double count = double(positions * (norm.shape.channels / norm.groups));
    Groups groups = groups_of(norm, unit);
    Block block;
    for_each_strip(norm, unit, [&](const Strip& strip) {
        alignas(64) double sums[kNormStrip] = {};
        alignas(64) float first[kNormStrip];
        load(norm, norm.x, strip.offset, positions ? 1 : 0, strip.length, block);
        for (int c = 0; c < strip.length; ++c) first[c] = positions ? block.values[c] : 0.0f;
        for_each_block(norm, strip, [&](int64_t, int pixels, int64_t offset) {
            load(norm, norm.x, offset, pixels, strip.length, block);
            const float* const x = block.values;
            const int64_t stride = block.stride;
            // Differences from the channel's first pixel: a large mean costs their sum no digits.
            add_pixels(pixels, strip.length, sums, [&](int p, int c) { return x[p * stride + c] - first[c]; });
        });
        for_each_channel(groups, strip, [&](int c, Statistics& group) {
            const double base = double(first[c]) + value_of(norm.added, strip.sample, strip.channel + c);
            group.mean += sums[c] + double(positions) * base;
        });
    });
    for_each_group(groups, [&](int, Statistics& group) { group.mean /= count; });
    for_each_strip(norm, unit, [&](const Strip& strip) {
        alignas(64) double sum_d[kNormStrip] = {}, sum_dd[kNormStrip] = {};
        alignas(64) float centre[kNormStrip];
        for_each_channel(groups, strip, [&](int c, const Statistics& group) {
            centre[c] = float(group.mean - value_of(norm.added, strip.sample, strip.channel + c));
        });
        for_each_block(norm, strip, [&](int64_t, int pixels, int64_t offset) {
            load(norm, norm.x, offset, pixels, strip.length, block);
            const float* const x = block.values;
            const int64_t stride = block.stride;
            const auto d = [&](int p, int c) { return x[p * stride + c] - centre[c]; };
            if (norm.added.data) add_pixels(pixels, strip.length, sum_d, d);
            add_pixels(pixels, strip.length, sum_dd, [&](int p, int c) { return mul(d(p, c), d(p, c)); });
        });
        for_each_channel(groups, strip, [&](int c, Statistics& group) {
            const double mean = group.mean - value_of(norm.added, strip.sample, strip.channel + c);
            const double rest = mean - double(centre[c]), all_rest = rest * double(positions);
            // Without `added` the group's channels have one `rest` in common, and it is what their d is on average.
            group.rstd += sum_dd[c] - rest * (norm.added.data ? 2.0 * sum_d[c] - all_rest : all_rest);
        });
    });
    float* const stored = stored_statistics(norm, unit, groups);
    for_each_group(groups, [&](int i, Statistics& group) {
        group.rstd = 1.0 / __builtin_sqrt(group.rstd / count + eps);
        stored[3 * i] = float(group.mean);
        stored[3 * i + 1] = float(group.mean - double(stored[3 * i]));
        stored[3 * i + 2] = float(group.rstd);
    });
    return groups;
}

// A strip's channels as the loops over pixels want them: u = (x - centre) * gain + offset.
struct Coefficients {
    alignas(64) float centre[kNormStrip], gain[kNormStrip], offset[kNormStrip];
};

static inline void find_coefficients(const GroupNorm& norm, Groups& groups, const Strip& strip, Coefficients& to) {
    for_each_channel(groups, strip, [&](int c, const Statistics& group) {
        const Channel channel = channel_of(norm, group, strip.sample, strip.channel + c);
        const double gain = channel.rstd * channel.factor;
        to.centre[c] = float(channel.centre);
        to.gain[c] = float(gain);
        to.offset[c] = float(channel.offset - channel.rest * gain);
    });
}

template <bool kSilu>
static void forward(const GroupNormArgs& args, const Unit& unit) {
    const GroupNorm& norm = args.norm;
    Groups groups = find_statistics(norm, unit, args.eps);
    for_each_strip(norm, unit, [&](const Strip& strip) {
        Coefficients coefficients;
        find_coefficients(norm, groups, strip, coefficients);
        const float *const centre = coefficients.centre, *const gain = coefficients.gain;
        const float* const shift = coefficients.offset;
        for_each_block(norm, strip, [&](int64_t, int pixels, int64_t offset) {
            Block in, out;
            load(norm, norm.x, offset, pixels, strip.length, in);
            place(args.y, norm.dtype, offset, norm.shape.channels, out);
            const float* const x = in.values;
            float* const y = out.values;
            const int64_t stride = in.stride;  // of both
            for_each_value(pixels, strip.length, [&](int p, int c) {
                const float u = fused(x[p * stride + c] - centre[c], gain[c], shift[c]);
                y[p * stride + c] = kSilu ? silu(u) : u;
            });
            store(norm, args.y, offset, pixels, strip.length, out);
        });
    });
}

// With g = dL/du and n = (x - mean) * rstd, means over the group's pixels and channels:
//
//     dL/dx = rstd * (factor * g - mean(factor * g) - n * mean(factor * g * n))
//
// g is kept from the pass for the sums to the pass for dx: SiLU's derivative takes longer than reading it.
template <bool kSilu>
static void backward(const GroupNormBackwardArgs& args, char* scratch, const Unit& unit) {
    const GroupNorm& norm = args.norm;
    const int64_t positions = norm.shape.positions, width = unit.end - unit.first;
    const double count = double(positions * (norm.shape.channels / norm.groups));
    const int64_t all = norm.shape.samples * norm.shape.channels;
    float* const sums = args.sums + unit.sample * norm.shape.channels;
    Groups groups = groups_of(norm, unit);
    const float* const stored = stored_statistics(norm, unit, groups);
    for_each_group(groups, [&](int i, Statistics& group) {
        group = Statistics{double(stored[3 * i]) + double(stored[3 * i + 1]), stored[3 * i + 2]};
    });
    struct {
        double fg, fgn;
    } means[kNormStrip] = {};  // a group's
    struct Sums {
        double g, n;
    };
    Sums* const exact = reinterpret_cast<Sums*>(scratch);  // a channel's, from the unit's first
    float* const all_g = reinterpret_cast<float*>(exact + width);
    for_each_strip(norm, unit, [&](const Strip& strip) {
        Coefficients coefficients;
        find_coefficients(norm, groups, strip, coefficients);
        const float *const centre = coefficients.centre, *const gain = coefficients.gain;
        const float* const shift = coefficients.offset;
        alignas(64) double sum_g[kNormStrip] = {}, sum_gd[kNormStrip] = {}, sum_d[kNormStrip] = {};
        float* const kept = all_g + strip.channel - unit.first;
        for_each_block(norm, strip, [&](int64_t position, int pixels, int64_t offset) {
            Block image, grad;
            load(norm, norm.x, offset, pixels, strip.length, image);
            load(norm, args.grad, offset, pixels, strip.length, grad);
            const float *const x = image.values, *const dy = grad.values;
            float* const g = kept + position * width;
            const int64_t stride = image.stride;  // of both
            for_each_value(pixels, strip.length, [&](int p, int c) {
                const float u = fused(x[p * stride + c] - centre[c], gain[c], shift[c]);
                g[p * width + c] = mul(dy[p * stride + c], kSilu ? silu_derivative(u) : 1.0f);
            });
            add_pixels(pixels, strip.length, sum_g, [&](int p, int c) { return g[p * width + c]; });
            add_pixels(pixels, strip.length, sum_d, [&](int p, int c) { return x[p * stride + c] - centre[c]; });
            add_pixels(pixels, strip.length, sum_gd,
                       [&](int p, int c) { return mul(g[p * width + c], x[p * stride + c] - centre[c]); });
        });
        for_each_channel(groups, strip, [&](int c, const Statistics& group) {
            const int64_t index = strip.channel + c;
            const Channel channel = channel_of(norm, group, strip.sample, index);
            const double sum_gn = channel.rstd * (sum_gd[c] - channel.rest * sum_g[c]);
            sums[index] = float(sum_g[c]);
            sums[index + all] = float(sum_gn);
            exact[index - unit.first] = {sum_g[c], channel.rstd * (sum_d[c] - channel.rest * double(positions))};
            means[&group - groups.statistics].fg += channel.factor * sum_g[c] / count;
            means[&group - groups.statistics].fgn += channel.factor * sum_gn / count;
        });
    });
    for_each_strip(norm, unit, [&](const Strip& strip) {
        alignas(64) float centre[kNormStrip], gain[kNormStrip], slope[kNormStrip], level[kNormStrip];
        for_each_channel(groups, strip, [&](int c, const Statistics& group) {
            const int64_t index = strip.channel + c;
            const Channel channel = channel_of(norm, group, strip.sample, index);
            const auto& mean = means[&group - groups.statistics];
            const double of_d = channel.rstd * channel.rstd * mean.fgn;
            centre[c] = float(channel.centre);
            gain[c] = float(channel.rstd * channel.factor);
            slope[c] = float(of_d);
            level[c] = float(channel.rstd * mean.fg - of_d * channel.rest);
            const Sums& sum = exact[index - unit.first];
            const double through = double(positions) * mean.fg + sum.n * mean.fgn;
            sums[index + 2 * all] = float(channel.rstd * (channel.factor * sum.g - through));
        });
        const float* const kept = all_g + strip.channel - unit.first;
        for_each_block(norm, strip, [&](int64_t position, int pixels, int64_t offset) {
            Block in, out;
            load(norm, norm.x, offset, pixels, strip.length, in);
            place(args.dx, norm.dtype, offset, norm.shape.channels, out);
            const float *const x = in.values, *const g = kept + position * width;
            float* const dx = out.values;
            const int64_t stride = in.stride;  // of both
            for_each_value(pixels, strip.length, [&](int p, int c) {
                const float d = x[p * stride + c] - centre[c];
                dx[p * stride + c] = norm_gradient(g[p * width + c], d, gain[c], slope[c], level[c]);
            });
            store(norm, args.dx, offset, pixels, strip.length, out);
        });
    });
}

// Calls body(unit) for every unit, on `threads` threads.
template <class Body>
static inline void parallel_units(const GroupNorm& norm, int threads, Body body) {
    const int64_t channels = norm.shape.channels, width = group_norm_width(norm, threads);
    const int64_t across = (channels + width - 1) / width, units = norm.shape.samples * across;
    const bool serial = threads <= 1 || units <= 1 || norm.shape.samples * norm.shape.elements() < kSerial;
#pragma omp parallel for schedule(static) num_threads(threads) if (!serial)
    for (int64_t index = 0; index < units; ++index) {
        const int64_t first = index % across * width;
        body(Unit{index / across, first, first + width < channels ? first + width : channels});
    }
}

void group_norm(const GroupNormArgs& args, void*, int threads) {
    const auto run = args.norm.silu ? forward<true> : forward<false>;
    parallel_units(args.norm, threads, [&](const Unit& unit) { run(args, unit); });
}

void group_norm_backward(const GroupNormBackwardArgs& args, void* workspace, int threads) {
    const auto run = args.norm.silu ? backward<true> : backward<false>;
    char* const scratch = static_cast<char*>(workspace);
    if (!args.norm.shape.positions) {  // without pixels the statistics are NaN, and the sums are 0
        for (int64_t i = 0; i < 3 * args.norm.shape.samples * args.norm.shape.channels; ++i) args.sums[i] = 0.0f;
        return;
    }
    const int64_t size = group_norm_scratch(args.norm, threads);
    parallel_units(args.norm, threads, [&](const Unit& unit) { run(args, scratch + thread_number() * size, unit); });
}

}  // namespace DDPM_ISA
}  // namespace ddpm
