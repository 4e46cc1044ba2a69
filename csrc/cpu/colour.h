// Channels_last pixels of three channels (colour) or six (colour with a learned variance), to rows of one channel each
// and back. Whole registers are loaded and stored, and shuffled between: one channel at a time, number by number, takes
// a cycle for each number that is stored and as long again for each that is loaded.
#pragma once

#include "../portable.h"
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ddpm {
namespace DDPM_ISA {

constexpr int kTile = 6;  // rows of kRun numbers that a tile has room for

#if defined(__AVX2__)

constexpr int kStepPixels = 8;  // a step handles so many, as registers of 8 numbers

// Numbers i, i + 3, ... of 24 are in the same places of three registers: at 0, 3, 6 of one, at 1, 4, 7 of another and
// at 2, 5 of the third.
DDPM_FN __m256 merge(__m256 at_036, __m256 at_147, __m256 at_25) {
    return _mm256_blend_ps(_mm256_blend_ps(at_036, at_147, 0x92), at_25, 0x24);
}
DDPM_FN __m256 permute(__m256 a, __m256i order) { return _mm256_permutevar8x32_ps(a, order); }

DDPM_FN void split3(const float* from, float* to) {
    const __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + 8), c = _mm256_loadu_ps(from + 16);
    _mm256_store_ps(to, permute(merge(a, b, c), _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5)));
    _mm256_store_ps(to + kRun, permute(merge(c, a, b), _mm256_setr_epi32(1, 4, 7, 2, 5, 0, 3, 6)));
    _mm256_store_ps(to + 2 * kRun, permute(merge(b, c, a), _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7)));
}

DDPM_FN void join3(const float* from, float* to) {
    const __m256 x = permute(_mm256_load_ps(from), _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5));
    const __m256 y = permute(_mm256_load_ps(from + kRun), _mm256_setr_epi32(5, 0, 3, 6, 1, 4, 7, 2));
    const __m256 z = permute(_mm256_load_ps(from + 2 * kRun), _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7));
    _mm256_storeu_ps(to, merge(x, y, z));
    _mm256_storeu_ps(to + 8, merge(z, x, y));
    _mm256_storeu_ps(to + 16, merge(y, z, x));
}

// The same with twelve pairs of numbers in three registers: at 0, 3 of one, at 1 of another and at 2 of the third.
DDPM_FN __m256d merge_pairs(__m256d at_03, __m256d at_1, __m256d at_2) {
    return _mm256_blend_pd(_mm256_blend_pd(at_03, at_1, 0x2), at_2, 0x4);
}

DDPM_FN void split6(const float* from, float* to) {
    __m256 pairs[3][2];  // of channels 2 i and 2 i + 1 of four pixels, and of four more
    for (int half = 0; half < 2; ++half) {
        const float* const at = from + 24 * half;
        const __m256d a = _mm256_castps_pd(_mm256_loadu_ps(at)), b = _mm256_castps_pd(_mm256_loadu_ps(at + 8)),
                      c = _mm256_castps_pd(_mm256_loadu_ps(at + 16));
        pairs[0][half] = _mm256_castpd_ps(_mm256_permute4x64_pd(merge_pairs(a, c, b), 0x6C));  // 0, 3, 2, 1
        pairs[1][half] = _mm256_castpd_ps(_mm256_permute4x64_pd(merge_pairs(b, a, c), 0xB1));  // 1, 0, 3, 2
        pairs[2][half] = _mm256_castpd_ps(_mm256_permute4x64_pd(merge_pairs(c, b, a), 0xC6));  // 2, 1, 0, 3
    }
    for (int i = 0; i < 3; ++i) {
        const __m256 first = _mm256_shuffle_ps(pairs[i][0], pairs[i][1], 0x88);
        const __m256 second = _mm256_shuffle_ps(pairs[i][0], pairs[i][1], 0xDD);
        _mm256_store_pd(reinterpret_cast<double*>(to + 2 * i * kRun),
                        _mm256_permute4x64_pd(_mm256_castps_pd(first), 0xD8));  // 0, 2, 1, 3
        _mm256_store_pd(reinterpret_cast<double*>(to + (2 * i + 1) * kRun),
                        _mm256_permute4x64_pd(_mm256_castps_pd(second), 0xD8));
    }
}

DDPM_FN void join6(const float* from, float* to) {
    __m256d pairs[2][3];
    for (int i = 0; i < 3; ++i) {
        const __m256d x = _mm256_castps_pd(_mm256_load_ps(from + 2 * i * kRun));
        const __m256d y = _mm256_castps_pd(_mm256_load_ps(from + (2 * i + 1) * kRun));
        const __m256 first = _mm256_castpd_ps(_mm256_permute4x64_pd(x, 0xD8));
        const __m256 second = _mm256_castpd_ps(_mm256_permute4x64_pd(y, 0xD8));
        pairs[0][i] = _mm256_castps_pd(_mm256_unpacklo_ps(first, second));
        pairs[1][i] = _mm256_castps_pd(_mm256_unpackhi_ps(first, second));
    }
    for (int half = 0; half < 2; ++half) {
        float* const at = to + 24 * half;
        const __m256d x = _mm256_permute4x64_pd(pairs[half][0], 0x6C), y = _mm256_permute4x64_pd(pairs[half][1], 0xB1),
                      z = _mm256_permute4x64_pd(pairs[half][2], 0xC6);
        _mm256_storeu_ps(at, _mm256_castpd_ps(merge_pairs(x, y, z)));
        _mm256_storeu_ps(at + 8, _mm256_castpd_ps(merge_pairs(y, z, x)));
        _mm256_storeu_ps(at + 16, _mm256_castpd_ps(merge_pairs(z, x, y)));
    }
}

#endif

// rows[c * kRun + i] = pixels[i * kChannels + c]
template <int kChannels>
static inline void split_pixels(const float* pixels, int length, float* rows) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + kStepPixels <= length; i += kStepPixels)
        kChannels == 3 ? split3(pixels + 3 * i, rows + i) : split6(pixels + 6 * i, rows + i);
#endif
    for (int c = 0; c < kChannels; ++c)
        for (int j = i; j < length; ++j) rows[c * kRun + j] = pixels[j * kChannels + c];
}

// pixels[i * kChannels + c] = rows[c * kRun + i]
template <int kChannels>
static inline void join_pixels(const float* rows, int length, float* pixels) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + kStepPixels <= length; i += kStepPixels)
        kChannels == 3 ? join3(rows + i, pixels + 3 * i) : join6(rows + i, pixels + 6 * i);
#endif
    for (int c = 0; c < kChannels; ++c)
        for (int j = i; j < length; ++j) pixels[j * kChannels + c] = rows[c * kRun + j];
}

}  // namespace DDPM_ISA
}  // namespace ddpm
