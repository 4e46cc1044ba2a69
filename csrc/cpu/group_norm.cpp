// Group norm, scale-shift and SiLU of channels_last images,
//
//     y = silu(u),   u = ((v - mean) * rstd * weight + bias) * (1 + scale) + shift,   v = x + residual + added,
//
// of v and, behind its channels, those of another image; and the gradient. A unit of work is some whole groups of one
// sample. It is passed over twice, each time eight pixels through all its channels: what is read is contiguous, which
// memory and the caches give several times as fast as parts of rows. Each channel has its own sums over pixels: of a
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

// Up to kNormStrip channels of one image, whose rows are `width` channels long.
struct Strip {
    int64_t sample, channel;  // the first one, among those of both images
    int64_t width, own;       // own: the channel's number in its image
    int length;
    bool joined;
};

// A channel of a sample: u = (v - centre - rest) * rstd * factor + offset. As an fp32 number the mean alone would be
// off by up to 2^-24 of itself, which is much of a standard deviation where that is small compared with it; v - centre
// loses nothing.
struct Channel {
    double centre, rest, rstd, factor, offset;
};

struct Group {
    double mean, rstd;
    double of_g, of_gn;  // the backward's means of factor * g and of factor * g * n
};

// What a unit keeps, in the thread's part of the workspace: of each channel from its first on, and of its groups.
struct Kept {
    Group* groups;
    double* sums[3];
    float* values[4];
    float* g;  // [positions, channels of the unit]: the backward's, where dx cannot hold it

    Kept(void* scratch, int64_t width) {
        groups = static_cast<Group*>(scratch);
        sums[0] = reinterpret_cast<double*>(groups + width);
        for (int i = 1; i < 3; ++i) sums[i] = sums[i - 1] + width;
        values[0] = reinterpret_cast<float*>(sums[2] + width);
        for (int i = 1; i < 4; ++i) values[i] = values[i - 1] + width;
        g = values[3] + width;
    }
};
static_assert(sizeof(Group) + 3 * sizeof(double) + 4 * sizeof(float) == kNormKept, "see group_norm_scratch");

static inline bool is_of_x(const GroupNorm& norm, int64_t channel) { return channel < norm.x_channels; }

static inline double added_to(const GroupNorm& norm, int64_t sample, int64_t channel) {
    return is_of_x(norm, channel) ? value_of(norm.added, sample, channel) : 0.0;
}

static inline Channel channel_of(const GroupNorm& norm, const Group& group, int64_t sample, int64_t channel) {
    const double mean = group.mean - added_to(norm, sample, channel), centre = float(mean);
    const double spread = 1.0 + value_of(norm.scale, sample, channel);
    const double offset = value_of(norm.bias, sample, channel) * spread + value_of(norm.shift, sample, channel);
    return Channel{centre, mean - centre, group.rstd, value_of(norm.weight, sample, channel) * spread, offset};
}

// Where the forward leaves a group's statistics: the mean as the nearest fp32 number, what that loses, and rstd.
static inline float* stored_statistics(const GroupNorm& norm, int64_t sample, int64_t group) {
    return norm.statistics + 3 * (sample * norm.groups + group);
}

// Calls visit(group, its number in the unit, its number among all).
template <class Visit>
static inline void for_each_group(const GroupNorm& norm, const Unit& unit, const Kept& kept, Visit visit) {
    const int64_t channels = norm.shape.channels / norm.groups;
    for (int64_t i = 0; i < (unit.end - unit.first) / channels; ++i) visit(kept.groups[i], unit.first / channels + i);
}

// Calls visit(c, channel, its group) for the unit's channels, c from 0.
template <class Visit>
static inline void for_each_channel(const GroupNorm& norm, const Unit& unit, const Kept& kept, Visit visit) {
    const int64_t channels = norm.shape.channels / norm.groups;
    for (int64_t c = 0; c < unit.end - unit.first; ++c) visit(c, unit.first + c, kept.groups[c / channels]);
}

