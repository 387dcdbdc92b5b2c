// The K best so far: sorted lists of at most 64 candidates that a warp keeps together.
//
// A candidate is one 64-bit number that orders as the method asks: by score, ties by lower entry.
// A list lives in shared memory (8·K bytes), best first; 0 is no candidate. Testing a candidate
// against the list costs one comparison; the rare insertion, one read and one write of the list.
// Lists are merged in registers, by sorting networks: what a warp does there costs the same few
// hundred cycles whatever is in them, where up to 64 insertions would cost some ten thousand.
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

// A sorted list in the registers of a warp: place `lane + 32·j` is element j.
using WarpList = Candidate[kMaxNeighbors / kLanes];
static_assert(kMaxNeighbors == 2 * kLanes, "the networks below sort two candidates a lane");

// One step of a sorting network: the better or the worse of this lane's and the other's.
__device__ inline Candidate keep(bool better, Candidate own, int offset) {
    const Candidate other = __shfl_xor_sync(kEveryLane, own, offset);
    return (own > other) == better ? own : other;
}

// Sorts one candidate a lane, best first or best last.
template <bool BEST_FIRST>
__device__ inline Candidate sort_lanes(Candidate candidate) {
#pragma unroll
    for (int size = 2; size <= kLanes; size *= 2) {
#pragma unroll
        for (int offset = size / 2; offset > 0; offset /= 2) {
            const bool lower = (lane_index() & offset) == 0, flipped = (lane_index() & size) != 0;
            candidate = keep(lower != flipped ? BEST_FIRST : !BEST_FIRST, candidate, offset);
        }
    }
    return candidate;
}

// Sorts a list that has one rise and one fall, wherever they begin.
__device__ inline void sort_bitonic(WarpList& list) {
    const Candidate first = list[0];
    list[0] = first > list[1] ? first : list[1];
    list[1] = first > list[1] ? list[1] : first;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        const bool lower = (lane_index() & offset) == 0;
        list[0] = keep(lower, list[0], offset);
        list[1] = keep(lower, list[1], offset);
    }
}

__device__ inline Candidate best_of(Candidate a, Candidate b) { return a > b ? a : b; }

__device__ inline Candidate at_or_none(const Candidate* list, int place, int count) {
    return place < count ? list[place] : kNone;
}

__device__ inline void load_list(WarpList& list, const Candidate* from, int count) {
    list[0] = at_or_none(from, lane_index(), count);
    list[1] = at_or_none(from, lane_index() + kLanes, count);
}

__device__ inline void store_list(const WarpList& list, Candidate* to, int count, int stride = 1) {
#pragma unroll
    for (int j = 0; j < kMaxNeighbors / kLanes; ++j) {
        const int place = lane_index() + kLanes * j;
        if (place < count) to[static_cast<long long>(place) * stride] = list[j];
    }
}

// Adds a sorted list of `count` in shared memory to one in registers. Of a list and another one in
// reverse, the better at each place are the 64 best, and fall and rise once.
__device__ inline void merge_list(WarpList& list, const Candidate* other, int count) {
    const int reversed = kMaxNeighbors - 1 - lane_index();
    list[0] = best_of(list[0], at_or_none(other, reversed, count));
    list[1] = best_of(list[1], at_or_none(other, reversed - kLanes, count));
    sort_bitonic(list);
}

// Adds one candidate a lane; returns whether any is among the list's k best.
__device__ inline bool merge_lanes(WarpList& list, int k, Candidate candidate) {
    const Candidate at_its_lane = k > kLanes ? list[1] : list[0];
    const Candidate last = __shfl_sync(kEveryLane, at_its_lane, (k - 1) % kLanes);
    if (__ballot_sync(kEveryLane, candidate > last) == 0) return false;
    list[1] = best_of(list[1], sort_lanes<false>(candidate));
    sort_bitonic(list);
    return true;
}

// Sorts up to 64 candidates that stand anyhow in shared memory.
__device__ inline void sort_list(WarpList& list, const Candidate* from, int count) {
    list[0] = sort_lanes<true>(at_or_none(from, lane_index(), count));
    list[1] = sort_lanes<false>(at_or_none(from, lane_index() + kLanes, count));
    sort_bitonic(list);
}

}  // namespace knnmoe
