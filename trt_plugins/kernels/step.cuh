// What a decode step needs between two engines besides the blend: the routing rule, and new keys and
// values put into their caches. So nothing of a step waits for the host.
//
// Routing: one warp a token, the row in registers, no shared memory. Reads 4·E bytes a token; writes
// 8·k (route, heaviest) or 4·E (assign). E ≤ 1024, k ≤ 64, k ≤ E. Selecting is k rounds in which
// only the lane whose value was taken looks at its values again. A rule that selects by something
// else than it weighs by (a bias, groups, logits) reads the logits of what it selected once more;
// a bias is 4·E bytes a token, of the cache. Groups, at most 32, are ranked one after the other.
//
// A logit that is NaN or +inf, or a row of -inf alone, has no softmax: the row's experts are then
// 0..k-1 (without groups), in bounds like any others, and the weights of those that the rule selects
// are NaN, as in the NumPy reference. A NaN among assignments, sigmoids or logits to select by comes
// after every number.
#pragma once

#include "candidates.cuh"

namespace knnmoe {

constexpr int kStepWarps = 4;     // of every block; one a token, or one a row of a cache
constexpr int kMostExperts = 1024;
constexpr int kMostSelected = 64;  // two a lane
constexpr int kMostCaches = 32;    // of one launch
constexpr int kMostGroups = 32;    // one a lane

// How logits become scores.
constexpr int kSoftmax = 0;
constexpr int kSoftmaxTopk = 1;  // logits select, a softmax over the selected weighs
constexpr int kSigmoid = 2;

// All pointers are device memory. `assignments` may be `rows`; nothing else may overlap.
struct RouteParams {
    const float* rows;      // [T, E] logits, or assignments for `heaviest`
    int* expert_ids;        // [T, k]
    float* expert_weights;  // [T, k]
    float* assignments;     // [T, E]
    const float* selection_bias;  // [E], added to the scores to select by; or null
    int tokens;             // T
    int experts;            // E
    int columns;            // k
    int top_k;              // experts the rule selects, at most k; the rest have weight 0
    int renormalize;        // 1: the selected weights are divided by their sum
    int score;              // kSoftmax, kSoftmaxTopk or kSigmoid
    int groups;             // equal ones of consecutive experts; 1: none
    int top_groups;         // to select experts from
    int group_sum;          // a group's rank is 0: its best score, 1: the sum of its two best
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

__device__ inline float logistic(float logit) { return 1 / (1 + expf(-logit)); }

// Whether what ranks an expert is not its weight before the weights are divided by their sum.
__device__ inline bool weighs_by_logit(const RouteParams& p) {
    return p.selection_bias != nullptr || p.groups > 1 || p.score == kSoftmaxTopk;
}

// What the weights are divided by; the sigmoids of a row may all be 0.
__device__ inline float divisor_of(const RouteParams& p, float sum) {
    if (p.score == kSoftmaxTopk) return sum;
    if (!p.renormalize) return 1;
    return p.score == kSigmoid ? sum + 1e-20f : sum;
}

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
    float most = 0, sum = 1;  // of the softmax: largest logit, sum of the exponentials

