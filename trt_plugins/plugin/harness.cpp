// Drives a built plugin library as TensorRT drives it, without TensorRT: a tool for tests.
//
// The library is the one that is shipped, loaded by dlopen; nothing of the plugin is compiled here.
// harness.py calls these functions with the addresses of device memory, so that the plugin's
// enqueue runs on any GPU, also under stream capture. Shapes come from the caller: getOutputShapes
// needs a builder's expressions and is not called.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace {

using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;

// What the plugin said since it was last asked.
std::string messages;

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity, const char* message) noexcept override {
        if (!messages.empty()) messages += '\n';
        messages += message;
    }
};

class Finder final : public nvinfer1::ILoggerFinder {
public:
    nvinfer1::ILogger* findLogger() override { return &logger_; }

private:
    Logger logger_;
};

Finder finder;

struct Library {
    void* handle;
    nvinfer1::IPluginCreatorInterface* const* creators;
    int32_t count;
};

// As harness.py has them.
struct Tensor {
    int64_t sizes[8];
    int32_t dimensions;
    int32_t type;  // nvinfer1::DataType
};

struct Field {
    const char* name;
    const void* data;
    int32_t type;  // nvinfer1::PluginFieldType
    int32_t length;
};

std::vector<nvinfer1::PluginTensorDesc> describe(const Tensor* tensors, int count) {
    std::vector<nvinfer1::PluginTensorDesc> result(count);
    for (int i = 0; i < count; ++i) {
        result[i].dims.nbDims = tensors[i].dimensions;
        for (int j = 0; j < tensors[i].dimensions; ++j) result[i].dims.d[j] = tensors[i].sizes[j];
        result[i].type = static_cast<nvinfer1::DataType>(tensors[i].type);
        result[i].format = nvinfer1::TensorFormat::kLINEAR;
        result[i].scale = 1;
    }
    return result;
}

std::vector<nvinfer1::DynamicPluginTensorDesc> as_dynamic(
    const std::vector<nvinfer1::PluginTensorDesc>& tensors) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> result(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        result[i].desc = tensors[i];
        result[i].min = result[i].opt = result[i].max = tensors[i].dims;
    }
    return result;
}

nvinfer1::IPluginCreatorV3One* find_creator(
    const Library& library, const char* name, const char* version, const char* space) {
    for (int i = 0; i < library.count; ++i) {
        const std::string kind = library.creators[i]->getInterfaceInfo().kind;
        if (kind != "PLUGIN CREATOR_V3ONE") continue;
        auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(library.creators[i]);
        if (std::string(creator->getPluginName()) == name &&
            std::string(creator->getPluginVersion()) == version &&
            std::string(creator->getPluginNamespace()) == space)
            return creator;
    }
    messages = "the library has no creator of that name, version and namespace";
    return nullptr;
}

template <typename Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
    auto* result = static_cast<Capability*>(plugin->getCapabilityInterface(type));
    if (!result) messages = "the plugin has no such capability";
    return result;
}

}  // namespace

#define KNNMOE_EXPORT extern "C" __attribute__((visibility("default")))

// Major version of the TensorRT this was compiled for.
KNNMOE_EXPORT int knnmoe_harness_tensorrt() { return NV_TENSORRT_MAJOR; }

// What the plugin said since the last call; valid until the next one.
KNNMOE_EXPORT const char* knnmoe_harness_messages() {
    static std::string given;
    given.swap(messages);
    messages.clear();
    return given.c_str();
}

// Null where it cannot be loaded. A library stays loaded: plugins may outlive every handle.
KNNMOE_EXPORT Library* knnmoe_harness_open(const char* path) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        messages = dlerror();
        return nullptr;
    }
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
    using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);
    const auto get = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    const auto set = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"));
    if (!get || !set) {
        messages = "exports no getCreators and setLoggerFinder";
        dlclose(handle);
        return nullptr;
    }
    set(&finder);
    auto* library = new Library{handle, nullptr, 0};
    library->creators = get(library->count);
    return library;
}

