// The activation after a group norm: SiLU, u / (1 + e^-u), and its derivative.
#pragma once

#include "functions.h"

namespace ddpm {

// Both from e = e^-|u|, which overflows nowhere. Held at e^-87: SiLU is 0 or u there.
DDPM_FN float silu(float u) {
    const float m = lesser(magnitude(u), 87.0f);
    const float e = exponential_within(-m);
    return divide(u >= 0.0f ? u : -mul(m, e), add(1.0f, e));
}

// s + u s (1 - s), where s and 1 - s are r = 1 / (1 + e) and e r, or the other way about.
DDPM_FN float silu_derivative(float u) {
    const float m = lesser(magnitude(u), 87.0f);
    const float e = exponential_within(-m);
    const float r = divide(1.0f, add(1.0f, e));
    const float rest = mul(e, mul(m, r));
    return mul(r, add(u >= 0.0f ? 1.0f : e, as_float(as_bits(rest) | (as_bits(u) & 0x80000000u))));
}

}  // namespace ddpm
