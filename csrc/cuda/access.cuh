// How a thread reads and writes its share of a sample, its tile: a few quads, which are four consecutive elements of
// the logical NCHW order, the four normals of one counter. What is in registers is in that order whatever the memory
// format; a formula sees nothing but arrays.
//
//   Flat       every operand contiguous: two quads that follow each other, so 16-byte accesses for 16-bit storage too
//   Pixels<C>  C channels and some operand channels_last: the same four positions in all channels, which are 4 C
//              consecutive elements of a channels_last operand and C quads of a contiguous one
//   Any        all other calls (sizes that are no multiple of four, many channels, rare types): one quad; types and
//              formats are looked up at run time, and elements are read one by one where nothing better is possible
//
// Flat and Pixels know the storage types at compile time (given noise is fp32 there). layout_of() says which one fits.
#pragma once

#include "../ops.h"
#include "../philox.h"

namespace ddpm {
namespace cuda {

template <DType>
struct Element {
    using type = uint16_t;
};
template <>
struct Element<DType::u8> {
    using type = uint8_t;
};
template <>
struct Element<DType::f32> {
    using type = float;
};

template <int kBytes>
struct Word;
template <>
struct Word<4> {
    using type = uint32_t;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

template <DType kType>
DDPM_FN float widen(typename Element<kType>::type stored) {
    if constexpr (kType == DType::u8) return from_u8(stored);
    if constexpr (kType == DType::f32) return stored;
    if constexpr (kType == DType::bf16) return from_bf16(stored);
    if constexpr (kType == DType::f16) return from_f16(stored);
}

// kCount consecutive elements, a multiple of four, as they are stored; the address is as aligned as kCount elements'
// size allows, up to 16 bytes.
template <DType kType, int kCount>
struct Run {
    static constexpr int kBytes = kCount * int(sizeof(typename Element<kType>::type));
    static constexpr int kAccess = kBytes % 16 == 0 ? 16 : kBytes % 8 == 0 ? 8 : 4;
    using Access = typename Word<kAccess>::type;
    alignas(16) typename Element<kType>::type element[kCount];

    DDPM_METHOD void load(const void* data, int64_t offset) {
        const auto* const from = static_cast<const typename Element<kType>::type*>(data) + offset;
#pragma unroll
        for (int i = 0; i < kBytes / kAccess; ++i)
            reinterpret_cast<Access*>(element)[i] = reinterpret_cast<const Access*>(from)[i];
    }

    DDPM_METHOD void store(void* data, int64_t offset) const {
        auto* const to = static_cast<typename Element<kType>::type*>(data) + offset;
#pragma unroll
        for (int i = 0; i < kBytes / kAccess; ++i)
            reinterpret_cast<Access*>(to)[i] = reinterpret_cast<const Access*>(element)[i];
    }

    DDPM_METHOD float get(int i) const { return widen<kType>(element[i]); }

    // Elements i and i + 1, i even.
    DDPM_METHOD void set_pair(int i, float first, float second) {
        if constexpr (kType == DType::f32) {
            element[i] = first;
            element[i + 1] = second;
        } else {
            reinterpret_cast<uint32_t*>(element)[i / 2] =
                kType == DType::bf16 ? to_bf16_pair(first, second) : to_f16_pair(first, second);
        }
    }
};

// The normals of kQuads counters.
template <int kQuads>
DDPM_FN void draw(const NoiseKey& key, const uint32_t (&counter)[kQuads], float (&z)[4 * kQuads]) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) normal4(counter[q], key, z[4 * q], z[4 * q + 1], z[4 * q + 2], z[4 * q + 3]);
}

// Called once a sample, outside of the loop over tiles: the compiler cannot know that what a kernel stores leaves the
// key unchanged, and would read it again for every tile.
DDPM_FN NoiseKey key_of(const Noise& noise, int64_t sample) {
    if (noise.given.data) return NoiseKey{};
    return noise_key(uint64_t(*noise.seed), uint64_t(noise.sample_id[sample]), uint32_t(*noise.step), noise.stream);
}

struct Flat {
    static constexpr int kQuads = 2, kValues = 8;

    static DDPM_METHOD int64_t tiles(const Shape& shape) { return shape.elements() / kValues; }
    static DDPM_METHOD int inside(const Shape&, int64_t) { return kValues; }

