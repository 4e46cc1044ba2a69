// The variational bound's term per sample and its gradient in one pass over the network's output and x_0: by itself
// (vlb_terms), and as a part of L_hybrid (Nichol & Dhariwal 2021, eq. 16), which detaches the mean in it.
//
// The pass leaves derivatives behind in the output's dtype, without what is the same for all of a sample, and two
// factors a sample that make gradients of them: at late steps the whole derivative by v is 1e-7 and would vanish in
// fp16.
#include "../bound.h"

#include "sums.h"

namespace ddpm {
namespace DDPM_ISA {

static inline bool is_planar(const BoundArgs& args) {
    return channels_last(args.output) || channels_last(args.x0) || channels_last(args.noise.given) ||
           channels_last(args.gradient);
}

static inline void saturate(const Image& image, float* values, int length) {
    if (image.dtype != DType::f16) return;
    for (int i = 0; i < length; ++i) values[i] = held_in_half(values[i]);
}

// In place of v where the variance is fixed: what is multiplied by a slope of 0 has to be finite.
static const float kNothing[kRun] = {};

// What a run reads, in fp32.
struct Inputs {
    const float *output, *v, *x0, *z;
};

// A run's terms, derivatives, and what is squared for the MSE. The row by value and the pointers restricted: otherwise
// the compiler fears that they overlap, and the loop takes five times as long.
template <bool kHybrid, class Formula>
static inline void apply(const BoundRow row, float slope, float shrink, int length, const Inputs& in,
                         float* __restrict error, float* __restrict term, float* __restrict by_output,
                         float* __restrict by_v, Formula formula) {
    const float* __restrict const output = in.output;
    const float* __restrict const v = in.v;
    const float* __restrict const x0 = in.x0;
    const float* __restrict const z = in.z;
    for (int i = 0; i < length; ++i) {
        const float residual = loss_residual(row.target, output[i], x0[i], z[i]);
        const float unclipped = mul(row.to_x0, residual);
        const float e = kHybrid ? unclipped : clipped_error(row, x0[i], unclipped);
        const bool stopped = !kHybrid && is_clipped(row, x0[i], unclipped);
        const BoundTerm made = formula(row, x0[i], e, add(row.delta, mul(slope, v[i])));
        term[i] = made.nats;
        error[i] = kHybrid ? residual : e;
        by_output[i] = kHybrid ? residual : stopped ? 0.0f : mul(made.by_error, shrink);
        by_v[i] = made.by_log_variance;
    }
}

template <bool kHybrid>
static void bound(const BoundArgs& args, double* partial, int threads) {
    constexpr int kColumns = kHybrid ? kHybridColumns : kBoundColumns;
    const bool planar = is_planar(args);
    const bool learned = args.groups == 2;
    const int64_t chunks = chunks_of(args.shape, planar);
    const Shape wide = widened(args.shape, args.groups);  // of the output, and of what is stored for its gradient
    parallel_chunks(args.shape, planar, threads, [&](int64_t sample, int64_t chunk) {
        const BoundRow row = bound_row(args.table.entries + kColumns * args.t[sample]);
        const BlockKey key = key_of(args.noise, sample);
        const float shrink = divide(1.0f, error_scale(row));
        double squares = 0.0, nats = 0.0;
        Buffer output_buffer, x0_buffer, z_buffer, gradient_buffer;
        for_each_run(args.shape, planar, sample, chunk, [&](const Run& run) {
            alignas(64) float error[kRun], term[kRun], by_v_unused[kRun];
            const Run second = second_group(args.shape, run);
            const bool stored = args.gradient.data;
            float* const by_output =
                stored ? destination(args.gradient, wide, run, gradient_buffer) : gradient_buffer.values;
            float* const by_v =
                stored && learned ? destination(args.gradient, wide, second, gradient_buffer) : by_v_unused;
            Inputs in;
            in.output = load(args.output, wide, run, output_buffer);
            in.v = learned ? load(args.output, wide, second, output_buffer) : kNothing;
            in.x0 = load(args.x0, args.shape, run, x0_buffer);
            in.z = noise_of(args.noise, key, args.shape, run, z_buffer);
            const float slope = learned ? row.slope : 0.0f;
            const auto evaluate = [&](auto formula) {
                apply<kHybrid>(row, slope, shrink, run.length, in, error, term, by_output, by_v, formula);
            };
            // The choice outside of the loop, so that each loop vectorises.
            switch (row.term) {
                case Term::kl:
                    evaluate([](const BoundRow& r, float, float e, float d) { return kl_term(r, e, d); });
                    break;
                case Term::paper_decoder:
                    evaluate([](const BoundRow& r, float x, float e, float d) {
                        return paper_decoder_term(x, e, add(r.log_beta, d));
                    });
                    break;
                case Term::exact_decoder:
                    evaluate([](const BoundRow& r, float x, float e, float d) {
                        return exact_decoder_term(x, e, add(r.log_beta, d));
                    });
                    break;
            }
            squares += sum_run(run.length, [&](int i) { return mul(error[i], error[i]); });
            nats += sum_run(run.length, [&](int i) { return term[i]; });
            if (stored) {
                saturate(args.gradient, by_output, run.length);
                store(args.gradient, wide, run, by_output);
                if (learned) {
                    saturate(args.gradient, by_v, run.length);
                    store(args.gradient, wide, second, by_v);
                }
            }
        });
        partial[2 * (sample * chunks + chunk)] = squares;
        partial[2 * (sample * chunks + chunk) + 1] = nats;
    });
    for (int64_t sample = 0; sample < args.shape.samples; ++sample) {
        const float* const entry = args.table.entries + kColumns * args.t[sample];
        const BoundRow row = bound_row(entry);
        const double per_element = 1.0 / double(args.shape.elements());
        const double bits = per_element * 1.4426950408889634;
        double squares = 0.0, nats = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            squares += partial[2 * (sample * chunks + chunk)];
            nats += partial[2 * (sample * chunks + chunk) + 1];
        }
        float* const factor = args.factors + sample * args.groups;
        if (kHybrid) {
            const double mse_weight = entry[kBoundColumns], vlb_weight = entry[kBoundColumns + 1];
            args.loss[sample] = float(mse_weight * squares * per_element + vlb_weight * nats * bits);
            factor[0] = float(2.0 * mse_weight * per_element);
            factor[1] = float(vlb_weight * bits * double(row.slope));
        } else {
            args.loss[sample] = float(nats * bits);
            args.mse_x0[sample] = float(squares * per_element);
            factor[0] = float(bits * double(row.to_x0) * double(error_scale(row)));
            if (learned) factor[1] = float(bits * double(row.slope));
        }
    }
}

void hybrid_loss(const BoundArgs& args, void* workspace, int threads) {
    bound<true>(args, static_cast<double*>(workspace), threads);
}

void vlb_terms(const BoundArgs& args, void* workspace, int threads) {
    bound<false>(args, static_cast<double*>(workspace), threads);
}

}  // namespace DDPM_ISA
}  // namespace ddpm
