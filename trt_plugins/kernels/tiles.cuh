// A tile: the inner products of TOKENS queries with KEYS consecutive keys, by one warp.
//
// Both tiles read a key once, sixteen bytes a lane (WIDTH elements), and never in a way that
// depends on alignment the caller does not have: where D is no multiple of WIDTH they read single
// elements, correct and slower. Keys past the last are read as the last, and never offered.
//
// FmaTile   fp32 arithmetic, queries in fp32. Best for 1 to 4 tokens; the only tile for fp32 keys.
// MmaTile   tensor cores. Eight tokens fill the sixteen rows of a fragment twice: their fp16 values
//           and what fp16 lost of them. So the products are as exact as fp32 queries would give
//           (keys are fp16 or int8 and exact in fp16), and a D of any size costs one pass.
//
// A tile also says how a query is stored for it: `slot` of an element, and `query_bytes`.
#pragma once

#include "candidates.cuh"

namespace knnmoe {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(signed char v) { return static_cast<float>(v); }

// Two fp16 in a register, as a number and back.
__device__ inline __half2 pair_of(unsigned bits) {
    return __halves2half2(
        __ushort_as_half(static_cast<unsigned short>(bits)),
        __ushort_as_half(static_cast<unsigned short>(bits >> 16)));
}

__device__ inline unsigned bits_of(__half2 pair) {
    return __half_as_ushort(__low2half(pair)) |
           static_cast<unsigned>(__half_as_ushort(__high2half(pair))) << 16;
}

// Two int8 as the same two numbers in fp16: 0x6400 + u is the fp16 number 1024 + u.
__device__ inline unsigned halves_of_bytes(unsigned bytes, unsigned selector) {
    const unsigned raised = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, selector);
    const __half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1024 + 128
    return bits_of(__hsub2(pair_of(raised), offset));
}

