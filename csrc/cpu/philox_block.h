// Sixteen counters of Philox at once: the same words as ../philox.h's philox4x32_10, faster.
//
// Philox is two 32 x 32 -> 64-bit products a round. x86 has that product for the low halves of 64-bit lanes
// (pmuludq), so each 32-bit word is given a 64-bit lane of its own: the high half of a product is a shift, the low half
// is the lane itself (whatever stands above it, the next product does not look), and nothing is ever shuffled. Left to
// itself, g++ 12 packs the words into 32-bit lanes and spends two thirds of its time unpacking them: 1.58 ns a normal
// on AVX-512 against 0.85 for this (AVX2: 2.41 and 1.22; SSE2: 2.96 and 2.17).
#pragma once

#include "../philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ddpm {
namespace DDPM_ISA {

constexpr int kCounters = 16;  // in a block: one AVX-512 register of each word

// A sample's key with the ten rounds' keys worked out, one a 64-bit lane, to be broadcast straight from memory.
struct BlockKey {
    uint64_t round0[10], round1[10];
    NoiseKey key;
};

static inline BlockKey block_key(const NoiseKey& key) {
    BlockKey block;
    block.key = key;
    for (uint32_t round = 0; round < 10; ++round) {
        block.round0[round] = key.key0 + round * 0x9E3779B9u;
        block.round1[round] = key.key1 + round * 0xBB67AE85u;
    }
    return block;
}

struct WordBlock {
    alignas(64) uint32_t word[4][kCounters];
};

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
typedef uint64_t Lanes __attribute__((vector_size(sizeof(Wide))));

DDPM_FN Lanes product(Lanes a, uint32_t b) {
    return (Lanes)low_product((Wide)a, (Wide)(Lanes{} + uint64_t(b)));
}

static inline void philox_block(uint32_t first, const BlockKey& keys, WordBlock& block) {
    Lanes lane{};
    for (int i = 0; i < kWide; ++i) lane[i] = uint64_t(2 * i);
    // Even counters in one register, odd ones in another: packed as 32-bit words they are in order again.
    for (int at = 0; at < kCounters; at += 2 * kWide) {
        Lanes c0[2] = {lane + uint64_t(first + uint32_t(at)), lane + uint64_t(first + uint32_t(at)) + 1};
        Lanes c1[2] = {Lanes{} + uint64_t(keys.key.c1), Lanes{} + uint64_t(keys.key.c1)};
        Lanes c2[2] = {Lanes{} + uint64_t(keys.key.c2), Lanes{} + uint64_t(keys.key.c2)};
        Lanes c3[2] = {Lanes{} + uint64_t(keys.key.c3), Lanes{} + uint64_t(keys.key.c3)};
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const Lanes p0 = product(c0[i], 0xD2511F53u), p1 = product(c2[i], 0xCD9E8D57u);
                c0[i] = (p1 >> 32) ^ c1[i] ^ keys.round0[round];
                c2[i] = (p0 >> 32) ^ c3[i] ^ keys.round1[round];
                c1[i] = p1;
                c3[i] = p0;
            }
        }
        const Lanes* const words[4] = {c0, c1, c2, c3};
        for (int w = 0; w < 4; ++w) {
            const Lanes packed = (words[w][0] & uint64_t(0xFFFFFFFFu)) | (words[w][1] << 32);
            std::memcpy(&block.word[w][at], &packed, sizeof packed);
        }
    }
}

#else

static inline void philox_block(uint32_t first, const BlockKey& keys, WordBlock& block) {
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) {
        uint32_t c0 = first + uint32_t(i), c1 = keys.key.c1, c2 = keys.key.c2, c3 = keys.key.c3;
        philox4x32_10(c0, c1, c2, c3, keys.key.key0, keys.key.key1);
        block.word[0][i] = c0;
        block.word[1][i] = c1;
        block.word[2][i] = c2;
        block.word[3][i] = c3;
    }
}

#endif

// The 4 * kCounters normals of counters first .. first + kCounters - 1, in the order of their elements.
static inline void normal_block(uint32_t first, const BlockKey& keys, float* out) {
    WordBlock block;
    philox_block(first, keys, block);
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) {
        normal_pair(block.word[0][i], block.word[1][i], out[4 * i], out[4 * i + 1]);
        normal_pair(block.word[2][i], block.word[3][i], out[4 * i + 2], out[4 * i + 3]);
    }
}

}  // namespace DDPM_ISA
}  // namespace ddpm
