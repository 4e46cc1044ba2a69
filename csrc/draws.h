// What a training step draws besides its noise: timesteps with their losses' weights, and which labels are dropped; and
// the memory of losses that importance sampling draws by. ddpm_fast/loops/timesteps.py has the rules and the papers.
#pragma once

#include "ops.h"
#include "philox.h"

namespace ddpm {

// The four random words of a sample that its draws from a stream are made of: those of element 0.
struct Words {
    uint32_t w0, w1, w2, w3;
};

DDPM_FN Words words_of(const Noise& noise, int64_t sample, uint32_t stream) {
    const NoiseKey key =
        noise_key(uint64_t(*noise.seed), uint64_t(noise.sample_id[sample]), uint32_t(*noise.step), stream);
    Words words{0, key.c1, key.c2, key.c3};
    philox4x32_10(words.w0, words.w1, words.w2, words.w3, key.key0, key.key1);
    return words;
}

// An integer in 0..high-1, for high up to 2^31.
DDPM_FN int64_t uniform_integer(uint32_t word, int64_t high) { return int64_t(word) * high >> 32; }

// The remainder that is never negative.
DDPM_FN int64_t modulo(int64_t a, int64_t n) {
    const int64_t rest = a % n;
    return rest < 0 ? rest + n : rest;
}

// The first index whose entry is larger than `value`, or `size`: torch.searchsorted(right=True), step for step.
DDPM_FN int64_t first_above(const double* sorted, int64_t size, double value) {
    int64_t first = 0, last = size;
    while (first < last) {
        const int64_t middle = first + (last - first) / 2;
        if (sorted[middle] > value)
            last = middle;
        else
            first = middle + 1;
    }
    return first;
}

// A sample's timestep. In proportion to the probabilities: u in [0, 1) of 53 bits, and no sum of products that could be
// contracted.
DDPM_FN int64_t draw_timestep(const DrawArgs& args, const Words& words, int64_t sample) {
    const int64_t T = args.timesteps;
    if (args.cumulative) {
        const double u = double(uint64_t(words.w0) << 21 | words.w1 >> 11) * 1.1102230246251565e-16;  // 2^-53
        const int64_t t = first_above(args.cumulative, T, u * args.cumulative[T - 1]);
        return t < T ? t : T - 1;  // the product may round up to the sum itself
    }
    const int64_t t = uniform_integer(words.w0, T);
    // floor(T (i + u) / parts), where i is the sample's part.
    return args.parts ? (T * modulo(args.noise.sample_id[sample], args.parts) + t) / args.parts : t;
}

// All that is drawn for one sample.
DDPM_FN void draw_sample(const DrawArgs& args, int64_t sample) {
    const int64_t t = draw_timestep(args, words_of(args.noise, sample, args.noise.stream), sample);
    args.t[sample] = t;
    args.weights[sample] = args.cumulative ? float(1.0 / (double(args.timesteps) * args.probabilities[t])) : 1.0f;
    if (args.network_timesteps) args.network_t[sample] = args.network_timesteps[t];
    if (args.labels) {
        const uint32_t dice = words_of(args.noise, sample, args.label_stream).w0 >> 8;
        args.kept_labels[sample] = int64_t(dice) < args.dropped ? args.null_label : args.labels[sample];
    }
}

// A loss that is remembered: infinities and NaN are not.
DDPM_FN bool is_finite(float value) { return (as_bits(value) & 0x7F800000u) != 0x7F800000u; }

}  // namespace ddpm