__device__ inline unsigned word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Elements 4·part .. 4·part + 3 of a lane's sixteen bytes.
__device__ inline float4 unpack(const uint4& v, int part, float) {
    (void)part;
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

__device__ inline float4 unpack(const uint4& v, int part, __half) {
    const float2 low = __half22float2(pair_of(word(v, 2 * part)));
    const float2 high = __half22float2(pair_of(word(v, 2 * part + 1)));
    return {low.x, low.y, high.x, high.y};
}

__device__ inline float4 unpack(const uint4& v, int part, signed char) {
    const unsigned w = word(v, part);
    const auto byte = [w](int i) { return to_float(static_cast<signed char>(w >> 8 * i)); };
    return {byte(0), byte(1), byte(2), byte(3)};
}

// From an inner product with the stored query to what neighbours are ranked by: similarity, or
// what falls with the distance. `scales` are those of the key.
__device__ inline float similarity_of(
    const BlendParams& p, const float* scales, float product, const QueryScale& query) {
    const float inner = product * query.multiplier * scales[0];
    if (!p.rbf) return inner;
    const float distance = fmaxf(query.squares - 2 * inner + scales[1], 0.0f);
    return expf(-p.calibration[kGamma] * distance);
}

__device__ inline Candidate score_scanned(
    const BlendParams& p, float product, const QueryScale& query, int entry) {
    const float* scales = p.scan_scales + 2LL * entry;
    // Candidates to be scored again need no similarity, and no exponential to round them together.
    const float score = p.rbf && p.candidates > 0
                            ? 2 * product * query.multiplier * scales[0] - scales[1]
                            : similarity_of(p, scales, product, query);
    return make_candidate(score, entry);
}

template <typename Key_, int TOKENS_>
struct FmaTile {
    using Key = Key_;
    using Query = float;
    static constexpr int TOKENS = TOKENS_;
    static constexpr int KEYS = 4;
    static constexpr int WIDTH = 16 / sizeof(Key);
    static constexpr int PARTS = WIDTH / 4;

    static __host__ __device__ constexpr int padded(int hidden) {
        return static_cast<int>(round_up(hidden, WIDTH));
    }
    static __host__ __device__ constexpr long long query_bytes(int hidden) {
        return 4LL * TOKENS * padded(hidden);
    }

    // The four-element parts of a lane's elements stand apart, each for all lanes in a row: sixteen
    // byte reads of shared memory without bank conflicts.
    static __host__ __device__ constexpr int slot(int hidden, int token, int e) {
        return token * padded(hidden) + e % WIDTH / 4 * (padded(hidden) / PARTS) + e / WIDTH * 4 +
               e % 4;
    }
    static __device__ void store(Query* queries, int hidden, int token, int e, float v) {
        queries[slot(hidden, token, e)] = v;
    }

    // Offers the keys first .. first + KEYS - 1, those below n, to the lists of the tokens.
    static __device__ void scan(
        const BlendParams& p, const Query* queries, const QueryScale* scales, int tokens, int first,
        int n, Candidate* lists, int k) {
        const Key* rows[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; ++i) {
            const int entry = first + i < n ? first + i : n - 1;
            rows[i] =
                static_cast<const Key*>(p.scan_keys) + static_cast<long long>(entry) * p.hidden;
        }
        const float product = multiply<FmaTile>(rows, queries, p.hidden);
        const int token = mine() % TOKENS, entry = first + mine() / TOKENS;
        Candidate candidate = kNone;
        if (lane_index() % SHARERS == 0 && token < tokens && entry < n)
            candidate = score_scanned(p, product, scales[token], entry);
        offer(candidate, token, lists, list_columns(p), k);
    }

    // SHARERS lanes end with the same product: that of key mine() / TOKENS, token mine() % TOKENS.
    static constexpr int SHARERS = kLanes / (KEYS * TOKENS);
    static __device__ int mine() { return lane_index() / SHARERS; }

    // The inner products of KEYS keys with the queries as Layout, which may be another tile, has
    // stored them. Each lane returns one of them.
    template <class Layout>
    static __device__ float multiply(
        const Key* const (&rows)[KEYS], const Query* queries, int hidden) {
        const int lane = lane_index();
        float sums[KEYS * TOKENS] = {};
        if (hidden % WIDTH == 0) {
            const int groups = hidden / WIDTH;
            const auto part_of_query = [=](int t, int part, int g) {
                if constexpr (Layout::WIDTH == WIDTH)
                    return queries + t * hidden + (part * groups + g) * 4;  // saves registers
                else
                    return queries + Layout::slot(hidden, t, g * WIDTH + part * 4);
            };
            constexpr int UNROLL = WIDTH > 8 ? 1 : 2;  // what the registers hold
#pragma unroll UNROLL
            for (int g = lane; g < groups; g += kLanes) {
                uint4 raw[KEYS];
#pragma unroll
                for (int i = 0; i < KEYS; ++i) raw[i] = load_stream(rows[i] + g * WIDTH);
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    float4 keys[KEYS];
#pragma unroll
                    for (int i = 0; i < KEYS; ++i) keys[i] = unpack(raw[i], part, Key());
#pragma unroll
                    for (int t = 0; t < TOKENS; ++t) {
                        const float4 q =
                            *reinterpret_cast<const float4*>(part_of_query(t, part, g));
#pragma unroll
                        for (int i = 0; i < KEYS; ++i) {
                            float& sum = sums[i * TOKENS + t];
                            sum = fmaf(q.x, keys[i].x, sum);
                            sum = fmaf(q.y, keys[i].y, sum);
                            sum = fmaf(q.z, keys[i].z, sum);
                            sum = fmaf(q.w, keys[i].w, sum);
                        }
                    }
                }
            }
        } else {
            for (int e = lane; e < hidden; e += kLanes) {
#pragma unroll
                for (int i = 0; i < KEYS; ++i) {
                    const float key = to_float(rows[i][e]);
#pragma unroll
                    for (int t = 0; t < TOKENS; ++t)
                        sums[i * TOKENS + t] =
                            fmaf(queries[Layout::slot(hidden, t, e)], key, sums[i * TOKENS + t]);
                }
            }
        }
        return warp_sums(sums);
    }
};

template <typename Key_, int GROUPS, int TILES>
struct MmaTile {
    using Key = Key_;
    using Query = __half;
    static constexpr int TOKENS = 8 * GROUPS;
    static constexpr int KEYS = 8 * TILES;
    static constexpr int WIDTH = 16 / sizeof(Key);
    static constexpr int CHUNK = 4 * WIDTH;   // elements of a key that four lanes read together
    static constexpr int STEPS = WIDTH / 8;   // pairs of multiplications a chunk needs
    static constexpr int DEPTH = 8 / TILES;   // chunks in flight: eight loads a lane

    static __host__ __device__ constexpr int padded(int hidden) {
        return static_cast<int>(round_up(hidden, CHUNK));
    }
    static __host__ __device__ constexpr long long query_bytes(int hidden) {
        return 32LL * GROUPS * padded(hidden);
    }

