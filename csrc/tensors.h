// torch's tensors as Python hands them over, without torch's headers: read through DLPack, and checked. Whatever a
// kernel cannot take as it is (or may not: a gradient, a subclass) throws Otherwise. The caller then goes the long way,
// through torch's dispatch and ddpm_fast/ops/checks.py, which copies, or chooses another backend, or says what is
// wrong.
#pragma once

#include <Python.h>

#include <initializer_list>

#include "dlpack.h"
#include "ops.h"

namespace ddpm {
namespace python {

struct Otherwise {};

inline void need(bool condition) {
    if (!condition) throw Otherwise{};
}

// A reference that is given back.
struct Ref {
    PyObject* object;
    explicit Ref(PyObject* object) : object(object) { need(object != nullptr); }
    Ref(Ref&& other) noexcept : object(other.object) { other.object = nullptr; }
    Ref(const Ref&) = delete;
    ~Ref() { Py_XDECREF(object); }
    PyObject* release() {
        PyObject* const released = object;
        object = nullptr;
        return released;
    }
};

constexpr int kDTypes = 4;  // of DType
constexpr int64_t kMaxElements = int64_t(1) << 34;

// What has to be known of Python's side, given once by ddpm_fast/ops/dispatch.py.
struct Known {
    const dlpack::ExchangeApi* exchange;                                  // nullptr: nothing is known
    PyObject *tensor, *parameter, *noise_key;                             // types
    PyObject *empty, *empty_like, *is_grad_enabled, *get_num_threads;     // torch's functions
    PyObject *contiguous_format, *channels_last, *dtypes[kDTypes];        // torch's constants
    PyObject *requires_grad, *is_neg, *seed, *sample_id, *step, *stream;  // names
    PyObject *dtype_keyword, *dtype_and_format_keywords;                  // tuples of names
};

inline Known& known() {
    static Known value{};
    return value;
}

// Remembers for good: DLPack's capsule and three tuples, in the order of Known. Returns whether they can be used.
inline bool know(PyObject* capsule, PyObject* types, PyObject* functions, PyObject* constants) {
    const void* const pointer = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    const auto* const exchange = static_cast<const dlpack::ExchangeApi*>(pointer);
    if (!exchange || exchange->major != dlpack::kMajorVersion || !exchange->view) {
        PyErr_Clear();
        return false;
    }
    Known& k = known();
    const auto item = [](PyObject* tuple, Py_ssize_t at) { return Py_NewRef(PyTuple_GetItem(tuple, at)); };
    PyObject** const of_types[] = {&k.tensor, &k.parameter, &k.noise_key};
    for (int i = 0; i < 3; ++i) *of_types[i] = item(types, i);
    PyObject** const of_functions[] = {&k.empty, &k.empty_like, &k.is_grad_enabled, &k.get_num_threads};
    for (int i = 0; i < 4; ++i) *of_functions[i] = item(functions, i);
    k.contiguous_format = item(constants, 0);
    k.channels_last = item(constants, 1);
    for (int i = 0; i < kDTypes; ++i) k.dtypes[i] = item(constants, 2 + i);
    k.requires_grad = PyUnicode_InternFromString("requires_grad");
    k.is_neg = PyUnicode_InternFromString("is_neg");
    k.seed = PyUnicode_InternFromString("seed");
    k.sample_id = PyUnicode_InternFromString("sample_id");
    k.step = PyUnicode_InternFromString("step");
    k.stream = PyUnicode_InternFromString("stream");
    k.dtype_keyword = Py_BuildValue("(s)", "dtype");
    k.dtype_and_format_keywords = Py_BuildValue("(ss)", "dtype", "memory_format");
    k.exchange = exchange;
    return true;
}

inline bool is_true(PyObject* function) {
    const Ref answer(PyObject_CallNoArgs(function));
    return answer.object == Py_True;
}

inline int64_t integer(PyObject* value) {
    need(PyLong_Check(value));
    const int64_t result = PyLong_AsLongLong(value);
    need(!PyErr_Occurred());
    return result;
}

inline int threads() { return int(integer(Ref(PyObject_CallNoArgs(known().get_num_threads)).object)); }

inline bool is_float(const dlpack::DataType& dtype) {
    return dtype.code == dlpack::kFloat || dtype.code == dlpack::kBfloat;
}

inline bool is_tensor(PyObject* object) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == known().tensor || type == known().parameter;
}

// Says what a tensor is, wherever it lies. Returns whether it may do without torch's dispatch: it is of torch's own
// type and not of a subclass, it has memory, no gradient would be lost, and its values are those in its memory (a view
// of a conjugated complex tensor has their negatives). Where not, a Python error may be set.
inline bool look(PyObject* object, bool with_grad, dlpack::Tensor& seen) {
    const Known& torch = known();
    if (!is_tensor(object) || torch.exchange->view(object, &seen) != 0 || !seen.data || seen.dtype.lanes != 1)
        return false;
    if (!is_float(seen.dtype)) return true;
    return (!with_grad || Ref(PyObject_GetAttr(object, torch.requires_grad)).object == Py_False) &&
           Ref(PyObject_CallMethodNoArgs(object, torch.is_neg)).object == Py_False;
}

// Whether elements lie one by one in the order of the dimensions given, the innermost first.
template <class Dimensions>
bool is_dense(const dlpack::Tensor& tensor, const Dimensions& dimensions) {
    int64_t expected = 1;
    for (const int d : dimensions) {
        if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
        expected *= tensor.shape[d];
    }
    return true;
}

inline bool is_contiguous(const dlpack::Tensor& tensor) {
    int64_t expected = 1;
    for (int d = tensor.ndim - 1; d >= 0; expected *= tensor.shape[d--])
        if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    return true;
}

inline bool is_channels_last(const dlpack::Tensor& tensor) {
    if (tensor.ndim == 4) return is_dense(tensor, std::initializer_list<int>{1, 3, 2, 0});
    return tensor.ndim == 5 && is_dense(tensor, std::initializer_list<int>{1, 4, 3, 2, 0});
}

inline DType dtype_of(const dlpack::DataType& dtype) {
    if (dtype.code == dlpack::kFloat && dtype.bits == 32) return DType::f32;
    if (dtype.code == dlpack::kBfloat && dtype.bits == 16) return DType::bf16;
    if (dtype.code == dlpack::kFloat && dtype.bits == 16) return DType::f16;
    need(dtype.code == dlpack::kUInt && dtype.bits == 8);
    return DType::u8;
}

// One of torch's dtypes, a float's.
inline DType float_of(PyObject* dtype) {
    for (int i = 1; i < kDTypes; ++i)
        if (dtype == known().dtypes[i]) return DType(i);
    throw Otherwise{};
}

inline PyObject* object_of(DType dtype) { return known().dtypes[int(dtype)]; }

// The tensors of one call on the CPU.
class Operands {
   public:
    static constexpr Image kNoImage{nullptr, DType::f32, false};