    // The tile of every of the image's kGroups groups of channels, group by group.
    template <DType kType, int kGroups = 1>
    static DDPM_METHOD void load(const Image& image, const Shape& shape, int64_t sample, int64_t tile,
                                 float (&values)[kGroups * kValues]) {
        Run<kType, kValues> run[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) run[g].load(image.data, offset<kGroups>(shape, sample, g, tile));
#pragma unroll
        for (int i = 0; i < kGroups * kValues; ++i) values[i] = run[i / kValues].get(i % kValues);
    }

    template <DType kType, int kGroups = 1>
    static DDPM_METHOD void store(const Image& image, const Shape& shape, int64_t sample, int64_t tile,
                                  const float (&values)[kGroups * kValues]) {
        Run<kType, kValues> run[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups * kValues; i += 2) run[i / kValues].set_pair(i % kValues, values[i], values[i + 1]);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) run[g].store(image.data, offset<kGroups>(shape, sample, g, tile));
    }

    static DDPM_METHOD void noise(const Noise& noise, const NoiseKey& key, const Shape& shape, int64_t sample,
                                  int64_t tile, float (&z)[kValues]) {
        if (noise.given.data) return load<DType::f32>(noise.given, shape, sample, tile, z);
        const uint32_t counter[2] = {uint32_t(2 * tile), uint32_t(2 * tile + 1)};
        draw(key, counter, z);
    }

   private:
    template <int kGroups>
    static DDPM_METHOD int64_t offset(const Shape& shape, int64_t sample, int group, int64_t tile) {
        return (sample * kGroups + group) * shape.elements() + tile * kValues;
    }
};

template <int kChannels>
struct Pixels {
    static constexpr int kQuads = kChannels, kValues = 4 * kChannels;

    static DDPM_METHOD int64_t tiles(const Shape& shape) { return shape.positions / 4; }
    static DDPM_METHOD int inside(const Shape&, int64_t) { return kValues; }

    template <DType kType, int kGroups = 1>
    static DDPM_METHOD void load(const Image& image, const Shape& shape, int64_t sample, int64_t tile,
                                 float (&values)[kGroups * kValues]) {
        if (image.channels_last) {
            Run<kType, kGroups * kValues> run;
            run.load(image.data, sample * kGroups * shape.elements() + tile * kGroups * kValues);
#pragma unroll
            for (int i = 0; i < kGroups * kValues; ++i) values[i] = run.get(i % 4 * kGroups * kChannels + i / 4);
        } else {
            Run<kType, 4> run[kGroups * kChannels];
#pragma unroll
            for (int c = 0; c < kGroups * kChannels; ++c)
                run[c].load(image.data, planar<kGroups>(shape, sample, c, tile));
#pragma unroll
            for (int i = 0; i < kGroups * kValues; ++i) values[i] = run[i / 4].get(i % 4);
        }
    }

    template <DType kType, int kGroups = 1>
    static DDPM_METHOD void store(const Image& image, const Shape& shape, int64_t sample, int64_t tile,
                                  const float (&values)[kGroups * kValues]) {
        constexpr int kWidth = kGroups * kChannels;
        if (image.channels_last) {
            Run<kType, kGroups * kValues> run;
#pragma unroll
            for (int m = 0; m < kGroups * kValues; m += 2)
                run.set_pair(m, values[m % kWidth * 4 + m / kWidth], values[(m + 1) % kWidth * 4 + (m + 1) / kWidth]);
            run.store(image.data, sample * kGroups * shape.elements() + tile * kGroups * kValues);
        } else {
#pragma unroll
            for (int c = 0; c < kWidth; ++c) {
                Run<kType, 4> run;
                run.set_pair(0, values[4 * c], values[4 * c + 1]);
                run.set_pair(2, values[4 * c + 2], values[4 * c + 3]);
                run.store(image.data, planar<kGroups>(shape, sample, c, tile));
            }
        }
    }

    static DDPM_METHOD void noise(const Noise& noise, const NoiseKey& key, const Shape& shape, int64_t sample,
                                  int64_t tile, float (&z)[kValues]) {
        if (noise.given.data) return load<DType::f32>(noise.given, shape, sample, tile, z);
        uint32_t counter[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) counter[c] = uint32_t(c * (shape.positions / 4) + tile);
        draw(key, counter, z);
    }

   private:
    template <int kGroups>
    static DDPM_METHOD int64_t planar(const Shape& shape, int64_t sample, int channel, int64_t tile) {
        return sample * kGroups * shape.elements() + channel * shape.positions + 4 * tile;
    }
};

struct Any {
    static constexpr int kQuads = 1, kValues = 4;