    // An inner product does not care in which order its elements are multiplied, so a lane's
    // fragments hold the elements that it reads anyway: lane 4·g + t has elements
    // WIDTH·t .. WIDTH·t + WIDTH - 1 of every chunk, of token g and of key g. Stored in the order
    // they are read: [group][chunk][step][value, rest][lane][8].
    static __device__ void store(Query* queries, int hidden, int token, int e, float v) {
        const int group = token / 8, chunk = e / CHUNK, lane = token % 8 * 4 + e % CHUNK / WIDTH;
        const int step = e % WIDTH / 8;
        const long long at =
            16LL * group * padded(hidden) + ((chunk * STEPS + step) * 2 * kLanes + lane) * 8 + e % 8;
        const __half value = __float2half_rn(v);
        queries[at] = value;
        queries[at + kLanes * 8] = __float2half_rn(v - __half2float(value));
    }

    // Elements e .. e + WIDTH - 1 of a key. Past its end the queries are zero, so anything finite
    // will do: vectors are read from the end again, which needs no branch.
    template <bool VECTORS>
    static __device__ uint4 load_keys(const Key* row, int e, int hidden) {
        if constexpr (VECTORS) {
            return load_stream(row + (e < hidden ? e : hidden - WIDTH));
        } else {
            Key elements[WIDTH];
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) elements[i] = row[e + i < hidden ? e + i : hidden - 1];
            uint4 v;
            memcpy(&v, elements, sizeof v);
            return v;
        }
    }

    // The words of the key fragments of one step.
    static __device__ uint4 key_halves(const uint4& raw, int step) {
        if (sizeof(Key) == 2) return raw;
        const unsigned low = word(raw, 2 * step), high = word(raw, 2 * step + 1);
        return {halves_of_bytes(low, 0x4140), halves_of_bytes(low, 0x4342),
                halves_of_bytes(high, 0x4140), halves_of_bytes(high, 0x4342)};
    }

    // Multiplies DEPTH chunks from the given one on: all loads of keys, then all products.
    template <bool VECTORS, int DEPTH>
    static __device__ void multiply(
        int chunk, int hidden, const Query* queries, const Key* const (&rows)[TILES],
        float (&sums)[GROUPS][TILES][4]) {
        const int lane = lane_index(), chunks = padded(hidden) / CHUNK;
        uint4 raw[DEPTH][TILES];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int e = (chunk + d) * CHUNK + lane % 4 * WIDTH;
#pragma unroll
            for (int j = 0; j < TILES; ++j) raw[d][j] = load_keys<VECTORS>(rows[j], e, hidden);
        }
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) {
                    const uint4* a = reinterpret_cast<const uint4*>(queries) + lane +
                                     ((i * chunks + chunk + d) * STEPS + step) * (2 * kLanes);
                    const uint4 value = a[0], rest = a[kLanes];
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        const uint4 b = key_halves(raw[d][j], step);
                        multiply_fragments(
                            sums[i][j], value.x, rest.x, value.y, rest.y, b.x, b.y);
                        multiply_fragments(
                            sums[i][j], value.z, rest.z, value.w, rest.w, b.z, b.w);
                    }
                }
            }
        }
    }

    static __device__ void scan(
        const BlendParams& p, const Query* queries, const QueryScale* scales, int tokens, int first,
        int n, Candidate* lists, int k) {
        const int hidden = p.hidden, chunks = padded(hidden) / CHUNK;
        const int lane = lane_index(), g = lane / 4, t = lane % 4;
        const Key* rows[TILES];
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const int entry = first + 8 * j + g < n ? first + 8 * j + g : n - 1;
            rows[j] =
                static_cast<const Key*>(p.scan_keys) + static_cast<long long>(entry) * hidden;
        }
        float sums[GROUPS][TILES][4] = {};
        int chunk = 0;
        if (hidden % WIDTH == 0) {
            for (; chunk + DEPTH <= chunks; chunk += DEPTH)
                multiply<true, DEPTH>(chunk, hidden, queries, rows, sums);
            for (; chunk < chunks; ++chunk) multiply<true, 1>(chunk, hidden, queries, rows, sums);
        } else {
            for (; chunk < chunks; ++chunk) multiply<false, 1>(chunk, hidden, queries, rows, sums);
        }
        // Rows 0-7 of a product hold the values' part, rows 8-15 the rest's, of the same tokens.
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int token = 8 * i + g, entry = first + 8 * j + 2 * t + c;
                    Candidate candidate = kNone;
                    if (token < tokens && entry < n)
                        candidate = score_scanned(
                            p, sums[i][j][c] + sums[i][j][c + 2], scales[token], entry);
                    offer(candidate, token, lists, list_columns(p), k);
                }
            }
        }
    }
};

}  // namespace knnmoe
