// The regression losses. Whatever the network predicts (eps, v, x_0), its target is linear in x_0 and the noise,
// so a loss is a row of three numbers: weight * mean((output - (c_x0 x_0 + c_noise eps))^2).
#pragma once

#include "portable.h"

namespace ddpm {

struct LossRow {
    float x0, noise, weight;
};

// output - target. The loss is the weighted mean of its square; the gradient is proportional to it.
DDPM_FN float loss_residual(const LossRow& row, float output, float x0, float z) {
    return add(output, -add(mul(row.x0, x0), mul(row.noise, z)));
}

}  // namespace ddpm
