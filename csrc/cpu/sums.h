// Sums over a run in an order that is the same on every instruction set: thirty-two lanes, added as a tree at the end.
// The lanes are float64, in which the order all but never shows in an fp32 result. So a sample's loss has the same bits
// in both memory formats, although their runs are cut differently.
#pragma once

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int kLanes = 32;

// The sum of value(i) for i in 0 .. length - 1.
template <class Value>
static inline double sum_run(int length, Value value) {
    alignas(64) double lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= length; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += double(value(i + lane));
    for (int lane = 0; i + lane < length; ++lane) lanes[lane] += double(value(i + lane));
#pragma GCC unroll 5
    for (int half = kLanes / 2; half >= 1; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

}  // namespace DDPM_ISA
}  // namespace ddpm
