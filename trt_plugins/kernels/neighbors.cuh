// From the K best entries of a token to its blended row: the second half of the method.
//
// Reads K rows of values (K·E elements a token, in rows of E), K evidence weights, r, state; writes r', state',
// confidence, neighbours and similarities.
#pragma once

#include "candidates.cuh"

namespace knnmoe {

__device__ inline float clip01(float v) { return fminf(fmaxf(v, 0.0f), 1.0f); }

// Turns the sorted list of one token into weights [n], reports the neighbours and returns s̄, to
// which each counts by its entry's evidence weight.
// By a whole warp; n = min(K, n_valid) neighbours exist. `weights` may be null.
__device__ inline float weigh_neighbors(
    const BlendParams& p, int token, const Candidate* list, int n, float* weights) {
    const float* c = p.calibration;
    float similarities[kMaxNeighbors / kLanes], raw[kMaxNeighbors / kLanes];
    float best = 0, total = 0, evidence = 0;
#pragma unroll
    for (int j = 0; j < kMaxNeighbors / kLanes; ++j) {
        const int rank = lane_index() + kLanes * j;
        similarities[j] = rank < n ? clip01(candidate_score(list[rank])) : 0;
        best = fmaxf(best, similarities[j]);
        if (rank < n)
            evidence += similarities[j] * p.evidence_weights[candidate_entry(list[rank])];
        if (rank < p.columns) {
            const long long at = static_cast<long long>(token) * p.columns + rank;
            // Where no neighbour is: the entries at and after n_valid follow, as in a full sort.
            if (p.neighbors)
                p.neighbors[at] =
                    rank < n ? candidate_entry(list[rank]) : valid_entries(p) + rank - n;
            if (p.similarities) p.similarities[at] = similarities[j];
        }
    }
    best = warp_max(best);
    evidence = warp_sum(evidence);
#pragma unroll
    for (int j = 0; j < kMaxNeighbors / kLanes; ++j) {
        raw[j] = powf(similarities[j], c[kWeightPower]) *
                 expf(c[kInverseTemperature] * (similarities[j] - best));
        if (lane_index() + kLanes * j >= n) raw[j] = 0;
        total += raw[j];
    }
    total = warp_sum(total);
#pragma unroll
    for (int j = 0; j < kMaxNeighbors / kLanes; ++j) {
        const int rank = lane_index() + kLanes * j;
        if (weights && rank < n) weights[rank] = total > 0 ? raw[j] / total : 0;
    }
    return fminf(c[kMean] != 0 && n > 0 ? evidence / n : evidence, 1.0f);
}

// The gate g of every token of one sequence, and its state moved on by its real tokens.
// By a whole warp, 32 tokens at a time: token t makes m of a sum m' before it, m = kept·m' + own,
// and two such steps in a row are one, kept·kept' and kept·own' + own, so they are scanned as sums.
__device__ inline void gate_sequence(
    const BlendParams& p, int sequence, const float* evidence, float* gate) {
    const float* c = p.calibration;
    const int length = p.tokens / p.sequences, first = sequence * length;
    const int real = clamp_count(p.lengths[sequence], length);
    // One lane reads the state and writes it, so that it may be moved on in place.
    float sum_before = 0, tokens_before = 0;
    if (lane_index() == 0) {
        sum_before = p.state[2 * sequence];
        tokens_before = p.state[2 * sequence + 1];
    }
    sum_before = __shfl_sync(kEveryLane, sum_before, 0);
    tokens_before = __shfl_sync(kEveryLane, tokens_before, 0);
    for (int base = 0; base < length; base += kLanes) {
        const int position = base + lane_index();
        const float own = position < length ? evidence[first + position] : 0;
        // Padding adds nothing and takes nothing.
        float sum = position < real ? own : 0, tokens = position < real ? 1 : 0;
        float kept = position < real ? c[kDecay] : 1;
        for (int offset = 1; offset < kLanes; offset *= 2) {
            const float earlier_sum = __shfl_up_sync(kEveryLane, sum, offset);
            const float earlier_tokens = __shfl_up_sync(kEveryLane, tokens, offset);
            const float earlier_kept = __shfl_up_sync(kEveryLane, kept, offset);
            if (lane_index() >= offset) {
                sum += kept * earlier_sum;
                tokens += kept * earlier_tokens;
                kept *= earlier_kept;
            }
        }
        sum += kept * sum_before;
        tokens += kept * tokens_before;
        sum_before = __shfl_sync(kEveryLane, sum, kLanes - 1);
        tokens_before = __shfl_sync(kEveryLane, tokens, kLanes - 1);
        if (position >= length) continue;
        float measured = own, seen = 1;
        if (c[kSequence] != 0) {
            // A row of padding before any real token has seen none: it divides by one.
            seen = fmaxf(tokens, 1);
            measured = sum / seen;
        }
        float g = 1;
        if (c[kSharpness] != 0) {
            const float growth = fminf(sqrtf(seen), c[kCap]);
            const float z = growth * c[kSharpness] * (measured - c[kMidpoint]);
            g = 1 / (1 + expf(-fminf(fmaxf(z, -80.0f), 80.0f)));
        }
        gate[first + position] = g;
    }
    if (lane_index() == 0) {
        p.state_out[2 * sequence] = sum_before;
        p.state_out[2 * sequence + 1] = tokens_before;
    }
}

__device__ inline float confidence_of(const BlendParams& p, float evidence, float gate) {
    const float* c = p.calibration;
    return clip01(c[kScale] * powf(evidence, c[kPower]) * gate);
}

// One element of r'; `list` and `weights` are the token's, `entries` are read in rank order.
__device__ inline void blend_element(
    const BlendParams& p, int token, int expert, const Candidate* list, const float* weights, int n,
    float confidence) {
    const long long at = static_cast<long long>(token) * p.experts + expert;
    const float r = p.r[at];
    if (!(confidence > 0)) {
        p.rows[at] = r;  // bit for bit
        return;
    }
    float mean = 0;
#pragma unroll 4
    for (int rank = 0; rank < n; ++rank) {
        const long long from =
            static_cast<long long>(candidate_entry(list[rank])) * p.experts + expert;
        const float value = p.half_values
                                ? __half2float(static_cast<const __half*>(p.values)[from])
                                : static_cast<const float*>(p.values)[from];
        mean = fmaf(weights[rank], value, mean);
    }
    p.rows[at] = r + confidence * (mean - p.calibration[kInterpolate] * r);
}

}  // namespace knnmoe
