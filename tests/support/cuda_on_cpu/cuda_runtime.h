// As much of CUDA's runtime as csrc/cuda uses, on the CPU. The kernels' own source, compiled by an ordinary C++
// compiler, runs with every block's threads as coroutines. It comes before the real header on the include path, for
// tests on machines without a GPU: they show that indexing, synchronisation and arithmetic are right, and nothing about
// speed.
//
// A thread runs until it meets a barrier or a shuffle; it goes on when its block, or its warp, has met it too. A
// barrier that not all threads meet stops the program. The order in which threads are run turns around every time, so
// that what is read without a barrier after it was written is seen by one of the two orders.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define CUDART_VERSION 0

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    void* attrs = nullptr;
    unsigned numAttrs = 0;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid configuration" : "no error"; }

namespace cuda_on_cpu {

constexpr size_t kStack = 256 * 1024;

enum class State { running, at_barrier, at_shuffle, done };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::running;
    float given = 0.0f, received = 0.0f;
    unsigned from = 0;  // the lane it receives from
};

struct Machine {
    dim3 thread, block, block_size, grid;
    ucontext_t scheduler;
    std::vector<std::unique_ptr<Thread>> threads;
    std::function<void()> kernel;
    unsigned current = 0;
    bool backwards = false;
};

inline Machine& machine() {
    static Machine made;
    return made;
}

inline void wait(State state) {
    Machine& m = machine();
    const unsigned self = m.current;
    m.threads[self]->state = state;
    swapcontext(&m.threads[self]->context, &m.scheduler);
}

inline void enter() {
    machine().kernel();
    wait(State::done);
}

inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
}

// Lets those go on whose block or warp has met them. False if all threads are done.
inline bool release(unsigned count) {
    Machine& m = machine();
    unsigned live = 0, waiting = 0;
    bool moved = false;
    for (unsigned first = 0; first < count; first += 32) {
        unsigned lanes = 0, shuffling = 0;
        for (unsigned i = first; i < first + 32 && i < count; ++i) {
            lanes += m.threads[i]->state != State::done;
            shuffling += m.threads[i]->state == State::at_shuffle;
            waiting += m.threads[i]->state == State::at_barrier;
        }
        live += lanes;
        if (!shuffling || shuffling != lanes) continue;
        if (lanes != 32) fail("a shuffle of all 32 lanes that not all of them meet");
        for (unsigned i = first; i < first + 32; ++i)
            m.threads[i]->received = m.threads[first + m.threads[i]->from]->given;
        for (unsigned i = first; i < first + 32; ++i) m.threads[i]->state = State::running;
        moved = true;
    }
    if (live && waiting == live) {
        for (unsigned i = 0; i < count; ++i)
            if (m.threads[i]->state == State::at_barrier) m.threads[i]->state = State::running;
        moved = true;
    }
    if (live && !moved) fail("a barrier or shuffle that some threads never meet");
    return live > 0;
}

inline void run_block(unsigned count) {
    Machine& m = machine();
    while (m.threads.size() < count) m.threads.emplace_back(new Thread);
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = *m.threads[i];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
        thread.state = State::running;
    }
    do {
        m.backwards = !m.backwards;
        for (unsigned k = 0; k < count; ++k) {
            const unsigned i = m.backwards ? count - 1 - k : k;
            if (m.threads[i]->state != State::running) continue;
            m.current = i;
            m.thread = dim3(i, 0, 0);
            swapcontext(&m.scheduler, &m.threads[i]->context);
        }
    } while (release(count));
}

}  // namespace cuda_on_cpu

inline const dim3& threadIdx = cuda_on_cpu::machine().thread;
inline const dim3& blockIdx = cuda_on_cpu::machine().block;
inline const dim3& blockDim = cuda_on_cpu::machine().block_size;
inline const dim3& gridDim = cuda_on_cpu::machine().grid;

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    cuda_on_cpu::Machine& m = cuda_on_cpu::machine();
    const unsigned threads = config->blockDim.x;
    const dim3 grid = config->gridDim;
    if (!threads || threads > 1024 || !grid.x || !grid.y || grid.x > 0x7FFFFFFF || grid.y > 65535)
        return cudaErrorInvalidConfiguration;
    m.block_size = config->blockDim;
    m.grid = grid;
    m.kernel = [=] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            m.block = dim3(x, y);
            cuda_on_cpu::run_block(threads);
        }
    return cudaSuccess;
}

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_barrier); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
    cuda_on_cpu::Machine& m = cuda_on_cpu::machine();
    cuda_on_cpu::Thread& self = *m.threads[m.current];
    self.given = value;
    self.from = m.current % 32 ^ unsigned(lanes);
    cuda_on_cpu::wait(cuda_on_cpu::State::at_shuffle);
    return self.received;
}
