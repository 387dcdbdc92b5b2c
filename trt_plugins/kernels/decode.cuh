// Decode: the whole blend of 1 to 16 tokens in one launch, at the cost of one read of the keys.
//
// Grid (splits, token groups), 8 warps a block. The warps of the grid take turns over the keys
// (Tile::KEYS at a time), each keeping its own K best of every token; a block merges its warps'
// lists and writes them out; the block that is last to do so merges those of all blocks, weighs,
// gates and blends. One launch, because a second one would cost about what it saves: microseconds,
// against a merge that mostly reads two or three ranks of `splits` lists, by up to eight warps a
// token. (Reckoned, not measured.)
//
// Bytes read      n_valid·(D·sizeof(Key) + 4 or 8), once a token group; per block 12·D·T of x and
//                 center (mostly from L2); K·E values, E logits a token
// Bytes written   T·(4·E + 12·columns + 4) results; 8·T·columns·splits of lists, of which the last
//                 block reads back only the ranks it needs
// Shared memory   DecodeShared: queries (4·D a token of the tile) and 8 lists of `columns`
//                 candidates a token; the last block reuses it. Where it is too small for the
//                 tile that would read the keys at most twice, plan.h prefills
// Limits          T ≤ 16, K ≤ columns ≤ 64, N < 2^31; any D and E
// Never allocates, synchronises or reads on the host; the ticket resets itself: fit for a CUDA graph.
//
// With candidates to be scored again (rescore.cuh) the same kernel stops at the blocks' lists.
#pragma once

#include "neighbors.cuh"
#include "queries.cuh"

namespace knnmoe {

// Offsets into the dynamic shared memory of the block that ends a call.
struct FinishShared {
    static constexpr long long LISTS = 16;

    // Lists are merged by a team of warps a token, a list each.
    static __host__ __device__ constexpr int team(int tokens) {
        return tokens > 4 ? 1 : tokens > 2 ? 2 : tokens > 1 ? 4 : 8;
    }
    static __host__ __device__ constexpr long long weights(int tokens, int columns) {
        return LISTS + 8LL * tokens * team(tokens) * columns;
    }
    static __host__ __device__ constexpr long long evidence(int tokens, int columns) {
        return weights(tokens, columns) + 4LL * tokens * columns;
    }
    static __host__ __device__ constexpr long long gate(int tokens, int columns) {
        return evidence(tokens, columns) + 4LL * tokens;
    }
    static __host__ __device__ constexpr long long bytes(int tokens, int columns) {
        return gate(tokens, columns) + 4LL * tokens;
    }
};

// Offsets into the dynamic shared memory of a block while it scans.
template <class Tile>
struct DecodeShared {
    static constexpr long long LAST = 0;  // int: is this block the last one?
    static constexpr long long SCALES = 16;
    static constexpr long long SCRATCH = SCALES + 8LL * Tile::TOKENS;
    static constexpr long long QUERIES =
        round_up(SCRATCH + 4LL * QueryTeams<Tile, kWarps>::SCRATCH, 16);

