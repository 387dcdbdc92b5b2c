// Two-stage search: int8 keys are scanned for R candidates, which are scored again with the full
// keys; the K best of them are the neighbours. The rest is as without (runtime/two_stage.py).
//
//   1 token         decode_two_stage: one launch, whose last block scores again, then finishes
//   2 to 16 tokens  decode's scan of int8 keys, then decode_rescore: a block a token, of which the
//                   last one finishes
//   more            prefill, with prefill_rescore, a block a token, in the place of its merge
//
// Bytes read      n_valid·(D + 8) of int8 keys, once a token group: half of fp16. A token's R rows
//                 of keys, R·D·sizeof(Key): 256 KiB for R 64, D 2048, fp16, 0.1 % of what the
//                 scan of 100k entries reads
// Latency         a block has about 32 KiB of loads in flight, so for these rows it would wait for
//                 memory eight times, 5 µs on a large GPU. It asks for all of them to come to L2
//                 first and then reads them from there: about 3 µs. For one token that is what a
//                 second launch and its spreading would cost, after a scan of some 60 µs; for more
//                 it would be that many times as long, hence a block each. Were each block to
//                 score its own best few again, nobody would have to merge R, but each token would
//                 cost splits/R times the rows, and what is found would depend on the device.
// Merge           lists of R are merged by sorting networks (candidates.cuh) and by all warps of
//                 the block: about 5 µs for 400 lists of 64, where insertions would take 20 µs
// Shared memory   a query, 8 lists of R candidates and one more: 4·D + 4.6 KiB for R 64
// Limits          as decode; K ≤ columns ≤ R ≤ 64; keys fp32 or fp16
// All times are reckoned, not measured.
#pragma once

#include "prefill.cuh"

