// Which kernels a call launches, in which grids: what a C++ host needs beside the kernels.
//
// Plain C++17. plan.py says the same for Python; a test holds the two together.
#pragma once

#include "prefill.cuh"

namespace knnmoe {

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
    KeyType key_type;
    int tokens, sequences, hidden, experts, columns;
    long long capacity;
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

// As DecodeShared::bytes.
inline long long decode_shared(const Problem& q, const TileShape& tile) {
    const int team = kWarps > tile.tokens ? kWarps / tile.tokens : 1;
    const long long queries = round_up(16 + 8LL * tile.tokens + 8LL * tile.tokens * team, 16);
    const long long scanning =
        queries + tile.query_bytes + 8LL * kWarps * tile.tokens * q.columns;
    const long long finishing = 16 + q.tokens * (12LL * q.columns + 8);
    return scanning > finishing ? scanning : finishing;
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
    // The most tokens a read of the keys can serve: what is asked for, what fits.
    int tokens = 1;
    for (int more : {2, 4, 8, 16}) {
        if (more > 4 && q.key_type == KeyType::kFloat32) break;
        if (more == 4 && q.key_type == KeyType::kInt8) continue;  // would spill; 8 cost the same
        if (decode_shared(q, TileShape::of(q.key_type, more, q.hidden)) > device.shared_bytes) break;
        if (tokens >= q.tokens) break;
        tokens = more;
    }
    const TileShape tile = TileShape::of(q.key_type, tokens, q.hidden);
    const long long shared = decode_shared(q, tile);
    const int groups = static_cast<int>(quotient_up(q.tokens, tokens));
    const int resident = least(
        tokens == 1 ? 3 : 2, at_least_one((device.shared_bytes + 1024) / (shared + 1024)));
    const long long fill = at_least_one(1LL * device.multiprocessors * resident / groups);
    Plan plan{};
    plan.splits = least(fill, at_least_one(quotient_up(q.capacity, kWarps * tile.keys)));
    plan.workspace_bytes = Workspace::of(q.tokens, q.columns, plan.splits, tokens, 0).bytes;
    char end[8] = {};
    int at = 0;
    for (const char* c = suffix(q.key_type); *c; ++c) end[at++] = *c;
    end[at++] = '_';
    if (tokens >= 10) end[at++] = static_cast<char>('0' + tokens / 10);
    end[at++] = static_cast<char>('0' + tokens % 10);
    plan.launches[plan.launch_count++] =
        launch("decode_", end, plan.splits, groups, kWarps, shared);
    return plan;
}

inline Plan plan_prefill(const Problem& q, const Device& device) {
    const int tokens = q.key_type == KeyType::kFloat32 ? 8 : 32;
    const TileShape tile = TileShape::of(q.key_type, tokens, q.hidden);
    const char* end = suffix(q.key_type);
    const int tiles = static_cast<int>(quotient_up(q.tokens, tokens));
    const long long fill = at_least_one(4LL * device.multiprocessors / tiles);
    Plan plan{};
    plan.splits = least(fill, at_least_one(quotient_up(q.capacity, kPrefillWarps * tile.keys)));
    plan.workspace_bytes =
        Workspace::of(q.tokens, q.columns, plan.splits, tokens, tile.query_bytes).bytes;
    const auto add = [&plan](const Launch& l) { plan.launches[plan.launch_count++] = l; };
    add(launch("prefill_prepare_", end, tiles, 1, kFinishWarps, 8LL * tokens));
    add(launch(
        "prefill_scan_", end, plan.splits, tiles, kPrefillWarps,
        8LL * kPrefillWarps * tokens * q.columns));
    add(launch(
        "prefill_merge", "", quotient_up(q.tokens, kFinishWarps), 1, kFinishWarps,
        8LL * kFinishWarps * q.columns));
    add(launch("prefill_gate", "", quotient_up(q.sequences, kFinishWarps), 1, kFinishWarps, 0));
    add(launch("prefill_finish", "", q.tokens, 1, kFinishWarps, 12LL * q.columns));
    return plan;
}

}  // namespace planning

inline Plan make_plan(const Problem& q, const Device& device) {
    return q.tokens <= kMaxDecodeTokens ? planning::plan_decode(q, device)
                                        : planning::plan_prefill(q, device);
}

}  // namespace knnmoe
