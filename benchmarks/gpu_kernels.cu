// What the measurements need on the device beside the kernels that are measured.
#include <cuda_fp16.h>

// Reads `vectors` sixteen-byte vectors as fast as a plain kernel can; a sum nobody expects is
// written so that the reads are not optimised away.
extern "C" __global__ void __launch_bounds__(512)
    knnmoe_read(const uint4* data, long long vectors, unsigned* sink) {
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    unsigned sum = 0;
    long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; at + 3 * step < vectors; at += 4 * step) {
        const uint4 a = __ldcs(data + at), b = __ldcs(data + at + step);
        const uint4 c = __ldcs(data + at + 2 * step), d = __ldcs(data + at + 3 * step);
        sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; at < vectors; at += step) {
        const uint4 a = __ldcs(data + at);
        sum ^= a.x ^ a.y ^ a.z ^ a.w;
    }
    if (sum == 0x9e3779b9u) *sink = sum;
}

__device__ inline unsigned long long mixed(unsigned long long z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// A standard normal number that depends on its place and the seed alone.
__device__ inline float normal(unsigned long long seed, long long place) {
    const unsigned long long bits = mixed(mixed(seed) + static_cast<unsigned long long>(place));
    const float u = (static_cast<float>(static_cast<unsigned>(bits >> 40)) + 1.0f) * 0x1p-24f;
    const float v = static_cast<float>(static_cast<unsigned>(bits & 0xffffffu)) * 0x1p-24f;
    return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}

__device__ inline float block_reduced(float value, bool largest) {
    __shared__ float partial[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, value, offset);
        value = largest ? fmaxf(value, other) : value + other;
    }
    __syncthreads();
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    float all = partial[0];
    for (int i = 1; i < warps; ++i) all = largest ? fmaxf(all, partial[i]) : all + partial[i];
    return all;
}

// Random rows of length one in every type that is asked for (a null pointer is not), one block a
// row. `scales` [N, 2] belongs to the fp32 and fp16 keys, `scales_i8` to the int8 keys.
extern "C" __global__ void __launch_bounds__(256) knnmoe_unit_rows(
    float* f32, __half* f16, signed char* i8, float* scales, float* scales_i8, int hidden,
    unsigned long long seed) {
    const long long row = blockIdx.x, first = row * hidden;
    float squares = 0, largest = 0;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        const float z = normal(seed, first + i);
        squares = fmaf(z, z, squares);
        largest = fmaxf(largest, fabsf(z));
    }
    const float unit = rsqrtf(block_reduced(squares, false));
    const float step = block_reduced(largest, true) * unit / 127.0f;
    float steps = 0;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        const float z = normal(seed, first + i) * unit;
        if (f32) f32[first + i] = z;
        if (f16) f16[first + i] = __float2half_rn(z);
        const float rounded = rintf(z / step);
        steps = fmaf(rounded, rounded, steps);
        if (i8) i8[first + i] = static_cast<signed char>(rounded);
    }
    const float multiplier = rsqrtf(block_reduced(steps, false));  // makes it of length one, too
    if (threadIdx.x == 0) {
        if (scales) scales[2 * row] = scales[2 * row + 1] = 1.0f;
        if (scales_i8) {
            scales_i8[2 * row] = multiplier;
            scales_i8[2 * row + 1] = 1.0f;
        }
    }
}
