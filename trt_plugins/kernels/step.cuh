// What a decode step needs between two engines besides the blend: the routing rule, and new keys and
// values put into their caches. So nothing of a step waits for the host.
//
// Routing: one warp a token, the row in registers, no shared memory. Reads 4·E bytes a token; writes
// 8·k (route, heaviest) or 4·E (assign). E ≤ 1024, k ≤ 64, k ≤ E. Selecting is k rounds in which
// only the lane whose value was taken looks at its values again.
//
// A logit that is NaN or +inf, or a row of -inf alone, has no softmax: the row's experts are then
// 0..k-1, in bounds like any others, and the weights of those that the rule selects are NaN, as in
// the NumPy reference. A NaN among assignments comes after every number.
#pragma once

#include "candidates.cuh"

namespace knnmoe {

constexpr int kStepWarps = 4;     // of every block; one a token, or one a row of a cache
constexpr int kMostExperts = 1024;
constexpr int kMostSelected = 64;  // two a lane
constexpr int kMostCaches = 32;    // of one launch

// All pointers are device memory. `assignments` may be `rows`; nothing else may overlap.
struct RouteParams {
    const float* rows;      // [T, E] logits, or assignments for `heaviest`
    int* expert_ids;        // [T, k]
    float* expert_weights;  // [T, k]
    float* assignments;     // [T, E]
    int tokens;             // T
    int experts;            // E
    int columns;            // k
    int top_k;              // experts the rule selects, at most k; the rest have weight 0
    int renormalize;        // 1: the selected weights are divided by their sum
    float scale;
};

struct CachePair {
    unsigned char* cache;        // [B, H, C, d]
    const unsigned char* fresh;  // [B, H, S, d]
    long long capacity;          // C
    int heads;                   // H
    int row_bytes;               // of d elements
    int unit;                    // bytes copied at a time: 16, 4 or 2; divides all addresses
    int reserved;
};

struct AppendParams {
    const long long* past_lengths;  // [B]
    int sequences;                  // B
    int fresh_rows;                 // S
    CachePair pairs[kMostCaches];
};

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// A score as a candidate; NaN comes after every number, by index like equal scores.
__device__ inline Candidate rank(float score, int expert) {
    return score == score ? make_candidate(score, expert)
                          : static_cast<Candidate>(0xffffffffu - static_cast<unsigned>(expert));
}

// A warp's row of scores: lane l holds those of experts l, l + 32, …
template <int VALUES>
struct Scores {
    float values[VALUES];
    unsigned taken = 0;  // of this lane's values
    Candidate best = kNone;

    __device__ void load(const float* row, int experts, float absent) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const int expert = lane_index() + kLanes * i;
            values[i] = expert < experts ? row[expert] : absent;
        }
    }

    __device__ void softmax() {
        float most = values[0], sum = 0;
#pragma unroll
        for (int i = 1; i < VALUES; ++i) most = fmaxf(most, values[i]);
        most = warp_max(most);
#pragma unroll
        for (int i = 0; i < VALUES; ++i) sum += values[i] = expf(values[i] - most);
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < VALUES; ++i) values[i] /= sum;
    }

    // The best of this lane's values that are not taken.
    __device__ void look(int experts) {
        best = kNone;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const int expert = lane_index() + kLanes * i;
            if (expert >= experts || (taken >> i & 1)) continue;
            const Candidate candidate = rank(values[i], expert);
            if (candidate > best) best = candidate;
        }
    }

    // Takes the best of the row; `look` must have been called once before.
    __device__ Candidate take(int experts) {
        Candidate most = best;
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            const Candidate other = __shfl_xor_sync(kEveryLane, most, offset);
            if (other > most) most = other;
        }
        if (most == best) {  // candidates differ, so it is this lane's
            taken |= 1u << (candidate_entry(most) / kLanes);
            look(experts);
        }
        return most;
    }

    __device__ float sum() const {
        float total = 0;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) total += values[i];
        return warp_sum(total);
    }
};

// The `count` best of a row: lane l holds the ones of rank l and l + 32.
struct Selected {
    int experts[kMostSelected / kLanes];
    float scores[kMostSelected / kLanes];  // 0 where there is none

    template <int VALUES>
    __device__ void select(Scores<VALUES>& row, int experts_of_row, int count) {
#pragma unroll
        for (int j = 0; j < kMostSelected / kLanes; ++j) {
            experts[j] = 0;
            scores[j] = 0;
        }
        row.look(experts_of_row);
        for (int place = 0; place < count; ++place) {
            const Candidate next = row.take(experts_of_row);
#pragma unroll
            for (int j = 0; j < kMostSelected / kLanes; ++j) {
                if (place != lane_index() + kLanes * j) continue;
                experts[j] = candidate_entry(next);
                scores[j] = candidate_score(next);
            }
        }
    }

