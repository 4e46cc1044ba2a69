// The gradient of a group norm in one pass: a thread keeps its values of the image and of the gradient in registers, as
// they are stored. What slices that are too large do instead is in group_norm_backward_streamed.cuh.
#include "group_norm_backward_streamed.cuh"
#include "kernels.h"

namespace ddpm {
namespace cuda {
namespace {

using Call = NormCall<GroupNormBackwardArgs>;

template <bool kSilu, bool kWhole, DType kType, int kRows>
__device__ __forceinline__ void sum_gradients(int count, const Channels<4>& channels, const Cell<kType, 4> (&x)[kRows],
                                              const Cell<kType, 4> (&grad)[kRows], GradientSums<4>& sums) {
    for_each_row<kWhole, kRows, 1>(count, [&](int i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float d = channels.difference(c, x[i].get(c));
            sums.add_value(c, d, before_silu<kSilu>(channels, c, d, grad[i].get(c)));
        }
    });
}

template <bool kSilu, bool kWhole, DType kType, int kRows>
__device__ __forceinline__ void write_gradients(const Cells& cells, int count, void* to, const void* grad_total,
                                                const Channels<4>& channels, const Through<4>& through,
                                                const Cell<kType, 4> (&x)[kRows], const Cell<kType, 4> (&grad)[kRows]) {
    for_each_row<kWhole, kRows, 1>(count, [&](int i) {
        Cell<kType, 4> more = {}, made;
        if (grad_total) more.load(grad_total, cells.at(i));
        float dx[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float d = channels.difference(c, x[i].get(c));
            const float g = before_silu<kSilu>(channels, c, d, grad[i].get(c));
            dx[c] = add(norm_gradient(g, d, channels.gain[c], through.slope, through.level[c]), more.get(c));
        }
        made.put(dx);
        made.store(to, cells.at(i));
    });
}

// kWhole: every lane has kRows pixels.
template <DType kType, int kRows, bool kWhole>
__global__ void __launch_bounds__(kNormThreads, 1) group_norm_backward_kernel(const Call call) {
    __shared__ float shared[kSums * 4 * kNormThreads];
    __shared__ float of_columns[2 * kNormThreads];
    __shared__ Affine affine;
    const GroupNorm& norm = call.args.norm;
    const NormLayout& layout = call.layout;
    const Slice slice = Slice::of_block(norm, layout);
    const int columns = layout.columns, group = slice.column / columns;
    const bool inside = slice.inside && group < slice.groups;
    const int count = inside ? (int(norm.shape.positions) - slice.lane - 1) / layout.lanes + 1 : 0;
    const int channel = inside ? 4 * (slice.first * columns + slice.column) : 0;
    const Place place = Place::of(norm, slice.sample, channel);
    const Cells cells(place, slice.lane, layout.lanes);
    const void* const grad_total = place.of_x(call.args.grad_total);

    Cell<kType, 4> x[kRows] = {}, grad[kRows] = {};
    {
        const void* const from = place.joined ? norm.joined : norm.x;
        const Cells of_y(Place::of_y(norm, slice.sample, channel), slice.lane, layout.lanes);
        for_each_row<kWhole, kRows>(count, [&](int i) { x[i].load(from, cells.at(i)); });
        for_each_row<kWhole, kRows>(count, [&](int i) { grad[i].load(call.args.grad, of_y.at(i)); });
    }
    affine.read(norm, slice.sample, 4 * slice.first * columns, 4 * slice.groups * columns, true);
    NormStatistics statistics = read_statistics(norm, slice, inside ? group : 0);
    __syncthreads();
    Channels<4> channels;
    affine.apply(slice.column, statistics, channels);

    GradientSums<4> sums = {};
    if (norm.silu)
        sum_gradients<true, kWhole>(count, channels, x, grad, sums);
    else
        sum_gradients<false, kWhole>(count, channels, x, grad, sums);
    if (grad_total) {
        for_each_row<kWhole, kRows>(count, [&](int i) {
            Cell<kType, 4> more;
            more.load(grad_total, cells.at(i));
#pragma unroll
            for (int c = 0; c < 4; ++c) sums.more[c] = add(sums.more[c], more.get(c));
        });
    }
    if (slice.inside) sums.write(shared, slice.lane, layout.across, slice.column);
    sum_rows(shared, layout.lanes, kSums * 4 * layout.across);
    // Once more, because what the sums did not need had no registers in the meantime.
    statistics = read_statistics(norm, slice, inside ? group : 0);
    affine.apply(slice.column, statistics, channels);
    sums.read(shared, layout.across, slice.column);
    if (slice.lane == 0) {
        sums.normalise(statistics, channels);
        of_columns[slice.column] = inside ? sum_cell<4>([&](int c) { return mul(channels.gain[c], sums.g[c]); }) : 0.0f;
        of_columns[layout.across + slice.column] =
            inside ? sum_cell<4>([&](int c) { return mul(channels.gain[c], sums.gn[c]); }) : 0.0f;
    }
    __syncthreads();
    if (!inside) return;
    float by_g = 0.0f, by_gn = 0.0f;
    for (int column = group * columns; column < (group + 1) * columns; ++column) {
        by_g = add(by_g, of_columns[column]);
        by_gn = add(by_gn, of_columns[layout.across + column]);
    }
    Through<4> through;
    through.find(statistics, channels, mul(by_g, call.inverse_count), mul(by_gn, call.inverse_count));
    if (slice.lane == 0) sums.store(call.args, slice.sample, channel, channels, through);

    if (void* const to = place.joined ? call.args.djoined : call.args.dx) {
        if (norm.silu)
            write_gradients<true, kWhole>(cells, count, to, grad_total, channels, through, x, grad);
        else
            write_gradients<false, kWhole>(cells, count, to, grad_total, channels, through, x, grad);
    }
}

NormLayout layout_of(const GroupNormBackwardArgs& args) {
    const GroupNorm& norm = args.norm;
    bool aligned = true;
    for (const void* image : {norm.x, norm.joined, args.grad, args.grad_total, static_cast<const void*>(args.dx),
                              static_cast<const void*>(args.djoined)})
        aligned = aligned && in_fours(image, norm.dtype);
    // Blocks of 256 threads with 128 registers each, two a multiprocessor.
    return norm_layout(norm, aligned, true);
}

template <DType kType, int kRows>
cudaError_t run(const Call& call, void* stream) {
    const NormLayout& layout = call.layout;
    const bool whole = call.args.norm.shape.positions == int64_t(layout.lanes) * kRows;
    return launch_blocks(
        whole ? group_norm_backward_kernel<kType, kRows, true> : group_norm_backward_kernel<kType, kRows, false>,
        call.args.norm.shape.samples * layout.slices, layout.threads, stream, call);
}

}  // namespace

int64_t workspace(const GroupNormBackwardArgs& args) {
    const NormLayout layout = layout_of(args);
    const Shape& shape = args.norm.shape;
    return layout.rows ? 0 : shape.samples * (kSums * shape.channels * layout.chunks + 2 * args.norm.groups);
}

int group_norm_backward(const GroupNormBackwardArgs& args, float* workspace, void* stream) {
    if (!args.norm.shape.samples) return cudaSuccess;
    const Call call = norm_call(args, layout_of(args), 0.0);
    cudaError_t error = cudaSuccess;
    for_layout(
        call.layout, args.norm.dtype,
        [&](auto types, auto rows) { error = run<types.kFirst, decltype(rows)::value>(call, stream); },
        [&](auto types, auto width) {
            error = run_streamed<types.kFirst, decltype(width)::value>(call, workspace, stream);
        });
    return error;
}

}  // namespace cuda
}  // namespace ddpm
