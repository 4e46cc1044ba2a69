// The ops: what the kernels are given, on the CPU and on the GPU alike, and at the end the table of all ops. Everything
// is raw pointers and sizes, which whoever calls has checked. Python passes a struct as a tuple of its fields, in their
// order (python.h); ddpm_fast/ops/backends/extension.py makes the tuples.
#pragma once

#include "storage.h"

namespace ddpm {

// A tensor [N, C, ...]: dense, either contiguous or channels_last.
struct Image {
    void* data;
    DType dtype;
    bool channels_last;
};

struct Shape {
    int64_t samples, channels, positions;  // positions: the product of the trailing dimensions
    DDPM_METHOD int64_t elements() const { return channels * positions; }
};

// The shape of an output [N, groups * C, ...] that goes with an image [N, C, ...].
DDPM_FN Shape widened(const Shape& shape, int64_t groups) {
    return Shape{shape.samples, groups * shape.channels, shape.positions};
}

DDPM_FN bool channels_last(const Image& image) { return image.data && image.channels_last; }

// Noise is either given (data != nullptr) or drawn from its counter.
struct Noise {
    Image given;
    const int64_t* seed;       // [1]
    const int64_t* sample_id;  // [N]
    const int64_t* step;       // [1]
    uint32_t stream;
};

// A table's rows. For an index outside of it the CPU raises an error and a GPU kernel, which cannot, gives NaN.
struct Table {
    const float* entries;  // [rows, columns]
    int64_t rows;
};

struct NormalArgs {
    Shape shape;
    Noise noise;
    Image out;
};

struct QSampleArgs {
    Shape shape;
    Image x0;
    const int64_t* t;  // [N]
    Table table;       // 2 columns
    Noise noise;
    Image out;
};

struct LossArgs {
    Shape shape;
    Image output, x0;
    const int64_t* t;  // [N]
    Table table;       // 3 columns
    Noise noise;
    Image residual;  // data == nullptr: not wanted
    float* loss;     // [N]
};

struct LossBackwardArgs {
    Shape shape;
    Image stored;        // what the loss's forward left
    int64_t groups;      // of channels, each with its factor
    const float* scale;  // [N, groups]
    Image grad;
};

struct BoundArgs {
    Shape shape;     // of x_0
    int64_t groups;  // 2: the output's second group of channels sets the variance; 1: it has none
    Image output, x0;
    const int64_t* t;  // [N]
    Table table;       // 9 columns for vlb_terms, 11 for hybrid_loss
    Noise noise;
    Image gradient;  // shaped like the output; data == nullptr: not wanted
    float* loss;     // [N]: L_hybrid, or the bound's term in bits/dim
    float* mse_x0;   // [N]: of vlb_terms alone
    float* factors;  // [N, groups]: what makes the loss's gradient of `gradient`
};

struct ReverseStepArgs {
    Shape shape;     // of x
    int64_t groups;  // of C channels in the output
    Image x, output;
    Image x0_previous;    // data == nullptr: none
    Table table;          // 8 columns
    const int64_t* step;  // [1]: the row
    Noise noise;
    Image x_next;
    Image x0, x_model;  // data == nullptr: not wanted
};

// What a training step draws: draws.h. The shape's samples are the batch's; the noise is a key, its stream the
// timesteps'.
struct DrawArgs {
    Shape shape;
    Noise noise;
    int64_t timesteps;                 // T
    int64_t parts;                     // N: sample id i draws from the (i mod N)-th of N equal parts of 0..T-1; 0: all
    const double* probabilities;       // [T]; nullptr: uniform
    const double* cumulative;          // [T]: their sums
    const int64_t* network_timesteps;  // [T]: the network's name for each timestep; nullptr: none
    const int64_t* labels;             // [N]; nullptr: none
    uint32_t label_stream;
    int64_t dropped;  // of 2^24 labels, how many become null_label
    int64_t null_label;
    int64_t* t;            // [N]
    float* weights;        // [N]
    int64_t* network_t;    // [N]
    int64_t* kept_labels;  // [N]
};

// Losses that are remembered: draws.h. The shape's samples are the timesteps and its channels the losses of each.
struct RecordArgs {
    Shape shape;
    float* history;   // [T, slots]: a timestep's loss number k, counted from 0, is in slot k % slots
    int64_t* counts;  // [T]: how many there were
    int64_t losses_count;
    const int64_t* t;     // [losses_count]
    const float* losses;  // [losses_count]
};

// out = x with some elements at 0 and the others times `scale`: dropout.h.
struct DropoutArgs {
    Shape shape;
    Image x;
    const int64_t* seed;       // [1]
    const int64_t* sample_id;  // [N]
    uint32_t layer, stream;
    uint32_t dropped;  // of 2^16 elements
    float scale;
    Image out;
};

// A 3x3 convolution by Winograd's F(4x4, 3x3), stride 1 and padding 1; images are [N, H, W, channels] and contiguous.
struct WinogradArgs {
    int64_t samples, height, width, channels, out_channels;
    DType dtype;  // of image and out
    const void* image;
    const float* filters;  // transformed: [panels of 32 output channels, 36 points, channels, 32]
    const float* bias;     // [out_channels]; nullptr: none
    void* out;
};

// The filters as WinogradArgs takes them. The strides are those of the weight [out_channels, channels, 3, 3], in
// elements; those of the rows and columns are negative, and `weight` points at the last tap, where filters are turned.
struct WinogradFiltersArgs {
    int64_t out_channels, channels;
    DType dtype;
    const void* weight;
    int64_t out_stride, channel_stride, row_stride, column_stride;
    float* filters;
};

// The gradient by the weight of the same convolution. Images are those of WinogradArgs.
struct WinogradWeightArgs {
    int64_t samples, height, width, channels, out_channels;
    DType dtype;  // of image and grad
    const void* image;
    const void* grad;
    float* weight;  // [out_channels, 3, 3, channels]
};

// A number for each sample and channel [N, C], or (with the first stride 0) for each channel; data == nullptr: none.
struct Rows {
    const void* data;
    DType dtype;
    int64_t sample_stride, channel_stride;
};

// What a group norm's forward and backward have in common. Images are channels_last and of one dtype; data of those
// that are missing is nullptr. The norm is of v = x + residual + added, and behind it of the channels of joined.
struct GroupNorm {
    Shape shape;         // of y: with the channels of joined
    int64_t x_channels;  // the first of them, which are x's
    int64_t groups;
    bool silu;
    DType dtype;
    const void *x, *residual, *joined;
    Rows weight, bias, scale, shift, added;
    float* statistics;  // [N, groups, 3]: the mean in two parts, 1/sqrt(variance + eps); the forward writes them
};

struct GroupNormArgs {
    GroupNorm norm;
    double eps;
    void *y, *total;  // total: v, rounded (then y is made of it); nullptr: not wanted
};

struct GroupNormBackwardArgs {
    GroupNorm norm;  // without residual; x is the total where one was kept
    const void *grad, *grad_total;
    void *dx, *djoined;
    float* sums;  // [3, N, C]: over pixels, of g (dL/dy before SiLU), of g times the normalised v, and of dL/dv
};

struct GroupNormParametersArgs {
    int64_t samples, channels;
    const float* sums;         // [2, N, C] at least: those of group_norm_backward
    Rows weight, bias, scale;  // scale: without data, there is none
    float *dweight, *dbias;    // [C]
    float *dscale, *dshift;    // [N, C]; nullptr: not wanted
};

// out = x + residual + bias, of channels_last images of one dtype.
struct AddBiasArgs {
    Shape shape;
    DType dtype;
    const void *x, *residual;  // residual: nullptr: none
    Rows bias;
    void* out;
};

struct ChannelSumsArgs {
    Shape shape;
    DType dtype;
    const void* image;  // channels_last
    float* out;         // [C]: over samples and positions
};

}  // namespace ddpm

