// Sums over a run in an order that is the same on every instruction set: sixteen lanes in fp32, then in double.
#pragma once

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int kLanes = 16;

// The sum of value(i) for i in 0 .. length - 1.
template <class Value>
static inline double sum_run(int length, Value value) {
    alignas(64) float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= length; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = add(lanes[lane], value(i + lane));
    for (int lane = 0; i + lane < length; ++lane) lanes[lane] = add(lanes[lane], value(i + lane));
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += double(lanes[lane]);
    return sum;
}

}  // namespace DDPM_ISA
}  // namespace ddpm
