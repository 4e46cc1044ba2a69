// What the bindings need of CUDA's runtime. The runtime is linked statically, so that the module can be imported on a
// machine without a driver.
#include "kernels.h"
#include "reduce.cuh"

namespace ddpm {
namespace cuda {

int64_t workspace(const Shape& shape) {
    const int64_t parts = (Any::tiles(shape) + kPartTiles - 1) / kPartTiles;  // of the access with the smallest tiles
    return parts > 1 ? 2 * shape.samples * parts : 0;
}

int exchange_device(int device) {
    int before = 0;
    if (cudaGetDevice(&before) != cudaSuccess) return -1;
    if (before != device && cudaSetDevice(device) != cudaSuccess) return -1;
    return before;
}

const char* error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace cuda
}  // namespace ddpm
