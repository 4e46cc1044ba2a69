// A call of a CUDA kernel: on its device, with the runtime's error as an exception.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ddpm {
namespace cuda {

struct Where {
    int device;
    void* stream;
    float* workspace;  // of workspace(shape) floats, on the device; nullptr if these are none
};

// Launches a kernel. Throws std::runtime_error if the launch was not accepted.
template <class Arguments>
void call(const char* op, int (*kernel)(const Arguments&, float*, void*), const Arguments& args, const Where& where) {
    const int before = exchange_device(where.device);
    const int error = kernel(args, where.workspace, where.stream);
    if (before != where.device && before >= 0) exchange_device(before);
    if (error)
        throw std::runtime_error(std::string(op) + " could not be launched on cuda:" + std::to_string(where.device) +
                                 ": " + error_string(error) +
                                 " (`python -m ddpm_fast.info` says what the kernels were built for)");
}

}  // namespace cuda
}  // namespace ddpm
