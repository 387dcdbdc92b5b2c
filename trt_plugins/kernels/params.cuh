// What every kernel of the blend is called with, and the layout of its scratch memory.
//
// Shapes, dtypes and names are those of the KnnBlend node in docs/design.md; the equations are in
// docs/method.md and, executable, in runtime/blend.py. T tokens are B sequences of S, in that order.
#pragma once

namespace knnmoe {

constexpr int kMaxNeighbors = 64;    // two candidates a lane
constexpr int kMaxDecodeTokens = 16;
constexpr int kWarps = 8;            // of every block that scans keys for decode
constexpr int kPrefillWarps = 4;     // of every block that scans keys for prefill
constexpr int kFinishWarps = 4;      // of every other block

// Indices into the calibration vector.
enum Calibration {
    kInterpolate,
    kWeightPower,
    kInverseTemperature,
    kMean,
    kScale,
    kPower,
    kMidpoint,
    kSharpness,
    kCap,
    kSequence,
    kGamma,
    kDecay,
    kCalibrationSize
};

// A kernel's only argument, by value. All pointers are device memory; keys and values begin at
// multiples of 16 bytes, everything else at multiples of its element. `state_out` may be `state`
// and `rows` may be `r`; nothing else may overlap.
struct BlendParams {
    const float* x;             // [T, D]
    const float* r;             // [T, E]
    const void* keys;           // [N, D] fp32, fp16 or int8, as the kernel's name says
    const float* key_scales;    // [N, 2] multiplier, squared norm
    const void* scan_keys;      // [N, D] what is scanned: `keys`, or int8 of them if candidates > 0
    const float* scan_scales;   // [N, 2] the same of them
    const void* values;         // [N, E] fp32, or fp16 if half_values
    const float* evidence_weights;  // [N]
    const long long* n_valid;   // [1]
    const long long* k;         // [1]
    const float* center;        // [D]
    const float* calibration;   // [12]
    const float* state;         // [B, 2]
    const long long* lengths;   // [B]
    float* rows;                // [T, E] r'
    float* state_out;           // [B, 2]
    float* confidence;          // [T]
    long long* neighbors;       // [T, columns], or null
    float* similarities;        // [T, columns], or null
    unsigned char* workspace;   // see Workspace; may hold anything
    unsigned* ticket;           // [1] zero before the first call; every call leaves it zero
    long long capacity;         // N, below 2^31
    int tokens;                 // T
    int sequences;              // B
    int hidden;                 // D
    int experts;                // E
    int columns;                // the most neighbours a call may ask for, at most 64
    int candidates;             // 0: the best of the scan are the neighbours; else, columns to 64:
                                // that many of them are scored again with `keys` (rescore.cuh)
    int splits;                 // parts the keys are scanned in, one block each
    int rbf;                    // 1: similarity = rbf, 0: cosine
    int half_values;            // 1: values are fp16
};

using Candidate = unsigned long long;  // a score and an entry; see candidates.cuh

// A query is stored divided by its largest magnitude, so that no finite x overflows.
struct QueryScale {
    float multiplier;  // makes an inner product with the stored query true
    float squares;     // ‖q‖², for RBF
};

inline __host__ __device__ constexpr long long round_up(long long n, long long multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Offsets into the scratch memory. One workspace, as one ticket, serves one stream at a time.
struct Workspace {
    long long candidates;  // Candidate [T, listed, splits]
    long long merged;      // Candidate [T, columns]
    // The rest is for prefill alone.
    long long evidence;    // fp32 [T]
    long long gate;        // fp32 [T]
    long long scales;      // QueryScale [T rounded up to whole tiles]
    long long queries;     // [T rounded up to whole tiles], as the tile stores them
    long long bytes;

    // `listed`: the length of a block's lists, see list_columns. `query_bytes` is a tile's, 0 for
    // decode, which keeps its queries in shared memory.
    static __host__ __device__ constexpr Workspace of(
        int tokens, int listed, int columns, int splits, int tile_tokens, long long query_bytes) {
        Workspace w{};
        long long tiles = (tokens + tile_tokens - 1) / tile_tokens;
        w.merged = round_up(8LL * tokens * listed * splits, 256);
        w.evidence = round_up(w.merged + 8LL * tokens * columns, 256);
        if (query_bytes == 0) {
            w.bytes = w.evidence;
            return w;
        }
        w.gate = round_up(w.evidence + 4LL * tokens, 256);
        w.scales = round_up(w.gate + 4LL * tokens, 256);
        w.queries = round_up(w.scales + 8LL * tiles * tile_tokens, 256);
        w.bytes = round_up(w.queries + tiles * query_bytes, 256);
        return w;
    }
};

}  // namespace knnmoe
