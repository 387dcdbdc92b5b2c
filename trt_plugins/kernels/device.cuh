// The few things a kernel asks of the machine itself, so that the rest is plain C++.
//
// With KNNMOE_EMULATION the same kernels run on a CPU (tests/trt_plugins/emulation); its header
// then supplies what the CUDA compiler would, and the two functions in PTX below.
#pragma once

#include <cuda_fp16.h>

#ifdef KNNMOE_EMULATION
#include "emulation.h"
#else
#define KNNMOE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include "params.cuh"

namespace knnmoe {

constexpr int kLanes = 32;
constexpr unsigned kEveryLane = 0xffffffffu;

#ifdef KNNMOE_EMULATION
using emulation::load_stream;
using emulation::multiply_fragments;
using emulation::prefetch;
#else
// Sixteen bytes that are read once: kept out of L1, where the queries are. Volatile, as is the
// product below, so that loads stay where they are written: many of them before the first use.
__device__ inline uint4 load_stream(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// Asks for a line of 128 bytes to be brought to L2, and does not wait for it.
__device__ inline void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// d += a·b on a tensor core: a is 16×16 fp16, b is 16×8 fp16, d is 16×8 fp32.
__device__ inline void multiply_fragments(
    float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

__device__ inline int lane_index() { return threadIdx.x % kLanes; }
__device__ inline int warp_index() { return threadIdx.x / kLanes; }

__device__ inline float warp_max(float v) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        v = fmaxf(v, __shfl_xor_sync(kEveryLane, v, offset));
    return v;
}

__device__ inline float warp_sum(float v) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        v += __shfl_xor_sync(kEveryLane, v, offset);
    return v;
}

// The sums over a warp of COUNT values at once. Lane l gets that of value l / (32 / COUNT).
// Each step halves the values a lane still carries, so COUNT sums cost little more than one.
template <int COUNT>
__device__ inline float warp_sums(float (&values)[COUNT]) {
    static_assert(COUNT > 0 && COUNT <= kLanes && (COUNT & (COUNT - 1)) == 0, "a power of two");
#pragma unroll
    for (int offset = kLanes / 2, count = COUNT; offset > 0; offset /= 2) {
        const bool upper = lane_index() & offset;
        if (count > 1) {
            count /= 2;
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) {
                if (i < count) {
                    const float given = upper ? values[i] : values[i + count];
                    const float kept = upper ? values[i + count] : values[i];
                    values[i] = kept + __shfl_xor_sync(kEveryLane, given, offset);
                }
            }
        } else {
            values[0] += __shfl_xor_sync(kEveryLane, values[0], offset);
        }
    }
    return values[0];
}

// `count` of a device scalar, within [0, limit].
__device__ inline int clamp_count(long long count, long long limit) {
    return static_cast<int>(count < 0 ? 0 : (count < limit ? count : limit));
}

// Entries that count, and the neighbours taken of them.
__device__ inline int valid_entries(const BlendParams& p) {
    return clamp_count(*p.n_valid, p.capacity);
}

__device__ inline int neighbor_count(const BlendParams& p, int n) {
    return clamp_count(*p.k, n < p.columns ? n : p.columns);
}

// Places in the lists that a scan keeps, and how many of them it fills: with neighbours, or with
// candidates that are scored again.
__device__ inline int list_columns(const BlendParams& p) {
    return p.candidates > 0 ? p.candidates : p.columns;
}

__device__ inline int list_count(const BlendParams& p, int n) {
    if (p.candidates == 0) return neighbor_count(p, n);
    return n < p.candidates ? n : p.candidates;
}

}  // namespace knnmoe
