// How a CPU kernel goes over a batch. The work is cut into chunks, which are what threads share, and chunks into runs:
// at most 256 elements that are consecutive in the logical NCHW order. A run's operands are loaded into fp32 buffers in
// the L1 cache, whatever their dtype and memory format; the formula is applied; the result is stored. Loading and
// storing take a fraction of the noise's time, so one loop per op serves every dtype and both memory formats.
#pragma once

#include "colour.h"
#include "kernels.h"
#include "philox_block.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int64_t kSerial = 8192;  // below this a second thread costs more than it saves

struct Run {
    int64_t sample, element;  // the first element, as a logical NCHW index within the sample
    int64_t channel, position;
    int length;
    int group;  // of channels, of an output [N, 2C, ...]
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
    return Run{run.sample, run.element + shape.elements(), run.channel + shape.channels, run.position, run.length, 1};
}

static inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

// Prefetches the run after this one. The normals of a run take 170 ns, in which memory would otherwise be idle and for
// which the next loads would then have to wait. Beyond the tensor's end a prefetch does nothing.
static inline void prefetch_next(const void* run, int64_t bytes) {
    const char* const next = static_cast<const char*>(run) + bytes;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
}

// What a run of an image is worked on in, where it is not in the image itself: a row for each channel of colour, which
// lies there from the first channel's run to the last one's of the same positions, or for each group of channels.
struct Buffer {
    alignas(64) float values[kTile * kRun];
};

static inline bool is_colour(const Image& image, const Shape& shape) {
    return image.channels_last && (shape.channels == 3 || shape.channels == 6);
}

static inline float* row_of(const Image& image, const Shape& shape, const Run& run, Buffer& buffer) {
    return buffer.values + kRun * (is_colour(image, shape) ? run.channel : run.group);
}

// The compiler vectorises a loop over neighbours; numbers at any other distance it takes one by one.
template <int kStride, class T, class Convert>
static inline void load_every(const T* from, int64_t stride, int length, float* to, Convert convert) {
    for (int i = 0; i < length; ++i) to[i] = convert(from[i * (kStride ? kStride : stride)]);
}

template <class T, class Convert>
static inline void load_as(const T* from, int64_t stride, int length, float* to, Convert convert) {
    stride == 1 ? load_every<1>(from, stride, length, to, convert) : load_every<0>(from, stride, length, to, convert);
}

// Numbers of any dtype, `stride` apart, as fp32.
static inline void load_numbers(const Image& image, const Place& w, int length, float* to) {
    switch (image.dtype) {
        case DType::u8:
            return load_as(static_cast<const uint8_t*>(image.data) + w.offset, w.stride, length, to,
                           [](uint8_t v) { return from_u8(v); });
        case DType::f32:
            return load_as(static_cast<const float*>(image.data) + w.offset, w.stride, length, to,
                           [](float v) { return v; });
        case DType::bf16:
            return load_as(static_cast<const uint16_t*>(image.data) + w.offset, w.stride, length, to,
                           [](uint16_t v) { return from_bf16(v); });
        case DType::f16:
            return load_as(static_cast<const uint16_t*>(image.data) + w.offset, w.stride, length, to,
                           [](uint16_t v) { return from_f16(v); });
    }
}

template <int kStride, class T, class Convert>
static inline void store_every(T* to, int64_t stride, int length, const float* from, Convert convert) {
    for (int i = 0; i < length; ++i) to[i * (kStride ? kStride : stride)] = convert(from[i]);
}

template <class T, class Convert>
static inline void store_as(T* to, int64_t stride, int length, const float* from, Convert convert) {
    stride == 1 ? store_every<1>(to, stride, length, from, convert) : store_every<0>(to, stride, length, from, convert);
}

static inline void store_numbers(const Image& image, const Place& w, int length, const float* from) {
    switch (image.dtype) {
        case DType::f32:
            return store_as(static_cast<float*>(image.data) + w.offset, w.stride, length, from,
                            [](float v) { return v; });
        case DType::bf16:
            return store_as(static_cast<uint16_t*>(image.data) + w.offset, w.stride, length, from,
                            [](float v) { return to_bf16(v); });
        case DType::f16:
            return store_as(static_cast<uint16_t*>(image.data) + w.offset, w.stride, length, from,
                            [](float v) { return to_f16(v); });
        case DType::u8: return;  // images are only ever read as uint8: the bindings refuse it for outputs
    }
}

