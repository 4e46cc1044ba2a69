// The part of DLPack's C interface (version 1) that tells a library what a tensor of another one is: where it lies, its
// device, dtype, shape and strides. Of DLPackExchangeAPI only the function that is used here has its type. torch gives
// the interface as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace ddpm {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;                                      // DLDeviceType
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4;  // DLDataTypeCode

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void* allocate;
    void* from_python;
    void* to_python;
    // Fills `out` with what stays the tensor's own. Returns -1, with a Python error set, for what is no such tensor.
    int (*view)(void* python_object, Tensor* out);
    void* current_stream;
};

}  // namespace dlpack
}  // namespace ddpm