// Plugins live until they are destroyed; `runtime`: as when an engine is loaded, else as when built.
KNNMOE_EXPORT IPluginV3* knnmoe_harness_create(
    const Library* library, const char* name, const char* version, const char* space,
    const Field* fields, int count, int runtime) {
    auto* creator = find_creator(*library, name, version, space);
    if (!creator) return nullptr;
    std::vector<nvinfer1::PluginField> all;
    for (int i = 0; i < count; ++i)
        all.emplace_back(
            fields[i].name, fields[i].data,
            static_cast<nvinfer1::PluginFieldType>(fields[i].type), fields[i].length);
    const nvinfer1::PluginFieldCollection collection{count, all.data()};
    return creator->createPlugin(
        "knnmoe", &collection,
        runtime ? nvinfer1::TensorRTPhase::kRUNTIME : nvinfer1::TensorRTPhase::kBUILD);
}

KNNMOE_EXPORT void knnmoe_harness_destroy(IPluginV3* plugin) { delete plugin; }

// The fields an engine would store; returns how many there are, and writes the one at `index`.
KNNMOE_EXPORT int knnmoe_harness_serialized(IPluginV3* plugin, int index, Field* field) {
    auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    const auto* fields = runtime ? runtime->getFieldsToSerialize() : nullptr;
    if (!fields) return -1;
    if (index >= 0 && index < fields->nbFields) {
        const nvinfer1::PluginField& f = fields->fields[index];
        *field = {f.name, f.data, static_cast<int32_t>(f.type), f.length};
    }
    return fields->nbFields;
}

// The plugin of a context: another one, or null.
KNNMOE_EXPORT IPluginV3* knnmoe_harness_attach(IPluginV3* plugin) {
    auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    return runtime ? runtime->attachToContext(nullptr) : nullptr;
}

// As while an engine is built: whether the types fit, the plugin accepts the shapes, and how much
// scratch memory it wants, or -1. The outputs' types must be those that the plugin names.
KNNMOE_EXPORT int64_t knnmoe_harness_configure(
    IPluginV3* plugin, const Tensor* inputs, int input_count, const Tensor* outputs,
    int output_count) {
    auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    if (!build) return -1;
    if (build->getNbOutputs() != output_count) {
        messages = "the plugin has " + std::to_string(build->getNbOutputs()) + " outputs";
        return -1;
    }
    auto all = as_dynamic(describe(inputs, input_count));
    const auto out = as_dynamic(describe(outputs, output_count));
    std::vector<nvinfer1::DataType> in_types, out_types(output_count);
    for (const auto& tensor : all) in_types.push_back(tensor.desc.type);
    if (build->getOutputDataTypes(out_types.data(), output_count, in_types.data(), input_count) != 0)
        return -1;
    for (int i = 0; i < output_count; ++i) {
        if (out_types[i] == out[i].desc.type) continue;
        messages = "output " + std::to_string(i) + " must have type " +
                   std::to_string(static_cast<int>(out_types[i])) + " of TensorRT's";
        return -1;
    }
    all.insert(all.end(), out.begin(), out.end());
    for (int i = 0; i < input_count + output_count; ++i) {
        if (build->supportsFormatCombination(i, all.data(), input_count, output_count)) continue;
        messages = std::string(i < input_count ? "input " : "output ") +
                   std::to_string(i < input_count ? i : i - input_count) +
                   " has a type that the plugin does not take";
        return -1;
    }
    if (build->configurePlugin(all.data(), input_count, out.data(), output_count) != 0) return -1;
    return static_cast<int64_t>(
        build->getWorkspaceSize(all.data(), input_count, out.data(), output_count));
}

KNNMOE_EXPORT int knnmoe_harness_shapes(
    IPluginV3* plugin, const Tensor* inputs, int input_count, const Tensor* outputs,
    int output_count) {
    auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    if (!runtime) return -1;
    const auto in = describe(inputs, input_count), out = describe(outputs, output_count);
    return runtime->onShapeChange(in.data(), input_count, out.data(), output_count);
}

// `stream` is a cudaStream_t, all other pointers are device memory.
KNNMOE_EXPORT int knnmoe_harness_enqueue(
    IPluginV3* plugin, const Tensor* inputs, int input_count, const Tensor* outputs,
    int output_count, const void* const* input_data, void* const* output_data, void* workspace,
    void* stream) {
    auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    if (!runtime) return -1;
    const auto in = describe(inputs, input_count), out = describe(outputs, output_count);
    return runtime->enqueue(
        in.data(), out.data(), input_data, output_data, workspace,
        static_cast<cudaStream_t>(stream));
}
