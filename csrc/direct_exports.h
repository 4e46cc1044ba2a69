// How the functions of direct.h are called from Python.
#pragma once

#include "direct.h"

namespace ddpm {
namespace python {

// A function of so many arguments, as Python calls it.
template <PyObject* (*kBody)(Operands&, Given), Py_ssize_t kCount>
PyObject* entry(PyObject*, PyObject* const* given, Py_ssize_t count) {
    static_assert(kCount <= Operands::kMost);
    if (count != kCount || !known().exchange) Py_RETURN_NONE;
    try {
        Operands operands(given, count);
        if (operands.are_usual()) return kBody(operands, given);
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
        DDPM_ENTRY("group_norm", group_norm, 8),
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
