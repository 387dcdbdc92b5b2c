// Prefill: the blend of any number of tokens, in five launches that share the workspace.
//
//   prepare_queries  x → queries in the order the tiles read them         one block a tile
//   scan             as decode's, queries from the workspace through L1   (splits, tiles) blocks
//   merge            all blocks' lists of a token → one, and its evidence one warp a token
//   gate             evidence → gate, over each sequence                  one warp a sequence
//   finish           weights, confidence, blend                           one block a token
//
// MmaTile<Key, 4, 4> multiplies 32 tokens (twice, see tiles.cuh) by 32 keys a warp: 64 fp32 sums a
// lane, 12 sixteen-byte loads for 32 tensor-core instructions, fed by L1 rather than staged in
// shared memory. fp32 keys take FmaTile<float, 8>: exact, for tests, not for speed.
//
// Bytes read      scan: n_valid·D·sizeof(Key) a tile of tokens (from L2 where the blocks of one
//                 split run together), 4·D·T of queries a split
// Bytes written   4·D·T of queries; 8·T·columns·splits of lists; results as decode
// Shared memory   scan: 4 lists of `columns` (or R) candidates a token: 1 KiB · columns, so that of
//                 64 columns one block fits an SM of 100 KiB, where two run of 48 or fewer;
//                 others: little. None of it grows with D, whose queries are in the workspace
// Limits          K ≤ columns ≤ 64, N < 2^31, 65,535 tiles (2 million tokens, of fp32 keys half a
//                 million); any D and E
//
// In a search of two stages the scan is that of int8 keys, and rescore.cuh takes the merge's place.
#pragma once

#include "decode.cuh"

namespace knnmoe {

template <class Tile>
__device__ inline Workspace prefill_workspace(const BlendParams& p) {
    return Workspace::of(
        p.tokens, list_columns(p), p.columns, p.splits, Tile::TOKENS, Tile::query_bytes(p.hidden));
}

// Where a tile-independent part of the workspace is: any tile would do.
using AnyTile = FmaTile<float, 1>;

template <class Tile>
__device__ inline void prefill_prepare(const BlendParams& p) {
    KNNMOE_DYNAMIC_SHARED(shared);
    const Workspace w = prefill_workspace<Tile>(p);
    prepare_queries<Tile, kFinishWarps>(
        p, blockIdx.x * Tile::TOKENS,
        reinterpret_cast<typename Tile::Query*>(
            p.workspace + w.queries + blockIdx.x * Tile::query_bytes(p.hidden)),
        reinterpret_cast<QueryScale*>(p.workspace + w.scales) + blockIdx.x * Tile::TOKENS,
        reinterpret_cast<float*>(shared));
}

template <class Tile>
__device__ inline void prefill_scan(const BlendParams& p) {
    KNNMOE_DYNAMIC_SHARED(shared);
    const Workspace w = prefill_workspace<Tile>(p);
    const int first_token = blockIdx.y * Tile::TOKENS;
    scan_keys<Tile, kPrefillWarps>(
        p, first_token,
        reinterpret_cast<const typename Tile::Query*>(
            p.workspace + w.queries + blockIdx.y * Tile::query_bytes(p.hidden)),
        reinterpret_cast<const QueryScale*>(p.workspace + w.scales) + first_token,
        reinterpret_cast<Candidate*>(shared));
}

// Leaves a token's neighbours and its evidence in the workspace. By a whole warp.
__device__ inline void report_merged(
    const BlendParams& p, int token, const WarpList& list, int k) {
    const Workspace w = prefill_workspace<AnyTile>(p);
    Candidate* out = reinterpret_cast<Candidate*>(p.workspace + w.merged) +
                     static_cast<long long>(token) * p.columns;
    store_list(list, out, k);
    // A lane weighs the ranks it stored.
    const float mean = weigh_neighbors(p, token, out, k, nullptr);
    if (lane_index() == 0) reinterpret_cast<float*>(p.workspace + w.evidence)[token] = mean;
}

__device__ inline void prefill_merge(const BlendParams& p) {
    const int token = blockIdx.x * kFinishWarps + warp_index();
    if (token >= p.tokens) return;
    const int k = neighbor_count(p, valid_entries(p));
    WarpList list;
    merge_splits(p, token, 0, 1, k, list);
    report_merged(p, token, list, k);
}

__device__ inline void prefill_gate(const BlendParams& p) {
    const Workspace w = prefill_workspace<AnyTile>(p);
    const int sequence = blockIdx.x * kFinishWarps + warp_index();
    if (sequence < p.sequences)
        gate_sequence(
            p, sequence, reinterpret_cast<const float*>(p.workspace + w.evidence),
            reinterpret_cast<float*>(p.workspace + w.gate));
}

__device__ inline void prefill_finish(const BlendParams& p) {
    KNNMOE_DYNAMIC_SHARED(shared);
    const Workspace w = prefill_workspace<AnyTile>(p);
    const int token = blockIdx.x, k = neighbor_count(p, valid_entries(p));
    auto* list = reinterpret_cast<Candidate*>(shared);
    auto* weights = reinterpret_cast<float*>(shared + 8LL * p.columns);
    if (warp_index() == 0) {
        const Candidate* merged = reinterpret_cast<const Candidate*>(p.workspace + w.merged) +
                                  static_cast<long long>(token) * p.columns;
        // A lane weighs the ranks it copies: nothing to wait for.
        for (int rank = lane_index(); rank < k; rank += kLanes) list[rank] = merged[rank];
        weigh_neighbors(p, token, list, k, weights);
    }
    __syncthreads();
    const float confidence = confidence_of(
        p, reinterpret_cast<const float*>(p.workspace + w.evidence)[token],
        reinterpret_cast<const float*>(p.workspace + w.gate)[token]);
    if (threadIdx.x == 0) p.confidence[token] = confidence;
    for (int expert = threadIdx.x; expert < p.experts; expert += kFinishWarps * kLanes)
        blend_element(p, token, expert, list, weights, k, confidence);
}

}  // namespace knnmoe
