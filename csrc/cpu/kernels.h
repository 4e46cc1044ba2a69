// The CPU kernels' interface: raw pointers and sizes in, nothing else. Each kernel exists once per instruction set
// (namespaces generic, avx2, avx512); dispatch.cpp picks the best one that the machine can run.
#pragma once

#include "../storage.h"

namespace ddpm {

constexpr int64_t kRun = 256;    // elements handled at a time; 1 KiB of fp32 a buffer
constexpr int64_t kChunk = 4096;  // elements in a contiguous chunk: the unit of work and of a partial sum

// A tensor [N, C, ...]: dense, either contiguous or channels_last.
struct Image {
    void* data;
    DType dtype;
    bool channels_last;
};

struct Shape {
    int64_t samples, channels, positions;  // positions: the product of the trailing dimensions
    int64_t elements() const { return channels * positions; }
};

inline bool channels_last(const Image& image) { return image.data && image.channels_last; }

// Noise is either given (data != nullptr) or drawn from its counter.
struct Noise {
    Image given;
    const int64_t* seed;       // [1]
    const int64_t* sample_id;  // [N]
    const int64_t* step;       // [1]
    uint32_t stream;
};

struct NormalArgs {
    Shape shape;
    Noise noise;
    Image out;
};

struct QSampleArgs {
    Shape shape;
    Image x0;
    const int64_t* t;    // [N]
    const float* table;  // [T, 2]
    Noise noise;
    Image out;
};

struct LossArgs {
    Shape shape;
    Image output, x0;
    const int64_t* t;    // [N]
    const float* table;  // [T, 3]
    Noise noise;
    Image residual;      // data == nullptr: not wanted
    float* loss;         // [N]
    double* partial;     // [N, loss_chunks(shape)]: one writer a slot, summed in order
};

// Room for the partial sums of one sample's loss. Their number is fixed by shape and memory format, never by the
// number of threads, so that a loss has the same bits on one core and on sixty-four.
inline int64_t loss_chunks(const Shape& shape) {
    const int64_t planar = (shape.positions + kRun - 1) / kRun;
    const int64_t contiguous = (shape.elements() + kChunk - 1) / kChunk;
    return planar > contiguous ? planar : contiguous;
}

struct LossBackwardArgs {
    Shape shape;
    Image stored;        // what the loss's forward left
    int64_t groups;      // of channels, each with its factor
    const float* scale;  // [N, groups]
    Image grad;
};

struct BoundArgs {
    Shape shape;         // of x_0
    int64_t groups;      // 2: the output's second group of channels sets the variance; 1: it has none
    Image output, x0;
    const int64_t* t;    // [N]
    const float* table;  // [T, 9] for vlb_terms, [T, 11] for hybrid_loss
    Noise noise;
    Image gradient;      // shaped like the output; data == nullptr: not wanted
    float* loss;         // [N]: L_hybrid, or the bound's term in bits/dim
    float* mse_x0;       // [N]: of vlb_terms alone
    float* factors;      // [N, groups]: what makes the loss's gradient of `gradient`
    double* partial;     // [N, loss_chunks(shape), 2]
};

struct ReverseStepArgs {
    Shape shape;         // of x
    int64_t groups;      // of C channels in the output
    Image x, output;
    Image x0_previous;   // data == nullptr: none
    const float* row;    // this step's row of the table, [8]
    Noise noise;
    Image x_next;
    Image x0, x_model;   // data == nullptr: not wanted
};

struct Kernels {
    const char* isa;
    void (*normal)(const NormalArgs&, int threads);
    void (*q_sample)(const QSampleArgs&, int threads);
    void (*diffusion_loss)(const LossArgs&, int threads);
    void (*hybrid_loss)(const BoundArgs&, int threads);
    void (*vlb_terms)(const BoundArgs&, int threads);
    void (*loss_backward)(const LossBackwardArgs&, int threads);
    void (*reverse_step)(const ReverseStepArgs&, int threads);
};

// Names of the instruction sets this machine can run, slowest first; null-terminated.
const char* const* runnable_isas();
// The kernels in use: the fastest runnable ones unless use_isa() chose others. Returns false for an unknown name.
const Kernels& active_kernels();
bool use_isa(const char* name);

#define DDPM_DECLARE_KERNELS(isa)                                        \
    namespace isa {                                                      \
    void normal(const NormalArgs&, int threads);                         \
    void q_sample(const QSampleArgs&, int threads);                      \
    void diffusion_loss(const LossArgs&, int threads);                   \
    void hybrid_loss(const BoundArgs&, int threads);                     \
    void vlb_terms(const BoundArgs&, int threads);                       \
    void loss_backward(const LossBackwardArgs&, int threads);            \
    void reverse_step(const ReverseStepArgs&, int threads);              \
    }
DDPM_DECLARE_KERNELS(generic)
DDPM_DECLARE_KERNELS(avx2)
DDPM_DECLARE_KERNELS(avx512)
#undef DDPM_DECLARE_KERNELS

}  // namespace ddpm