    static __host__ __device__ constexpr long long lists(int hidden) {
        return QUERIES + Tile::query_bytes(hidden);
    }
};

// Scans this block's share of the keys for the tokens of its tile, whose queries are prepared, and
// writes the block's best `count` of each to the workspace. By a whole block.
template <class Tile, int WARPS>
__device__ inline void scan_keys(
    const BlendParams& p, int first_token, const typename Tile::Query* queries,
    const QueryScale* scales, Candidate* lists) {
    const int n = valid_entries(p), count = list_count(p, n);
    const int warp = warp_index(), listed = list_columns(p);
    const int tokens =
        p.tokens - first_token < Tile::TOKENS ? p.tokens - first_token : Tile::TOKENS;
    Candidate* own = lists + warp * Tile::TOKENS * listed;
    for (int i = lane_index(); i < Tile::TOKENS * listed; i += kLanes) own[i] = kNone;
    __syncthreads();  // of the queries too
    if (count > 0) {
        const long long step = static_cast<long long>(gridDim.x) * WARPS * Tile::KEYS;
        for (long long first = (static_cast<long long>(blockIdx.x) * WARPS + warp) * Tile::KEYS;
             first < n; first += step)
            Tile::scan(p, queries, scales, tokens, static_cast<int>(first), n, own, count);
    }
    __syncthreads();
    Candidate* out = reinterpret_cast<Candidate*>(p.workspace);  // Workspace::candidates
    for (int token = warp; token < tokens; token += WARPS) {
        WarpList best;
        load_list(best, lists + token * listed, count);
        for (int other = 1; other < WARPS; ++other)
            merge_list(best, lists + (other * Tile::TOKENS + token) * listed, count);
        store_list(
            best,
            out + static_cast<long long>(first_token + token) * listed * p.splits + blockIdx.x,
            count, p.splits);
    }
}

template <class Tile>
__device__ inline void prepare_and_scan(
    const BlendParams& p, unsigned char* shared) {
    using Shared = DecodeShared<Tile>;
    const int first_token = blockIdx.y * Tile::TOKENS;
    auto* queries = reinterpret_cast<typename Tile::Query*>(shared + Shared::QUERIES);
    auto* scales = reinterpret_cast<QueryScale*>(shared + Shared::SCALES);
    prepare_queries<Tile, kWarps>(
        p, first_token, queries, scales, reinterpret_cast<float*>(shared + Shared::SCRATCH));
    scan_keys<Tile, kWarps>(
        p, first_token, queries, scales,
        reinterpret_cast<Candidate*>(shared + Shared::lists(p.hidden)));
}

// Whether this block is the last of the launch to come here, so that it sees what all have written.
// By a whole block. The int at the beginning of shared memory is used.
__device__ inline bool is_last_block(const BlendParams& p, unsigned char* shared) {
    int* last = reinterpret_cast<int*>(shared);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(p.ticket, 1u) + 1 == gridDim.x * gridDim.y;
    __syncthreads();
    if (!*last) return false;
    __threadfence();
    if (threadIdx.x == 0) *p.ticket = 0;
    return true;
}

// The best of one token from the lists of all blocks that are this member's: every rank of 32
// blocks at a time. All their first candidates, all their second ones, and so on until a whole rank
// adds nothing, since then no later one can; mostly that is after few ranks. By a whole warp.
__device__ inline void merge_splits(
    const BlendParams& p, int token, int member, int members, int count, WarpList& list) {
    list[0] = list[1] = kNone;
    // The lists were written by other blocks, perhaps of this launch: L1 must not answer for them.
    const Candidate* lists = reinterpret_cast<const Candidate*>(p.workspace) +
                             static_cast<long long>(token) * list_columns(p) * p.splits;
    const auto load = [&](int rank, int batch) {
        const int split = (batch * members + member) * kLanes + lane_index();
        return rank < count && split < p.splits
                   ? __ldcg(lists + static_cast<long long>(rank) * p.splits + split)
                   : kNone;
    };
    const int own = p.splits - member * kLanes;
    const int batches = own > 0 ? (own + members * kLanes - 1) / (members * kLanes) : 0;
    Candidate next = load(0, 0);
    for (int rank = 0; rank < count; ++rank) {
        bool any = false;
        for (int batch = 0; batch < batches; ++batch) {
            const Candidate candidate = next;
            next = batch + 1 < batches ? load(rank, batch + 1) : load(rank + 1, 0);
            any |= merge_lanes(list, count, candidate);
        }
        if (!any) break;
    }
}

// Weighs, gates and blends all tokens, whose neighbours are the first list of each team.
// By the last block.
__device__ inline void finish_tokens(const BlendParams& p, unsigned char* shared, int k) {
    using Shared = FinishShared;
    const int warp = warp_index(), team = Shared::team(p.tokens);
    const auto* lists = reinterpret_cast<const Candidate*>(shared + Shared::LISTS);
    auto* weights = reinterpret_cast<float*>(shared + Shared::weights(p.tokens, p.columns));
    auto* evidence = reinterpret_cast<float*>(shared + Shared::evidence(p.tokens, p.columns));
    auto* gate = reinterpret_cast<float*>(shared + Shared::gate(p.tokens, p.columns));
    for (int token = warp; token < p.tokens; token += kWarps) {
        const float mean = weigh_neighbors(
            p, token, lists + token * team * p.columns, k, weights + token * p.columns);
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
            p, token, expert, lists + token * team * p.columns, weights + token * p.columns, k,
            confidence);
    }
}

template <class Tile>
__device__ inline void decode(const BlendParams& p) {
    KNNMOE_DYNAMIC_SHARED(shared);
    prepare_and_scan<Tile>(p, shared);
    if (p.candidates > 0) return;
    if (!is_last_block(p, shared)) return;
    const int k = neighbor_count(p, valid_entries(p));
    const int warp = warp_index(), team = FinishShared::team(p.tokens);
    auto* lists = reinterpret_cast<Candidate*>(shared + FinishShared::LISTS);
    for (int i = warp; i < p.tokens * team; i += kWarps) {
        WarpList best;
        merge_splits(p, i / team, i % team, team, k, best);
        store_list(best, lists + i * p.columns, k);
    }
    __syncthreads();
    if (team > 1 && warp < p.tokens) {
        WarpList best;
        Candidate* first = lists + warp * team * p.columns;
        load_list(best, first, k);
        for (int other = 1; other < team; ++other) merge_list(best, first + other * p.columns, k);
        store_list(best, first, k);
    }
    finish_tokens(p, shared, k);
}

}  // namespace knnmoe
