// The short way of a call on the CPU: from the tensors that a public function of ddpm_fast/ops was given to the kernel
// and back. Each function takes what its namesake in Python takes, all arguments in their order, and returns what is to
// be returned; or None, where Otherwise was thrown and nothing has happened yet.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "cpu/calls.h"
#include "tensors.h"

namespace ddpm {
namespace python {

using Given = PyObject* const*;

template <class Arguments>
void run(void (*Kernels::*kernel)(const Arguments&, void*, int), const Arguments& args) {
    const int count = threads();
    pybind11::gil_scoped_release release;
    call(kernel, args, count);
}

// A new tensor shaped like another one, and of its memory format.
inline Ref new_like(PyObject* tensor, DType its, DType dtype) {
    PyObject* const given[] = {tensor, object_of(dtype)};
    const bool is_same = its == dtype;
    return Ref(PyObject_Vectorcall(known().empty_like, given, 1, is_same ? nullptr : known().dtype_keyword));
}

// A new fp32 tensor [count].
inline Ref new_floats(int64_t count) {
    const Ref size(PyLong_FromLongLong(count));
    PyObject* const given[] = {size.object, object_of(DType::f32)};
    return Ref(PyObject_Vectorcall(known().empty, given, 1, known().dtype_keyword));
}

inline float* floats(const Operands& operands, const Ref& made) {
    return static_cast<float*>(operands.tensor(made.object).data);
}

// x0, t, table, noise, dtype
inline PyObject* q_sample(Given given) {
    const Operands operands(given[0]);
    const Shape shape = operands.shape();
    const Image x0 = operands.pixels(given[0]);
    const bool is_u8 = x0.dtype == DType::u8;
    const DType dtype = given[4] == Py_None ? (is_u8 ? DType::f32 : x0.dtype) : float_of(given[4]);
    const int64_t* const t = operands.integers(given[1], shape.samples);
    const Table table = operands.table(given[2], 2);
    const Noise noise = operands.noise(given[3]);
    Ref out = new_like(given[0], x0.dtype, dtype);
    run(&Kernels::q_sample, QSampleArgs{shape, x0, t, table, noise, operands.image(out.object)});
    return out.release();
}

// key, shape, dtype, memory_format
inline PyObject* normal(Given given) {
    const Known& torch = known();
    const Operands operands;
    need(reinterpret_cast<PyObject*>(Py_TYPE(given[0])) == torch.noise_key && PyTuple_CheckExact(given[1]));
    float_of(given[2]);
    const Ref ids(PyObject_GetAttr(given[0], torch.sample_id));
    const dlpack::Tensor seen = operands.tensor(ids.object);
    need(seen.ndim == 1);
    const Py_ssize_t dimensions = PyTuple_GET_SIZE(given[1]);
    const Ref full(PyTuple_New(dimensions + 1));
    PyTuple_SET_ITEM(full.object, 0, Ref(PyLong_FromLongLong(seen.shape[0])).release());
    for (Py_ssize_t d = 0; d < dimensions; ++d) {
        PyObject* const size = PyTuple_GET_ITEM(given[1], d);
        need(PyLong_CheckExact(size));
        Py_INCREF(size);
        PyTuple_SET_ITEM(full.object, d + 1, size);
    }
    const bool contiguous = given[3] == torch.contiguous_format;
    need(contiguous || (given[3] == torch.channels_last && dimensions == 3));
    PyObject* const arguments[] = {full.object, given[2], given[3]};
    PyObject* const keywords = contiguous ? torch.dtype_keyword : torch.dtype_and_format_keywords;
    Ref out(PyObject_Vectorcall(torch.empty, arguments, 1, keywords));
    const Operands made(out.object);
    const Noise noise = operands.key(given[0], made.shape().samples);
    run(&Kernels::normal, NormalArgs{made.shape(), noise, made.image(out.object)});
    return out.release();
}

// output, x0, t, table, noise
inline PyObject* diffusion_loss(Given given) {
    const Operands operands(given[0]);
    const Shape shape = operands.shape();
    LossArgs args{shape,
                  operands.image(given[0]),
                  operands.pixels(given[1]),
                  operands.integers(given[2], shape.samples),
                  operands.table(given[3], 3),
                  operands.noise(given[4]),
                  Operands::kNoImage,
                  nullptr};
    Ref loss = new_floats(shape.samples);
    args.loss = floats(operands, loss);
    run(&Kernels::diffusion_loss, args);
    return loss.release();
}

inline BoundArgs bound_of(const Operands& operands, Given given, int64_t groups, int64_t columns) {
    const int64_t samples = operands.shape().samples;
    return BoundArgs{operands.shape(),
                     groups,
                     operands.image(given[0], groups),
                     operands.pixels(given[1]),
                     operands.integers(given[2], samples),
                     operands.table(given[3], columns),
                     operands.noise(given[4]),
                     Operands::kNoImage,
                     nullptr,
                     nullptr,
                     nullptr};
}

// output, x0, t, table, noise
inline PyObject* hybrid_loss(Given given) {
    const Operands operands(given[1]);
    BoundArgs args = bound_of(operands, given, 2, 11);
    Ref loss = new_floats(args.shape.samples);
    std::vector<float> factors(2 * args.shape.samples);
    args.loss = floats(operands, loss);
    args.factors = factors.data();
    run(&Kernels::hybrid_loss, args);
    return loss.release();
}

// output, x0, t, table, noise
inline PyObject* vlb_terms(Given given) {
    const Operands operands(given[1]);
    BoundArgs args = bound_of(operands, given, operands.groups(given[0]), 9);
    const Ref bits = new_floats(args.shape.samples), mse_x0 = new_floats(args.shape.samples);
    std::vector<float> factors(args.groups * args.shape.samples);
    args.loss = floats(operands, bits);
    args.mse_x0 = floats(operands, mse_x0);
    args.factors = factors.data();
    run(&Kernels::vlb_terms, args);
    return PyTuple_Pack(2, bits.object, mse_x0.object);
}

// x_t, output, x0_previous, table, step, noise, return_x0, model_dtype
inline PyObject* reverse_step(Given given) {
    const Operands operands(given[0]);
    const int64_t groups = operands.groups(given[1]);
    const bool with_x0 = given[6] == Py_True;
    need(with_x0 || given[6] == Py_False);
    ReverseStepArgs args{};
    args.shape = operands.shape();
    args.groups = groups;
    args.x = operands.image(given[0]);
    args.output = operands.image(given[1], groups);
    args.x0_previous = operands.image_or_none(given[2]);
    args.table = operands.table(given[3], 8);
    args.step = operands.scalar(given[4]);
    args.noise = operands.noise(given[5]);
    const DType model_dtype = given[7] == Py_None ? DType::f32 : float_of(given[7]);
    const Ref x = new_like(given[0], args.x.dtype, args.x.dtype);
    const Ref x0 = with_x0 ? new_like(given[0], args.x.dtype, DType::f32) : Ref(Py_NewRef(Py_None));
    const Ref x_model = given[7] == Py_None ? Ref(Py_NewRef(Py_None)) : new_like(given[0], args.x.dtype, model_dtype);
    args.x_next = operands.image(x.object);
    args.x0 = operands.image_or_none(x0.object);
    args.x_model = operands.image_or_none(x_model.object);
    run(&Kernels::reverse_step, args);
    return PyTuple_Pack(3, x.object, x0.object, x_model.object);
}

// Where a tensor lies, from its first byte to behind its last.
struct Extent {
    const char *first, *last;
    bool meets(const Extent& other) const { return first < other.last && other.first < last; }
};

inline Extent extent_of(const dlpack::Tensor& tensor) {
    int64_t bytes = tensor.dtype.bits / 8;
    for (int d = 0; d < tensor.ndim; ++d) bytes *= tensor.shape[d];
    const char* const first = static_cast<const char*>(tensor.data);
    return Extent{first, first + bytes};
}

inline Extent extent_of(const int64_t* words, int64_t count) {
    const char* const first = reinterpret_cast<const char*>(words);
    return Extent{first, first + 8 * count};
}

inline bool is_same(const dlpack::Tensor& a, const dlpack::Tensor& b) {
    bool same = a.data == b.data && a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits && a.ndim == b.ndim;
    for (int d = 0; same && d < a.ndim; ++d) same = a.shape[d] == b.shape[d] && a.strides[d] == b.strides[d];
    return same;
}

// What reverse_step_ writes shares memory with nothing else, but for an output that is x. All is dense.
inline void need_apart(const Operands& operands, Given given, const ReverseStepArgs& args) {
    Extent extents[9];
    int count = 0, written = 0;
    const auto add = [&](const Extent& extent) {
        for (int i = 0; i < (written ? written : count); ++i) need(!extents[i].meets(extent));
        extents[count++] = extent;
    };
    const dlpack::Tensor x = operands.tensor(given[0]), output = operands.tensor(given[1]);
    add(extent_of(x));
    for (const int i : {2, 3})
        if (given[i] != Py_None) add(extent_of(operands.tensor(given[i])));
    written = count;
    if (!is_same(x, output)) add(extent_of(output));
    add(extent_of(operands.tensor(given[4])));
    add(extent_of(args.step, 1));
    if (args.noise.given.data) {
        add(extent_of(operands.tensor(given[6])));
    } else {
        add(extent_of(args.noise.seed, 1));
        add(extent_of(args.noise.sample_id, args.shape.samples));
        add(extent_of(args.noise.step, 1));
    }
}

// x, output, x0, x_model, table, step, noise. Returns True; torch has to be told of the writes.
inline PyObject* reverse_step_in_place(Given given) {
    const Operands operands(given[0]);
    ReverseStepArgs args{};
    args.shape = operands.shape();
    args.groups = operands.groups(given[1]);
    args.x = args.x_next = operands.image(given[0]);
    args.output = operands.image(given[1], args.groups);
    args.x0_previous = args.x0 = operands.image_or_none(given[2]);
    need(args.x0.dtype == DType::f32);
    args.x_model = operands.image_or_none(given[3]);
    args.table = operands.table(given[4], 8);
    args.step = operands.scalar(given[5]);
    args.noise = operands.noise(given[6]);
    need_apart(operands, given, args);
    run(&Kernels::reverse_step, args);
    Py_RETURN_TRUE;
}

// x, weight, bias, groups, eps, scale, shift, added, silu
inline PyObject* group_norm(Given given) {
    const Operands operands(given[0]);
    const Shape shape = operands.shape();
    const dlpack::Tensor seen = operands.tensor(given[0]);
    const Image x = operands.image(given[0]);
    // The result is channels_last: a copy of the strides serves if they are exactly that.
    need(seen.ndim == 4 && seen.strides[1] == 1 && seen.strides[3] == seen.shape[1]);
    need(seen.strides[2] == seen.shape[3] * seen.strides[3] && seen.strides[0] == seen.shape[2] * seen.strides[2]);
    const int64_t groups = integer(given[3]);
    need(groups > 0 && shape.channels % groups == 0 && PyFloat_CheckExact(given[4]));
    need((given[5] == Py_None) == (given[6] == Py_None) && PyBool_Check(given[8]));
    GroupNormArgs args{};
    args.norm.shape = shape;
    args.norm.x_channels = shape.channels;
    args.norm.groups = groups;
    args.norm.silu = given[8] == Py_True;
    args.norm.dtype = x.dtype;
    args.norm.x = x.data;
    args.norm.weight = operands.rows(given[1], shape.channels, false);
    args.norm.bias = operands.rows(given[2], shape.channels, false);
    args.norm.scale = operands.rows(given[5], shape.channels, true);
    args.norm.shift = operands.rows(given[6], shape.channels, true);
    args.norm.added = operands.rows(given[7], shape.channels, true);
    need(args.norm.weight.data && args.norm.bias.data);
    std::vector<float> statistics(3 * shape.samples * groups);
    args.norm.statistics = statistics.data();
    args.eps = PyFloat_AS_DOUBLE(given[4]);
    Ref y = new_like(given[0], x.dtype, x.dtype);
    args.y = operands.tensor(y.object).data;
    run(&Kernels::group_norm, args);
    return y.release();
}

// Of a tensor on another device, without the time that an exception takes.
inline bool is_elsewhere(PyObject* object) {
    dlpack::Tensor seen;
    return is_tensor(object) && (known().exchange->view(object, &seen) != 0 || seen.device_type != dlpack::kCpu);
}

// A function of so many arguments, as Python calls it.
template <PyObject* (*kBody)(Given), Py_ssize_t kCount>
PyObject* entry(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != kCount || !known().exchange) Py_RETURN_NONE;
    try {
        if (!is_elsewhere(given[0])) return kBody(given);
    } catch (const Otherwise&) {
    } catch (const std::out_of_range&) {  // an index outside of a table: the long way says which
    } catch (const std::bad_alloc&) {
    }
    PyErr_Clear();
    Py_RETURN_NONE;
}

// Whether all tensors among the arguments, on whatever device, may do without torch's dispatch.
inline PyObject* is_plain(PyObject*, PyObject* const* given, Py_ssize_t count) {
    const Known& torch = known();
    bool plain = torch.exchange != nullptr;
    try {
        const bool with_grad = plain && is_true(torch.is_grad_enabled);
        const auto look_at = [&](PyObject* object) {
            dlpack::Tensor seen;
            return look(object, with_grad, seen);
        };
        for (Py_ssize_t i = 0; plain && i < count; ++i) {
            PyObject* const object = given[i];
            if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch.noise_key)
                for (PyObject* const name : {torch.seed, torch.sample_id, torch.step})
                    plain = plain && look_at(Ref(PyObject_GetAttr(object, name)).object);
            else if (object != Py_None && !PyLong_Check(object) && !PyFloat_Check(object) &&
                     Py_TYPE(object) != Py_TYPE(torch.dtypes[0]))
                plain = look_at(object);
        }
    } catch (const Otherwise&) {
        plain = false;
    }
    if (!plain) PyErr_Clear();
    return PyBool_FromLong(plain);
}

