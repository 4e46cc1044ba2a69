// The GPU kernels' interface: the CPU's with a stream in place of threads. Everything that the arguments point to lives
// on the current device, and nothing waits for it. Each kernel returns a cudaError_t, 0 if the launch was accepted.
#pragma once

#include "../ops.h"

namespace ddpm {
namespace cuda {

// How many floats of workspace a loss needs: two sums for each part of a sample that is in several.
int64_t workspace(const Shape& shape);
// How many a call of the network's ops needs.
int64_t workspace(const GroupNormArgs& args);
int64_t workspace(const GroupNormBackwardArgs& args);
int64_t workspace(const ChannelSumsArgs& args);

#define DDPM_DECLARE(name, Arguments) int name(const Arguments&, float* workspace, void* stream);
DDPM_CUDA_OPS(DDPM_DECLARE)
#undef DDPM_DECLARE

// Makes `device` current and gives back the one that was; -1 if the runtime cannot.
int exchange_device(int device);
const char* error_string(int error);
// The versions of CUDA that the driver supports (0: no driver) and that this was built with, as 1000 major + 10 minor.
int driver_version();
int runtime_version();

}  // namespace cuda
}  // namespace ddpm