    static DDPM_METHOD int64_t tiles(const Shape& shape) { return (shape.elements() + 3) / 4; }
    // How many of a tile's values are the sample's.
    static DDPM_METHOD int inside(const Shape& shape, int64_t tile) {
        const int64_t left = shape.elements() - 4 * tile;
        return left < 4 ? int(left) : 4;
    }

    template <DType, int kGroups = 1>
    static DDPM_METHOD void load(const Image& image, const Shape& shape, int64_t sample, int64_t tile,
                                 float (&values)[kGroups * kValues]) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            uint32_t bits[4];
            switch (image.dtype) {
                case DType::u8: fetch<uint8_t, kGroups>(image, shape, sample, g, tile, bits); break;
                case DType::f32: fetch<uint32_t, kGroups>(image, shape, sample, g, tile, bits); break;
                default: fetch<uint16_t, kGroups>(image, shape, sample, g, tile, bits); break;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                values[4 * g + i] = image.dtype == DType::u8     ? from_u8(uint8_t(bits[i]))
                                    : image.dtype == DType::f32  ? as_float(bits[i])
                                    : image.dtype == DType::bf16 ? from_bf16(uint16_t(bits[i]))
                                                                 : from_f16(uint16_t(bits[i]));
        }
    }

    template <DType, int kGroups = 1>
    static DDPM_METHOD void store(const Image& image, const Shape& shape, int64_t sample, int64_t tile,
                                  const float (&values)[kGroups * kValues]) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            uint32_t bits[4];
            if (image.dtype == DType::f32) {
#pragma unroll
                for (int i = 0; i < 4; ++i) bits[i] = as_bits(values[4 * g + i]);
                put<uint32_t, kGroups>(image, shape, sample, g, tile, bits);
            } else {  // images are only ever read as uint8: ops/__init__.py refuses it for outputs
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const float first = values[4 * g + i], second = values[4 * g + i + 1];
                    bits[i] = image.dtype == DType::bf16 ? to_bf16_pair(first, second) : to_f16_pair(first, second);
                    bits[i + 1] = bits[i] >> 16;
                }
                put<uint16_t, kGroups>(image, shape, sample, g, tile, bits);
            }
        }
    }

    static DDPM_METHOD void noise(const Noise& noise, const NoiseKey& key, const Shape& shape, int64_t sample,
                                  int64_t tile, float (&z)[kValues]) {
        if (noise.given.data) return load<DType::f32>(noise.given, shape, sample, tile, z);
        const uint32_t counter[1] = {uint32_t(tile)};
        draw(key, counter, z);
    }

   private:
    // Whether the image's quads can be read at once, and then the offset of this one; otherwise the offsets of its
    // elements, -1 for those beyond the sample.
    template <class Stored, int kGroups>
    static DDPM_METHOD bool locate(const Image& image, const Shape& shape, int64_t sample, int group, int64_t tile,
                                   int64_t (&offset)[4]) {
        const int64_t elements = shape.elements(), base = sample * kGroups * elements;
        int64_t channel = 0, position = 0;
        if (image.channels_last) {
            if (elements <= 0xFFFFFFFF) {  // a 64-bit division takes 100 instructions, a 32-bit one 20
                channel = uint32_t(4 * tile) / uint32_t(shape.positions);
                position = uint32_t(4 * tile) % uint32_t(shape.positions);
            } else {
                channel = 4 * tile / shape.positions;
                position = 4 * tile % shape.positions;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t element = 4 * tile + i;
            offset[i] = base + group * elements + element;
            if (image.channels_last) {
                offset[i] = base + (position * kGroups + group) * shape.channels + channel;
                channel += ++position == shape.positions;
                position = position == shape.positions ? 0 : position;
            }
            if (element >= elements) offset[i] = -1;
        }
        return !image.channels_last && elements % 4 == 0 &&
               reinterpret_cast<uintptr_t>(image.data) % (4 * sizeof(Stored)) == 0;
    }

    template <class Stored, int kGroups>
    static DDPM_METHOD void fetch(const Image& image, const Shape& shape, int64_t sample, int group, int64_t tile,
                                  uint32_t (&bits)[4]) {
        const Stored* const data = static_cast<const Stored*>(image.data);
        int64_t offset[4];
        if (locate<Stored, kGroups>(image, shape, sample, group, tile, offset)) {
            using Quad = typename Word<4 * sizeof(Stored)>::type;
            const Quad quad = *reinterpret_cast<const Quad*>(data + offset[0]);
            if constexpr (sizeof(Stored) == 4) {
                bits[0] = quad.x, bits[1] = quad.y, bits[2] = quad.z, bits[3] = quad.w;
            } else if constexpr (sizeof(Stored) == 2) {
                bits[0] = quad.x, bits[1] = quad.x >> 16, bits[2] = quad.y, bits[3] = quad.y >> 16;
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) bits[i] = quad >> 8 * i;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[i] = offset[i] >= 0 ? uint32_t(data[offset[i]]) : 0u;
    }

    template <class Stored, int kGroups>
    static DDPM_METHOD void put(const Image& image, const Shape& shape, int64_t sample, int group, int64_t tile,
                                const uint32_t (&bits)[4]) {
        Stored* const data = static_cast<Stored*>(image.data);
        int64_t offset[4];
        if (locate<Stored, kGroups>(image, shape, sample, group, tile, offset)) {
            if constexpr (sizeof(Stored) == 4) {
                *reinterpret_cast<uint4*>(data + offset[0]) = uint4{bits[0], bits[1], bits[2], bits[3]};
            } else {
                *reinterpret_cast<uint2*>(data + offset[0]) =
                    uint2{(bits[0] & 0xFFFFu) | bits[1] << 16, (bits[2] & 0xFFFFu) | bits[3] << 16};
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (offset[i] >= 0) data[offset[i]] = Stored(bits[i]);
    }
};

// Which access fits a call's operands.
enum class Layout { flat, pixels, any };

constexpr int kColour = 3;  // the channels that Pixels is compiled for: a channels_last image in colour

// Which access fits a call: `noise`, where it is given, is one of the operands.
template <int kCount>
Layout layout_of(const Shape& shape, const Image& noise, const Image (&operands)[kCount]) {
    if (noise.data && noise.dtype != DType::f32) return Layout::any;
    bool contiguous = true;
    int64_t aligned = 8;  // elements, up to 16 bytes
    const auto look = [&](const Image& image) {
        if (!image.data) return;
        contiguous = contiguous && !image.channels_last;
        const int64_t size = image.dtype == DType::f32 ? 4 : image.dtype == DType::u8 ? 1 : 2;
        while (aligned > 1 && reinterpret_cast<uintptr_t>(image.data) % (aligned * size < 16 ? aligned * size : 16))
            aligned /= 2;
    };
    look(noise);
    for (const Image& image : operands) look(image);
    if (contiguous && aligned == 8 && shape.elements() % Flat::kValues == 0) return Layout::flat;
    const bool in_colour = !contiguous && shape.channels == kColour && shape.positions % 4 == 0;
    return in_colour && aligned >= 4 ? Layout::pixels : Layout::any;
}

// Storage types known at compile time, of two operands.
template <DType kFirstType, DType kSecondType>
struct Pair {
    static constexpr DType kFirst = kFirstType, kSecond = kSecondType;
};

template <class... Compiled>
struct Pairs {};

// x_0 and what is made of it, as training has them.
using TrainingPairs =
    Pairs<Pair<DType::u8, DType::f32>, Pair<DType::u8, DType::bf16>, Pair<DType::f32, DType::f32>,
          Pair<DType::f32, DType::bf16>, Pair<DType::bf16, DType::bf16>, Pair<DType::f16, DType::f16>>;
// The state and the network's output, as sampling has them.
using SamplingPairs = Pairs<Pair<DType::f32, DType::f32>, Pair<DType::f32, DType::bf16>, Pair<DType::f32, DType::f16>,
                            Pair<DType::bf16, DType::bf16>, Pair<DType::f16, DType::f16>>;
using EqualPairs = Pairs<Pair<DType::f32, DType::f32>, Pair<DType::bf16, DType::bf16>, Pair<DType::f16, DType::f16>>;

// Calls visit(access, pair) with the access that fits the layout and the pair that fits the types; Any looks up types
// that are in no pair.
template <class... Compiled, class Visit>
void choose(Pairs<Compiled...>, Layout layout, DType first, DType second, Visit visit) {
    const auto with = [&](auto access) {
        const auto is = [&](auto pair) {
            if (first != pair.kFirst || second != pair.kSecond) return false;
            visit(access, pair);
            return true;
        };
        return (is(Compiled{}) || ...);
    };
    if (layout == Layout::flat && with(Flat{})) return;
    if (layout == Layout::pixels && with(Pixels<kColour>{})) return;
    visit(Any{}, Pair<DType::f32, DType::f32>{});
}

}  // namespace cuda
}  // namespace ddpm