    __device__ float sum(int count) const {
        float total = 0;
#pragma unroll
        for (int j = 0; j < kMostSelected / kLanes; ++j)
            if (lane_index() + kLanes * j < count) total += scores[j];
        return warp_sum(total);
    }

    // Writes the first `weighted` of them with (score / divisor)·factor, the rest with weight 0.
    __device__ void write(
        const RouteParams& p, int token, int weighted, float divisor, float factor) const {
#pragma unroll
        for (int j = 0; j < kMostSelected / kLanes; ++j) {
            const int place = lane_index() + kLanes * j;
            if (place >= p.columns) continue;
            const long long at = static_cast<long long>(token) * p.columns + place;
            p.expert_ids[at] = experts[j];
            p.expert_weights[at] = place < weighted ? scores[j] / divisor * factor : 0;
        }
    }
};

// The token of this warp; at or after T there is none.
__device__ inline int step_token() { return blockIdx.x * kStepWarps + warp_index(); }

// The routing rule: softmax over all experts, the best of them, their weights.
template <int VALUES>
__device__ inline void step_route(const RouteParams& p) {
    const int token = step_token();
    if (token >= p.tokens) return;
    Scores<VALUES> row;
    row.load(p.rows + static_cast<long long>(token) * p.experts, p.experts, minus_infinity());
    row.softmax();
    Selected selected;
    selected.select(row, p.experts, p.columns);
    const float divisor = p.renormalize ? selected.sum(p.top_k) : 1;
    selected.write(p, token, p.top_k, divisor, p.scale);
}

// The rule as dense rows: the weight where an expert is selected, else 0.
template <int VALUES>
__device__ inline void step_assign(const RouteParams& p) {
    const int token = step_token();
    if (token >= p.tokens) return;
    Scores<VALUES> row;
    row.load(p.rows + static_cast<long long>(token) * p.experts, p.experts, minus_infinity());
    row.softmax();
    row.look(p.experts);
    for (int place = 0; place < p.top_k; ++place) row.take(p.experts);
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (!(row.taken >> i & 1)) row.values[i] = 0;
    const float divisor = p.renormalize ? row.sum() : 1;
    float* out = p.assignments + static_cast<long long>(token) * p.experts;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const int expert = lane_index() + kLanes * i;
        if (expert >= p.experts) continue;
        // Not by the product with 0: a row of NaN has a sum of NaN.
        out[expert] = row.taken >> i & 1 ? row.values[i] / divisor * p.scale : 0;
    }
}

// Cuts assignments down to the k heaviest; if more were not 0, they take the mass of the row.
template <int VALUES>
__device__ inline void step_heaviest(const RouteParams& p) {
    const int token = step_token();
    if (token >= p.tokens) return;
    Scores<VALUES> row;
    row.load(p.rows + static_cast<long long>(token) * p.experts, p.experts, 0);
    int supported = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) supported += row.values[i] != 0;
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        supported += __shfl_xor_sync(kEveryLane, supported, offset);
    const float total = row.sum();
    Selected selected;
    selected.select(row, p.experts, p.columns);
    const float kept = selected.sum(p.columns);
    const float factor = supported > p.columns ? total / (kept > 0 ? kept : 1) : 1;
    selected.write(p, token, p.columns, 1, factor);
}

template <typename Unit>
__device__ inline void copy_row(unsigned char* to, const unsigned char* from, int bytes) {
    const int count = bytes / static_cast<int>(sizeof(Unit));
    for (int i = lane_index(); i < count; i += kLanes)
        reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
}

// cache[b, h, past_lengths[b] + s] = fresh[b, h, s]: one warp a row of d elements, which is read
// once and written once; blockIdx.y is the cache. Positions outside of [0, C) are not written.
__device__ inline void step_append(const AppendParams& p) {
    const CachePair& pair = p.pairs[blockIdx.y];
    const long long row = static_cast<long long>(blockIdx.x) * kStepWarps + warp_index();
    const long long head = row / p.fresh_rows;  // b·H + h
    if (head >= static_cast<long long>(p.sequences) * pair.heads) return;
    // Unsigned, so that no length overflows and a negative position is past every capacity.
    const unsigned long long position =
        static_cast<unsigned long long>(p.past_lengths[head / pair.heads]) +
        static_cast<unsigned long long>(row % p.fresh_rows);
    if (position >= static_cast<unsigned long long>(pair.capacity)) return;
    unsigned char* to =
        pair.cache + (head * pair.capacity + static_cast<long long>(position)) * pair.row_bytes;
    const unsigned char* from = pair.fresh + row * pair.row_bytes;
    switch (pair.unit) {
        case 16: copy_row<uint4>(to, from, pair.row_bytes); break;
        case 4: copy_row<unsigned>(to, from, pair.row_bytes); break;
        default: copy_row<unsigned short>(to, from, pair.row_bytes);
    }
}

}  // namespace knnmoe
