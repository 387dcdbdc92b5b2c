// Every kernel, by the name under which a host finds it (see plan.h and plan.py).
//
// Hosts: nvcc links this file into the TensorRT plugin, NVRTC compiles it for CuPy, and the tests
// include it on a CPU. The second number of __launch_bounds__ is how many blocks an SM should hold:
// what keeps enough loads in flight (decode), or what the registers allow (prefill).
#include "rescore.cuh"

namespace knnmoe {

using MmaF16x8 = MmaTile<__half, 1, 2>;
using MmaF16x16 = MmaTile<__half, 2, 2>;
using MmaI8x8 = MmaTile<signed char, 1, 2>;
using MmaI8x16 = MmaTile<signed char, 2, 2>;
using PrefillF32 = FmaTile<float, 8>;
using PrefillF16 = MmaTile<__half, 4, 4>;
using PrefillI8 = MmaTile<signed char, 4, 4>;

}  // namespace knnmoe

#define KNNMOE_KERNEL(name, warps, blocks, ...)                               \
    extern "C" __global__ void __launch_bounds__((warps) * knnmoe::kLanes, blocks) \
        name(const __grid_constant__ knnmoe::BlendParams p) {                 \
        knnmoe::__VA_ARGS__(p);                                               \
    }

#define KNNMOE_EVERY_KERNEL(X)                                                                   \
    X(knnmoe_decode_f32_1, knnmoe::kWarps, 3, decode<knnmoe::FmaTile<float, 1>>)                 \
    X(knnmoe_decode_f32_2, knnmoe::kWarps, 2, decode<knnmoe::FmaTile<float, 2>>)                 \
    X(knnmoe_decode_f32_4, knnmoe::kWarps, 1, decode<knnmoe::FmaTile<float, 4>>)                 \
    X(knnmoe_decode_f16_1, knnmoe::kWarps, 3, decode<knnmoe::FmaTile<__half, 1>>)                \
    X(knnmoe_decode_f16_2, knnmoe::kWarps, 2, decode<knnmoe::FmaTile<__half, 2>>)                \
    X(knnmoe_decode_f16_4, knnmoe::kWarps, 2, decode<knnmoe::FmaTile<__half, 4>>)                \
    X(knnmoe_decode_f16_8, knnmoe::kWarps, 2, decode<knnmoe::MmaF16x8>)                          \
    X(knnmoe_decode_f16_16, knnmoe::kWarps, 2, decode<knnmoe::MmaF16x16>)                        \
    X(knnmoe_decode_i8_1, knnmoe::kWarps, 3, decode<knnmoe::FmaTile<signed char, 1>>)            \
    X(knnmoe_decode_i8_2, knnmoe::kWarps, 2, decode<knnmoe::FmaTile<signed char, 2>>)            \
    X(knnmoe_decode_i8_8, knnmoe::kWarps, 2, decode<knnmoe::MmaI8x8>)                            \
    X(knnmoe_decode_i8_16, knnmoe::kWarps, 2, decode<knnmoe::MmaI8x16>)                          \
    X(knnmoe_decode_two_stage_f32, knnmoe::kWarps, 3, decode_two_stage<float>)                   \
    X(knnmoe_decode_two_stage_f16, knnmoe::kWarps, 3, decode_two_stage<__half>)                  \
    X(knnmoe_decode_rescore_f32, knnmoe::kWarps, 2, decode_rescore<float>)                       \
    X(knnmoe_decode_rescore_f16, knnmoe::kWarps, 2, decode_rescore<__half>)                      \
    X(knnmoe_prefill_prepare_f32, knnmoe::kFinishWarps, 1, prefill_prepare<knnmoe::PrefillF32>)  \
    X(knnmoe_prefill_prepare_f16, knnmoe::kFinishWarps, 1, prefill_prepare<knnmoe::PrefillF16>)  \
    X(knnmoe_prefill_prepare_i8, knnmoe::kFinishWarps, 1, prefill_prepare<knnmoe::PrefillI8>)    \
    X(knnmoe_prefill_scan_f32, knnmoe::kPrefillWarps, 2, prefill_scan<knnmoe::PrefillF32>)       \
    X(knnmoe_prefill_scan_f16, knnmoe::kPrefillWarps, 2, prefill_scan<knnmoe::PrefillF16>)       \
    X(knnmoe_prefill_scan_i8, knnmoe::kPrefillWarps, 2, prefill_scan<knnmoe::PrefillI8>)         \
    X(knnmoe_prefill_merge, knnmoe::kFinishWarps, 1, prefill_merge)                              \
    X(knnmoe_prefill_rescore_f32, knnmoe::kWarps, 2, prefill_rescore<float>)                     \
    X(knnmoe_prefill_rescore_f16, knnmoe::kWarps, 2, prefill_rescore<__half>)                    \
    X(knnmoe_prefill_gate, knnmoe::kFinishWarps, 1, prefill_gate)                                \
    X(knnmoe_prefill_finish, knnmoe::kFinishWarps, 1, prefill_finish)

KNNMOE_EVERY_KERNEL(KNNMOE_KERNEL)
