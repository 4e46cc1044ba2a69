// The CPU kernels' interface: raw pointers and sizes in, nothing else. Each kernel exists once per instruction set
// (namespaces generic, avx2, avx512); dispatch.cpp picks the best one that the machine can run.
#pragma once

#include "../ops.h"
#include "winograd_layout.h"

namespace ddpm {

constexpr int64_t kRun = 256;     // elements handled at a time; 1 KiB of fp32 a buffer
constexpr int64_t kChunk = 4096;  // elements in a contiguous chunk: the unit of work and of a partial sum

// Room for the partial sums of one sample's loss. Their number is fixed by shape and memory format, never by the
// number of threads, so that a loss has the same bits on one core and on sixty-four.
inline int64_t loss_chunks(const Shape& shape) {
    const int64_t planar = (shape.positions + kRun - 1) / kRun;
    const int64_t contiguous = (shape.elements() + kChunk - 1) / kChunk;
    return planar > contiguous ? planar : contiguous;
}

// The channels of a sample that a group norm handles at a time, whole groups: all of them, or as few parts as give
// every thread its share. A multiple of 16 channels if the groups allow it, so that no two threads write to one cache
// line. No result depends on it.
constexpr int64_t kNormStrip = 64;  // channels whose pixels are converted to fp32 together
inline int64_t group_norm_width(const GroupNorm& norm, int threads) {
    const int64_t channels = norm.shape.channels, group = channels / norm.groups, samples = norm.shape.samples;
    int64_t least = group;
    while (least % 16 && least + group <= kNormStrip) least += group;
    const int64_t most = (channels + least - 1) / least;
    int64_t parts = 1;
    while (parts < most && samples * parts % threads && samples * parts < 8 * int64_t(threads)) ++parts;
    return (most + parts - 1) / parts * least;
}

// The memory that a kernel works in, in bytes: none, or the overload for its arguments. It is aligned to 64 bytes.
template <class Arguments>
int64_t workspace_bytes(const Arguments&, int /*threads*/) {
    return 0;
}
// A partial sum (double) for each sample and chunk, written by one thread; they are added in order. The bound has two.
inline int64_t workspace_bytes(const LossArgs& args, int) { return 8 * args.shape.samples * loss_chunks(args.shape); }
inline int64_t workspace_bytes(const BoundArgs& args, int) {
    return 2 * 8 * args.shape.samples * loss_chunks(args.shape);
}
// For each thread what it keeps of each of a unit's channels, and floats of each of its pixels; in bytes, and a
// multiple of a cache line.
constexpr int64_t kNormKept = 4 * 8 + 3 * 8 + 4 * 4;
inline int64_t group_norm_scratch(const GroupNorm& norm, int threads, int64_t floats) {
    return (group_norm_width(norm, threads) * (kNormKept + 4 * floats) + 63) / 64 * 64;
}
// How many for the gradient by what SiLU is given: dx holds it where that is fp32.
inline int64_t group_norm_kept_g(const GroupNorm& norm) { return norm.dtype == DType::f32 ? 0 : norm.shape.positions; }
inline int64_t workspace_bytes(const GroupNormArgs& args, int threads) {
    return threads * group_norm_scratch(args.norm, threads, 0);
}
inline int64_t workspace_bytes(const GroupNormBackwardArgs& args, int threads) {
    return threads * group_norm_scratch(args.norm, threads, group_norm_kept_g(args.norm));
}

// The kernels for one instruction set.
struct Kernels {
    const char* isa;
#define DDPM_FIELD(name, Arguments) void (*name)(const Arguments&, void* workspace, int threads);
    DDPM_CPU_OPS(DDPM_FIELD)
#undef DDPM_FIELD
};

// Names of the instruction sets this machine can run, slowest first; null-terminated.
const char* const* runnable_isas();
// The kernels in use: the fastest runnable ones unless use_isa() chose others. Returns false for an unknown name.
const Kernels& active_kernels();
bool use_isa(const char* name);
// Whether libraries multiply bf16 matrices in units of their own here.
bool has_matrix_units();

#define DDPM_DECLARE(name, Arguments) void name(const Arguments&, void* workspace, int threads);
namespace generic {
DDPM_CPU_OPS(DDPM_DECLARE)
}
namespace avx2 {
DDPM_CPU_OPS(DDPM_DECLARE)
}
namespace avx512 {
DDPM_CPU_OPS(DDPM_DECLARE)
}
#undef DDPM_DECLARE

}  // namespace ddpm