// Every op once: X(name, arguments). The kernels' declarations, the choice of an instruction set and the exports to
// Python are made from this table. The kernels are
//     void name(const Arguments&, void* workspace, int threads)         one for each instruction set: cpu/kernels.h
//     int name(const Arguments&, float* workspace, void* stream)        cuda/kernels.h
#define DDPM_OPS(X)                    \
    X(normal, NormalArgs)              \
    X(q_sample, QSampleArgs)           \
    X(diffusion_loss, LossArgs)        \
    X(hybrid_loss, BoundArgs)          \
    X(vlb_terms, BoundArgs)            \
    X(loss_backward, LossBackwardArgs) \
    X(reverse_step, ReverseStepArgs)   \
    X(draw_timesteps, DrawArgs)        \
    X(record_losses, RecordArgs)       \
    X(dropout, DropoutArgs)

// The network's besides: the CPU's, and the GPU's. A GPU's convolutions are its libraries', and the CPU's sums torch's.
#define DDPM_CPU_OPS(X)                             \
    DDPM_OPS(X)                                     \
    X(winograd, WinogradArgs)                       \
    X(winograd_filters, WinogradFiltersArgs)        \
    X(winograd_weight_gradient, WinogradWeightArgs) \
    X(group_norm, GroupNormArgs)                    \
    X(group_norm_backward, GroupNormBackwardArgs)   \
    X(group_norm_parameters, GroupNormParametersArgs)

#define DDPM_CUDA_NETWORK_OPS(X)                      \
    X(group_norm, GroupNormArgs)                      \
    X(group_norm_backward, GroupNormBackwardArgs)     \
    X(group_norm_parameters, GroupNormParametersArgs) \
    X(add_bias, AddBiasArgs)                          \
    X(channel_sums, ChannelSumsArgs)

#define DDPM_CUDA_OPS(X) \
    DDPM_OPS(X)          \
    DDPM_CUDA_NETWORK_OPS(X)
