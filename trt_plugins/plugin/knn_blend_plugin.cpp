// The KnnBlend node as a TensorRT plugin: checks what TensorRT asks, and launches the kernels.
//
// Inputs and outputs are those of the node in docs/design.md, in its order. The memory comes in as
// inputs, so a plan holds none of it and a swap needs no rebuild. Differences from the ONNX function:
// keys may be fp16 or int8 and values fp16; neighbours and similarities always have
// min(N, max_neighbors) columns, because K is a number on the device (those from K on have
// similarity 0).
//
// With two more inputs, scan_keys int8 [N, D] and scan_scales fp32 [N, 2], the search has two
// stages (rescore.cuh): those are scanned, and the best scored again with keys, fp32 or fp16.
//
// Fields  similarity     "cosine" or "rbf"
//         max_neighbors  int32, 1 to 64, 64 if not given: the most K may be; a smaller one saves
//                        shared memory and merging
//         candidates     int32, max_neighbors to 64, 64 if not given: how many are scored again
//
// Compiled by nvcc together with the kernels; links neither libnvinfer nor libcuda, so that one
// library serves every TensorRT of its major version. Exported: setLoggerFinder and getCreators.
#include <NvInferRuntime.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>

#include "knn_blend.cu"
#include "plan.h"

namespace knnmoe {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr char kName[] = "KnnBlend";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "knnmoe";
// What the workspace is sized for where the device is not known yet.
constexpr int kMostMultiprocessors = 192;
constexpr long long kMostSharedBytes = 227 * 1024;

enum Input {
    kX, kR, kKeys, kKeyScales, kValues, kEvidenceWeights, kNValid, kK, kCenter, kNumbers, kState,
    kLengths, kScanKeys, kScanScales
};
constexpr int kExactInputs = 12, kInputs = 14;
enum Output { kRows, kStateOut, kConfidence, kNeighborIds, kSimilarities, kOutputs };

nvinfer1::ILoggerFinder* logger_finder = nullptr;

// To TensorRT's logger where it gave one, which it does for version-compatible plans alone.
void report(const std::string& problem) {
    const std::string line = "knnmoe::KnnBlend: " + problem;
    if (nvinfer1::ILogger* logger = logger_finder ? logger_finder->findLogger() : nullptr)
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    else
        std::fprintf(stderr, "%s\n", line.c_str());
}

bool succeeded(cudaError_t status, const char* what) {
    if (status != cudaSuccess) report(std::string(what) + ": " + cudaGetErrorString(status));
    return status == cudaSuccess;
}

const void* find_kernel(const char* name) {
#define KNNMOE_FIND(kernel, warps, blocks, ...) \
    if (std::strcmp(name, #kernel) == 0) return reinterpret_cast<const void*>(kernel);
    KNNMOE_EVERY_KERNEL(KNNMOE_FIND)
    return nullptr;
}

KeyType key_type(DataType type) {
    return type == DataType::kFLOAT  ? KeyType::kFloat32
           : type == DataType::kHALF ? KeyType::kFloat16
                                     : KeyType::kInt8;
}

// What the fields say.
struct Settings {
    bool rbf = false;
    int32_t max_neighbors = kMaxNeighbors;
    int32_t candidates = kMaxNeighbors;
};

// `position` counts the inputs, of which there are `inputs`, and then the outputs.
bool type_fits(int position, int inputs, DataType type) {
    if (position >= inputs)
        return type == (position - inputs == kNeighborIds ? DataType::kINT64 : DataType::kFLOAT);
    switch (position) {
        case kKeys:
            return type == DataType::kFLOAT || type == DataType::kHALF ||
                   (type == DataType::kINT8 && inputs == kExactInputs);
        case kScanKeys: return type == DataType::kINT8;
        case kValues: return type == DataType::kFLOAT || type == DataType::kHALF;
        case kNValid:
        case kK:
        case kLengths: return type == DataType::kINT64;
        default: return type == DataType::kFLOAT;
    }
}

// Ranks of the inputs, then the sizes that must agree; says what does not.
bool shapes_fit(const nvinfer1::Dims* d, int inputs) {
    constexpr int ranks[kInputs] = {2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 2, 1, 2, 2};
    constexpr const char* names[kInputs] = {
        "x", "r", "keys", "key_scales", "values", "evidence_weights", "n_valid", "k", "center",
        "calibration", "state", "lengths", "scan_keys", "scan_scales"};
    for (int i = 0; i < inputs; ++i) {
        if (d[i].nbDims == ranks[i]) continue;
        report(std::string(names[i]) + " must have " + std::to_string(ranks[i]) + " dimensions");
        return false;
    }
    const auto same = [&](int a, int i, int b, int j) {
        // A negative size is one that is not known yet.
        if (d[a].d[i] < 0 || d[b].d[j] < 0 || d[a].d[i] == d[b].d[j]) return true;
        report(
            std::string(names[a]) + " and " + names[b] + " disagree: " +
            std::to_string(d[a].d[i]) + " against " + std::to_string(d[b].d[j]));
        return false;
    };
    const auto is = [&](int a, int i, long long size) {
        if (d[a].d[i] < 0 || d[a].d[i] == size) return true;
        report(
            std::string(names[a]) + " must have size " + std::to_string(size) + ", has " +
            std::to_string(d[a].d[i]));
        return false;
    };
    return same(kX, 0, kR, 0) && same(kKeys, 1, kX, 1) && same(kKeyScales, 0, kKeys, 0) &&
           is(kKeyScales, 1, 2) && same(kValues, 0, kKeys, 0) && same(kValues, 1, kR, 1) &&
           same(kEvidenceWeights, 0, kKeys, 0) &&
           is(kNValid, 0, 1) && is(kK, 0, 1) && same(kCenter, 0, kX, 1) &&
           is(kNumbers, 0, kCalibrationSize) && is(kState, 1, 2) && same(kState, 0, kLengths, 0) &&
           (inputs == kExactInputs ||
            (same(kScanKeys, 0, kKeys, 0) && same(kScanKeys, 1, kX, 1) &&
             same(kScanScales, 0, kKeys, 0) && is(kScanScales, 1, 2)));
}

Problem problem_of(const nvinfer1::Dims* d, DataType keys, int inputs, const Settings& settings) {
    const auto size = [&](int input, int i) { return static_cast<int>(d[input].d[i]); };
    const int columns = static_cast<int>(std::min<int64_t>(d[kKeys].d[0], settings.max_neighbors));
    return {key_type(keys), size(kX, 0), size(kState, 0), size(kX, 1), size(kR, 1), columns,
            inputs == kExactInputs ? 0 : settings.candidates, d[kKeys].d[0]};
}

class KnnBlend final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
public:
    explicit KnnBlend(const Settings& settings)
        : settings_(settings), similarity_(settings.rbf ? "rbf" : "cosine") {}
    KnnBlend(const KnnBlend&) = delete;
    KnnBlend& operator=(const KnnBlend&) = delete;
    ~KnnBlend() override {
        if (ticket_) cudaFree(ticket_);
    }

    // --- what it is
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    nvinfer1::IPluginV3* clone() noexcept override {
        return new (std::nothrow) KnnBlend(settings_);
    }
    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    // --- while an engine is built
    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t getOutputDataTypes(
        DataType* outputs, int32_t count, const DataType*, int32_t inputs) const noexcept override {
        if (count != kOutputs || !takes(inputs)) return refuse_counts();
        for (int i = 0; i < kOutputs; ++i)
            outputs[i] = i == kNeighborIds ? DataType::kINT64 : DataType::kFLOAT;
        return 0;
    }

    int32_t getOutputShapes(
        const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t output_count,
        nvinfer1::IExprBuilder& build) noexcept override {
        if (!takes(count) || output_count != kOutputs) return refuse_counts();
        const auto* tokens = inputs[kX].d[0];
        const auto* columns = build.operation(
            nvinfer1::DimensionOperation::kMIN, *inputs[kKeys].d[0],
            *build.constant(settings_.max_neighbors));
        outputs[kRows] = inputs[kR];
        outputs[kStateOut] = inputs[kState];
        outputs[kConfidence].nbDims = 1;
        outputs[kConfidence].d[0] = tokens;
        for (int i : {kNeighborIds, kSimilarities}) {
            outputs[i].nbDims = 2;
            outputs[i].d[0] = tokens;
            outputs[i].d[1] = columns;
        }
        return 0;
    }

    bool supportsFormatCombination(
        int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
        int32_t) noexcept override {
        const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
        return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
               type_fits(position, inputs, tensor.type);
    }

    int32_t configurePlugin(
        const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
        const nvinfer1::DynamicPluginTensorDesc*, int32_t outputs) noexcept override {
        if (!takes(count) || outputs != kOutputs) return refuse_counts();
        nvinfer1::Dims dims[kInputs];
        for (int i = 0; i < count; ++i) dims[i] = inputs[i].desc.dims;
        return shapes_fit(dims, count) ? 0 : -1;
    }

    size_t getWorkspaceSize(
        const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
        const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override {
        nvinfer1::Dims dims[kInputs];
        for (int i = 0; i < count; ++i) dims[i] = inputs[i].max;
        Problem problem = problem_of(dims, inputs[kKeys].desc.type, count, settings_);
        const Device largest{kMostMultiprocessors, kMostSharedBytes};
        const int most = problem.tokens;
        long long bytes = 0;
        // Fewer tokens may need more, being split in more parts: ask for every number of tiles.
        for (int tokens = 1; tokens < most + kMaxDecodeTokens;
             tokens += tokens < kMaxDecodeTokens ? 1 : 8) {
            problem.tokens = std::min(tokens, most);
            // A device with less shared memory may prefill where this one would decode.
            for (const Plan& plan :
                 {make_plan(problem, largest), planning::plan_prefill(problem, largest)})
                bytes = std::max(bytes, plan.workspace_bytes);
        }
        return static_cast<size_t>(bytes);
    }

    // --- while an engine runs
    int32_t onShapeChange(
        const nvinfer1::PluginTensorDesc* inputs, int32_t count, const nvinfer1::PluginTensorDesc*,
        int32_t) noexcept override {
        if (!takes(count)) return refuse_counts();
        nvinfer1::Dims dims[kInputs];
        for (int i = 0; i < count; ++i) dims[i] = inputs[i].dims;
        if (!shapes_fit(dims, count)) return -1;
        problem_ = problem_of(dims, inputs[kKeys].type, count, settings_);
        if (problem_.tokens == 0) return 0;
        if (problem_.sequences < 1 || problem_.tokens % problem_.sequences != 0) {
            report("the rows of x are no multiple of the sequences of state");
            return -1;
        }
        if (problem_.capacity < 1 || problem_.capacity > 0x7fffffff) {
            report("keys must have 1 to 2^31 - 1 rows");
            return -1;
        }
        int device = 0, multiprocessors = 0, shared = 0;
        if (!succeeded(cudaGetDevice(&device), "no device") ||
            !succeeded(
                cudaDeviceGetAttribute(
                    &multiprocessors, cudaDevAttrMultiProcessorCount, device),
                "asking the device") ||
            !succeeded(
                cudaDeviceGetAttribute(
                    &shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                "asking the device"))
            return -1;
        plan_ = make_plan(problem_, {std::min(multiprocessors, kMostMultiprocessors), shared});
        for (int i = 0; i < plan_.launch_count; ++i) {
            if (plan_.launches[i].grid_y > kMostTiles) {
                report("x has more rows than a call takes: " + std::to_string(problem_.tokens));
                return -1;
            }
            kernels_[i] = find_kernel(plan_.launches[i].kernel);
            // The most there is, since other contexts launch the same kernels with other sizes.
            if (!succeeded(
                    cudaFuncSetAttribute(
                        kernels_[i], cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                    plan_.launches[i].kernel))
                return -1;
        }
        // Here and not in enqueue, which must not allocate.
        return ticket_ || make_ticket() ? 0 : -1;
    }

    int32_t enqueue(
        const nvinfer1::PluginTensorDesc* descriptions, const nvinfer1::PluginTensorDesc*,
        const void* const* in, void* const* out, void* workspace,
        cudaStream_t stream) noexcept override {
        if (problem_.tokens == 0) return 0;
        BlendParams p{};
        p.x = static_cast<const float*>(in[kX]);
        p.r = static_cast<const float*>(in[kR]);
        p.keys = in[kKeys];
        p.key_scales = static_cast<const float*>(in[kKeyScales]);
        const bool two_stages = problem_.candidates > 0;
        p.scan_keys = in[two_stages ? kScanKeys : kKeys];
        p.scan_scales = static_cast<const float*>(in[two_stages ? kScanScales : kKeyScales]);
        p.values = in[kValues];
        p.evidence_weights = static_cast<const float*>(in[kEvidenceWeights]);
        p.n_valid = static_cast<const long long*>(in[kNValid]);
        p.k = static_cast<const long long*>(in[kK]);
        p.center = static_cast<const float*>(in[kCenter]);
        p.calibration = static_cast<const float*>(in[kNumbers]);
        p.state = static_cast<const float*>(in[kState]);
        p.lengths = static_cast<const long long*>(in[kLengths]);
        p.rows = static_cast<float*>(out[kRows]);
        p.state_out = static_cast<float*>(out[kStateOut]);
        p.confidence = static_cast<float*>(out[kConfidence]);
        p.neighbors = static_cast<long long*>(out[kNeighborIds]);
        p.similarities = static_cast<float*>(out[kSimilarities]);
        p.workspace = static_cast<unsigned char*>(workspace);
        p.ticket = ticket_;
        p.capacity = problem_.capacity;
        p.tokens = problem_.tokens;
        p.sequences = problem_.sequences;
        p.hidden = problem_.hidden;
        p.experts = problem_.experts;
        p.columns = problem_.columns;
        p.candidates = problem_.candidates;
        p.splits = plan_.splits;
        p.rbf = settings_.rbf;
        p.half_values = descriptions[kValues].type == DataType::kHALF;
        void* arguments[] = {&p};
        for (int i = 0; i < plan_.launch_count; ++i) {
            const Launch& l = plan_.launches[i];
            const dim3 grid(l.grid_x, l.grid_y);
            if (!succeeded(
                    cudaLaunchKernel(
                        kernels_[i], grid, dim3(l.threads), arguments,
                        static_cast<size_t>(l.shared_bytes), stream),
                    l.kernel))
                return -1;
        }
        return 0;
    }

    // A clone for each context: contexts may run at the same time, and a ticket serves one stream.
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
        return clone();
    }

    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        stored_[0] = PluginField(
            "similarity", similarity_.data(), PluginFieldType::kCHAR,
            static_cast<int32_t>(similarity_.size()));
        stored_[1] =
            PluginField("max_neighbors", &settings_.max_neighbors, PluginFieldType::kINT32, 1);
        stored_[2] = PluginField("candidates", &settings_.candidates, PluginFieldType::kINT32, 1);
        fields_ = {3, stored_};
        return &fields_;
    }

private:
    static bool takes(int32_t inputs) { return inputs == kExactInputs || inputs == kInputs; }

    bool make_ticket() {
        unsigned* made = nullptr;
        if (!succeeded(cudaMalloc(&made, sizeof *made), "four bytes")) return false;
        // Setting memory does not wait, and a stream of the caller's may not wait for it.
        if (!succeeded(cudaMemset(made, 0, sizeof *made), "four bytes") ||
            !succeeded(cudaStreamSynchronize(nullptr), "waiting for the device")) {
            cudaFree(made);
            return false;
        }
        ticket_ = made;
        return true;
    }

    static int32_t refuse_counts() {
        report("takes 12 inputs, or 14 to search in two stages, and gives 5 outputs");
        return -1;
    }

    const Settings settings_;
    const std::string similarity_;
    PluginField stored_[3] = {};
    nvinfer1::PluginFieldCollection fields_{};
    Problem problem_{};
    Plan plan_{};
    const void* kernels_[5] = {};
    unsigned* ticket_ = nullptr;
};

bool within(const char* name, int value, int least) {
    if (least <= value && value <= kMaxNeighbors) return true;
    report(
        std::string(name) + " must be " + std::to_string(least) +
        (least > 1 ? " (max_neighbors) to " : " to ") + std::to_string(kMaxNeighbors) + ", is " +
        std::to_string(value));
    return false;
}

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
        static const PluginField all[] = {
            {"similarity", nullptr, PluginFieldType::kCHAR, 0},
            {"max_neighbors", nullptr, PluginFieldType::kINT32, 1},
            {"candidates", nullptr, PluginFieldType::kINT32, 1}};
        static const nvinfer1::PluginFieldCollection fields{3, all};
        return &fields;
    }

    nvinfer1::IPluginV3* createPlugin(
        const char*, const nvinfer1::PluginFieldCollection* fields,
        nvinfer1::TensorRTPhase) noexcept override {
        std::string similarity;
        Settings settings;
        for (int i = 0; fields && i < fields->nbFields; ++i) {
            const PluginField& field = fields->fields[i];
            const std::string name = field.name ? field.name : "";
            const bool number = field.type == PluginFieldType::kINT32 && field.data &&
                                field.length == 1;
            if (name == "max_neighbors" && number) {
                settings.max_neighbors = *static_cast<const int32_t*>(field.data);
            } else if (name == "candidates" && number) {
                settings.candidates = *static_cast<const int32_t*>(field.data);
            } else if (name == "similarity" && field.type == PluginFieldType::kCHAR && field.data) {
                // A parser counts the characters, or their terminating zero too.
                const char* text = static_cast<const char*>(field.data);
                similarity.assign(text, strnlen(text, std::max(field.length, 0)));
            } else if (name.rfind("plugin_", 0) != 0) {  // plugin_namespace, plugin_version
                report("takes no field \"" + name + "\" of that type");
                return nullptr;
            }
        }
        if (similarity != "cosine" && similarity != "rbf") {
            report("similarity must be \"cosine\" or \"rbf\", is \"" + similarity + "\"");
            return nullptr;
        }
        if (!within("max_neighbors", settings.max_neighbors, 1) ||
            !within("candidates", settings.candidates, settings.max_neighbors))
            return nullptr;
        settings.rbf = similarity == "rbf";
        return new (std::nothrow) KnnBlend(settings);
    }
};

}  // namespace
}  // namespace knnmoe

#define KNNMOE_EXPORT extern "C" __attribute__((visibility("default")))

KNNMOE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    knnmoe::logger_finder = finder;
}

KNNMOE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static knnmoe::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}