    Operands() : with_grad_(is_true(known().is_grad_enabled)) {}

    // Other images have the shape of this one, [N, C, ...].
    explicit Operands(PyObject* image) : Operands() {
        image_ = tensor(image);
        need(image_.ndim >= 2);
        shape_ = Shape{image_.shape[0], image_.shape[1], 1};
        for (int d = 2; d < image_.ndim; ++d) shape_.positions *= image_.shape[d];
        need(shape_.elements() > 0 && shape_.elements() <= kMaxElements);
    }

    const Shape& shape() const { return shape_; }

    dlpack::Tensor tensor(PyObject* object) const {
        dlpack::Tensor seen;
        need(look(object, with_grad_, seen) && seen.device_type == dlpack::kCpu);
        return seen;
    }

    // How many times an output has the image's channels, 1 or 2.
    int64_t groups(PyObject* output) const {
        const dlpack::Tensor seen = tensor(output);
        return seen.ndim >= 2 && seen.shape[1] == 2 * shape_.channels ? 2 : 1;
    }

    // An image with `groups` times the channels.
    Image image(PyObject* object, int64_t groups = 1) const {
        const Image image = pixels(object, groups);
        need(image.dtype != DType::u8);
        return image;
    }

    // One that may be uint8.
    Image pixels(PyObject* object, int64_t groups = 1) const {
        const dlpack::Tensor seen = tensor(object);
        need(seen.ndim == image_.ndim);
        for (int d = 0; d < seen.ndim; ++d) need(seen.shape[d] == (d == 1 ? groups : 1) * image_.shape[d]);
        const bool contiguous = is_contiguous(seen);
        need(contiguous || is_channels_last(seen));
        return Image{seen.data, dtype_of(seen.dtype), !contiguous};
    }

