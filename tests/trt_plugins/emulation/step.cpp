// The kernels of step.cu as a shared library for ctypes, on the emulated machine.
#include <cstddef>
#include <cstdio>
#include <cstring>

#define KNNMOE_EMULATION
#include "step.cu"

namespace {

template <typename Params>
struct Entry {
    const char* name;
    void (*kernel)(Params);
};

#define KNNMOE_ENTRY(kernel, params, ...) {#kernel, kernel},
const Entry<knnmoe::RouteParams> kRoutes[] = {KNNMOE_EVERY_ROUTE_KERNEL(KNNMOE_ENTRY)};

template <typename Params>
const char* run(
    void (*kernel)(Params), const void* params, int grid_x, int grid_y, int threads, int schedule,
    unsigned seed) {
    return emulation::launch<Params>(
        kernel, *static_cast<const Params*>(params), grid_x, grid_y, threads, 0,
        static_cast<emulation::Schedule>(schedule), seed);
}

}  // namespace

extern "C" {

// Offsets of the fields of RouteParams, CachePair and AppendParams, each with its size at the end.
int knnmoe_step_layout(long long* offsets) {
    using R = knnmoe::RouteParams;
    using C = knnmoe::CachePair;
    using A = knnmoe::AppendParams;
    const size_t all[] = {
        offsetof(R, rows), offsetof(R, expert_ids), offsetof(R, expert_weights),
        offsetof(R, assignments), offsetof(R, selection_bias), offsetof(R, tokens),
        offsetof(R, experts), offsetof(R, columns), offsetof(R, top_k), offsetof(R, renormalize),
        offsetof(R, score), offsetof(R, groups), offsetof(R, top_groups), offsetof(R, group_sum),
        offsetof(R, scale), sizeof(R),
        offsetof(C, cache), offsetof(C, fresh), offsetof(C, capacity), offsetof(C, heads),
        offsetof(C, row_bytes), offsetof(C, unit), offsetof(C, reserved), sizeof(C),
        offsetof(A, past_lengths), offsetof(A, sequences), offsetof(A, fresh_rows),
        offsetof(A, pairs), sizeof(A)};
    int count = 0;
    for (size_t offset : all) offsets[count++] = static_cast<long long>(offset);
    return count;
}

// Runs one launch; returns what went wrong, or null.
const char* knnmoe_step_run(
    const char* name, const void* params, int grid_x, int grid_y, int threads, int schedule,
    unsigned seed) {
    for (const auto& entry : kRoutes)
        if (std::strcmp(name, entry.name) == 0)
            return run(entry.kernel, params, grid_x, grid_y, threads, schedule, seed);
    if (std::strcmp(name, "knnmoe_step_append") == 0)
        return run(knnmoe_step_append, params, grid_x, grid_y, threads, schedule, seed);
    return "no such kernel";
}

// As that of blend.cpp, for hosts that take either.
const char* knnmoe_launch(
    const char* name, const void* params, int grid_x, int grid_y, int threads,
    long long shared_bytes) {
    if (shared_bytes != 0) return "these kernels take no shared memory";
    return knnmoe_step_run(name, params, grid_x, grid_y, threads, emulation::kForward, 0);
}
}