// Calls visit(strip, position, pixels) for all strips of each kPixels pixels in turn.
template <class Visit>
static inline void for_each_tile(const GroupNorm& norm, const Unit& unit, Visit visit) {
    const int64_t positions = norm.shape.positions, x_channels = norm.x_channels;
    for (int64_t p = 0; p < positions; p += kPixels) {
        for (int64_t c = unit.first; c < unit.end;) {
            const bool joined = !is_of_x(norm, c);
            const int64_t end = !joined && x_channels < unit.end ? x_channels : unit.end;
            const int length = int(end - c < kNormStrip ? end - c : kNormStrip);
            const int64_t width = joined ? norm.shape.channels - x_channels : x_channels;
            visit(Strip{unit.sample, c, width, joined ? c - x_channels : c, length, joined}, p,
                  int(positions - p < kPixels ? positions - p : kPixels));
            c += length;
        }
    }
}

// Up to kPixels pixels of a strip in fp32: in the image itself, or in a buffer.
struct Block {
    alignas(64) float buffer[kPixels * kNormStrip];
    float* values;
    int64_t stride;  // from a pixel to the next
};

// A strip's pixels in an image of rows of `width` channels, of which the strip's first is `channel`.
struct Part {
    void* image;
    int64_t width, channel;
};

static inline Part part_of(const void* x, const void* joined, const Strip& strip) {
    return Part{const_cast<void*>(strip.joined ? joined : x), strip.width, strip.own};
}
static inline Part part_of(const GroupNorm& norm, const void* both, const Strip& strip) {
    return Part{const_cast<void*>(both), norm.shape.channels, strip.channel};
}

static inline int64_t offset_of(const GroupNorm& norm, const Part& part, const Strip& strip, int64_t position) {
    return (strip.sample * norm.shape.positions + position) * part.width + part.channel;
}

static inline void place(const GroupNorm& norm, const Part& part, const Strip& strip, int64_t position, Block& block) {
    const bool in_place = norm.dtype == DType::f32;
    block.values = in_place ? static_cast<float*>(part.image) + offset_of(norm, part, strip, position) : block.buffer;
    block.stride = in_place ? part.width : kNormStrip;
}

static inline void load(const GroupNorm& norm, const Part& part, const Strip& strip, int64_t position, int pixels,
                        Block& block) {
    place(norm, part, strip, position, block);
    if (norm.dtype == DType::f32) return;
    for (int p = 0; p < pixels; ++p) {
        const uint16_t* const from =
            static_cast<const uint16_t*>(part.image) + offset_of(norm, part, strip, position + p);
        float* const to = block.values + p * block.stride;
        if (norm.dtype == DType::bf16)
            load_every<1>(from, 1, strip.length, to, [](uint16_t v) { return from_bf16(v); });
        else
            load_every<1>(from, 1, strip.length, to, [](uint16_t v) { return from_f16(v); });
    }
}

static inline void store(const GroupNorm& norm, const Part& part, const Strip& strip, int64_t position, int pixels,
                         const Block& block) {
    if (norm.dtype == DType::f32) return;
    for (int p = 0; p < pixels; ++p) {
        uint16_t* const to = static_cast<uint16_t*>(part.image) + offset_of(norm, part, strip, position + p);
        const float* const from = block.values + p * block.stride;
        if (norm.dtype == DType::bf16)
            store_every<1>(to, 1, strip.length, from, [](float v) { return to_bf16(v); });
        else
            store_every<1>(to, 1, strip.length, from, [](float v) { return to_f16(v); });
    }
}

// Calls visit(p, c) for a block's values.
template <class Visit>
static inline void for_each_value(int pixels, int length, Visit visit) {
    for (int p = 0; p < pixels; ++p) {
#pragma omp simd
        for (int c = 0; c < length; ++c) visit(p, c);
    }
}

// to[c] = the sum of value(pixel, c) over a block's pixels.
template <class Value>
static inline void sum_pixels(int pixels, int length, float* __restrict to, Value value) {
    if (pixels == kPixels) {
#pragma omp simd
        for (int c = 0; c < length; ++c) {
            float total = value(0, c);
#pragma GCC unroll 8
            for (int p = 1; p < kPixels; ++p) total = add(total, value(p, c));
            to[c] = total;
        }
    } else {
        for (int c = 0; c < length; ++c) to[c] = value(0, c);
        for (int p = 1; p < pixels; ++p) {
#pragma omp simd
            for (int c = 0; c < length; ++c) to[c] = add(to[c], value(p, c));
        }
    }
}

