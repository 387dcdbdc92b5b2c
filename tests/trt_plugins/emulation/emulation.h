// CUDA threads as fibers: enough of the machine to run the kernels of trt_plugins on a CPU.
//
// Two blocks at a time; each thread is a fiber that runs until it must wait for another, and a
// schedule says which fiber runs next. A shuffle waits for its source lane only and orders no
// memory, as CUDA promises no more; ballots, matrix products and __syncwarp wait for the warp,
// __syncthreads for the block. What waits forever, or meets a different operation, is an error.
// Shared memory is allocated to the byte and filled with NaNs. Not modelled: a memory that shows
// different threads its changes in different orders, which is what __threadfence is for.
#pragma once

#include <cuda_fp16.h>
#include <math.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define KNNMOE_DYNAMIC_SHARED(name) unsigned char* name = emulation::own_block().shared
#define threadIdx (emulation::machine.fibers[emulation::machine.running].thread)
#define blockIdx (emulation::own_block().index)
#define gridDim (emulation::machine.grid)

// Saves the registers a call must keep, changes stacks, restores them.
extern "C" void knnmoe_emulation_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl knnmoe_emulation_switch
knnmoe_emulation_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
constexpr int kSavedWords = 6, kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl knnmoe_emulation_switch
knnmoe_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int kSavedWords = 20, kReturnWord = 11;
#else
#error "the emulation switches stacks on x86-64 and aarch64 only"
#endif

