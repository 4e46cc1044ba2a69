// A call of a CPU kernel: what has to hold before it runs, and the memory that it works in.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace ddpm {

// Timesteps and step indices are looked at here, where it costs nothing: a bad one would read outside the table.
inline void check_rows(const int64_t* index, int64_t count, const Table& table, const char* what) {
    for (int64_t i = 0; i < count; ++i)
        if (index[i] < 0 || index[i] >= table.rows)
            throw std::out_of_range(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(index[i]) +
                                    ", outside the table's range 0.." + std::to_string(table.rows - 1));
}

template <class Arguments>
void check(const Arguments&) {}
inline void check(const QSampleArgs& args) { check_rows(args.t, args.shape.samples, args.table, "t"); }
inline void check(const LossArgs& args) { check_rows(args.t, args.shape.samples, args.table, "t"); }
inline void check(const BoundArgs& args) { check_rows(args.t, args.shape.samples, args.table, "t"); }
inline void check(const ReverseStepArgs& args) { check_rows(args.step, 1, args.table, "step"); }
inline void check(const RecordArgs& args) {
    check_rows(args.t, args.losses_count, Table{nullptr, args.shape.samples}, "t");
}

// The memory that a thread's calls work in, kept from call to call: newly mapped, every page of it costs a fault, which
// for a convolution's 10 MiB is 2 ms.
class Workspace {
   public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() { release(); }

    // At least so many bytes, aligned to a cache line. What was in them is lost.
    void* of(int64_t bytes) {
        if (bytes > size_) {
            release();
            const int64_t unit = bytes < kPage ? 64 : kPage, rounded = (bytes + unit - 1) / unit * unit;
            data_ = ::operator new(size_t(rounded), std::align_val_t(unit));
            size_ = rounded;
            unit_ = unit;
#if defined(MADV_HUGEPAGE)
            if (unit == kPage) madvise(data_, size_t(rounded), MADV_HUGEPAGE);  // advice: it may be refused
#endif
        }
        return data_;
    }

   private:
    static constexpr int64_t kPage = int64_t(2) << 20;  // a huge page of most machines
    void* data_ = nullptr;
    int64_t size_ = 0, unit_ = 64;

    void release() {
        if (data_) ::operator delete(data_, std::align_val_t(unit_));
        data_ = nullptr;
        size_ = 0;
    }
};

inline Workspace& workspace() {
    static thread_local Workspace of_this_thread;
    return of_this_thread;
}

// Runs one of the active kernels. Throws std::out_of_range for an index outside of a table.
template <class Arguments>
void call(void (*Kernels::*kernel)(const Arguments&, void*, int), const Arguments& args, int threads) {
    check(args);
    (active_kernels().*kernel)(args, workspace().of(workspace_bytes(args, threads)), threads);
}

}  // namespace ddpm
