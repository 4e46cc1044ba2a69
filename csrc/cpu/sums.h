// Sums over a run in an order that is the same on every instruction set: sixty-four lanes in fp32, added as a tree at
// the end. With so many lanes four additions are independent of each other and hide each other's latency.
#pragma once

#include "runs.h"

namespace ddpm {
namespace DDPM_ISA {

constexpr int kLanes = 64;

// The sum of value(i) for i in 0 .. length - 1.
template <class Value>
static inline double sum_run(int length, Value value) {
    alignas(64) float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= length; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = add(lanes[lane], value(i + lane));
    for (int lane = 0; i + lane < length; ++lane) lanes[lane] = add(lanes[lane], value(i + lane));
#pragma GCC unroll 6
    for (int half = kLanes / 2; half >= 1; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] = add(lanes[lane], lanes[lane + half]);
    return double(lanes[0]);
}

}  // namespace DDPM_ISA
}  // namespace ddpm
