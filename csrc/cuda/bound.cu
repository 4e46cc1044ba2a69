// The variational bound's term per sample and its gradient in one pass: see ../cpu/bound.cpp, also for what is left
// behind.
#include "../bound.h"

#include "kernels.h"
#include "reduce.cuh"

namespace ddpm {
namespace cuda {
namespace {

__device__ __forceinline__ BoundRow row_at(const BoundArgs& args, int64_t sample, int columns) {
    const int64_t index = args.t[sample];
    if (index >= 0 && index < args.table.rows) return bound_row(args.table.entries + index * columns);
    const float nan = as_float(0x7FC00000u);
    return BoundRow{{nan, nan, nan}, nan, nan, nan, nan, nan, nan, Term::kl};
}

template <bool kHybrid>
struct FinishBound {
    static __device__ void apply(const BoundArgs& args, int64_t sample, const float (&sums)[2]) {
        const float elements = float(args.shape.elements());
        const float squares = divide(sums[0], elements);
        const float bits = divide(1.44269502f, elements);
        float* const factor = args.factors + sample * args.groups;
        const BoundRow row = row_at(args, sample, kHybrid ? kHybridColumns : kBoundColumns);
        if constexpr (kHybrid) {
            const int64_t index = args.t[sample];
            const bool inside = index >= 0 && index < args.table.rows;
            const float* const weights = args.table.entries + index * kHybridColumns + kBoundColumns;
            const float mse_weight = inside ? weights[0] : row.to_x0, vlb_weight = inside ? weights[1] : row.to_x0;
            args.loss[sample] = add(mul(mse_weight, squares), mul(vlb_weight, mul(sums[1], bits)));
            factor[0] = divide(mul(2.0f, mse_weight), elements);
            factor[1] = mul(mul(vlb_weight, bits), row.slope);
        } else {
            args.loss[sample] = mul(sums[1], bits);
            args.mse_x0[sample] = squares;
            factor[0] = mul(mul(bits, row.to_x0), error_scale(row));
            if (args.groups == 2) factor[1] = mul(bits, row.slope);
        }
    }
};

// A thread's values of the output, in place of which the derivatives are put, of x_0 and of the noise.
template <class Access, int kGroups>
struct Values {
    static constexpr int kCount = Access::kValues;
    float output[kGroups * kCount], x0[kCount], z[kCount];

    // Rotates every array by one: the next value comes first. After kCount rotations all are where they were.
    DDPM_METHOD void turn() {
        turn(output);
        if constexpr (kGroups == 2) turn(output + kCount);
        turn(x0);
        turn(z);
    }