    Image image_or_none(PyObject* object) const { return object == Py_None ? kNoImage : image(object); }

    // int64 values: [count], or a scalar.
    const int64_t* integers(PyObject* object, int64_t count) const {
        const dlpack::Tensor seen = integral(object);
        need(seen.ndim == 1 && seen.shape[0] == count);
        return static_cast<const int64_t*>(seen.data);
    }
    const int64_t* scalar(PyObject* object) const {
        const dlpack::Tensor seen = integral(object);
        need(seen.ndim == 0);
        return static_cast<const int64_t*>(seen.data);
    }

    Table table(PyObject* object, int64_t columns) const {
        const dlpack::Tensor seen = tensor(object);
        need(seen.ndim == 2 && seen.shape[1] == columns && is_contiguous(seen));
        need(seen.dtype.code == dlpack::kFloat && seen.dtype.bits == 32);
        return Table{static_cast<const float*>(seen.data), seen.shape[0]};
    }

    // A tensor shaped like the image, or a NoiseKey of its samples.
    Noise noise(PyObject* object) const {
        if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == known().noise_key) return key(object, shape_.samples);
        return Noise{image(object), nullptr, nullptr, nullptr, 0};
    }

    Noise key(PyObject* object, int64_t samples) const {
        const Known& names = known();
        const Ref seed(PyObject_GetAttr(object, names.seed)), step(PyObject_GetAttr(object, names.step));
        const Ref ids(PyObject_GetAttr(object, names.sample_id)), stream(PyObject_GetAttr(object, names.stream));
        return Noise{kNoImage, scalar(seed.object), integers(ids.object, samples), scalar(step.object),
                     uint32_t(integer(stream.object))};
    }

    // Numbers [columns], or [N, columns] or [1, columns] where they differ by sample, or none.
    Rows rows(PyObject* object, int64_t columns, bool by_sample) const {
        if (object == Py_None) return Rows{nullptr, DType::f32, 0, 1};
        const dlpack::Tensor seen = tensor(object);
        need(seen.ndim == (by_sample ? 2 : 1) && seen.shape[seen.ndim - 1] == columns);
        const bool is_one_row = !by_sample || seen.shape[0] == 1;
        need(is_one_row || seen.shape[0] == shape_.samples);
        const DType dtype = dtype_of(seen.dtype);
        need(dtype != DType::u8);
        return Rows{seen.data, dtype, is_one_row ? 0 : seen.strides[0], seen.strides[seen.ndim - 1]};
    }

   private:
    dlpack::Tensor integral(PyObject* object) const {
        const dlpack::Tensor seen = tensor(object);
        need(seen.dtype.code == dlpack::kInt && seen.dtype.bits == 64 && is_contiguous(seen));
        return seen;
    }

    bool with_grad_;
    dlpack::Tensor image_{};
    Shape shape_{};
};

}  // namespace python
}  // namespace ddpm
