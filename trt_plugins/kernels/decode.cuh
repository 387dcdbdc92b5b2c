// Decode: the whole blend of 1 to 16 tokens in one launch, at the cost of one read of the keys.
//
// Grid (splits, token groups), 8 warps a block. The warps of the grid take turns over the keys
// (Tile::KEYS at a time), each keeping its own K best of every token; a block merges its warps'
// lists and writes them out; the block that is last to do so merges those of all blocks, weighs,
// gates and blends. One launch, because a second one would cost about what it saves: microseconds,
// against a merge that mostly reads two or three ranks of `splits` lists. (Reckoned, not measured.)
//
// Bytes read      n_valid·(D·sizeof(Key) + 4 or 8), once a token group; per block 12·D·T of x and
//                 center (mostly from L2); K·E values, E logits a token
// Bytes written   T·(4·E + 12·columns + 4) results; 8·T·columns·splits of lists, of which the last
//                 block reads back only the ranks it needs
// Shared memory   DecodeShared::bytes: queries (4·D a token of the tile) and 8 lists of `columns`
//                 candidates a token; the last block reuses it
// Limits          T ≤ 16, K ≤ columns ≤ 64, N < 2^31; any D and E
// Never allocates, synchronises or reads on the host; the ticket resets itself: fit for a CUDA graph.
#pragma once

#include "neighbors.cuh"
#include "queries.cuh"

namespace knnmoe {

// Offsets into a block's dynamic shared memory, first while scanning, then in the last block.
template <class Tile>
struct DecodeShared {
    static constexpr long long LAST = 0;  // int: is this block the last one?
    static constexpr long long SCALES = 16;
    static constexpr long long SCRATCH = SCALES + 8LL * Tile::TOKENS;
    static constexpr long long QUERIES =
        round_up(SCRATCH + 4LL * QueryTeams<Tile, kWarps>::SCRATCH, 16);

    static constexpr long long MERGED = 16;

    static __host__ __device__ constexpr long long lists(int hidden) {
        return QUERIES + Tile::query_bytes(hidden);
    }
    static __host__ __device__ constexpr long long weights(int tokens, int columns) {
        return MERGED + 8LL * tokens * columns;
    }
    static __host__ __device__ constexpr long long evidence(int tokens, int columns) {
        return weights(tokens, columns) + 4LL * tokens * columns;
    }
    static __host__ __device__ constexpr long long gate(int tokens, int columns) {
        return evidence(tokens, columns) + 4LL * tokens;
    }
    static __host__ __device__ constexpr long long bytes(int tokens, int hidden, int columns) {
        const long long scanning = lists(hidden) + 8LL * kWarps * Tile::TOKENS * columns;
        const long long finishing = gate(tokens, columns) + 4LL * tokens;
        return scanning > finishing ? scanning : finishing;
    }
};

// Scans this block's share of the keys for the tokens of its tile, whose queries are prepared, and
// writes the block's K best of each to the workspace. By a whole block.
template <class Tile, int WARPS>
__device__ inline void scan_keys(
    const BlendParams& p, int first_token, const typename Tile::Query* queries,
    const QueryScale* scales, Candidate* lists, int n, int k) {
    const int warp = warp_index();
    const int tokens =
        p.tokens - first_token < Tile::TOKENS ? p.tokens - first_token : Tile::TOKENS;
    Candidate* own = lists + warp * Tile::TOKENS * p.columns;
    for (int i = lane_index(); i < Tile::TOKENS * p.columns; i += kLanes) own[i] = kNone;
    __syncthreads();  // of the queries too
    if (k > 0) {
        const long long step = static_cast<long long>(gridDim.x) * WARPS * Tile::KEYS;
        for (long long first = (static_cast<long long>(blockIdx.x) * WARPS + warp) * Tile::KEYS;
             first < n; first += step)
            Tile::scan(p, queries, scales, tokens, static_cast<int>(first), n, own, k);
    }
    __syncthreads();
    Candidate* out = reinterpret_cast<Candidate*>(
        p.workspace + Workspace::of(p.tokens, p.columns, p.splits, 1, 0).candidates);
    for (int token = warp; token < tokens; token += WARPS) {
        Candidate* list = lists + token * p.columns;
        merge_lists<false>(
            list, k, list + Tile::TOKENS * p.columns, WARPS - 1, Tile::TOKENS * p.columns, 1);
        for (int rank = lane_index(); rank < k; rank += kLanes)
            out[(static_cast<long long>(first_token + token) * p.columns + rank) * p.splits +
                blockIdx.x] = list[rank];
    }
}

// The K best of one token from all blocks' lists. By a whole warp.
__device__ inline void merge_splits(const BlendParams& p, int token, Candidate* list, int k) {
    const Candidate* candidates = reinterpret_cast<const Candidate*>(
        p.workspace + Workspace::of(p.tokens, p.columns, p.splits, 1, 0).candidates);
    for (int rank = lane_index(); rank < k; rank += kLanes) list[rank] = kNone;
    __syncwarp();
    merge_lists<true>(
        list, k, candidates + static_cast<long long>(token) * p.columns * p.splits, p.splits, 1,
        p.splits);
}

template <class Tile>
__device__ inline void decode(const BlendParams& p) {
    using Shared = DecodeShared<Tile>;
    KNNMOE_DYNAMIC_SHARED(shared);
    const int n = valid_entries(p), k = neighbor_count(p, n);
    const int warp = warp_index();
    {
        const int first_token = blockIdx.y * Tile::TOKENS;
        auto* queries = reinterpret_cast<typename Tile::Query*>(shared + Shared::QUERIES);
        auto* scales = reinterpret_cast<QueryScale*>(shared + Shared::SCALES);
        prepare_queries<Tile, kWarps>(
            p, first_token, queries, scales, reinterpret_cast<float*>(shared + Shared::SCRATCH));
        scan_keys<Tile, kWarps>(
            p, first_token, queries, scales,
            reinterpret_cast<Candidate*>(shared + Shared::lists(p.hidden)), n, k);
    }

    int* last = reinterpret_cast<int*>(shared + Shared::LAST);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(p.ticket, 1u) + 1 == gridDim.x * gridDim.y;
    __syncthreads();
    if (!*last) return;
    __threadfence();
    if (threadIdx.x == 0) *p.ticket = 0;

    auto* merged = reinterpret_cast<Candidate*>(shared + Shared::MERGED);
    auto* weights = reinterpret_cast<float*>(shared + Shared::weights(p.tokens, p.columns));
    auto* evidence = reinterpret_cast<float*>(shared + Shared::evidence(p.tokens, p.columns));
    auto* gate = reinterpret_cast<float*>(shared + Shared::gate(p.tokens, p.columns));
    for (int token = warp; token < p.tokens; token += kWarps) {
        Candidate* list = merged + token * p.columns;
        merge_splits(p, token, list, k);
        const float mean = weigh_neighbors(p, token, list, k, weights + token * p.columns);
        if (lane_index() == 0) evidence[token] = mean;
    }
    __syncthreads();
    for (int sequence = warp; sequence < p.sequences; sequence += kWarps)
        gate_sequence(p, sequence, evidence, gate);
    __syncthreads();
    for (int at = threadIdx.x; at < p.tokens * p.experts; at += kWarps * kLanes) {
        const int token = at / p.experts, expert = at % p.experts;
        const float confidence = confidence_of(p, evidence[token], gate[token]);
        if (expert == 0) p.confidence[token] = confidence;
        blend_element(
            p, token, expert, merged + token * p.columns, weights + token * p.columns, k,
            confidence);
    }
}

}  // namespace knnmoe
