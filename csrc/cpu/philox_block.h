// Thirty-two counters of Philox at once, and their normals: the same words and bits as ../philox.h's, faster.
//
// Philox is two 32 x 32 -> 64-bit products a round. x86 has that product for the low halves of 64-bit lanes
// (pmuludq), so each 32-bit word is given a 64-bit lane of its own: the high half of a product is a shift, the low half
// is the lane itself (whatever stands above it, the next product does not look), and nothing is ever shuffled. Left to
// itself, g++ 12 packs the words into 32-bit lanes and spends two thirds of its time unpacking them.
//
// Both halves of the work are long dependency chains, some 50 cycles of Philox and 80 of Box-Muller, so several are
// interleaved: four registers of counters, then all pairs of normals in one loop. 0.63 ns a normal on a 3.7 GHz Zen 4
// (AVX2: 1.07, SSE2: 2.2), where two registers and sixteen counters took 0.89 (1.29, 2.43).
#pragma once

#include "../philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ddpm {
namespace DDPM_ISA {

constexpr int kCounters = 32;          // in a block
constexpr int kPairs = 2 * kCounters;  // of normals
constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;

// A sample's key with the ten rounds' keys worked out, one a 64-bit lane, to be broadcast straight from memory.
struct BlockKey {
    uint64_t round0[10], round1[10];
    NoiseKey key;
};

// What the counter's constant words put into the first three rounds is part of their keys: one product of the first
// round and one of the second, of four, do not depend on the element. The last round's keys are one, for packed words.
static inline BlockKey block_key(const NoiseKey& key) {
    BlockKey block;
    block.key = key;
    for (uint32_t round = 0; round < 10; ++round) {
        block.round0[round] = key.key0 + round * 0x9E3779B9u;
        block.round1[round] = key.key1 + round * 0xBB67AE85u;
    }
    const uint64_t p1 = uint64_t(kFactor1) * key.c2;
    const uint64_t p0 = uint64_t(kFactor0) * (uint32_t(p1 >> 32) ^ key.c1 ^ uint32_t(block.round0[0]));
    block.round1[0] ^= key.c3;
    block.round0[1] ^= uint32_t(p1);
    block.round1[1] ^= p0 >> 32;
    block.round1[2] ^= uint32_t(p0);
    block.round0[9] |= block.round1[9] << 32;
    return block;
}

#if defined(__SSE2__)

#if defined(__AVX512F__)
using Wide = __m512i;
DDPM_FN Wide low_product(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
#elif defined(__AVX2__)
using Wide = __m256i;
DDPM_FN Wide low_product(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
#else
using Wide = __m128i;
DDPM_FN Wide low_product(Wide a, Wide b) { return _mm_mul_epu32(a, b); }
#endif

constexpr int kWide = sizeof(Wide) / 8;  // counters in a register
constexpr int kTogether = 4;             // registers of counters
typedef uint64_t Lanes __attribute__((vector_size(sizeof(Wide))));

DDPM_FN Lanes product(Lanes a, uint32_t b) { return (Lanes)low_product((Wide)a, (Wide)(Lanes{} + uint64_t(b))); }

// Two words of each lane's counter as neighbours: the low halves of a and b, or the high ones.
DDPM_FN Lanes pack_low(Lanes a, Lanes b) { return (a & 0xFFFFFFFFu) | (b << 32); }
DDPM_FN Lanes pack_high(Lanes a, Lanes b) { return (a >> 32) | (b & 0xFFFFFFFF00000000u); }

// The words of each pair of normals: radius[p] and angle[p] are those of elements 4 * first + 2 * p and the next.
DDPM_FN void philox_block(uint32_t first, const BlockKey& keys, uint32_t* radius, uint32_t* angle) {
    Lanes lane{};
    for (int i = 0; i < kWide; ++i) lane[i] = uint64_t(i);
    for (int at = 0; at < kCounters; at += kTogether * kWide) {
        Lanes c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
            const Lanes p0 = product(lane + uint64_t(first + uint32_t(at + i * kWide)), kFactor0);
            const Lanes p1 = product((p0 >> 32) ^ keys.round1[0], kFactor1);
            c0[i] = (p1 >> 32) ^ keys.round0[1];
            c1[i] = p1;
            c2[i] = p0 ^ keys.round1[1];
            c3[i] = Lanes{};
        }
#pragma GCC unroll 7
        for (int round = 2; round < 9; ++round) {
#pragma GCC unroll 4
            for (int i = 0; i < kTogether; ++i) {
                const Lanes p0 = product(c0[i], kFactor0), p1 = product(c2[i], kFactor1);
                c0[i] = (p1 >> 32) ^ c1[i] ^ keys.round0[round];
                c2[i] = (p0 >> 32) ^ c3[i] ^ keys.round1[round];
                c1[i] = p1;
                c3[i] = p0;
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
            const Lanes p0 = product(c0[i], kFactor0), p1 = product(c2[i], kFactor1);
            const Lanes first_words = pack_high(p1, p0) ^ pack_low(c1[i], c3[i]) ^ keys.round0[9];
            const Lanes second_words = pack_low(p1, p0);
            std::memcpy(radius + 2 * (at + i * kWide), &first_words, sizeof first_words);
            std::memcpy(angle + 2 * (at + i * kWide), &second_words, sizeof second_words);
        }
    }
}

#else

DDPM_FN void philox_block(uint32_t first, const BlockKey& keys, uint32_t* radius, uint32_t* angle) {
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) {
        uint32_t c0 = first + uint32_t(i), c1 = keys.key.c1, c2 = keys.key.c2, c3 = keys.key.c3;
        philox4x32_10(c0, c1, c2, c3, keys.key.key0, keys.key.key1);
        radius[2 * i] = c0;
        angle[2 * i] = c1;
        radius[2 * i + 1] = c2;
        angle[2 * i + 1] = c3;
    }
}

#endif

// The 4 * kCounters normals of counters first .. first + kCounters - 1, in the order of their elements. Out of line:
// g++ takes some forty constants out of a loop over a run's blocks and spills them, 0.74 ns a normal for 0.65.
static __attribute__((noinline)) void normal_block(uint32_t first, const BlockKey& keys, float* out) {
    alignas(64) uint32_t radius[kPairs], angle[kPairs];
    philox_block(first, keys, radius, angle);
#pragma omp simd
    for (int p = 0; p < kPairs; ++p) normal_pair(radius[p], angle[p], out[2 * p], out[2 * p + 1]);
}

}  // namespace DDPM_ISA
}  // namespace ddpm