   private:
    static DDPM_METHOD void turn(float* values) {
        const float first = values[0];
#pragma unroll
        for (int i = 0; i + 1 < kCount; ++i) values[i] = values[i + 1];
        values[kCount - 1] = first;
    }
};

template <bool kHybrid, int kGroups, int kAt, class Access, class Formula>
__device__ __forceinline__ void evaluate(const BoundRow& row, float shrink, bool counts, Values<Access, kGroups>& in,
                                         float (&sums)[2], Formula formula) {
    constexpr int kSecond = (kGroups - 1) * Access::kValues;  // where v is, if there is a second group
    const float x0 = in.x0[kAt];
    const float residual = loss_residual(row.target, in.output[kAt], x0, in.z[kAt]);
    const float unclipped = mul(row.to_x0, residual);
    const float e = kHybrid ? unclipped : clipped_error(row, x0, unclipped);
    const bool stopped = !kHybrid && is_clipped(row, x0, unclipped);
    // Without a second group v is not read: the output in its place may be infinite, and 0 times infinity is NaN.
    const float d = kGroups == 2 ? add(row.delta, mul(row.slope, in.output[kSecond + kAt])) : row.delta;
    const BoundTerm made = formula(row, x0, e, d);
    const float error = kHybrid ? residual : e;
    sums[0] = add(sums[0], counts ? mul(error, error) : 0.0f);
    sums[1] = add(sums[1], counts ? made.nats : 0.0f);
    in.output[kAt] = kHybrid ? residual : stopped ? 0.0f : mul(made.by_error, shrink);
    if constexpr (kGroups == 2) in.output[kSecond + kAt] = made.by_log_variance;
}

// Evaluates the formula for all values at once: for the KL divergence, which nearly every sample takes ...
template <bool kHybrid, int kGroups, int kAt = 0, class Access, class Formula>
__device__ __forceinline__ void evaluate_all(const BoundRow& row, float shrink, int inside, Values<Access, kGroups>& in,
                                             float (&sums)[2], Formula formula) {
    if constexpr (kAt < Access::kValues) {
        evaluate<kHybrid, kGroups, kAt>(row, shrink, kAt < inside, in, sums, formula);
        evaluate_all<kHybrid, kGroups, kAt + 1>(row, shrink, inside, in, sums, formula);
    }
}

// ... and one after the other, for the decoders: only t = 0 asks for them, and eight copies of their hundreds of
// instructions would fill the instruction cache. Turning the arrays keeps them in registers.
template <bool kHybrid, int kGroups, class Access, class Formula>
__device__ __forceinline__ void evaluate_in_turn(const BoundRow& row, float shrink, int inside,
                                                 Values<Access, kGroups>& in, float (&sums)[2], Formula formula) {
#pragma unroll 1
    for (int i = 0; i < Access::kValues; ++i) {
        evaluate<kHybrid, kGroups, 0>(row, shrink, i < inside, in, sums, formula);
        in.turn();
    }
}

template <bool kHybrid, int kGroups, class Access, DType kX0, DType kOutput>
__global__ void __launch_bounds__(kSumThreads, 1) bound_kernel(const BoundArgs args, float* workspace) {
    const int64_t tiles = Access::tiles(args.shape), first = blockIdx.x * kPartTiles;
    const int64_t end = first + kPartTiles < tiles ? first + kPartTiles : tiles;
    for (int64_t sample = blockIdx.y; sample < args.shape.samples; sample += gridDim.y) {
        const NoiseKey key = key_of(args.noise, sample);
        const BoundRow row = row_at(args, sample, kHybrid ? kHybridColumns : kBoundColumns);
        const float shrink = kHybrid ? 0.0f : divide(1.0f, error_scale(row));
        float sums[2] = {};
        for (int64_t tile = first + threadIdx.x; tile < end; tile += blockDim.x) {
            Values<Access, kGroups> in;
            float of_tile[2] = {};
            const int inside = Access::inside(args.shape, tile);
            Access::template load<kOutput, kGroups>(args.output, args.shape, sample, tile, in.output);
            Access::template load<kX0>(args.x0, args.shape, sample, tile, in.x0);
            Access::noise(args.noise, key, args.shape, sample, tile, in.z);
            if (row.term == Term::kl) {
                evaluate_all<kHybrid, kGroups>(
                    row, shrink, inside, in, of_tile,
                    [](const BoundRow& r, float, float e, float d) { return kl_term(r, e, d); });
            } else if (row.term == Term::paper_decoder) {
                evaluate_in_turn<kHybrid, kGroups>(row, shrink, inside, in, of_tile,
                                                   [](const BoundRow& r, float x, float e, float d) {
                                                       return paper_decoder_term(x, e, add(r.log_beta, d));
                                                   });
            } else {
                evaluate_in_turn<kHybrid, kGroups>(row, shrink, inside, in, of_tile,
                                                   [](const BoundRow& r, float x, float e, float d) {
                                                       return exact_decoder_term(x, e, add(r.log_beta, d));
                                                   });
            }
            sums[0] = add(sums[0], of_tile[0]);
            sums[1] = add(sums[1], of_tile[1]);
            if (args.gradient.data) {
                if (args.gradient.dtype == DType::f16) {
#pragma unroll
                    for (float& value : in.output) value = held_in_half(value);
                }
                Access::template store<kOutput, kGroups>(args.gradient, args.shape, sample, tile, in.output);
            }
        }
        finish_part<FinishBound<kHybrid>>(args, workspace, sample, sums);
    }
}

template <bool kHybrid, int kGroups>
cudaError_t run(const BoundArgs& args, float* workspace, void* stream) {
    cudaError_t error = cudaSuccess;
    choose(TrainingPairs{}, layout_of(args.shape, args.noise.given, {args.output, args.x0, args.gradient}),
           args.x0.dtype, args.output.dtype, [&](auto access, auto types) {
               using Access = decltype(access);
               error = launch_sums<FinishBound<kHybrid>, 2>(
                   bound_kernel<kHybrid, kGroups, Access, types.kFirst, types.kSecond>, Access::tiles(args.shape), args,
                   workspace, stream);
           });
    return error;
}

}  // namespace

int hybrid_loss(const BoundArgs& args, float* workspace, void* stream) { return run<true, 2>(args, workspace, stream); }

int vlb_terms(const BoundArgs& args, float* workspace, void* stream) {
    return args.groups == 2 ? run<false, 2>(args, workspace, stream) : run<false, 1>(args, workspace, stream);
}

}  // namespace cuda
}  // namespace ddpm
