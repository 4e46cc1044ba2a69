// One step of any sampler. Ancestral DDPM, DDIM and DPM-Solver++ differ only in their row of coefficients.
#pragma once

#include "functions.h"

namespace ddpm {

constexpr int kStepColumns = 8;

struct StepRow {
    float a_x, a_out;             // x0 = clip(a_x x + a_out out)
    float b_x, b_x0, b_previous;  // x_next = b_x x + b_x0 x0 + b_previous x0_previous + sigma e^(spread v) z
    float sigma;
    float clip;    // x0 is held to [-clip, clip]; infinity: not at all
    float spread;  // of a variance that is learned; 0: v is not read
};

DDPM_FN StepRow step_row(const float* entry) {
    return StepRow{entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7]};
}

// Written as comparisons, so that a NaN stays a NaN.
DDPM_FN float predicted_x0(const StepRow& row, float x, float out) {
    const float x0 = add(mul(row.a_x, x), mul(row.a_out, out));
    const float below = x0 > row.clip ? row.clip : x0;
    return below < -row.clip ? -row.clip : below;
}

DDPM_FN float step_mean(const StepRow& row, float x, float x0) { return add(mul(row.b_x, x), mul(row.b_x0, x0)); }

DDPM_FN float step_deviation(const StepRow& row, float v) {
    return mul(row.sigma, open_exponential(mul(row.spread, v)));
}

}  // namespace ddpm
