// channels_last images as matrices: a pixel is a row, kV channels that are read together are a column. A block handles
// some columns; a thread one of them, and every lanes-th row. What is summed over a block is summed through shared
// memory in an order that depends on the number of rows alone.
#pragma once

#include "../group_norm.h"

#include "launch.cuh"

namespace ddpm {
namespace cuda {

// kV consecutive channels of a pixel as they are stored, in whole registers: 4 of them, 8 or 16 bytes that are aligned
// to their size, or 1.
template <DType kType, int kV>
struct Cell {
    static_assert(kV == 4, "");
    static constexpr int kBytes = kType == DType::f32 ? 16 : 8;
    using Access = typename Word<kBytes>::type;
    using Stored = typename Element<kType>::type;
    alignas(kBytes) uint32_t words[kBytes / 4];

    DDPM_METHOD void load(const void* data, int64_t offset) {
        *reinterpret_cast<Access*>(words) = *reinterpret_cast<const Access*>(static_cast<const Stored*>(data) + offset);
    }
    DDPM_METHOD void store(void* data, int64_t offset) const {
        *reinterpret_cast<Access*>(static_cast<Stored*>(data) + offset) = *reinterpret_cast<const Access*>(words);
    }
    DDPM_METHOD float get(int c) const {
        if constexpr (kType == DType::f32) return as_float(words[c]);
        if constexpr (kType == DType::bf16) return as_float(c % 2 ? words[c / 2] & 0xFFFF0000u : words[c / 2] << 16);
        if constexpr (kType == DType::f16) return from_f16(uint16_t(c % 2 ? words[c / 2] >> 16 : words[c / 2]));
    }
    DDPM_METHOD void put(const float (&values)[4]) {
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
            if constexpr (kType == DType::f32) words[c] = as_bits(values[c]), words[c + 1] = as_bits(values[c + 1]);
            if constexpr (kType == DType::bf16) words[c / 2] = to_bf16_pair(values[c], values[c + 1]);
            if constexpr (kType == DType::f16) words[c / 2] = to_f16_pair(values[c], values[c + 1]);
        }
    }
};

template <DType kType>
struct Cell<kType, 1> {
    using Stored = typename Element<kType>::type;
    Stored element;
    DDPM_METHOD void load(const void* data, int64_t offset) { element = static_cast<const Stored*>(data)[offset]; }
    DDPM_METHOD void store(void* data, int64_t offset) const { static_cast<Stored*>(data)[offset] = element; }
    DDPM_METHOD float get(int) const { return widen<kType>(element); }
    DDPM_METHOD void put(const float (&values)[1]) {
        if constexpr (kType == DType::f32) element = values[0];
        if constexpr (kType == DType::bf16) element = Stored(to_bf16_pair(values[0], 0.0f));
        if constexpr (kType == DType::f16) element = Stored(to_f16_pair(values[0], 0.0f));
    }
};

// Whether kV = 4 may be used on an image. A size that is no multiple of 4 is no pointer either: say of channels.
inline bool in_fours(const void* data, DType dtype) {
    return reinterpret_cast<uintptr_t>(data) % (dtype == DType::f32 ? 16 : 8) == 0;
}
inline int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// kV entries of a row; zeros where there are none.
template <int kV>
__device__ __forceinline__ void read_entries(const Rows& rows, int64_t sample, int64_t channel, float (&values)[kV]) {
#pragma unroll
    for (int c = 0; c < kV; ++c) values[c] = 0.0f;
    if (!rows.data) return;
    const int64_t first = sample * rows.sample_stride + channel * rows.channel_stride;
    if (rows.dtype == DType::f32) {
        const float* const from = static_cast<const float*>(rows.data) + first;
#pragma unroll
        for (int c = 0; c < kV; ++c) values[c] = from[c * rows.channel_stride];
        return;
    }
    const uint16_t* const from = static_cast<const uint16_t*>(rows.data) + first;
#pragma unroll
    for (int c = 0; c < kV; ++c) {
        const uint16_t bits = from[c * rows.channel_stride];
        values[c] = rows.dtype == DType::bf16 ? from_bf16(bits) : from_f16(bits);
    }
}

// The sum of a cell's kV values, as a tree.
template <int kV, class Value>
__device__ __forceinline__ float sum_cell(Value value) {
    if constexpr (kV == 1)
        return value(0);
    else
        return add(add(value(0), value(1)), add(value(2), value(3)));
}

// Adds the rows of `values` [rows, columns] up into the first, 16 at a time. All threads call it, after they wrote and
// before they read.
__device__ __forceinline__ void sum_rows(float* values, int rows, int columns) {
    __syncthreads();
    while (rows > 1) {
        const int left = (rows + 15) / 16, step = left * columns, count = rows * columns;
        // Nobody else reads what is written here: the others' are other columns, or other rows modulo `left`.
        for (int i = threadIdx.x; i < step; i += blockDim.x) {
            float sum = values[i];
#pragma unroll 5
            for (int j = i + step; j < count; j += step) sum = add(sum, values[j]);
            values[i] = sum;
        }
        rows = left;
        __syncthreads();
    }
}

// Calls run(type, kV as an integral constant) for a dtype of images.
template <int kV>
struct Width {
    static constexpr int value = kV;
};
template <class Visit>
void for_type(DType dtype, Visit visit) {
    switch (dtype) {
        case DType::bf16: return visit(Pair<DType::bf16, DType::bf16>{});
        case DType::f16: return visit(Pair<DType::f16, DType::f16>{});
        default: return visit(Pair<DType::f32, DType::f32>{});
    }
}

// A launch of a one-dimensional grid.
template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                          const Arguments&... arguments) {
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    return launch(kernel, Grid{blocks, threads}, 1, stream, arguments...);
}

}  // namespace cuda
}  // namespace ddpm