// All channels of the run's pixels, to rows and from them. Numbers that are not fp32 are converted in a buffer.
template <int kChannels>
static inline void load_colour(const Image& image, const Place& w, int length, float* rows) {
    if (image.dtype == DType::f32)
        return split_pixels<kChannels>(static_cast<const float*>(image.data) + w.offset, length, rows);
    Buffer pixels;
    load_numbers(image, Place{w.offset, 1}, kChannels * length, pixels.values);
    split_pixels<kChannels>(pixels.values, length, rows);
}

template <int kChannels>
static inline void store_colour(const Image& image, const Place& w, int length, const float* rows) {
    if (image.dtype == DType::f32)
        return join_pixels<kChannels>(rows, length, static_cast<float*>(image.data) + w.offset);
    Buffer pixels;
    join_pixels<kChannels>(rows, length, pixels.values);
    store_numbers(image, Place{w.offset, 1}, kChannels * length, pixels.values);
}

// The run's elements in fp32: in `buffer`, or the operand itself where it is already contiguous fp32. Of colour the
// first channel's run has to be loaded first.
static inline const float* load(const Image& image, const Shape& shape, const Run& run, Buffer& buffer) {
    const Place w = place_of(image, shape, run);
    const int64_t size = bytes_of(image.dtype);
    // Where channels are few, they are all in the same cache lines: prefetch once, with the first channel.
    if ((w.stride == 1 || run.channel == 0) && w.stride <= 8)
        prefetch_next(static_cast<const char*>(image.data) + w.offset * size, run.length * w.stride * size);
    float* const row = row_of(image, shape, run, buffer);
    if (is_colour(image, shape)) {
        if (run.channel == 0) {
            if (shape.channels == 3)
                load_colour<3>(image, w, run.length, row);
            else
                load_colour<6>(image, w, run.length, row);
        }
        return row;
    }
    if (image.dtype == DType::f32 && w.stride == 1) return static_cast<const float*>(image.data) + w.offset;
    load_numbers(image, w, run.length, row);
    return row;
}

// Where to compute a run of an output: in the output itself where that is contiguous fp32, which spares store() a
// copy, otherwise in its row of `buffer`.
static inline float* destination(const Image& image, const Shape& shape, const Run& run, Buffer& buffer) {
    const Place w = place_of(image, shape, run);
    if (image.dtype == DType::f32 && w.stride == 1) return static_cast<float*>(image.data) + w.offset;
    return row_of(image, shape, run, buffer);
}

// Stores the run's values. Those of colour have to be in their row of a buffer, and are stored with the last channel's.
static inline void store(const Image& image, const Shape& shape, const Run& run, const float* values) {
    const Place w = place_of(image, shape, run);
    if (is_colour(image, shape)) {
        if (run.channel != shape.channels - 1) return;
        const Place first{w.offset - run.channel, w.stride};
        const float* const rows = values - run.channel * kRun;
        if (shape.channels == 3)
            store_colour<3>(image, first, run.length, rows);
        else
            store_colour<6>(image, first, run.length, rows);
        return;
    }
    if (image.dtype == DType::f32 && static_cast<float*>(image.data) + w.offset == values) return;
    store_numbers(image, w, run.length, values);
}

// Whether a run's normals fill whole blocks, so that they can be drawn into their place.
static inline bool whole_blocks(const Run& run) { return run.element % 4 == 0 && run.length % (4 * kCounters) == 0; }

// Draws a run's normals and says where the first one is. It may start at any lane of a counter, and they are drawn in
// whole blocks, which `values` has room for.
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
                                    Buffer& buffer) {
    return noise.given.data ? load(noise.given, shape, run, buffer) : draw(key, run, buffer.values);
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
            visit(Run{sample, c * shape.positions + position, c, position, length, 0});
    } else {
        const int64_t end = (chunk + 1) * kChunk < shape.elements() ? (chunk + 1) * kChunk : shape.elements();
        for (int64_t e = chunk * kChunk; e < end; e += kRun)
            visit(Run{sample, e, 0, 0, int(end - e < kRun ? end - e : kRun), 0});
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