namespace emulation {

enum Schedule { kGreedy, kForward, kBackward, kRandom };

constexpr int kLanes = 32;
constexpr int kAhead = 8;  // operations a lane may be ahead of the slowest of its warp
constexpr int kResident = 2;  // blocks that run at the same time
// No power of two: the tops of all stacks would share one set of the cache.
constexpr size_t kStackBytes = (128 << 10) + 5 * 64;

struct Slot {
    const char* operation;
    unsigned words[6];
};

struct Warp {
    long published[kLanes];
    long slowest;    // the least of them …
    int at_slowest;  // … and how many lanes have published no more
    unsigned awaited[kLanes];  // of each lane, which may wait for it
    Slot slots[kLanes][kAhead];
};

enum class Waits { kNothing, kLane, kWarp, kRoom, kBlock, kDone };

struct Fiber {
    dim3 thread;
    void* stack_pointer;
    Waits waits;
    long sequence;  // of the operation it waits in
    int source;
    long barriers;
};

struct Block {
    dim3 index;
    unsigned char* shared;
    long arrivals;  // at its barriers, of all threads
};

struct Machine {
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> ready;  // of each warp, the lanes that may run
    std::vector<char> stacks;
    dim3 grid;
    int threads = 0;  // of a block
    int running = 0;
    int resting = -1;  // the block that was first to touch an atomic
    void* scheduler = nullptr;
    void (*body)(const void*) = nullptr;
    const void* argument = nullptr;
    const char* error = nullptr;
    bool yields = false;  // also where a fiber need not wait
    int left_out = -1;    // the barrier that a mutation leaves out
    long streamed = 0;    // sixteen-byte loads of keys
};
inline Machine machine;

inline Fiber& self() { return machine.fibers[machine.running]; }
inline Block& block_of(int fiber) { return machine.blocks[fiber / machine.threads]; }
inline Block& own_block() { return block_of(machine.running); }
inline Warp& own_warp() { return machine.warps[machine.running / kLanes]; }
inline int own_lane() { return machine.running % kLanes; }

inline void leave() { knnmoe_emulation_switch(&self().stack_pointer, machine.scheduler); }

[[noreturn]] inline void fail(const char* error) {
    machine.error = error;
    leave();
    abort();
}

inline bool may_run(int index) {
    const Fiber& f = machine.fibers[index];
    const Warp& w = machine.warps[index / kLanes];
    switch (f.waits) {
        case Waits::kNothing: return true;
        case Waits::kLane: return w.published[f.source] > f.sequence;
        case Waits::kWarp: return w.slowest > f.sequence;
        case Waits::kRoom: return w.slowest > f.sequence - kAhead + 1;
        case Waits::kBlock:
            return block_of(index).arrivals >= f.barriers * machine.threads;
        case Waits::kDone: return false;
    }
    return false;
}

// Marks those of some lanes of a warp as ready that may run now.
inline void wake(int warp, unsigned lanes) {
    unsigned& ready = machine.ready[warp];
    for (lanes &= ~ready; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        if (may_run(warp * kLanes + lane)) ready |= 1u << lane;
    }
}

inline void wait(Waits waits, long sequence, int source = 0) {
    Fiber& f = self();
    f.waits = waits;
    f.sequence = sequence;
    f.source = source;
    const bool goes_on = may_run(machine.running);
    if (!goes_on) {
        const unsigned own = 1u << own_lane();
        machine.ready[machine.running / kLanes] &= ~own;
        if (waits == Waits::kLane) own_warp().awaited[source] |= own;
    }
    if (machine.yields || !goes_on) leave();
    f.waits = Waits::kNothing;
}

// Wakes those threads of the running one's block that a complete barrier lets run.
inline void wake_block() {
    const int warps = machine.threads / kLanes;
    const int first = machine.running / machine.threads * warps;
    for (int warp = first; warp < first + warps; ++warp) wake(warp, ~0u);
}

// Publishes this lane's operand of its next operation and returns the operation's number.
inline long publish(const char* operation, const void* value, size_t size) {
    Warp& w = own_warp();
    const int lane = own_lane();
    const long sequence = w.published[lane];
    wait(Waits::kRoom, sequence);
    Slot& slot = w.slots[lane][sequence % kAhead];
    slot.operation = operation;
    memcpy(slot.words, value, size);
    ++w.published[lane];
    unsigned concerned = std::exchange(w.awaited[lane], 0);
    if (sequence == w.slowest && --w.at_slowest == 0) {
        long* const end = w.published + kLanes;
        w.slowest = *std::min_element(w.published, end);
        w.at_slowest = static_cast<int>(std::count(w.published, end, w.slowest));
        concerned = ~0u;
    }
    wake(machine.running / kLanes, concerned);
    return sequence;
}

inline const Slot& look(long sequence, int lane, const char* operation) {
    const Slot& slot = own_warp().slots[lane][sequence % kAhead];
    if (slot.operation != operation) fail("lanes of a warp met in different operations");
    return slot;
}

template <typename T>
T exchange(const char* operation, T value, int source) {
    const long sequence = publish(operation, &value, sizeof value);
    wait(Waits::kLane, sequence, source);
    T result;
    memcpy(&result, look(sequence, source, operation).words, sizeof result);
    return result;
}

inline unsigned gather_bits(const char* operation, unsigned bit) {
    const long sequence = publish(operation, &bit, sizeof bit);
    wait(Waits::kWarp, sequence);
    unsigned bits = 0;
    for (int lane = 0; lane < kLanes; ++lane)
        bits |= (look(sequence, lane, operation).words[0] & 1) << lane;
    return bits;
}

inline uint4 load_stream(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("a load is not aligned");
    ++machine.streamed;
    uint4 v;
    memcpy(&v, address, sizeof v);
    return v;
}

inline void prefetch(const void*) {}

// mma.sync.m16n8k16 by the fragment layouts of the PTX manual.
inline void multiply_fragments(
    float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const unsigned words[6] = {a0, a1, a2, a3, b0, b1};
    const long sequence = publish("mma", words, sizeof words);
    wait(Waits::kWarp, sequence);
    const auto element = [&](int lane, int word, int half) {
        const unsigned w = look(sequence, lane, "mma").words[word];
        return __half2float(__ushort_as_half(static_cast<unsigned short>(w >> (16 * half))));
    };
    const int g = own_lane() / 4, t = own_lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row_half = i / 2, column = 2 * t + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int owner = k % 8 / 2, half = k % 2, high = k / 8;
            d[i] += element(4 * g + owner, row_half + 2 * high, half) *
                    element(4 * column + owner, 4 + high, half);
        }
    }
}

inline void run_fiber() {
    machine.body(machine.argument);
    self().waits = Waits::kDone;
    machine.ready[machine.running / kLanes] &= ~(1u << own_lane());
    leave();
    abort();
}

// Greedy stays with a warp while it can, and a block that was first to touch an atomic then rests
// until the others are done; forward and backward take turns; random draws.
inline int next_fiber(Schedule schedule, int last, std::mt19937& random) {
    const int count = static_cast<int>(machine.fibers.size());
    const int start = schedule == kGreedy     ? last / kLanes * kLanes
                      : schedule == kForward  ? (last + 1) % count
                      : schedule == kBackward ? (last + count - 1) % count
                                              : static_cast<int>(random() % count);
    const int warps = count / kLanes, warps_of_a_block = machine.threads / kLanes;
    const int resting = schedule == kGreedy ? machine.resting : -1;
    const bool down = schedule == kBackward;
    // From the start up (or down) to the end, then from there on; the first warp comes last again.
    const unsigned first = down ? ~0u >> (kLanes - 1 - start % kLanes) : ~0u << start % kLanes;
    for (bool all : {false, true})
        for (int i = 0, warp = start / kLanes; i <= warps; ++i) {
            const unsigned lanes = machine.ready[warp] & (i == 0 ? first : i == warps ? ~first : ~0u);
            if (lanes && (all || warp / warps_of_a_block != resting))
                return warp * kLanes +
                       (down ? kLanes - 1 - __builtin_clz(lanes) : __builtin_ctz(lanes));
            warp = down ? (warp ? warp : warps) - 1 : warp + 1 < warps ? warp + 1 : 0;
        }
    return -1;
}

