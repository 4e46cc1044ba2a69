// How a CPU kernel goes over a batch. The work is cut into chunks, which are what threads share, and chunks into runs:
// at most 256 elements that are consecutive in the logical NCHW order. A run's operands are loaded into fp32 buffers in
// the L1 cache, whatever their dtype and memory format; the formula is applied; the result is stored. Loading and
// storing take a fraction of the noise's time, so one loop per op serves every dtype and both memory formats.
#pragma once

#include "kernels.h"
#include "philox_block.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int64_t kSerial = 8192;  // below this a second thread costs more than it saves

struct Run {
    int64_t sample, element;  // the first element, as a logical NCHW index within the sample
    int64_t channel, position;
    int length;
};

// Where a run starts in an operand, and the distance between its elements in memory.
struct Place {
    int64_t offset, stride;
};

static inline Place place_of(const Image& image, const Shape& shape, const Run& run) {
    const int64_t base = run.sample * shape.elements();
    if (image.channels_last) return Place{base + run.position * shape.channels + run.channel, shape.channels};
    return Place{base + run.element, 1};
}

// The same run in the second group of channels of an output [N, 2C, ...].
static inline Run second_group(const Shape& shape, const Run& run) {
    return Run{run.sample, run.element + shape.elements(), run.channel + shape.channels, run.position, run.length};
}

static inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

// Prefetches the run after this one. The normals of a run take 170 ns, in which memory would otherwise be idle and for
// which the next loads would then have to wait. Beyond the tensor's end a prefetch does nothing.
static inline void prefetch_next(const void* run, int64_t bytes) {
    const char* const next = static_cast<const char*>(run) + bytes;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
}

// The compiler knows the distances of one (contiguous), three and six (channels_last colour, without or with a learned
// variance). For these it loads whole registers and shuffles them; for any other it loads every element by itself.
template <int kStride, class T, class Convert>
static inline void load_every(const T* from, int64_t stride, int length, float* to, Convert convert) {
    for (int i = 0; i < length; ++i) to[i] = convert(from[i * (kStride ? kStride : stride)]);
}

template <class T, class Convert>
static inline void load_as(const T* from, int64_t stride, int length, float* to, Convert convert) {
    switch (stride) {
        case 1: return load_every<1>(from, stride, length, to, convert);
        case 3: return load_every<3>(from, stride, length, to, convert);
        case 6: return load_every<6>(from, stride, length, to, convert);
        default: return load_every<0>(from, stride, length, to, convert);
    }
}

template <int kStride, class T, class Convert>
static inline void store_every(T* to, int64_t stride, int length, const float* from, Convert convert) {
    for (int i = 0; i < length; ++i) to[i * (kStride ? kStride : stride)] = convert(from[i]);
}

template <class T, class Convert>
static inline void store_as(T* to, int64_t stride, int length, const float* from, Convert convert) {
    switch (stride) {
        case 1: return store_every<1>(to, stride, length, from, convert);
        case 3: return store_every<3>(to, stride, length, from, convert);
        case 6: return store_every<6>(to, stride, length, from, convert);
        default: return store_every<0>(to, stride, length, from, convert);
    }
}

// One channel of channels_last colour.
static inline void store_colour(float* to, int length, const float* from) {
    int stored = 0;
#if defined(__AVX512F__)
    // Sixteen values are spread over three registers, of which a mask stores every third word. One at a time, as
    // the compiler has it, they take 1.0 cycles each and so 0.4 (Zen 4).
    typedef int32_t Index __attribute__((vector_size(64)));
    const Index place[3] = {{0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5},
                            {5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10},
                            {10, 11, 11, 11, 12, 12, 12, 13, 13, 13, 14, 14, 14, 15, 15, 15}};
    constexpr uint16_t kThird[3] = {0x9249, 0x4924, 0x2492};
    for (; stored + 16 <= length; stored += 16) {
        const __m512 values = _mm512_loadu_ps(from + stored);
        for (int word = 0; word < 3; ++word)
            _mm512_mask_storeu_ps(to + 3 * stored + 16 * word, kThird[word],
                                  _mm512_permutexvar_ps((__m512i)place[word], values));
    }
#endif
    for (; stored < length; ++stored) to[3 * stored] = from[stored];
}

// The run's elements in fp32: `buffer`, or the operand itself where it is already contiguous fp32.
static inline const float* load(const Image& image, const Shape& shape, const Run& run, float* buffer) {
    const Place w = place_of(image, shape, run);
    const int64_t size = bytes_of(image.dtype);
    // Where channels are few, they are all in the same cache lines: prefetch once, with the first channel.
    if ((w.stride == 1 || run.channel == 0) && w.stride <= 8)
        prefetch_next(static_cast<const char*>(image.data) + w.offset * size, run.length * w.stride * size);
    switch (image.dtype) {
        case DType::u8:
            load_as(static_cast<const uint8_t*>(image.data) + w.offset, w.stride, run.length, buffer,
                    [](uint8_t v) { return from_u8(v); });
            break;
        case DType::f32: {
            const float* data = static_cast<const float*>(image.data) + w.offset;
            if (w.stride == 1) return data;
            load_as(data, w.stride, run.length, buffer, [](float v) { return v; });
            break;
        }
        case DType::bf16:
            load_as(static_cast<const uint16_t*>(image.data) + w.offset, w.stride, run.length, buffer,
                    [](uint16_t v) { return from_bf16(v); });
            break;
        case DType::f16:
            load_as(static_cast<const uint16_t*>(image.data) + w.offset, w.stride, run.length, buffer,
                    [](uint16_t v) { return from_f16(v); });
            break;
    }
    return buffer;
}