    __device__ void load(const float* row, int experts, float absent) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const int expert = lane_index() + kLanes * i;
            values[i] = expert < experts ? row[expert] : absent;
        }
    }

    __device__ void softmax() {
        most = values[0];
        sum = 0;
#pragma unroll
        for (int i = 1; i < VALUES; ++i) most = fmaxf(most, values[i]);
        most = warp_max(most);
#pragma unroll
        for (int i = 0; i < VALUES; ++i) sum += values[i] = expf(values[i] - most);
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < VALUES; ++i) values[i] /= sum;
    }

    // Logits become what experts are selected by.
    __device__ void rank_experts(const RouteParams& p) {
        if (p.score == kSoftmax) softmax();
        if (p.score == kSigmoid) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) values[i] = logistic(values[i]);
        }
        if (p.selection_bias != nullptr) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                const int expert = lane_index() + kLanes * i;
                if (expert < p.experts) values[i] += p.selection_bias[expert];
            }
        }
        if (p.groups > 1) keep_best_groups(p);
    }

    // Experts outside of the best groups rank as -inf.
    __device__ void keep_best_groups(const RouteParams& p) {
        const int size = p.experts / p.groups;
        Candidate mine = kNone;  // of group `lane`
        for (int group = 0; group < p.groups; ++group) {
            float first = minus_infinity(), second = minus_infinity();
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                const bool counts = within(i, group, size) && values[i] == values[i];
                const float value = counts ? values[i] : minus_infinity();
                second = fmaxf(second, fminf(first, value));
                first = fmaxf(first, value);
            }
#pragma unroll
            for (int offset = kLanes / 2; offset > 0; offset /= 2) {
                const float other = __shfl_xor_sync(kEveryLane, first, offset);
                const float next = __shfl_xor_sync(kEveryLane, second, offset);
                second = fmaxf(fminf(first, other), fmaxf(second, next));
                first = fmaxf(first, other);
            }
            const float score = p.group_sum ? first + second : first;
            if (lane_index() == group) mine = rank(score, group);
        }
        unsigned kept = 0;
        for (int place = 0; place < p.top_groups; ++place) {
            Candidate best_group = mine;
#pragma unroll
            for (int offset = kLanes / 2; offset > 0; offset /= 2) {
                const Candidate other = __shfl_xor_sync(kEveryLane, best_group, offset);
                if (other > best_group) best_group = other;
            }
            if (best_group == mine) mine = kNone;
            kept |= 1u << candidate_entry(best_group);
        }
        for (int group = 0; group < p.groups; ++group) {
            if (kept >> group & 1) continue;
#pragma unroll
            for (int i = 0; i < VALUES; ++i)
                if (within(i, group, size)) values[i] = minus_infinity();
        }
    }

    // Whether this lane's value i is of an expert of that group.
    __device__ static bool within(int i, int group, int size) {
        return static_cast<unsigned>(lane_index() - group * size + kLanes * i) <
               static_cast<unsigned>(size);
    }

    // What an expert with this logit weighs, before the weights are divided by their sum.
    __device__ float weight(int score, float logit) const {
        if (score == kSigmoid) return logistic(logit);
        return expf(logit - most) / sum;
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

    __device__ float total() const {
        float all = 0;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) all += values[i];
        return warp_sum(all);
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

    // Replaces the scores of the first `count` by what the logits of their experts weigh.
    template <int VALUES>
    __device__ void weigh(
        const RouteParams& p, Scores<VALUES>& row, const float* logits, int count) {
#pragma unroll
        for (int j = 0; j < kMostSelected / kLanes; ++j) {
            const bool counts = lane_index() + kLanes * j < count;
            scores[j] = counts ? logits[experts[j]] : minus_infinity();
        }
        if (p.score == kSoftmaxTopk) row.most = warp_max(fmaxf(scores[0], scores[1]));
#pragma unroll
        for (int j = 0; j < kMostSelected / kLanes; ++j)
            scores[j] = row.weight(p.score, scores[j]);
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

// The routing rule: scores of all experts, the best of them, their weights.
template <int VALUES>
__device__ inline void step_route(const RouteParams& p) {
    const int token = step_token();
    if (token >= p.tokens) return;
    const float* logits = p.rows + static_cast<long long>(token) * p.experts;
    Scores<VALUES> row;
    row.load(logits, p.experts, minus_infinity());
    row.rank_experts(p);
    Selected selected;
    selected.select(row, p.experts, p.columns);
    if (weighs_by_logit(p)) selected.weigh(p, row, logits, p.top_k);
    selected.write(p, token, p.top_k, divisor_of(p, selected.sum(p.top_k)), p.scale);
}

// The rule as dense rows: the weight where an expert is selected, else 0.
template <int VALUES>
__device__ inline void step_assign(const RouteParams& p) {
    const int token = step_token();
    if (token >= p.tokens) return;
    const float* logits = p.rows + static_cast<long long>(token) * p.experts;
    Scores<VALUES> row;
    row.load(logits, p.experts, minus_infinity());
    row.rank_experts(p);
    row.look(p.experts);
    for (int place = 0; place < p.top_k; ++place) row.take(p.experts);
    if (weighs_by_logit(p)) {
        // `assignments` may be `rows`: a lane reads what it will write.
        float most = minus_infinity();
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            if (!(row.taken >> i & 1)) continue;
            row.values[i] = logits[lane_index() + kLanes * i];
            most = fmaxf(most, row.values[i]);
        }
        if (p.score == kSoftmaxTopk) row.most = warp_max(most);
#pragma unroll
        for (int i = 0; i < VALUES; ++i) row.values[i] = row.weight(p.score, row.values[i]);
    }
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (!(row.taken >> i & 1)) row.values[i] = 0;
    const float divisor = divisor_of(p, row.total());
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
    const float total = row.total();
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
