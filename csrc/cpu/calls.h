// A call of a CPU kernel: what has to hold before it runs, and the memory that it works in.
#pragma once

#include <memory>
#include <new>
#include <stdexcept>
#include <string>

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

// Runs one of the active kernels. Throws std::out_of_range for an index outside of a table.
template <class Arguments>
void call(void (*Kernels::*kernel)(const Arguments&, void*, int), const Arguments& args, int threads) {
    check(args);
    struct alignas(64) CacheLine {
        char bytes[64];
    };
    const int64_t bytes = workspace_bytes(args, threads);
    const std::unique_ptr<CacheLine[]> workspace(bytes ? new CacheLine[(bytes + 63) / 64] : nullptr);
    (active_kernels().*kernel)(args, workspace.get(), threads);
}

}  // namespace ddpm
