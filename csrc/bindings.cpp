// Exports to Python, and nothing else: pointers arrive as integers, ddpm_fast/ops/native.py has checked them. The CPU's
// kernels are the module's functions, the GPU's (where they were built) those of its submodule `cuda`; they differ in
// their last argument, which says where to run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#if defined(DDPM_CUDA_ARCHS)
#include "cuda/kernels.h"
#endif

#if !defined(DDPM_MODULE)
#define DDPM_MODULE _C
#endif

namespace py = pybind11;
using namespace ddpm;

namespace {

using ImageTuple = std::tuple<uintptr_t, int, bool>;       // pointer, dtype, channels_last
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t>;  // samples, channels, positions
using TableTuple = std::tuple<uintptr_t, int64_t>;         // pointer, rows
// given, seed, ids, step, stream
using NoiseTuple = std::tuple<ImageTuple, uintptr_t, uintptr_t, uintptr_t, uint32_t>;
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;  // pointer, dtype, strides
// shape, groups, SiLU, dtype, x, weight, bias, scale, shift, added, statistics
using NormTuple = std::tuple<ShapeTuple, int64_t, bool, int, uintptr_t, RowsTuple, RowsTuple, RowsTuple, RowsTuple,
                             RowsTuple, uintptr_t>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Image image(const ImageTuple& t) { return Image{pointer<void>(std::get<0>(t)), DType(std::get<1>(t)), std::get<2>(t)}; }
Shape shape(const ShapeTuple& t) { return Shape{std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
Table table(const TableTuple& t) { return Table{pointer<const float>(std::get<0>(t)), std::get<1>(t)}; }
Noise noise(const NoiseTuple& t) {
    return Noise{image(std::get<0>(t)), pointer<const int64_t>(std::get<1>(t)), pointer<const int64_t>(std::get<2>(t)),
                 pointer<const int64_t>(std::get<3>(t)), std::get<4>(t)};
}
Rows rows(const RowsTuple& t) {
    return Rows{pointer<void>(std::get<0>(t)), DType(std::get<1>(t)), std::get<2>(t), std::get<3>(t)};
}
GroupNorm norm(const NormTuple& t) {
    return GroupNorm{shape(std::get<0>(t)),
                     std::get<1>(t),
                     std::get<2>(t),
                     DType(std::get<3>(t)),
                     pointer<void>(std::get<4>(t)),
                     rows(std::get<5>(t)),
                     rows(std::get<6>(t)),
                     rows(std::get<7>(t)),
                     rows(std::get<8>(t)),
                     rows(std::get<9>(t)),
                     pointer<double>(std::get<10>(t))};
}

struct alignas(64) CacheLine {
    float floats[16];
};

struct Cpu {
    using Where = int;  // threads

    static void normal(const NormalArgs& args, const Where& threads) {
        py::gil_scoped_release release;
        active_kernels().normal(args, threads);
    }
    static void q_sample(const QSampleArgs& args, const Where& threads) {
        check_rows(args.t, args.shape.samples, args.table, "t");
        py::gil_scoped_release release;
        active_kernels().q_sample(args, threads);
    }
    static void diffusion_loss(const LossArgs& args, const Where& threads) {
        check_rows(args.t, args.shape.samples, args.table, "t");
        const std::unique_ptr<double[]> partial(new double[args.shape.samples * loss_chunks(args.shape)]);
        py::gil_scoped_release release;
        active_kernels().diffusion_loss(args, partial.get(), threads);
    }
    static void hybrid_loss(const BoundArgs& args, const Where& threads) { bound(active_kernels().hybrid_loss, args, threads); }
    static void vlb_terms(const BoundArgs& args, const Where& threads) { bound(active_kernels().vlb_terms, args, threads); }
    static void loss_backward(const LossBackwardArgs& args, const Where& threads) {
        py::gil_scoped_release release;
        active_kernels().loss_backward(args, threads);
    }
    static void reverse_step(const ReverseStepArgs& args, const Where& threads) {
        check_rows(args.step, 1, args.table, "step");
        py::gil_scoped_release release;
        active_kernels().reverse_step(args, threads);
    }

   private:
    static void bound(void (*kernel)(const BoundArgs&, double*, int), const BoundArgs& args, const Where& threads) {
        check_rows(args.t, args.shape.samples, args.table, "t");
        const std::unique_ptr<double[]> partial(new double[2 * args.shape.samples * loss_chunks(args.shape)]);
        py::gil_scoped_release release;
        kernel(args, partial.get(), threads);
    }

    // Timesteps and step indices are looked at here, where it costs nothing: a bad one would read outside the table.
    static void check_rows(const int64_t* index, int64_t count, const Table& table, const char* what) {
        for (int64_t i = 0; i < count; ++i)
            if (index[i] < 0 || index[i] >= table.rows)
                throw py::index_error(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(index[i]) +
                                      ", outside the table's range 0.." + std::to_string(table.rows - 1));
    }
};

#if defined(DDPM_CUDA_ARCHS)
struct Cuda {
    using Where = std::tuple<int, uintptr_t, uintptr_t>;  // device, stream, workspace

    static void normal(const NormalArgs& args, const Where& where) {
        on_device("normal", where, [&](void* stream) { return cuda::normal(args, stream); });
    }
    static void q_sample(const QSampleArgs& args, const Where& where) {
        on_device("q_sample", where, [&](void* stream) { return cuda::q_sample(args, stream); });
    }
    static void diffusion_loss(const LossArgs& args, const Where& where) {
        on_device("diffusion_loss", where,
                  [&](void* stream) { return cuda::diffusion_loss(args, workspace(where), stream); });
    }
    static void hybrid_loss(const BoundArgs& args, const Where& where) {
        on_device("hybrid_loss", where,
                  [&](void* stream) { return cuda::hybrid_loss(args, workspace(where), stream); });
    }
    static void vlb_terms(const BoundArgs& args, const Where& where) {
        on_device("vlb_terms", where, [&](void* stream) { return cuda::vlb_terms(args, workspace(where), stream); });
    }
    static void loss_backward(const LossBackwardArgs& args, const Where& where) {
        on_device("loss_backward", where, [&](void* stream) { return cuda::loss_backward(args, stream); });
    }
    static void reverse_step(const ReverseStepArgs& args, const Where& where) {
        on_device("reverse_step", where, [&](void* stream) { return cuda::reverse_step(args, stream); });
    }

   private:
    static float* workspace(const Where& where) { return pointer<float>(std::get<2>(where)); }

    template <class Launch>
    static void on_device(const char* op, const Where& where, Launch launch) {
        const int device = std::get<0>(where);
        const int before = cuda::exchange_device(device);
        const int error = launch(pointer<void>(std::get<1>(where)));
        if (before != device && before >= 0) cuda::exchange_device(before);
        if (error)
            throw std::runtime_error(std::string(op) + " could not be launched on cuda:" + std::to_string(device) +
                                     ": " + cuda::error_string(error) +
                                     " (`python -m ddpm_fast.info` says what the kernels were built for)");
    }
};
#endif

// The ops of one machine: on raw pointers, alike in all but where they run.
template <class Machine>
void define(py::module_& m) {
    using Where = typename Machine::Where;

    m.def("normal", [](const ShapeTuple& s, const NoiseTuple& z, const ImageTuple& out, const Where& where) {
        Machine::normal(NormalArgs{shape(s), noise(z), image(out)}, where);
    });

    m.def("q_sample", [](const ShapeTuple& s, const ImageTuple& x0, uintptr_t t, const TableTuple& rows,
                         const NoiseTuple& z, const ImageTuple& out, const Where& where) {
        Machine::q_sample(
            QSampleArgs{shape(s), image(x0), pointer<const int64_t>(t), table(rows), noise(z), image(out)}, where);
    });

    m.def("diffusion_loss", [](const ShapeTuple& s, const ImageTuple& output, const ImageTuple& x0, uintptr_t t,
                               const TableTuple& rows, const NoiseTuple& z, const ImageTuple& residual, uintptr_t loss,
                               const Where& where) {
        Machine::diffusion_loss(LossArgs{shape(s), image(output), image(x0), pointer<const int64_t>(t), table(rows),
                                         noise(z), image(residual), pointer<float>(loss)},
                                where);
    });

    // mse_x0 is null for hybrid_loss, which has none.
    const auto bound = [](void (*run)(const BoundArgs&, const Where&)) {
        return [run](const ShapeTuple& s, int64_t groups, const ImageTuple& output, const ImageTuple& x0, uintptr_t t,
                     const TableTuple& rows, const NoiseTuple& z, const ImageTuple& gradient, uintptr_t loss,
                     uintptr_t mse_x0, uintptr_t factors, const Where& where) {
            run(BoundArgs{shape(s), groups, image(output), image(x0), pointer<const int64_t>(t), table(rows), noise(z),
                          image(gradient), pointer<float>(loss), pointer<float>(mse_x0), pointer<float>(factors)},
                where);
        };
    };
    m.def("hybrid_loss", bound(&Machine::hybrid_loss));
    m.def("vlb_terms", bound(&Machine::vlb_terms));

    m.def("loss_backward", [](const ShapeTuple& s, int64_t groups, const ImageTuple& stored, uintptr_t scale,
                              const ImageTuple& grad, const Where& where) {
        Machine::loss_backward(
            LossBackwardArgs{shape(s), image(stored), groups, pointer<const float>(scale), image(grad)}, where);
    });

    m.def("reverse_step", [](const ShapeTuple& s, int64_t groups, const ImageTuple& x, const ImageTuple& output,
                             const ImageTuple& x0_previous, const TableTuple& rows, uintptr_t step, const NoiseTuple& z,
                             const ImageTuple& x_next, const ImageTuple& x0, const ImageTuple& x_model,
                             const Where& where) {
        Machine::reverse_step(
            ReverseStepArgs{shape(s), groups, image(x), image(output), image(x0_previous), table(rows),
                            pointer<const int64_t>(step), noise(z), image(x_next), image(x0), image(x_model)},
            where);
    });
}

}  // namespace

PYBIND11_MODULE(DDPM_MODULE, m) {
    m.doc() = "ddpm_fast's kernels on raw pointers. Use ddpm_fast.ops.";

    m.def("isa", [] { return std::string(active_kernels().isa); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const char* const* name = runnable_isas(); *name; ++name) names.emplace_back(*name);
        return names;
    });
    m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });
    m.def("has_matrix_units", [] { return has_matrix_units(); });
    define<Cpu>(m);

    // Of the CPU alone: a GPU's convolutions are cuDNN's.
    m.def("winograd", [](const std::tuple<int64_t, int64_t, int64_t, int64_t>& s, int64_t out_channels, int dtype,
                         uintptr_t image, uintptr_t filters, uintptr_t bias, uintptr_t out, int threads) {
        const WinogradArgs args{std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s), out_channels,
                                DType(dtype), pointer<const void>(image), pointer<const float>(filters),
                                pointer<const float>(bias), pointer<void>(out)};
        py::gil_scoped_release release;
        const std::unique_ptr<CacheLine[]> workspace(new CacheLine[winograd_workspace(args, threads) / 16]);
        active_kernels().winograd(args, workspace.get()->floats, threads);
    });

    m.def("group_norm", [](const NormTuple& n, double eps, uintptr_t y, int threads) {
        const GroupNormArgs args{norm(n), eps, pointer<void>(y)};
        py::gil_scoped_release release;
        active_kernels().group_norm(args, threads);
    });
    m.def("group_norm_backward", [](const NormTuple& n, uintptr_t grad, uintptr_t dx, uintptr_t sums, int threads) {
        const GroupNormBackwardArgs args{norm(n), pointer<void>(grad), pointer<void>(dx), pointer<double>(sums)};
        const int64_t size = args.norm.shape.positions * group_norm_width(args.norm, threads);
        const std::unique_ptr<float[]> scratch(new float[threads * size]);
        py::gil_scoped_release release;
        active_kernels().group_norm_backward(args, scratch.get(), threads);
    });

#if defined(DDPM_CUDA_ARCHS)
    py::module_ gpu = m.def_submodule("cuda", "The same on a GPU. Use ddpm_fast.ops.");
    gpu.attr("archs") = std::vector<int>{DDPM_CUDA_ARCHS};
    gpu.attr("ptx") = DDPM_CUDA_PTX;
    gpu.def("workspace", [](const ShapeTuple& s) { return cuda::workspace(shape(s)); });
    gpu.def("driver_version", &cuda::driver_version);
    gpu.def("runtime_version", &cuda::runtime_version);
    define<Cuda>(gpu);
#endif
}
