// The GPU kernels' interface: as the CPU's, with a stream. Everything that the arguments point to lives on the current
// device; nothing waits for it. Each returns a cudaError_t, 0 if the launch was accepted.
#pragma once

#include "../arguments.h"

namespace ddpm {
namespace cuda {

// How many floats of workspace a loss needs: two sums for each part of a sample that is in several.
int64_t workspace(const Shape& shape);

int normal(const NormalArgs&, void* stream);
int q_sample(const QSampleArgs&, void* stream);
int diffusion_loss(const LossArgs&, float* workspace, void* stream);
int hybrid_loss(const BoundArgs&, float* workspace, void* stream);
int vlb_terms(const BoundArgs&, float* workspace, void* stream);
int loss_backward(const LossBackwardArgs&, void* stream);
int reverse_step(const ReverseStepArgs&, void* stream);

// Makes `device` current and gives back the one that was; -1 if the runtime cannot.
int exchange_device(int device);
const char* error_string(int error);
// The versions of CUDA that the driver supports (0: no driver) and that this was built with, as 1000 major + 10 minor.
int driver_version();
int runtime_version();

}  // namespace cuda
}  // namespace ddpm
