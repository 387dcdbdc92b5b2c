// Queries as they are compared: centred, and divided by their largest magnitude.
//
// Reads x and center (8·D bytes a token, three times, the last two from cache), writes
// Tile::query_bytes to shared memory (decode) or to the workspace (prefill).
#pragma once

#include "tiles.cuh"

namespace knnmoe {

constexpr float kLargest = 3.402823466e38f;
constexpr float kRbfClip = 1e17f;  // squares of anything larger overflow when summed

template <class Tile, int WARPS>
struct QueryTeams {
    // Warps that work on one token; with more tokens than warps each takes several.
    static constexpr int SIZE = WARPS > Tile::TOKENS ? WARPS / Tile::TOKENS : 1;
    static constexpr int COUNT = WARPS / SIZE;
    static constexpr int SCRATCH = 2 * Tile::TOKENS * SIZE;  // floats of shared memory
};

// By a whole block; the caller synchronises it before anyone reads the result. Tokens that the
// tile has room for but the call lacks are stored as zeros.
template <class Tile, int WARPS>
__device__ inline void prepare_queries(
    const BlendParams& p, int first_token, typename Tile::Query* queries, QueryScale* scales,
    float* scratch) {
    using Teams = QueryTeams<Tile, WARPS>;
    const int team = warp_index() / Teams::SIZE, member = warp_index() % Teams::SIZE;
    const int start = member * kLanes + lane_index(), stride = Teams::SIZE * kLanes;
    const float bound = p.rbf ? kRbfClip : kLargest;
    float* largest = scratch;
    float* squares = scratch + Tile::TOKENS * Teams::SIZE;
    const auto centred = [&](int token, int e) {
        if (first_token + token >= p.tokens || e >= p.hidden) return 0.0f;
        const float x = p.x[static_cast<long long>(first_token + token) * p.hidden + e];
        return fminf(fmaxf(x - p.center[e], -bound), bound);
    };
    const auto largest_of = [&](int token) {
        float most = 0;
        for (int i = 0; i < Teams::SIZE; ++i) most = fmaxf(most, largest[token * Teams::SIZE + i]);
        return most;
    };
    for (int token = team; token < Tile::TOKENS; token += Teams::COUNT) {
        float most = 0;
        for (int e = start; e < p.hidden; e += stride) most = fmaxf(most, fabsf(centred(token, e)));
        most = warp_max(most);
        if (lane_index() == 0) largest[token * Teams::SIZE + member] = most;
    }
    __syncthreads();
    for (int token = team; token < Tile::TOKENS; token += Teams::COUNT) {
        const float most = largest_of(token), divisor = most > 0 ? most : 1;
        float sum = 0;
        for (int e = start; e < Tile::padded(p.hidden); e += stride) {
            const float q = centred(token, e) / divisor;
            sum = fmaf(q, q, sum);
            Tile::store(queries, p.hidden, token, e, q);
        }
        sum = warp_sum(sum);
        if (lane_index() == 0) squares[token * Teams::SIZE + member] = sum;
    }
    __syncthreads();
    for (int token = threadIdx.x; token < Tile::TOKENS; token += WARPS * kLanes) {
        const float most = largest_of(token);
        float sum = 0;
        for (int i = 0; i < Teams::SIZE; ++i) sum += squares[token * Teams::SIZE + i];
        const float norm = sqrtf(sum);
        scales[token] = p.rbf ? QueryScale{most, most * norm * (most * norm)}
                              : QueryScale{norm > 0 ? 1 / norm : 0, 1};
    }
}

}  // namespace knnmoe