namespace knnmoe {

// The neighbours of one token: the best R of all blocks' lists, scored again. By a whole block of
// kWarps, which stores the query as Layout does; in shared memory `lists` has room for kWarps + 1
// lists of R. Warp 0 returns the neighbours; no other warp reads shared memory afterwards.
template <class Layout, typename Key>
__device__ inline void rescore_token(
    const BlendParams& p, int token, const float* query, const QueryScale* scale, Candidate* lists,
    WarpList& best) {
    using Tile = FmaTile<Key, 1>;
    const int warp = warp_index(), count = list_count(p, valid_entries(p));
    merge_splits(p, token, warp, kWarps, count, best);
    store_list(best, lists + warp * p.candidates, count);
    __syncthreads();  // of the query too
    for (int i = 1; i < kWarps; ++i)
        merge_list(best, lists + (warp + i) % kWarps * p.candidates, count);

    // Every warp has all candidates now. Lines are asked for by the warp that will read them.
    const int entries[] = {candidate_entry(best[0]), candidate_entry(best[1])};
    const auto entry_at = [&](int place) {
        if (place >= count) place = count - 1;
        const int low = __shfl_sync(kEveryLane, entries[0], place % kLanes);
        const int high = __shfl_sync(kEveryLane, entries[1], place % kLanes);
        return place < kLanes ? low : high;
    };
    const auto row_at = [&](int place) {
        return static_cast<const Key*>(p.keys) + static_cast<long long>(entry_at(place)) * p.hidden;
    };
    constexpr int STEP = kWarps * Tile::KEYS, LINE = 128 / sizeof(Key);
#pragma unroll 1
    for (int first = warp * Tile::KEYS; first < count; first += STEP) {
#pragma unroll 1
        for (int i = 0; i < Tile::KEYS; ++i) {
            const Key* row = row_at(first + i);
            for (int e = lane_index() * LINE; e < p.hidden; e += kLanes * LINE) prefetch(row + e);
        }
    }
    Candidate* exact = lists + kWarps * p.candidates;
#pragma unroll 1
    for (int first = warp * Tile::KEYS; first < count; first += STEP) {
        const Key* rows[Tile::KEYS];
#pragma unroll
        for (int i = 0; i < Tile::KEYS; ++i) rows[i] = row_at(first + i);
        const float product = Tile::template multiply<Layout>(rows, query, p.hidden);
        const int place = first + Tile::mine();
        const int entry = entry_at(place);
        if (lane_index() % Tile::SHARERS == 0 && place < count)
            exact[place] = make_candidate(
                similarity_of(p, p.key_scales + 2LL * entry, product, *scale), entry);
    }
    __syncthreads();
    if (warp == 0) sort_list(best, exact, count);
}

// The same for a block that has not scanned, and must prepare the query of its token, blockIdx.x.
template <typename Key>
__device__ inline void prepare_and_rescore(
    const BlendParams& p, unsigned char* shared, WarpList& best) {
    using Tile = FmaTile<Key, 1>;
    using Shared = DecodeShared<Tile>;
    const int token = blockIdx.x;
    auto* query = reinterpret_cast<float*>(shared + Shared::QUERIES);
    auto* scale = reinterpret_cast<QueryScale*>(shared + Shared::SCALES);
    prepare_queries<Tile, kWarps>(
        p, token, query, scale, reinterpret_cast<float*>(shared + Shared::SCRATCH));
    rescore_token<Tile, Key>(
        p, token, query, scale, reinterpret_cast<Candidate*>(shared + Shared::lists(p.hidden)),
        best);
}

__device__ inline Candidate* merged_of(const BlendParams& p, int token) {
    const Workspace w =
        Workspace::of(p.tokens, list_columns(p), p.columns, p.splits, 1, 0);
    return reinterpret_cast<Candidate*>(p.workspace + w.merged) +
           static_cast<long long>(token) * p.columns;
}

template <typename Key>
__device__ inline void decode_two_stage(const BlendParams& p) {
    using Tile = FmaTile<signed char, 1>;
    using Shared = DecodeShared<Tile>;
    KNNMOE_DYNAMIC_SHARED(shared);
    prepare_and_scan<Tile>(p, shared);
    if (!is_last_block(p, shared)) return;
    WarpList best;
    rescore_token<Tile, Key>(
        p, 0, reinterpret_cast<const float*>(shared + Shared::QUERIES),
        reinterpret_cast<const QueryScale*>(shared + Shared::SCALES),
        reinterpret_cast<Candidate*>(shared + Shared::lists(p.hidden)), best);
    const int k = neighbor_count(p, valid_entries(p));
    if (warp_index() == 0)
        store_list(best, reinterpret_cast<Candidate*>(shared + FinishShared::LISTS), k);
    finish_tokens(p, shared, k);
}

template <typename Key>
__device__ inline void decode_rescore(const BlendParams& p) {
    KNNMOE_DYNAMIC_SHARED(shared);
    WarpList best;
    prepare_and_rescore<Key>(p, shared, best);
    const int k = neighbor_count(p, valid_entries(p));
    if (warp_index() == 0) store_list(best, merged_of(p, blockIdx.x), k);
    if (!is_last_block(p, shared)) return;
    auto* lists = reinterpret_cast<Candidate*>(shared + FinishShared::LISTS);
    const int team = FinishShared::team(p.tokens);
    for (int token = warp_index(); token < p.tokens; token += kWarps) {
        const Candidate* merged = merged_of(p, token);
        // A lane weighs the ranks it copies, and the barriers of what follows show them to all.
        for (int rank = lane_index(); rank < k; rank += kLanes)
            lists[token * team * p.columns + rank] = __ldcg(merged + rank);
    }
    finish_tokens(p, shared, k);
}

template <typename Key>
__device__ inline void prefill_rescore(const BlendParams& p) {
    KNNMOE_DYNAMIC_SHARED(shared);
    WarpList best;
    prepare_and_rescore<Key>(p, shared, best);
    const int k = neighbor_count(p, valid_entries(p));
    if (warp_index() == 0) report_merged(p, blockIdx.x, best, k);
}

}  // namespace knnmoe