// A block's sums, and the channels' own, which they are added to.
struct BlockSums {
    alignas(64) float values[kNormStrip];
    template <class Value>
    BlockSums(int pixels, int length, Value value) {
        sum_pixels(pixels, length, values, value);
    }
    void add_to(double* __restrict sums, int length) const {
#pragma omp simd
        for (int c = 0; c < length; ++c) sums[c] += double(values[c]);
    }
};

// The block of v = x + residual + added as it is stored in `total`.
static inline void add_up(const GroupNormArgs& args, const Strip& strip, int64_t position, int pixels, Block& block) {
    const GroupNorm& norm = args.norm;
    const Part total = part_of(args.total, nullptr, strip);
    Block image, residual;
    load(norm, part_of(norm.x, nullptr, strip), strip, position, pixels, image);
    if (norm.residual) load(norm, part_of(norm.residual, nullptr, strip), strip, position, pixels, residual);
    place(norm, total, strip, position, block);
    alignas(64) float added[kNormStrip];
    for (int c = 0; c < strip.length; ++c) added[c] = value_of(norm.added, strip.sample, strip.channel + c);
    const float *const x = image.values, *const more = norm.residual ? residual.values : nullptr;
    const int64_t of_x = image.stride, of_more = norm.residual ? residual.stride : 0, to = block.stride;
    float* const v = block.values;
    if (more)
        for_each_value(pixels, strip.length, [&](int p, int c) {
            v[p * to + c] = add(add(x[p * of_x + c], more[p * of_more + c]), added[c]);
        });
    else
        for_each_value(pixels, strip.length, [&](int p, int c) { v[p * to + c] = add(x[p * of_x + c], added[c]); });
    store(norm, total, strip, position, pixels, block);
    load(norm, total, strip, position, pixels, block);  // as it was rounded
}

// Of each channel, with d = v - its first pixel (so that a large mean costs no digits): the sum of d, the sum over
// blocks of (the sum of d)^2 / pixels, and the sum of squared differences from each block's own mean. The second and
// the third together are the sum of d^2. In double precision the second loses nothing against the square of the
// first, and the third needs no digits that fp32 lacks.
static void find_statistics(const GroupNormArgs& args, const GroupNorm& norm, const Unit& unit, const Kept& kept) {
    const int64_t width = unit.end - unit.first;
    const double positions = double(norm.shape.positions);
    const double count = positions * double(norm.shape.channels / norm.groups);
    float* const first = kept.values[0];
    for (int64_t c = 0; c < width; ++c) first[c] = 0.0f, kept.sums[0][c] = kept.sums[1][c] = kept.sums[2][c] = 0.0;
    for_each_tile(norm, unit, [&](const Strip& strip, int64_t position, int pixels) {
        Block block;
        if (args.total && !strip.joined)
            add_up(args, strip, position, pixels, block);
        else
            load(norm, part_of(norm.x, norm.joined, strip), strip, position, pixels, block);
        const float* const x = block.values;
        const int64_t stride = block.stride, at = strip.channel - unit.first;
        float* const about = first + at;
        if (!position)
            for (int c = 0; c < strip.length; ++c) about[c] = x[c];
        const BlockSums sum(pixels, strip.length, [&](int p, int c) { return add(x[p * stride + c], -about[c]); });
        const float share = 1.0f / float(pixels);
        const BlockSums squares(pixels, strip.length, [&](int p, int c) {
            const float d = add(add(x[p * stride + c], -about[c]), -mul(sum.values[c], share));
            return mul(d, d);
        });
        sum.add_to(kept.sums[0] + at, strip.length);
        squares.add_to(kept.sums[2] + at, strip.length);
        double* const __restrict between = kept.sums[1] + at;
        const double inverse = 1.0 / pixels;
#pragma omp simd
        for (int c = 0; c < strip.length; ++c) between[c] += inverse * (double(sum.values[c]) * double(sum.values[c]));
    });
    for_each_group(norm, unit, kept, [&](Group& group, int64_t) { group = Group{0.0, 0.0, 0.0, 0.0}; });
    for_each_channel(norm, unit, kept, [&](int64_t c, int64_t channel, Group& group) {
        group.mean += kept.sums[0][c] + positions * (double(first[c]) + added_to(norm, unit.sample, channel));
    });
    for_each_group(norm, unit, kept, [&](Group& group, int64_t) { group.mean /= count; });
    for_each_channel(norm, unit, kept, [&](int64_t c, int64_t channel, Group& group) {
        const double off = double(first[c]) + added_to(norm, unit.sample, channel) - group.mean;
        group.rstd += kept.sums[1][c] + kept.sums[2][c] + off * (2.0 * kept.sums[0][c] + positions * off);
    });
    for_each_group(norm, unit, kept, [&](Group& group, int64_t index) {
        const double variance = group.rstd / count;
        group.rstd = 1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + args.eps);
        float* const stored = stored_statistics(norm, unit.sample, index);
        stored[0] = float(group.mean);
        stored[1] = float(group.mean - double(stored[0]));
        stored[2] = float(group.rstd);
    });
}

