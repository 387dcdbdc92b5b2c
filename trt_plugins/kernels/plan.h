// Which kernels a call launches, in which grids: what a C++ host needs beside the kernels.
//
// Plain C++17. plan.py says the same for Python; a test holds the two together.
#pragma once

#include "rescore.cuh"

namespace knnmoe {

constexpr int kMostTiles = 65535;  // of a call: rows of a grid

enum class KeyType { kFloat32, kFloat16, kInt8 };

struct Device {
    int multiprocessors;
    long long shared_bytes;  // the most a block may ask for
};

struct Launch {
    char kernel[40];
    int grid_x, grid_y;
    int threads;
    long long shared_bytes;
};

struct Plan {
    Launch launches[5];
    int launch_count;
    int splits;
    long long workspace_bytes;
};

struct Problem {
    KeyType key_type;  // of `keys`; with candidates fp32 or fp16, and what is scanned is int8
    int tokens, sequences, hidden, experts, columns;
    int candidates;  // 0, or columns to 64
    long long capacity;

    KeyType scan_type() const { return candidates > 0 ? KeyType::kInt8 : key_type; }
    int listed() const { return candidates > 0 ? candidates : columns; }
};

namespace planning {

inline const char* suffix(KeyType type) {
    return type == KeyType::kFloat32 ? "f32" : type == KeyType::kFloat16 ? "f16" : "i8";
}

inline int key_width(KeyType type) {
    return type == KeyType::kFloat32 ? 4 : type == KeyType::kFloat16 ? 8 : 16;
}

// Of the tile that takes `tokens` tokens at a time; the same numbers as in tiles.cuh.
struct TileShape {
    int tokens, keys;
    long long query_bytes;
    bool tensor;