// Adds a submodule `direct` and in it what is above. Nothing of it is taken before `know` was called.
inline void define_direct(pybind11::module_& module) {
#define DDPM_ENTRY(name, body, count)                                                                             \
    {                                                                                                             \
        name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&entry<body, count>)), METH_FASTCALL, nullptr \
    }
    static PyMethodDef methods[] = {
        DDPM_ENTRY("q_sample", q_sample, 5),
        DDPM_ENTRY("normal", normal, 4),
        DDPM_ENTRY("diffusion_loss", diffusion_loss, 5),
        DDPM_ENTRY("hybrid_loss", hybrid_loss, 5),
        DDPM_ENTRY("vlb_terms", vlb_terms, 5),
        DDPM_ENTRY("reverse_step", reverse_step, 8),
        DDPM_ENTRY("reverse_step_", reverse_step_in_place, 7),
        DDPM_ENTRY("group_norm", group_norm, 9),
        {"is_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&is_plain)), METH_FASTCALL, nullptr},
        {nullptr, nullptr, 0, nullptr},
    };
#undef DDPM_ENTRY
    pybind11::module_ direct = module.def_submodule("direct", "The ops on torch's tensors. Use ddpm_fast.ops.");
    if (PyModule_AddFunctions(direct.ptr(), methods) < 0) throw pybind11::error_already_set();
    direct.def("know", [](const pybind11::object& exchange, const pybind11::tuple& types,
                          const pybind11::tuple& functions, const pybind11::tuple& constants) {
        return know(exchange.ptr(), types.ptr(), functions.ptr(), constants.ptr());
    });
}

}  // namespace python
}  // namespace ddpm
