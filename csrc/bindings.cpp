// Exports to Python, and nothing else. The CPU's kernels are the module's functions, the GPU's (where they were built)
// those of its submodule `cuda`. An op takes the fields of its struct in ops.h and then where to run: a number of
// threads, or a GPU's (device, stream, workspace). The submodule `direct` has the CPU's once more, on torch's tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/calls.h"
#include "direct.h"
#include "python.h"
#if defined(DDPM_CUDA_ARCHS)
#include "cuda/calls.h"
#endif

#if !defined(DDPM_MODULE)
#define DDPM_MODULE _C
#endif

namespace py = pybind11;
using namespace ddpm;

PYBIND11_MODULE(DDPM_MODULE, m) {
    m.doc() = "ddpm_fast's kernels on raw pointers. Use ddpm_fast.ops.";

    m.def("isa", [] { return std::string(active_kernels().isa); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const char* const* name = runnable_isas(); *name; ++name) names.emplace_back(*name);
        return names;
    });
    m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });
#ifdef _OPENMP
    m.attr("threads") = true;
#else
    m.attr("threads") = false;  // built without OpenMP: each call runs on one thread
#endif
    m.def("has_matrix_units", [] { return has_matrix_units(); });

#define DDPM_EXPORT(name, Arguments)         \
    python::define<Arguments, int>(m, #name, \
                                   [](const Arguments& args, int threads) { call(&Kernels::name, args, threads); });
    DDPM_CPU_OPS(DDPM_EXPORT)
#undef DDPM_EXPORT
    python::define_direct(m);

#if defined(DDPM_CUDA_ARCHS)
    py::module_ gpu = m.def_submodule("cuda", "The same on a GPU. Use ddpm_fast.ops.");
    gpu.attr("archs") = std::vector<int>{DDPM_CUDA_ARCHS};
    gpu.attr("ptx") = DDPM_CUDA_PTX;
    gpu.def("workspace", [](const py::tuple& shape) { return cuda::workspace(python::read<Shape>(shape.ptr())); });
    gpu.def("driver_version", &cuda::driver_version);
    gpu.def("runtime_version", &cuda::runtime_version);

#define DDPM_EXPORT(name, Arguments)                                                                         \
    python::define<Arguments, cuda::Where>(gpu, #name, [](const Arguments& args, const cuda::Where& where) { \
        cuda::call(#name, cuda::name, args, where);                                                          \
    });
    DDPM_CUDA_OPS(DDPM_EXPORT)
#undef DDPM_EXPORT
#define DDPM_EXPORT(name, Arguments) \
    python::define<Arguments>(gpu, #name "_workspace", [](const Arguments& args) { return cuda::workspace(args); });
    DDPM_EXPORT(group_norm, GroupNormArgs)
    DDPM_EXPORT(group_norm_backward, GroupNormBackwardArgs)
    DDPM_EXPORT(channel_sums, ChannelSumsArgs)
#undef DDPM_EXPORT
#endif
}