// Runs the blocks in machine.blocks to their end.
inline void run_blocks(Schedule schedule, std::mt19937& random) {
    const int count = machine.threads * static_cast<int>(machine.blocks.size());
    machine.resting = -1;
    machine.fibers.assign(count, Fiber{});
    machine.warps.assign(count / kLanes, Warp{});
    for (Warp& warp : machine.warps) warp.at_slowest = kLanes;
    machine.ready.assign(count / kLanes, ~0u);
    machine.stacks.resize(std::max(machine.stacks.size(), kStackBytes * count));
    for (int i = 0; i < count; ++i) {
        machine.fibers[i].thread = dim3(i % machine.threads);
        auto* top = reinterpret_cast<void**>(
            reinterpret_cast<uintptr_t>(machine.stacks.data() + kStackBytes * (i + 1)) / 16 * 16);
        void** frame = top - 2 - kSavedWords - 2;
        std::fill(frame, top, nullptr);
        frame[kReturnWord] = reinterpret_cast<void*>(run_fiber);
        machine.fibers[i].stack_pointer = frame;
    }
    int done = 0, last = 0;
    while (done < count) {
        last = next_fiber(schedule, last, random);
        if (last < 0) {
            machine.error = "every thread waits: a barrier or an operation was not met by all";
            return;
        }
        machine.running = last;
        knnmoe_emulation_switch(&machine.scheduler, machine.fibers[last].stack_pointer);
        if (machine.error) return;
        done += machine.fibers[last].waits == Waits::kDone;
    }
}

// Runs a kernel over a grid; returns what went wrong, or null.
template <typename Argument>
const char* launch(
    void (*kernel)(Argument), const Argument& argument, int grid_x, int grid_y, int threads,
    size_t shared_bytes, Schedule schedule, unsigned seed) {
    std::mt19937 random(seed);
    struct Call {
        void (*kernel)(Argument);
        Argument argument;
    } call{kernel, argument};
    machine.body = [](const void* c) {
        static_cast<const Call*>(c)->kernel(static_cast<const Call*>(c)->argument);
    };
    machine.argument = &call;
    machine.grid = dim3(grid_x, grid_y);
    machine.error = nullptr;
    machine.yields = schedule == kRandom;
    std::vector<int> blocks(static_cast<size_t>(grid_x) * grid_y);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int>(i);
    if (schedule == kBackward) std::reverse(blocks.begin(), blocks.end());
    if (schedule == kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
    machine.threads = threads;
    for (size_t first = 0; first < blocks.size() && !machine.error; first += kResident) {
        machine.blocks.clear();
        for (size_t i = first; i < std::min(blocks.size(), first + kResident); ++i) {
            auto* shared = static_cast<unsigned char*>(malloc(shared_bytes));
            memset(shared, 0xff, shared_bytes);
            machine.blocks.push_back({dim3(blocks[i] % grid_x, blocks[i] / grid_x), shared, 0});
        }
        run_blocks(schedule, random);
        for (const Block& block : machine.blocks) free(block.shared);
    }
    return machine.error;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
    return emulation::exchange("shuffle", value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchange("shuffle xor", value, emulation::own_lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int offset) {
    const int lane = emulation::own_lane();
    return emulation::exchange("shuffle up", value, lane < offset ? lane : lane - offset);
}
inline unsigned __ballot_sync(unsigned, bool bit) { return emulation::gather_bits("ballot", bit); }
inline void __syncwarp() { emulation::gather_bits("syncwarp", 0); }
inline void __syncthreads() {
    ++emulation::self().barriers;
    if (++emulation::own_block().arrivals % emulation::machine.threads == 0)
        emulation::wake_block();
    emulation::wait(emulation::Waits::kBlock, 0);
}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    if (emulation::machine.resting < 0)
        emulation::machine.resting = emulation::machine.running / emulation::machine.threads;
    const unsigned before = *address;
    *address += value;
    return before;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
inline unsigned __float_as_uint(float v) {
    unsigned bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}
