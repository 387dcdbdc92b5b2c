// The kernels as a shared library for ctypes: the same sources, on the emulated machine.
#include <cstddef>
#include <cstdio>
#include <cstring>

#define KNNMOE_EMULATION
#include "knn_blend.cu"
#include "plan.h"

namespace {

using Kernel = void (*)(knnmoe::BlendParams);

Kernel find_kernel(const char* name) {
#define KNNMOE_FIND(kernel, warps, blocks, ...) \
    if (std::strcmp(name, #kernel) == 0) return kernel;
    KNNMOE_EVERY_KERNEL(KNNMOE_FIND)
    return nullptr;
}

}  // namespace

extern "C" {

void knnmoe_plan(
    const knnmoe::Problem* problem, const knnmoe::Device* device, knnmoe::Plan* plan) {
    *plan = knnmoe::make_plan(*problem, *device);
}

// Offsets of the fields of BlendParams, then its size.
int knnmoe_params_layout(long long* offsets) {
    using P = knnmoe::BlendParams;
    const size_t all[] = {
        offsetof(P, x), offsetof(P, r), offsetof(P, keys), offsetof(P, key_scales),
        offsetof(P, scan_keys), offsetof(P, scan_scales), offsetof(P, values),
        offsetof(P, evidence_weights), offsetof(P, n_valid), offsetof(P, k), offsetof(P, center), offsetof(P, calibration),
        offsetof(P, state), offsetof(P, lengths), offsetof(P, rows), offsetof(P, state_out),
        offsetof(P, confidence), offsetof(P, neighbors),
        offsetof(P, similarities), offsetof(P, workspace), offsetof(P, ticket),
        offsetof(P, capacity),
        offsetof(P, tokens), offsetof(P, sequences), offsetof(P, hidden), offsetof(P, experts),
        offsetof(P, columns), offsetof(P, candidates), offsetof(P, splits), offsetof(P, rbf),
        offsetof(P, half_values), sizeof(P)};
    int count = 0;
    for (size_t offset : all) offsets[count++] = static_cast<long long>(offset);
    return count;
}

// For kernels whose barriers were numbered: the one to leave out, or -1.
void knnmoe_leave_out(int barrier) { emulation::machine.left_out = barrier; }

// Bytes of keys read by vector loads since the last call.
long knnmoe_streamed_bytes() {
    const long bytes = 16 * emulation::machine.streamed;
    emulation::machine.streamed = 0;
    return bytes;
}

// Runs one launch; returns what went wrong, or null.
const char* knnmoe_launch(
    const char* name, const knnmoe::BlendParams* params, int grid_x, int grid_y, int threads,
    long long shared_bytes) {
    const Kernel kernel = find_kernel(name);
    if (!kernel) return "no such kernel";
    return emulation::launch<knnmoe::BlendParams>(
        kernel, *params, grid_x, grid_y, threads, static_cast<size_t>(shared_bytes),
        emulation::kForward, 0);
}

// Runs a plan's launches one after the other; returns what went wrong, or null.
const char* knnmoe_run(
    const knnmoe::Plan* plan, const knnmoe::BlendParams* params, int schedule, unsigned seed) {
    for (int i = 0; i < plan->launch_count; ++i) {
        const knnmoe::Launch& l = plan->launches[i];
        const Kernel kernel = find_kernel(l.kernel);
        if (!kernel) return "no such kernel";
        const char* error = emulation::launch<knnmoe::BlendParams>(
            kernel, *params, l.grid_x, l.grid_y, l.threads, static_cast<size_t>(l.shared_bytes),
            static_cast<emulation::Schedule>(schedule), seed + static_cast<unsigned>(i));
        if (error) return error;
    }
    return nullptr;
}
}
