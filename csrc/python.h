// How a struct of ops.h arrives from Python: as a tuple with an entry for each field, in the order of the fields.
// Pointers are integers, and a struct within a struct is a tuple within the tuple. The fields' number and types are
// those that the struct was defined with, so nothing about an op is repeated for its export.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

namespace ddpm {
namespace python {

// Stands for a field of any type while fields are counted.
struct AnyField {
    template <class Field>
    operator Field() const;
};

template <class Struct, class Indices, class = void>
struct HasFields : std::false_type {};
template <class Struct, size_t... kIndex>
struct HasFields<Struct, std::index_sequence<kIndex...>,
                 std::void_t<decltype(Struct{(static_cast<void>(kIndex), AnyField{})...})>> : std::true_type {};

// The number of an aggregate's fields: the most that it can be initialised with.
template <class Struct, size_t kCount = 1>
constexpr size_t field_count() {
    if constexpr (HasFields<Struct, std::make_index_sequence<kCount + 1>>::value)
        return field_count<Struct, kCount + 1>();
    else
        return kCount;
}

template <class Struct>
Struct read_fields(PyObject* tuple);

template <class T>
T read(PyObject* value) {
    T result;
    if constexpr (std::is_class_v<T>)
        return read_fields<T>(value);
    else if constexpr (std::is_pointer_v<T>)
        result = reinterpret_cast<T>(PyLong_AsVoidPtr(value));
    else if constexpr (std::is_same_v<T, bool>)
        result = PyObject_IsTrue(value) == 1;
    else if constexpr (std::is_floating_point_v<T>)
        result = T(PyFloat_AsDouble(value));
    else
        result = T(PyLong_AsLongLong(value));
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    return result;
}

// A value from Python that becomes whatever the field that it initialises is.
struct Field {
    PyObject* value;
    template <class T>
    operator T() const {
        return read<T>(value);
    }
};

template <class Struct, size_t... kIndex>
Struct read_fields(PyObject* tuple, std::index_sequence<kIndex...>) {
    return Struct{Field{PyTuple_GET_ITEM(tuple, kIndex)}...};
}

template <class Struct>
Struct read_fields(PyObject* tuple) {
    constexpr size_t kCount = field_count<Struct>();
    if (!PyTuple_Check(tuple) || size_t(PyTuple_GET_SIZE(tuple)) != kCount)
        throw pybind11::type_error("expected a tuple of " + std::to_string(kCount) + " fields: see csrc/ops.h");
    return read_fields<Struct>(tuple, std::make_index_sequence<kCount>());
}

// Exports a function of the struct and of where to run it: in Python, of the struct's fields and then `where`.
template <class Struct, class Where, class Run>
void define(pybind11::module_& module, const char* name, Run run) {
    module.def(name, [run, name](const pybind11::args& given) {
        constexpr size_t kCount = field_count<Struct>();
        PyObject* const tuple = given.ptr();
        if (size_t(PyTuple_GET_SIZE(tuple)) != kCount + 1)
            throw pybind11::type_error(std::string(name) + " takes " + std::to_string(kCount + 1) +
                                       " arguments: see csrc/ops.h");
        const Struct args = read_fields<Struct>(tuple, std::make_index_sequence<kCount>());
        const Where where = read<Where>(PyTuple_GET_ITEM(tuple, kCount));
        pybind11::gil_scoped_release release;
        run(args, where);
    });
}

// Exports a function of the struct's fields alone.
template <class Struct, class Run>
void define(pybind11::module_& module, const char* name, Run run) {
    module.def(name, [run](const pybind11::args& given) { return run(read_fields<Struct>(given.ptr())); });
}

}  // namespace python
}  // namespace ddpm
