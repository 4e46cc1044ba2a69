// Exports to Python, and nothing else: pointers arrive as integers, ddpm_fast/ops/native.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "reverse_step.h"

namespace py = pybind11;
using namespace ddpm;

namespace {

using ImageTuple = std::tuple<uintptr_t, int, bool>;       // pointer, dtype, channels_last
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t>;  // samples, channels, positions
// given, seed, ids, step, stream
using NoiseTuple = std::tuple<ImageTuple, uintptr_t, uintptr_t, uintptr_t, uint32_t>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Image image(const ImageTuple& t) { return Image{pointer<void>(std::get<0>(t)), DType(std::get<1>(t)), std::get<2>(t)}; }
Shape shape(const ShapeTuple& t) { return Shape{std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
Noise noise(const NoiseTuple& t) {
    return Noise{image(std::get<0>(t)), pointer<const int64_t>(std::get<1>(t)), pointer<const int64_t>(std::get<2>(t)),
                 pointer<const int64_t>(std::get<3>(t)), std::get<4>(t)};
}

// Timesteps and step indices are looked at here, where it costs nothing: a bad one would read outside the table.
void check_rows(const int64_t* index, int64_t count, int64_t rows, const char* what) {
    for (int64_t i = 0; i < count; ++i)
        if (index[i] < 0 || index[i] >= rows)
            throw py::index_error(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(index[i]) +
                                  ", outside the table's range 0.." + std::to_string(rows - 1));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "ddpm_fast's CPU kernels on raw pointers. Use ddpm_fast.ops.";

    m.def("isa", [] { return std::string(active_kernels().isa); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const char* const* name = runnable_isas(); *name; ++name) names.emplace_back(*name);
        return names;
    });
    m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });

    m.def("normal", [](const ShapeTuple& s, const NoiseTuple& z, const ImageTuple& out, int threads) {
        const NormalArgs args{shape(s), noise(z), image(out)};
        py::gil_scoped_release release;
        active_kernels().normal(args, threads);
    });

    m.def("q_sample", [](const ShapeTuple& s, const ImageTuple& x0, uintptr_t t, uintptr_t table, int64_t rows,
                         const NoiseTuple& z, const ImageTuple& out, int threads) {
        const QSampleArgs args{shape(s), image(x0), pointer<const int64_t>(t), pointer<const float>(table), noise(z),
                               image(out)};
        check_rows(args.t, args.shape.samples, rows, "t");
        py::gil_scoped_release release;
        active_kernels().q_sample(args, threads);
    });

    m.def("diffusion_loss", [](const ShapeTuple& s, const ImageTuple& output, const ImageTuple& x0, uintptr_t t,
                               uintptr_t table, int64_t rows, const NoiseTuple& z, const ImageTuple& residual,
                               uintptr_t loss, int threads) {
        LossArgs args{shape(s), image(output), image(x0), pointer<const int64_t>(t), pointer<const float>(table),
                      noise(z), image(residual), pointer<float>(loss), nullptr};
        check_rows(args.t, args.shape.samples, rows, "t");
        const std::unique_ptr<double[]> partial(new double[args.shape.samples * loss_chunks(args.shape)]);
        args.partial = partial.get();
        py::gil_scoped_release release;
        active_kernels().diffusion_loss(args, threads);
    });

    // mse_x0 is null for hybrid_loss, which has none.
    m.def("bound", [](bool hybrid, const ShapeTuple& s, int64_t groups, const ImageTuple& output, const ImageTuple& x0,
                      uintptr_t t, uintptr_t table, int64_t rows, const NoiseTuple& z, const ImageTuple& gradient,
                      uintptr_t loss, uintptr_t mse_x0, uintptr_t factors, int threads) {
        BoundArgs args{shape(s), groups, image(output), image(x0), pointer<const int64_t>(t),
                       pointer<const float>(table), noise(z), image(gradient), pointer<float>(loss),
                       pointer<float>(mse_x0), pointer<float>(factors), nullptr};
        check_rows(args.t, args.shape.samples, rows, "t");
        const std::unique_ptr<double[]> partial(new double[2 * args.shape.samples * loss_chunks(args.shape)]);
        args.partial = partial.get();
        py::gil_scoped_release release;
        (hybrid ? active_kernels().hybrid_loss : active_kernels().vlb_terms)(args, threads);
    });

    m.def("loss_backward", [](const ShapeTuple& s, const ImageTuple& stored, int64_t groups, uintptr_t scale,
                              const ImageTuple& grad, int threads) {
        const LossBackwardArgs args{shape(s), image(stored), groups, pointer<const float>(scale), image(grad)};
        py::gil_scoped_release release;
        active_kernels().loss_backward(args, threads);
    });

    m.def("reverse_step", [](const ShapeTuple& s, int64_t groups, const ImageTuple& x, const ImageTuple& output,
                             const ImageTuple& x0_previous, uintptr_t table, int64_t rows, uintptr_t step,
                             const NoiseTuple& z, const ImageTuple& x_next, const ImageTuple& x0,
                             const ImageTuple& x_model, int threads) {
        const int64_t* const index = pointer<const int64_t>(step);
        check_rows(index, 1, rows, "step");
        const ReverseStepArgs args{shape(s), groups, image(x), image(output), image(x0_previous),
                                   pointer<const float>(table) + kStepColumns * *index, noise(z), image(x_next),
                                   image(x0), image(x_model)};
        py::gil_scoped_release release;
        active_kernels().reverse_step(args, threads);
    });
}
