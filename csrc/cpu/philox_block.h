// Thirty-two counters of Philox at once, and their normals: the same words and bits as ../philox.h's, faster.
//
// Philox is two 32 x 32 -> 64-bit products a round. x86 has that product for the low halves of 64-bit lanes
// (pmuludq), so each 32-bit word is given a 64-bit lane of its own: the high half of a product is a shift, the low half
// is the lane itself (whatever stands above it, the next product does not look), and nothing is ever shuffled. Left to
// itself, g++ 12 packs the words into 32-bit lanes and spends two thirds of its time unpacking them.
//
// Both halves of the work are long dependency chains, some 50 cycles of Philox and 80 of Box-Muller, so several are
// interleaved: four registers of counters, then up to eight registers of pairs. With one loop over all pairs, as the
// compiler vectorises it, a normal took 0.63 ns on a 3.7 GHz Zen 4 (AVX-512), where two registers and sixteen counters
// took 0.89.
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
DDPM_FN __m512 roots(__m512 a) { return _mm512_sqrt_ps(a); }
DDPM_FN __m512 low_pairs(__m512 a, __m512 b) { return _mm512_unpacklo_ps(a, b); }
DDPM_FN __m512 high_pairs(__m512 a, __m512 b) { return _mm512_unpackhi_ps(a, b); }
#elif defined(__AVX2__)
using Wide = __m256i;
DDPM_FN Wide low_product(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
DDPM_FN __m256 roots(__m256 a) { return _mm256_sqrt_ps(a); }
DDPM_FN __m256 low_pairs(__m256 a, __m256 b) { return _mm256_unpacklo_ps(a, b); }
DDPM_FN __m256 high_pairs(__m256 a, __m256 b) { return _mm256_unpackhi_ps(a, b); }
#else
using Wide = __m128i;
DDPM_FN Wide low_product(Wide a, Wide b) { return _mm_mul_epu32(a, b); }
DDPM_FN __m128 roots(__m128 a) { return _mm_sqrt_ps(a); }
DDPM_FN __m128 low_pairs(__m128 a, __m128 b) { return _mm_unpacklo_ps(a, b); }
DDPM_FN __m128 high_pairs(__m128 a, __m128 b) { return _mm_unpackhi_ps(a, b); }
#endif

constexpr int kWide = sizeof(Wide) / 8;  // counters in a register
constexpr int kTogether = 4;             // registers of counters
typedef uint64_t Lanes __attribute__((vector_size(sizeof(Wide))));
typedef uint32_t WordLanes __attribute__((vector_size(sizeof(Wide))));
typedef int32_t SignedLanes __attribute__((vector_size(sizeof(Wide))));
typedef float RealLanes __attribute__((vector_size(sizeof(Wide))));

DDPM_FN Lanes product(Lanes a, uint32_t b) { return (Lanes)low_product((Wide)a, (Wide)(Lanes{} + uint64_t(b))); }

// Two words of each lane's counter as neighbours: the low halves of a and b, or the high ones.
#if defined(__AVX2__) && !defined(__AVX512F__)
DDPM_FN Lanes pack_low(Lanes a, Lanes b) { return (Lanes)_mm256_blend_epi32((Wide)a, (Wide)(b << 32), 0xAA); }
DDPM_FN Lanes pack_high(Lanes a, Lanes b) { return (Lanes)_mm256_blend_epi32((Wide)(a >> 32), (Wide)b, 0xAA); }
#else
DDPM_FN Lanes pack_low(Lanes a, Lanes b) { return (a & 0xFFFFFFFFu) | (b << 32); }
DDPM_FN Lanes pack_high(Lanes a, Lanes b) { return (a >> 32) | (b & 0xFFFFFFFF00000000u); }
#endif

// The counter of each lane, less that of the register's first. In this order low_pairs() and high_pairs(), which take
// words from each 128 bits, leave the normals in the order of their elements.
DDPM_FN Lanes lane_counters() {
    Lanes lane{};
    for (int i = 0; i < kWide; ++i) lane[i] = uint64_t(i / 2 + (i % 2) * (kWide / 2));
    return lane;
}

// The words of each pair of normals, those of each register's counters in the order of lane_counters().
DDPM_FN void philox_block(uint32_t first, const BlockKey& keys, uint32_t* radius, uint32_t* angle) {
    const Lanes lane = lane_counters();
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

// Some registers of words, or of numbers, which take each operation of a formula one after another: so many dependency
// chains are interleaved. With eight a normal takes 1.06 ns (AVX2, 3 GHz Zen 3) and 2.2 (SSE2), with one, as a compiler
// vectorises the formula, 1.30 and 2.5.
constexpr int kRegisters = kPairs / (2 * kWide) < 8 ? kPairs / (2 * kWide) : 8;
// In a namespace of their own, so that they hide nothing of ../portable.h's.
namespace registers {
struct Words {
    WordLanes of[kRegisters];
};
struct Reals {
    RealLanes of[kRegisters];
};
template <class Result, class Each>
DDPM_FN Result each(Each each) {
    Result result;
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) result.of[i] = each(i);
    return result;
}

DDPM_FN Words operator+(const Words& a, uint32_t b) {
    return each<Words>([&](int i) { return a.of[i] + b; });
}
DDPM_FN Words operator-(uint32_t a, const Words& b) {
    return each<Words>([&](int i) { return a - b.of[i]; });
}
DDPM_FN Words operator+(const Words& a, const Words& b) {
    return each<Words>([&](int i) { return a.of[i] + b.of[i]; });
}
DDPM_FN Words operator&(const Words& a, uint32_t b) {
    return each<Words>([&](int i) { return a.of[i] & b; });
}
DDPM_FN Words operator^(const Words& a, const Words& b) {
    return each<Words>([&](int i) { return a.of[i] ^ b.of[i]; });
}
DDPM_FN Words operator<<(const Words& a, int by) {
    return each<Words>([&](int i) { return a.of[i] << by; });
}
DDPM_FN Words operator>>(const Words& a, int by) {
    return each<Words>([&](int i) { return a.of[i] >> by; });
}
DDPM_FN Words signed_shift_right(const Words& a, int by) {
    return each<Words>([&](int i) { return (WordLanes)((SignedLanes)a.of[i] >> by); });
}
DDPM_FN Words as_bits(const Reals& a) {
    return each<Words>([&](int i) { return (WordLanes)a.of[i]; });
}
DDPM_FN Reals as_float(const Words& a) {
    return each<Reals>([&](int i) { return (RealLanes)a.of[i]; });
}
DDPM_FN Reals signed_to_real(const Words& a) {
    return each<Reals>([&](int i) { return __builtin_convertvector((SignedLanes)a.of[i], RealLanes); });
}
DDPM_FN Reals if_negative(const Words& a, const Reals& yes, const Reals& no) {
    return each<Reals>([&](int i) { return (SignedLanes)a.of[i] < 0 ? yes.of[i] : no.of[i]; });
}
DDPM_FN Reals add(const Reals& a, float b) {
    return each<Reals>([&](int i) { return a.of[i] + b; });
}
DDPM_FN Reals add(const Reals& a, const Reals& b) {
    return each<Reals>([&](int i) { return a.of[i] + b.of[i]; });
}
DDPM_FN Reals mul(const Reals& a, float b) {
    return each<Reals>([&](int i) { return a.of[i] * b; });
}
DDPM_FN Reals mul(const Reals& a, const Reals& b) {
    return each<Reals>([&](int i) { return a.of[i] * b.of[i]; });
}
DDPM_FN Reals square_root(const Reals& a) {
    return each<Reals>([&](int i) { return (RealLanes)roots(a.of[i]); });
}
}  // namespace registers

// The normals of the words that philox_block() gives, in the order of their elements.
DDPM_FN void normal_pairs(const uint32_t* radius, const uint32_t* angle, float* out) {
    for (int at = 0; at < kPairs; at += kRegisters * 2 * kWide) {
        registers::Words bits0, bits1;
        registers::Reals z0, z1;
        std::memcpy(&bits0, radius + at, sizeof bits0);
        std::memcpy(&bits1, angle + at, sizeof bits1);
        normal_pair(bits0, bits1, z0, z1);
#pragma GCC unroll 8
        for (int i = 0; i < kRegisters; ++i) {
            const RealLanes pairs[2] = {low_pairs(z0.of[i], z1.of[i]), high_pairs(z0.of[i], z1.of[i])};
            std::memcpy(out + 2 * at + 4 * i * kWide, pairs, sizeof pairs);
        }
    }
}

// The words that philox_block() gives, in the order of their counters.
DDPM_FN void words_in_order(const uint32_t* radius, const uint32_t* angle, void* out) {
    for (int at = 0; at < kPairs; at += 2 * kWide) {
        RealLanes first, second;
        std::memcpy(&first, radius + at, sizeof first);
        std::memcpy(&second, angle + at, sizeof second);
        const RealLanes both[2] = {low_pairs(first, second), high_pairs(first, second)};
        std::memcpy(static_cast<uint32_t*>(out) + 2 * at, both, sizeof both);
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

DDPM_FN void normal_pairs(uint32_t* radius, const uint32_t* angle, float* out) {
#pragma omp simd
    for (int p = 0; p < kPairs; ++p) normal_pair(radius[p], angle[p], out[2 * p], out[2 * p + 1]);
}

DDPM_FN void words_in_order(const uint32_t* radius, const uint32_t* angle, void* out) {
    for (int p = 0; p < kPairs; ++p) {
        const uint32_t both[2] = {radius[p], angle[p]};
        std::memcpy(static_cast<uint32_t*>(out) + 2 * p, both, sizeof both);
    }
}

#endif

// The 4 * kCounters normals of counters first .. first + kCounters - 1, in the order of their elements. Out of line:
// g++ takes some forty constants out of a loop over a run's blocks and spills them, 0.74 ns a normal for 0.65.
static __attribute__((noinline)) void normal_block(uint32_t first, const BlockKey& keys, float* out) {
    alignas(64) uint32_t radius[kPairs], angle[kPairs];
    philox_block(first, keys, radius, angle);
    normal_pairs(radius, angle, out);
}

}  // namespace DDPM_ISA
}  // namespace ddpm