// The unit's channels as the loops over pixels want them: u = (v - centre) * gain + offset, with centre in
// kept.values[0], gain in [1] and offset in [2].
static inline void find_coefficients(const GroupNorm& norm, const Unit& unit, const Kept& kept) {
    for_each_channel(norm, unit, kept, [&](int64_t c, int64_t index, const Group& group) {
        const Channel channel = channel_of(norm, group, unit.sample, index);
        const double gain = channel.rstd * channel.factor;
        kept.values[0][c] = float(channel.centre);
        kept.values[1][c] = float(gain);
        kept.values[2][c] = float(channel.offset - channel.rest * gain);
    });
}

template <bool kSilu>
static void forward(const GroupNormArgs& args, char* scratch, const Unit& unit) {
    const Kept kept(scratch, unit.end - unit.first);
    GroupNorm norm = args.norm;
    if (args.total) norm.x = args.total, norm.added = Rows{};  // which the first pass writes
    find_statistics(args, norm, unit, kept);
    find_coefficients(norm, unit, kept);
    for_each_tile(norm, unit, [&](const Strip& strip, int64_t position, int pixels) {
        Block in, out;
        const Part result = part_of(norm, args.y, strip);
        load(norm, part_of(norm.x, norm.joined, strip), strip, position, pixels, in);
        place(norm, result, strip, position, out);
        const int64_t at = strip.channel - unit.first, from = in.stride, to = out.stride;
        const float *const centre = kept.values[0] + at, *const gain = kept.values[1] + at;
        const float *const shift = kept.values[2] + at, *const x = in.values;
        float* const y = out.values;
        for_each_value(pixels, strip.length, [&](int p, int c) {
            const float u = fused(add(x[p * from + c], -centre[c]), gain[c], shift[c]);
            y[p * to + c] = kSilu ? silu(u) : u;
        });
        store(norm, result, strip, position, pixels, out);
    });
}

// Where the backward keeps g for a strip's block: in dx itself if that is fp32.
static inline Block kept_g(const GroupNormBackwardArgs& args, const Unit& unit, const Kept& kept, const Strip& strip,
                           int64_t position) {
    Block block;
    place(args.norm, part_of(args.dx, args.djoined, strip), strip, position, block);
    if (args.norm.dtype == DType::f32) return block;
    block.stride = unit.end - unit.first;
    block.values = kept.g + position * block.stride + strip.channel - unit.first;
    return block;
}