// Where to compute a run of an output: in the output itself where that is contiguous fp32, which spares store() a
// copy, otherwise in `buffer`.
static inline float* destination(const Image& image, const Shape& shape, const Run& run, float* buffer) {
    const Place w = place_of(image, shape, run);
    return image.dtype == DType::f32 && w.stride == 1 ? static_cast<float*>(image.data) + w.offset : buffer;
}

static inline void store(const Image& image, const Shape& shape, const Run& run, const float* values) {
    const Place w = place_of(image, shape, run);
    switch (image.dtype) {
        case DType::f32: {
            float* const to = static_cast<float*>(image.data) + w.offset;
            if (w.stride == 3)
                store_colour(to, run.length, values);
            else if (to != values)
                store_as(to, w.stride, run.length, values, [](float v) { return v; });
            break;
        }
        case DType::bf16:
            store_as(static_cast<uint16_t*>(image.data) + w.offset, w.stride, run.length, values,
                     [](float v) { return to_bf16(v); });
            break;
        case DType::f16:
            store_as(static_cast<uint16_t*>(image.data) + w.offset, w.stride, run.length, values,
                     [](float v) { return to_f16(v); });
            break;
        case DType::u8: break;  // images are only ever read as uint8: the bindings refuse it for outputs
    }
}

// Room for a run's normals: it may start at any lane of a counter and is drawn in whole blocks.
struct NoiseBuffer {
    alignas(64) float values[kRun + 4 * kCounters];
};

// Whether a run's normals fill whole blocks, so that they can be drawn into their place.
static inline bool whole_blocks(const Run& run) { return run.element % 4 == 0 && run.length % (4 * kCounters) == 0; }

// Draws a run's normals, `values` having room for whole blocks of them, and says where the first one is.
static inline const float* draw(const BlockKey& key, const Run& run, float* values) {
    const uint32_t first = uint32_t(run.element / 4);
    const int lane = int(run.element % 4);
    const int counters = (lane + run.length + 3) / 4;
    for (int block = 0; block < counters; block += kCounters)
        normal_block(first + uint32_t(block), key, values + 4 * block);
    return values + lane;
}

static inline BlockKey key_of(const Noise& noise, int64_t sample) {
    if (noise.given.data) return BlockKey{};
    return block_key(
        noise_key(uint64_t(*noise.seed), uint64_t(noise.sample_id[sample]), uint32_t(*noise.step), noise.stream));
}

static inline const float* noise_of(const Noise& noise, const BlockKey& key, const Shape& shape, const Run& run,
                                    NoiseBuffer& buffer) {
    return noise.given.data ? load(noise.given, shape, run, buffer.values) : draw(key, run, buffer.values);
}

static inline int64_t chunks_of(const Shape& shape, bool planar) {
    return planar ? (shape.positions + kRun - 1) / kRun : (shape.elements() + kChunk - 1) / kChunk;
}

// Calls visit(run) for the runs of one chunk. `planar` says that some operand is channels_last, so that a run must stay
// within one channel for its elements to be evenly spaced in memory. Planar chunks are tiles of kRun positions through
// all channels, so that the cache lines of a channels_last operand are used for every channel while they are near.
template <class Visit>
static inline void for_each_run(const Shape& shape, bool planar, int64_t sample, int64_t chunk, Visit visit) {
    if (planar) {
        const int64_t position = chunk * kRun;
        const int64_t left = shape.positions - position;
        const int length = int(left < kRun ? left : kRun);
        for (int64_t c = 0; c < shape.channels; ++c)
            visit(Run{sample, c * shape.positions + position, c, position, length});
    } else {
        const int64_t end = (chunk + 1) * kChunk < shape.elements() ? (chunk + 1) * kChunk : shape.elements();
        for (int64_t e = chunk * kChunk; e < end; e += kRun)
            visit(Run{sample, e, 0, 0, int(end - e < kRun ? end - e : kRun)});
    }
}

// Calls body(sample, chunk) for every chunk of the batch, on `threads` threads.
template <class Body>
static inline void parallel_chunks(const Shape& shape, bool planar, int threads, Body body) {
    const int64_t chunks = chunks_of(shape, planar);
    const int64_t units = shape.samples * chunks;
    const bool serial = threads <= 1 || units <= 1 || shape.samples * shape.elements() < kSerial;
#pragma omp parallel for schedule(static) num_threads(threads) if (!serial)
    for (int64_t unit = 0; unit < units; ++unit) body(unit / chunks, unit % chunks);
}

}  // namespace DDPM_ISA
}  // namespace ddpm