    static TileShape of(KeyType type, int tokens, int hidden) {
        const int width = key_width(type);
        const bool tensor = type != KeyType::kFloat32 && tokens >= 8;
        const long long padded = round_up(hidden, tensor ? 4 * width : width);
        const int keys = !tensor ? 4 : tokens == 32 ? 32 : 16;
        return {tokens, keys, 4LL * tokens * padded, tensor};
    }
};

// As DecodeShared: of a block that keeps a tile's queries and `lists` lists a token.
inline long long scan_shared(const Problem& q, const TileShape& tile, int lists) {
    const int team = kWarps > tile.tokens ? kWarps / tile.tokens : 1;
    const long long queries = round_up(16 + 8LL * tile.tokens + 8LL * tile.tokens * team, 16);
    return queries + tile.query_bytes + 8LL * lists * tile.tokens * q.listed();
}

inline long long larger(long long a, long long b) { return a > b ? a : b; }

inline long long decode_shared(const Problem& q, const TileShape& tile) {
    const long long finishing = FinishShared::bytes(q.tokens, q.columns);
    if (q.candidates == 0) return larger(scan_shared(q, tile, kWarps), finishing);
    // One token is scored again by a block that has scanned; more are by the next launch.
    if (q.tokens == 1) return larger(scan_shared(q, tile, kWarps + 1), finishing);
    return scan_shared(q, tile, kWarps);
}

inline long long rescore_shared(const Problem& q) {
    return scan_shared(q, TileShape::of(q.key_type, 1, q.hidden), kWarps + 1);
}

inline int least(long long a, long long b) { return static_cast<int>(a < b ? a : b); }
inline long long at_least_one(long long n) { return n < 1 ? 1 : n; }
inline long long quotient_up(long long n, long long d) { return (n + d - 1) / d; }

inline Launch launch(
    const char* stem, const char* end, long long grid_x, int grid_y, int warps, long long shared) {
    Launch l{};
    int at = 0;
    for (const char* part : {"knnmoe_", stem, end})
        for (; *part; ++part) l.kernel[at++] = *part;
    l.grid_x = static_cast<int>(grid_x);
    l.grid_y = grid_y;
    l.threads = warps * kLanes;
    l.shared_bytes = shared;
    return l;
}

inline Plan plan_decode(const Problem& q, const Device& device) {
    const KeyType type = q.scan_type();
    // The most tokens a read of the keys can serve: what is asked for, what fits.
    int tokens = 1;
    for (int more : {2, 4, 8, 16}) {
        if (more > 4 && type == KeyType::kFloat32) break;
        if (more == 4 && type == KeyType::kInt8) continue;  // would spill; 8 cost the same
        if (decode_shared(q, TileShape::of(type, more, q.hidden)) > device.shared_bytes) break;
        if (tokens >= q.tokens) break;
        tokens = more;
    }
    const TileShape tile = TileShape::of(type, tokens, q.hidden);
    const long long shared = decode_shared(q, tile);
    const int groups = static_cast<int>(quotient_up(q.tokens, tokens));
    const int resident = least(
        tokens == 1 ? 3 : 2, at_least_one((device.shared_bytes + 1024) / (shared + 1024)));
    const long long fill = at_least_one(1LL * device.multiprocessors * resident / groups);
    Plan plan{};
    plan.splits = least(fill, at_least_one(quotient_up(q.capacity, kWarps * tile.keys)));
    plan.workspace_bytes =
        Workspace::of(q.tokens, q.listed(), q.columns, plan.splits, tokens, 0).bytes;
    const auto add = [&plan](const Launch& l) { plan.launches[plan.launch_count++] = l; };
    if (q.candidates > 0 && q.tokens == 1) {
        add(launch(
            "decode_two_stage_", suffix(q.key_type), plan.splits, groups, kWarps, shared));
        return plan;
    }
    char end[8] = {};
    int at = 0;
    for (const char* c = suffix(type); *c; ++c) end[at++] = *c;
    end[at++] = '_';
    if (tokens >= 10) end[at++] = static_cast<char>('0' + tokens / 10);
    end[at++] = static_cast<char>('0' + tokens % 10);
    add(launch("decode_", end, plan.splits, groups, kWarps, shared));
    if (q.candidates > 0)
        add(launch(
            "decode_rescore_", suffix(q.key_type), q.tokens, 1, kWarps,
            larger(rescore_shared(q), FinishShared::bytes(q.tokens, q.columns))));
    return plan;
}

inline Plan plan_prefill(const Problem& q, const Device& device) {
    const KeyType type = q.scan_type();
    const int tokens = type == KeyType::kFloat32 ? 8 : 32;
    const TileShape tile = TileShape::of(type, tokens, q.hidden);
    const char* end = suffix(type);
    const int tiles = static_cast<int>(quotient_up(q.tokens, tokens));
    const long long fill = at_least_one(4LL * device.multiprocessors / tiles);
    Plan plan{};
    plan.splits = least(fill, at_least_one(quotient_up(q.capacity, kPrefillWarps * tile.keys)));
    plan.workspace_bytes =
        Workspace::of(q.tokens, q.listed(), q.columns, plan.splits, tokens, tile.query_bytes).bytes;
    const auto add = [&plan](const Launch& l) { plan.launches[plan.launch_count++] = l; };
    add(launch("prefill_prepare_", end, tiles, 1, kFinishWarps, 8LL * tokens));
    add(launch(
        "prefill_scan_", end, plan.splits, tiles, kPrefillWarps,
        8LL * kPrefillWarps * tokens * q.listed()));
    if (q.candidates > 0)
        add(launch(
            "prefill_rescore_", suffix(q.key_type), q.tokens, 1, kWarps, rescore_shared(q)));
    else
        add(launch(
            "prefill_merge", "", quotient_up(q.tokens, kFinishWarps), 1, kFinishWarps, 0));
    add(launch("prefill_gate", "", quotient_up(q.sequences, kFinishWarps), 1, kFinishWarps, 0));
    add(launch("prefill_finish", "", q.tokens, 1, kFinishWarps, 12LL * q.columns));
    return plan;
}

}  // namespace planning

inline Plan make_plan(const Problem& q, const Device& device) {
    const Plan prefill = planning::plan_prefill(q, device);
    if (q.tokens > kMaxDecodeTokens) return prefill;
    const Plan decode = planning::plan_decode(q, device);
    // Decode keeps queries and lists in shared memory. Where that is too small for a wide tile, so
    // that it would read the keys more than twice, prefill's one read is worth its five launches.
    const bool reads_more = q.scan_type() != KeyType::kFloat32 && decode.launches[0].grid_y > 2;
    return reads_more && prefill.launches[1].shared_bytes <= device.shared_bytes ? prefill : decode;
}

}  // namespace knnmoe