// The first pass: g = dL/du is kept, because SiLU's derivative takes longer than reading it; kept.sums get the
// channels' sums of g, of g * d and of d = v - centre.
template <bool kSilu>
static inline void sum_gradients(const GroupNormBackwardArgs& args, const Unit& unit, const Kept& kept) {
    const GroupNorm& norm = args.norm;
    for (int64_t c = 0; c < unit.end - unit.first; ++c) kept.sums[0][c] = kept.sums[1][c] = kept.sums[2][c] = 0.0;
    for_each_tile(norm, unit, [&](const Strip& strip, int64_t position, int pixels) {
        Block image, grad;
        load(norm, part_of(norm.x, norm.joined, strip), strip, position, pixels, image);
        load(norm, part_of(norm, args.grad, strip), strip, position, pixels, grad);
        const Block into = kept_g(args, unit, kept, strip, position);
        const int64_t at = strip.channel - unit.first, of_x = image.stride, of_y = grad.stride, of_g = into.stride;
        const float *const centre = kept.values[0] + at, *const gain = kept.values[1] + at;
        const float* const shift = kept.values[2] + at;
        const float *const x = image.values, *const dy = grad.values;
        float* const g = into.values;
        const int length = strip.length;
        for_each_value(pixels, length, [&](int p, int c) {
            const float u = fused(add(x[p * of_x + c], -centre[c]), gain[c], shift[c]);
            g[p * of_g + c] = mul(dy[p * of_y + c], kSilu ? silu_derivative(u) : 1.0f);
        });
        BlockSums(pixels, length, [&](int p, int c) { return g[p * of_g + c]; }).add_to(kept.sums[0] + at, length);
        BlockSums(pixels, length, [&](int p, int c) {
            return mul(g[p * of_g + c], add(x[p * of_x + c], -centre[c]));
        }).add_to(kept.sums[1] + at, length);
        BlockSums(pixels, length, [&](int p, int c) {
            return add(x[p * of_x + c], -centre[c]);
        }).add_to(kept.sums[2] + at, length);
    });
}

// With n = (v - mean) * rstd, means over the group's pixels and channels:
//
//     dL/dv = rstd * (factor * g - mean(factor * g) - n * mean(factor * g * n))
//           = g * gain - (d * slope + level)
//
// Leaves centre, gain, slope and level in kept.values, and the channels' sums in args.sums.
static inline void find_slopes(const GroupNormBackwardArgs& args, const Unit& unit, const Kept& kept) {
    const GroupNorm& norm = args.norm;
    const double positions = double(norm.shape.positions);
    const double count = positions * double(norm.shape.channels / norm.groups);
    const int64_t all = norm.shape.samples * norm.shape.channels;
    float* const sums = args.sums + unit.sample * norm.shape.channels;
    for_each_channel(norm, unit, kept, [&](int64_t c, int64_t index, Group& group) {
        const Channel channel = channel_of(norm, group, unit.sample, index);
        const double sum_g = kept.sums[0][c];
        const double sum_gn = channel.rstd * (kept.sums[1][c] - channel.rest * sum_g);
        sums[index] = float(sum_g);
        sums[index + all] = float(sum_gn);
        group.of_g += channel.factor * sum_g / count;
        group.of_gn += channel.factor * sum_gn / count;
    });
    for_each_channel(norm, unit, kept, [&](int64_t c, int64_t index, const Group& group) {
        const Channel channel = channel_of(norm, group, unit.sample, index);
        const double of_d = channel.rstd * channel.rstd * group.of_gn;
        const double sum_n = channel.rstd * (kept.sums[2][c] - channel.rest * positions);
        const double through = positions * group.of_g + sum_n * group.of_gn;
        kept.values[2][c] = float(of_d);
        kept.values[3][c] = float(channel.rstd * group.of_g - of_d * channel.rest);
        kept.sums[2][c] = channel.rstd * (channel.factor * kept.sums[0][c] - through);  // of dL/dv
    });
}

