// Group norm in one pass: a thread keeps its values in registers, as they are stored, from the sums to the result. So
// the image is read once and written once. Slices that are too large are read twice: group_norm_streamed.cuh.
#include "group_norm_streamed.cuh"
#include "kernels.h"

namespace ddpm {
namespace cuda {
namespace {

using Call = NormCall<GroupNormArgs>;

constexpr int kResiduals = 4;  // pixels whose residual a thread loads at a time

// total = x + residual + added, rounded, in place of x.
template <DType kType, int kRows>
__device__ __forceinline__ void take_total(const Call& call, const Slice& slice, const Place& place, const Cells& cells,
                                           int count, Cell<kType, 4> (&held)[kRows]) {
    constexpr int kBatch = kRows < kResiduals ? kRows : kResiduals;
    float added[4];
    read_added<4>(call.args.norm, slice, place, added);
#pragma unroll
    for (int first = 0; first < kRows; first += kBatch) {
        Cell<kType, 4> residual[kBatch] = {};
        if (call.args.norm.residual) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (first + i < count) residual[i].load(call.args.norm.residual, cells.at(first + i));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (first + i >= count) return;
            float v[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) v[c] = add(add(held[first + i].get(c), residual[i].get(c)), added[c]);
            held[first + i].put(v);
            held[first + i].store(call.args.total, cells.at(first + i));
        }
    }
}

template <bool kSilu, bool kWhole, DType kType, int kRows>
__device__ __forceinline__ void write_normalised(const Call& call, const Cells& cells, int count,
                                                 const Channels<4>& channels, const Cell<kType, 4> (&held)[kRows]) {
    for_each_row<kWhole, kRows, 2>(count, [&](int i) {
        float y[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float u = channels.mapped(c, channels.difference(c, held[i].get(c)));
            y[c] = kSilu ? silu(u) : u;
        }
        Cell<kType, 4> made;
        made.put(y);
        made.store(call.args.y, cells.at(i));
    });
}

// kWhole: every lane has kRows pixels.
template <DType kType, int kRows, bool kWhole>
__global__ void __launch_bounds__(kNormThreads, 1) group_norm_kernel(const Call call) {
    __shared__ float sums[kNormThreads], moments[2 * kNormThreads];
    __shared__ Affine affine;
    const GroupNorm& norm = call.args.norm;
    const NormLayout& layout = call.layout;
    const Slice slice = Slice::of_block(norm, layout);
    const int columns = layout.columns, group = slice.column / columns;
    const int count =
        slice.inside && group < slice.groups ? (int(norm.shape.positions) - slice.lane - 1) / layout.lanes + 1 : 0;
    const bool inside = count > 0;
    const int channel = inside ? 4 * (slice.first * columns + slice.column) : 0;

    Cell<kType, 4> held[kRows] = {};
    // Where the thread's sums go: [lanes, columns of a group, groups].
    const int at = (slice.lane * columns + slice.column % columns) * layout.groups + group;
    const int rows = layout.lanes * columns;
    float sum = 0.0f;
    {
        const Place place = Place::of(norm, slice.sample, channel);
        const Cells cells(place, slice.lane, layout.lanes);
        const void* const from = place.joined ? norm.joined : norm.x;
        for_each_row<kWhole, kRows>(count, [&](int i) { held[i].load(from, cells.at(i)); });
        const bool has_total = call.args.total;
        affine.read(norm, slice.sample, 4 * slice.first * columns, 4 * slice.groups * columns, !has_total);
        if (has_total && !place.joined) {
            take_total(call, slice, place, cells, count, held);
        } else if (inside && slice.lane == 0) {  // for all lanes
            float added[4];
            read_added<4>(norm, slice, place, added);
            sum = mul(float(norm.shape.positions), sum_cell<4>([&](int c) { return added[c]; }));
        }
    }

    // The mean first, to a few roundings. Then the squares about it, and the sum of the differences, which says what
    // the mean lacks.
    for_each_row<kWhole, kRows>(count,
                                [&](int i) { sum = add(sum, sum_cell<4>([&](int c) { return held[i].get(c); })); });
    if (inside) sums[at] = sum;
    sum_rows(sums, rows, layout.groups);
    const float about = mul(sums[group], call.inverse_count);
    Channels<4> channels;
    float differences = 0.0f, squares = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        float lost;
        two_sum(about, -affine.added[4 * slice.column + c], channels.centre[c], lost);
        differences = fused(-float(count), lost, differences);
    }
    for_each_row<kWhole, kRows, 2>(count, [&](int i) {
        float d[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) d[c] = channels.difference(c, held[i].get(c));
        differences = add(differences, sum_cell<4>([&](int c) { return d[c]; }));
        squares = add(squares, add(fused(d[0], d[0], mul(d[1], d[1])), fused(d[2], d[2], mul(d[3], d[3]))));
    });
    if (inside) {
        moments[2 * at] = differences;
        moments[2 * at + 1] = squares;
    }
    sum_rows(moments, rows, 2 * layout.groups);
    if (!inside) return;
    const NormStatistics made =
        norm_statistics(about, moments[2 * group], moments[2 * group + 1], call.inverse_count, call.eps);
    if (at == group) write_statistics(norm, slice.sample * norm.groups + channel / (4 * columns), made);

    affine.apply(slice.column, made, channels);
    const Cells cells(Place::of_y(norm, slice.sample, channel), slice.lane, layout.lanes);
    if (norm.silu)
        write_normalised<true, kWhole>(call, cells, count, channels, held);
    else
        write_normalised<false, kWhole>(call, cells, count, channels, held);
}

NormLayout layout_of(const GroupNormArgs& args) {
    const GroupNorm& norm = args.norm;
    bool aligned = true;
    for (const void* image :
         {norm.x, norm.residual, norm.joined, static_cast<const void*>(args.y), static_cast<const void*>(args.total)})
        aligned = aligned && in_fours(image, norm.dtype);
    // A residual of which no total is kept would take registers of its own.
    const bool registers = !norm.residual || args.total;
    // Of a CIFAR-10 image: blocks of 256 threads with up to 80 registers each, three a multiprocessor.
    return norm_layout(norm, aligned, registers);
}

template <DType kType, int kRows>
cudaError_t run(const Call& call, void* stream) {
    const NormLayout& layout = call.layout;
    const bool whole = call.args.norm.shape.positions == int64_t(layout.lanes) * kRows;
    return launch_blocks(whole ? group_norm_kernel<kType, kRows, true> : group_norm_kernel<kType, kRows, false>,
                         call.args.norm.shape.samples * layout.slices, layout.threads, stream, call);
}

}  // namespace

int64_t workspace(const GroupNormArgs& args) {
    const NormLayout layout = layout_of(args);
    return layout.rows ? 0 : args.norm.shape.samples * args.norm.groups * (2 * layout.chunks + 1);
}

int group_norm(const GroupNormArgs& args, float* workspace, void* stream) {
    if (!args.norm.shape.samples) return cudaSuccess;
    const Call call = norm_call(args, layout_of(args), args.eps);
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
