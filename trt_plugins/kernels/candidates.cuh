// The K best so far: sorted lists of at most 64 candidates that a warp keeps together.
//
// A candidate is one 64-bit number that orders as the method asks: by score, ties by lower entry.
// A list lives in shared memory (8·K bytes), best first; 0 is no candidate. Testing a candidate
// against the list costs one comparison; the rare insertion, one read and one write of the list.
#pragma once

#include "device.cuh"

namespace knnmoe {

constexpr Candidate kNone = 0;

__device__ inline Candidate make_candidate(float score, int entry) {
    const unsigned bits = __float_as_uint(score + 0.0f);  // +0 and -0 are one score
    const unsigned ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return static_cast<Candidate>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(entry));
}

__device__ inline int candidate_entry(Candidate c) {
    return static_cast<int>(0xffffffffu - static_cast<unsigned>(c));
}

__device__ inline float candidate_score(Candidate c) {
    const unsigned ordered = static_cast<unsigned>(c >> 32);
    return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

// Puts a candidate in its place; the last one falls off. By a whole warp, the same candidate.
__device__ inline void insert(Candidate* list, int k, Candidate candidate) {
    Candidate mine[kMaxNeighbors / kLanes];
#pragma unroll
    for (int j = 0; j < kMaxNeighbors / kLanes; ++j) {
        const int place = lane_index() + kLanes * j;
        if (place < k) {
            const Candidate here = list[place];
            const Candidate before = place > 0 ? list[place - 1] : ~kNone;
            mine[j] = here > candidate ? here : (before > candidate ? candidate : before);
        }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kMaxNeighbors / kLanes; ++j) {
        const int place = lane_index() + kLanes * j;
        if (place < k) list[place] = mine[j];
    }
    __syncwarp();
}

// Offers each lane's candidate to the list of that lane's token; returns whether any got in.
// By a whole warp that owns the lists.
__device__ inline bool offer(
    Candidate candidate, int token, Candidate* lists, int columns, int k) {
    unsigned passing = __ballot_sync(kEveryLane, candidate > lists[token * columns + k - 1]);
    const bool any = passing != 0;
    while (passing != 0) {
        const int lane = __ffs(static_cast<int>(passing)) - 1;
        passing &= passing - 1;
        const Candidate next = __shfl_sync(kEveryLane, candidate, lane);
        Candidate* list = lists + __shfl_sync(kEveryLane, token, lane) * columns;
        if (next > list[k - 1]) insert(list, k, next);
    }
    return any;
}

// Offers `count` sorted lists to one: all their first candidates, all their second ones, and so on
// until a whole rank adds nothing, since then no later one can. Mostly that is after few ranks.
// GLOBAL: the lists were written by other blocks of this launch, so L1 must not answer for them.
template <bool GLOBAL>
__device__ inline void merge_lists(
    Candidate* list, int k, const Candidate* others, int count, int list_stride, int rank_stride) {
    for (int rank = 0; rank < k; ++rank) {
        bool any = false;
        for (int first = 0; first < count; first += kLanes) {
            const int other = first + lane_index();
            Candidate candidate = kNone;
            if (other < count) {
                const Candidate* from = others + static_cast<long long>(other) * list_stride +
                                        static_cast<long long>(rank) * rank_stride;
                candidate = GLOBAL ? __ldcg(from) : *from;
            }
            any |= offer(candidate, 0, list, k, k);
        }
        if (!any) break;
    }
}

}  // namespace knnmoe
