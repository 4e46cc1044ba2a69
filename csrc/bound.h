// The variational bound's term at one t, per element and in nats, with its derivatives: Ho et al. 2020, eq. 5 and 13;
// Nichol & Dhariwal 2021, eq. 4-5 and 15.
//
// Neither x_t nor the two means are ever formed. With r = output - target (diffusion_loss.h), the predicted x_0 is off
// by e = to_x0 r, and for diagonal Gaussians whose log variances differ by d = log Sigma - log beta~
//
//     KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = (e^-d - 1 + d)/2 + (pull e)^2 e^-d / 2
//
// where pull is the posterior mean's coefficient of x_0 over sqrt(beta~). Late in the chain d is about 1e-3, so
// e^-d - 1 + d is a polynomial near 0: summed as it stands it would lose all but its first digits in fp32.
#pragma once

#include "diffusion_loss.h"
#include "functions.h"

namespace ddpm {

constexpr int kBoundColumns = 9;    // of a BoundRow's entry in the table of vlb_terms
constexpr int kHybridColumns = 11;  // and of hybrid_loss: the weights of the MSE and of the bound in bits follow

enum class Term { kl = 0, paper_decoder = 1, exact_decoder = 2 };

struct BoundRow {
    LossRow target;      // x0, noise; the weight is the MSE's
    float to_x0;         // predicted x_0 - x_0 = to_x0 * residual
    float pull;          // posterior_mean_coef1 / sqrt(beta~)
    float log_beta;      // log beta~
    float delta, slope;  // d = log Sigma - log beta~ = delta + slope * v, v the output's second group of channels
    float clip;          // predicted x_0 is held to [-clip, clip]; infinity: not at all
    Term term;
};

DDPM_FN BoundRow bound_row(const float* entry) {
    return BoundRow{{entry[0], entry[1], 0.0f}, entry[2], entry[3], entry[4], entry[5], entry[6], entry[8],
                    Term(int(entry[7]))};
}

// What a derivative by e is divided by before it is stored: its size, up to the error itself.
DDPM_FN float error_scale(const BoundRow& row) {
    return row.term == Term::kl ? mul(row.pull, row.pull) : exponential(-add(row.log_beta, row.delta));
}

// fp16 ends at 65504; an untrained network's derivative may not.
DDPM_FN float held_in_half(float value) { return greater(lesser(value, 65504.0f), -65504.0f); }

// A term's value, and its derivatives by e (predicted x_0 - x_0) and by log Sigma.
struct BoundTerm {
    float nats, by_error, by_log_variance;
};

// predicted x_0 - x_0. Clipping it is clipping x_0 + e, without the rounding of the sum where nothing is clipped.
DDPM_FN float clipped_error(const BoundRow& row, float x0, float e) {
    const float predicted = add(x0, e);
    const float below = predicted > row.clip ? add(row.clip, -x0) : e;
    return predicted < -row.clip ? add(-row.clip, -x0) : below;
}

DDPM_FN bool is_clipped(const BoundRow& row, float x0, float e) { return magnitude(add(x0, e)) > row.clip; }

DDPM_FN BoundTerm kl_term(const BoundRow& row, float e, float d) {
    const float shrink = open_exponential(-d);
    float p = -0.000199794988f;  // (e^-d - 1 + d) / d^2 for |d| <= 1/2
    p = add(mul(p, d), 0.00139821961f);
    p = add(mul(p, d), -0.00833312795f);
    p = add(mul(p, d), 0.0416657925f);
    p = add(mul(p, d), -0.166666672f);
    p = add(mul(p, d), 0.5f);
    const float spread = magnitude(d) < 0.5f ? mul(mul(d, d), p) : add(add(shrink, -1.0f), d);
    const float pulled = mul(row.pull, e);
    const float by_mean = mul(mul(pulled, row.pull), shrink);  // d/de of (pull e)^2 e^-d / 2
    const float square = mul(mul(pulled, pulled), shrink);
    return BoundTerm{mul(0.5f, add(spread, square)), by_mean, mul(0.5f, add(add(d, -spread), -square))};
}

// -log of the mass that a Gaussian of mean x_0 + e has in the bin of width 2/255 around x_0, where the first and last
// bins are open. This is the CDF of OpenAI's code, the tanh approximation, rounding included: in the tails the
// published likelihoods depend as much on its fp32 rounding and its floor of 1e-12 as on the Gaussian.
DDPM_FN BoundTerm paper_decoder_term(float x0, float e, float log_variance) {
    constexpr float kCube = 0.044715f, kScale = 0.797884583f, kFloor = 1e-12f;
    const float inverse = rounded_exponential(mul(-0.5f, log_variance));
    const float centred = -e;
    // Beyond 32 deviations the CDF is 0 or 1 in fp32; held there, u^3 cannot overflow.
    const float above = greater(lesser(mul(inverse, add(centred, 0.00392156886f)), 32.0f), -32.0f);
    const float below = greater(lesser(mul(inverse, add(centred, -0.00392156886f)), 32.0f), -32.0f);
    const float t1 = rounded_tanh(mul(kScale, add(above, mul(kCube, mul(mul(above, above), above)))));
    const float t0 = rounded_tanh(mul(kScale, add(below, mul(kCube, mul(mul(below, below), below)))));
    const float cdf1 = mul(0.5f, add(1.0f, t1)), cdf0 = mul(0.5f, add(1.0f, t0));
    const float density1 =
        mul(mul(mul(0.5f, kScale), add(1.0f, -mul(t1, t1))), add(1.0f, mul(3.0f * kCube, mul(above, above))));
    const float density0 =
        mul(mul(mul(0.5f, kScale), add(1.0f, -mul(t0, t0))), add(1.0f, mul(3.0f * kCube, mul(below, below))));
    const bool first = x0 < -0.999f, last = x0 > 0.999f;
    const float upper = last ? 1.0f : cdf1, lower = first ? 0.0f : cdf0;
    const float slope1 = last ? 0.0f : density1, slope0 = first ? 0.0f : density0;
    const float probability = add(upper, -lower);
    const float held = probability < kFloor ? kFloor : probability;  // a NaN stays one
    const float scale = probability < kFloor ? 0.0f : divide(1.0f, held);
    const float by_centre = mul(mul(inverse, add(slope1, -slope0)), scale);
    const float by_spread = mul(mul(0.5f, add(mul(above, slope1), -mul(below, slope0))), scale);
    return BoundTerm{-logarithm(held), by_centre, by_spread};
}

// log Q(x) + x^2/2 for x >= 0, with Q the Gaussian's upper tail: a polynomial in 1/(1 + 0.3 x) plus its logarithm.
// Error 1.2e-6 up to x = 1e5.
DDPM_FN float scaled_log_tail(float x) {
    const float t = divide(1.0f, add(1.0f, mul(0.3f, x)));
    float g = 0.158493116f;
    g = add(mul(g, t), -0.803674757f);
    g = add(mul(g, t), 1.56264532f);
    g = add(mul(g, t), -1.39307547f);
    g = add(mul(g, t), 0.601767421f);
    g = add(mul(g, t), -0.297768444f);
    g = add(mul(g, t), 0.0424854904f);
    g = add(mul(g, t), 0.14863041f);
    g = add(mul(g, t), 0.410266906f);
    g = add(mul(g, t), 0.99999409f);
    g = add(mul(g, t), -2.12291121f);
    return add(g, logarithm(t));
}

// The same with the Gaussian's CDF itself, relatively exact from the middle of the bin to a thousand deviations away.
DDPM_FN BoundTerm exact_decoder_term(float x0, float e, float log_variance) {
    constexpr float kLogRoot = 0.918938533f;  // log sqrt(2 pi)
    const float inverse = exponential(mul(-0.5f, log_variance));
    const float half = mul(inverse, 0.00392156886f), width = mul(2.0f, half);
    const float m = mul(inverse, magnitude(e));  // by symmetry, the bin lies above the mean
    const float a = add(m, -half), b = add(m, half);

    // Narrow bins: the density at the middle times the width, and two more terms of the series.
    const float m2 = mul(m, m), w2 = mul(width, width);
    const float c2 = mul(add(m2, -1.0f), 1.0f / 24.0f);
    const float c4 = mul(add(mul(add(m2, -6.0f), m2), 3.0f), 1.0f / 1920.0f);
    const float series = mul(w2, add(c2, mul(w2, c4)));
    const float narrow_log = add(add(logarithm(width), add(mul(-0.5f, m2), -kLogRoot)), logarithm(add(1.0f, series)));
    const float correction = divide(1.0f, add(1.0f, series));
    const float bend = add(1.0f / 12.0f, mul(w2, mul(add(m2, -3.0f), 1.0f / 480.0f)));
    const float narrow_by_m = add(-m, mul(mul(mul(m, w2), bend), correction));
    const float narrow_by_w =
        add(divide(1.0f, width), mul(mul(width, add(mul(2.0f, c2), mul(4.0f, mul(w2, c4)))), correction));

    // Wide bins, all of it above the mean: Q(a) (1 - Q(b)/Q(a)).
    const float tail_a = scaled_log_tail(greater(a, 0.0f)), tail_b = scaled_log_tail(b);
    const float ratio = exponential(-add(mul(m, width), add(tail_a, -tail_b)));
    const float rest = logarithm(add(1.0f, -lesser(ratio, 0.999f)));
    const float far_log = add(mul(mul(-0.5f, a), a), add(tail_a, rest));
    const float far_density_a = exponential(-add(kLogRoot, add(tail_a, rest)));
    const float far_density_b = mul(far_density_a, exponential(-mul(m, width)));

    // Wide bins with the mean inside: 1 - Q(-a) - Q(b).
    const float outside = exponential(add(scaled_log_tail(greater(-a, 0.0f)), mul(mul(-0.5f, a), a)));
    const float inside = add(add(1.0f, -outside), -exponential(add(tail_b, mul(mul(-0.5f, b), b))));
    const float near_log = logarithm(inside);
    const float near_density_a = exponential(add(add(mul(mul(-0.5f, a), a), -kLogRoot), -near_log));
    const float near_density_b = exponential(add(add(mul(mul(-0.5f, b), b), -kLogRoot), -near_log));

    const bool near = a < 0.0f, narrow = mul(width, greater(m, 1.0f)) < 0.5f;
    const float density_a = near ? near_density_a : far_density_a;
    const float density_b = near ? near_density_b : far_density_b;
    const float log_bin = narrow ? narrow_log : near ? near_log : far_log;
    const float by_m = narrow ? narrow_by_m : add(density_b, -density_a);
    const float by_w = narrow ? narrow_by_w : mul(0.5f, add(density_a, density_b));

    // The open bins at the ends: the CDF at y.
    const bool first = x0 < -0.999f, last = x0 > 0.999f;
    const float y = first ? mul(inverse, add(-e, 0.00392156886f)) : mul(inverse, add(e, 0.00392156886f));
    const float tail_y = scaled_log_tail(magnitude(y)), square = mul(mul(-0.5f, y), y);
    const float log_body = logarithm(add(1.0f, -exponential(add(tail_y, square))));
    const float log_open = y < 0.0f ? add(tail_y, square) : log_body;
    const float by_y =
        y < 0.0f ? exponential(-add(kLogRoot, tail_y)) : exponential(add(add(square, -kLogRoot), -log_body));

    const bool open = first || last;
    const float by_error_open = mul(by_y, first ? -inverse : inverse);
    const float by_error_bin = mul(by_m, e < 0.0f ? -inverse : inverse);
    const float by_scale = open ? mul(by_y, y) : add(mul(m, by_m), mul(width, by_w));  // d/d log(1/deviation)
    return BoundTerm{open ? -log_open : -log_bin, open ? -by_error_open : -by_error_bin, mul(0.5f, by_scale)};
}

}  // namespace ddpm