template <bool kSilu>
static void backward(const GroupNormBackwardArgs& args, char* scratch, const Unit& unit) {
    const GroupNorm& norm = args.norm;
    const Kept kept(scratch, unit.end - unit.first);
    for_each_group(norm, unit, kept, [&](Group& group, int64_t index) {
        const float* const stored = stored_statistics(norm, unit.sample, index);
        group = Group{double(stored[0]) + double(stored[1]), stored[2], 0.0, 0.0};
    });
    find_coefficients(norm, unit, kept);
    sum_gradients<kSilu>(args, unit, kept);
    find_slopes(args, unit, kept);
    for_each_tile(norm, unit, [&](const Strip& strip, int64_t position, int pixels) {
        Block image, total, out;
        const Part result = part_of(args.dx, args.djoined, strip);
        load(norm, part_of(norm.x, norm.joined, strip), strip, position, pixels, image);
        place(norm, result, strip, position, out);
        const Block from = kept_g(args, unit, kept, strip, position);
        const int64_t at = strip.channel - unit.first, of_x = image.stride, of_g = from.stride, to = out.stride;
        const float *const centre = kept.values[0] + at, *const gain = kept.values[1] + at;
        const float *const slope = kept.values[2] + at, *const level = kept.values[3] + at;
        const float *const x = image.values, *const g = from.values;
        float* const dx = out.values;
        for_each_value(pixels, strip.length, [&](int p, int c) {
            const float d = add(x[p * of_x + c], -centre[c]);
            dx[p * to + c] = norm_gradient(g[p * of_g + c], d, gain[c], slope[c], level[c]);
        });
        if (args.grad_total && !strip.joined) {
            load(norm, part_of(args.grad_total, nullptr, strip), strip, position, pixels, total);
            const float* const more = total.values;
            const int64_t of_more = total.stride;
            for_each_value(pixels, strip.length,
                           [&](int p, int c) { dx[p * to + c] = add(dx[p * to + c], more[p * of_more + c]); });
            BlockSums(pixels, strip.length, [&](int p, int c) {
                return more[p * of_more + c];
            }).add_to(kept.sums[2] + at, strip.length);
        }
        store(norm, result, strip, position, pixels, out);
    });
    float* const sums = args.sums + (2 * norm.shape.samples + unit.sample) * norm.shape.channels;
    for (int64_t c = unit.first; c < unit.end; ++c) sums[c] = float(kept.sums[2][c - unit.first]);
}

// Calls run(args, the thread's scratch, unit) for every unit, on `threads` threads.
template <class Arguments>
static inline void parallel_units(const Arguments& args, int threads, int64_t scratch, void* workspace,
                                  void (*run)(const Arguments&, char*, const Unit&)) {
    const GroupNorm& norm = args.norm;
    const int64_t channels = norm.shape.channels, width = group_norm_width(norm, threads);
    const int64_t across = (channels + width - 1) / width, units = norm.shape.samples * across;
    const bool serial = threads <= 1 || units <= 1 || norm.shape.samples * norm.shape.elements() < kSerial;
#pragma omp parallel for schedule(static) num_threads(threads) if (!serial)
    for (int64_t index = 0; index < units; ++index) {
        const int64_t first = index % across * width;
        run(args, static_cast<char*>(workspace) + thread_number() * scratch,
            Unit{index / across, first, first + width < channels ? first + width : channels});
    }
}

void group_norm(const GroupNormArgs& args, void* workspace, int threads) {
    const int64_t scratch = group_norm_scratch(args.norm, threads, 0);
    parallel_units(args, threads, scratch, workspace, args.norm.silu ? forward<true> : forward<false>);
}

void group_norm_backward(const GroupNormBackwardArgs& args, void* workspace, int threads) {
    if (!args.norm.shape.positions) {  // without pixels the statistics are NaN, and the sums are 0
        for (int64_t i = 0; i < 3 * args.norm.shape.samples * args.norm.shape.channels; ++i) args.sums[i] = 0.0f;
        return;
    }
    const int64_t scratch = group_norm_scratch(args.norm, threads, group_norm_kept_g(args.norm));
    parallel_units(args, threads, scratch, workspace, args.norm.silu ? backward<true> : backward<false>);
}

// The sums over the samples are in double precision, in the order of the samples.
void group_norm_parameters(const GroupNormParametersArgs& args, void*, int) {
    const int64_t samples = args.samples, channels = args.channels;
    for (int64_t c = 0; c < channels; ++c) {
        const double weight = value_of(args.weight, 0, c), bias = value_of(args.bias, 0, c);
        double dweight = 0.0, dbias = 0.0;
        for (int64_t n = 0; n < samples; ++n) {
            const int64_t at = n * channels + c;
            const double sum_g = args.sums[at], sum_gn = args.sums[samples * channels + at];
            const double spread = 1.0 + value_of(args.scale, n, c);
            dweight += spread * sum_gn;
            dbias += spread * sum_g;
            if (args.dscale) args.dscale[at] = float(weight * sum_gn + bias * sum_g);
            if (args.dshift) args.dshift[at] = args.sums[at];
        }
        args.dweight[c] = float(dweight);
        args.dbias[c] = float(dbias);
    }
}

}  // namespace DDPM_ISA
}  // namespace ddpm
