// Noising, Ho et al. 2020, eq. 4: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
#pragma once

#include "portable.h"

namespace ddpm {

struct QSampleRow {  // one row of the schedule's table
    float signal, noise;
};

DDPM_FN float q_sample(const QSampleRow& row, float x0, float z) { return add(mul(row.signal, x0), mul(row.noise, z)); }

}  // namespace ddpm
