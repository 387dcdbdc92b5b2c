// The TensorRT plugin on the emulated machine: its enqueue, driven as TensorRT would drive it.
//
// The few functions of the CUDA runtime that the plugin calls are stood in for below. Fresh memory
// holds anything, and what cudaMemset sets is not set before somebody has waited for it.
#include <cuda_runtime.h>

#define KNNMOE_EMULATION
#include "emulation.h"

#include <functional>
#include <memory>
#include <vector>

#include "knn_blend_plugin.cpp"

static std::vector<std::function<void()>> waiting;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 99 * 1024;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    *pointer = malloc(bytes);
    memset(*pointer, 0x55, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
    waiting.push_back([=] { memset(pointer, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    for (const auto& work : waiting) work();
    waiting.clear();
    return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
    using Kernel = void (*)(knnmoe::BlendParams);
    const char* error = emulation::launch<knnmoe::BlendParams>(
        reinterpret_cast<Kernel>(const_cast<void*>(function)),
        *static_cast<knnmoe::BlendParams*>(arguments[0]), static_cast<int>(grid.x),
        static_cast<int>(grid.y), static_cast<int>(block.x), shared, emulation::kForward, 0);
    if (error) std::fprintf(stderr, "%s\n", error);
    return error ? cudaErrorLaunchFailure : cudaSuccess;
}

// Creates the plugin, gives it a context, and enqueues twice on a workspace of the size it asks
// for; 12 or 14 inputs. Dimensions are two an input (the second 0 where there is none), types those
// of TensorRT. The plugin that runs is made from what the first one serializes, as an engine does.
KNNMOE_EXPORT int knnmoe_enqueue(
    const char* similarity, int max_neighbors, int candidates, int inputs_given,
    const long long* dimensions, const int* types, const void* const* inputs,
    void* const* outputs) {
    using namespace nvinfer1;
    const int kCount = inputs_given;
    int32_t count = 0;
    auto* creator = static_cast<IPluginCreatorV3One*>(getCreators(count)[0]);
    const PluginField given[] = {
        {"similarity", similarity, PluginFieldType::kCHAR,
         static_cast<int32_t>(strlen(similarity))},
        {"max_neighbors", &max_neighbors, PluginFieldType::kINT32, 1},
        {"candidates", &candidates, PluginFieldType::kINT32, 1}};
    const PluginFieldCollection fields{3, given};
    std::unique_ptr<IPluginV3> first(
        creator->createPlugin("blend", &fields, TensorRTPhase::kBUILD));
    if (!first) return -1;
    std::unique_ptr<IPluginV3> plugin(creator->createPlugin(
        "blend",
        static_cast<IPluginV3OneRuntime*>(
            first->getCapabilityInterface(PluginCapabilityType::kRUNTIME))
            ->getFieldsToSerialize(),
        TensorRTPhase::kRUNTIME));
    if (!plugin) return -1;
    auto* runtime = static_cast<IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
    runtime = static_cast<IPluginV3OneRuntime*>(
        attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto* build = static_cast<IPluginV3OneBuild*>(
        plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));

    PluginTensorDesc in[knnmoe::kInputs]{}, out[knnmoe::kOutputs]{};
    DynamicPluginTensorDesc dynamic[knnmoe::kInputs + knnmoe::kOutputs]{};
    for (int i = 0; i < kCount; ++i) {
        in[i].dims.nbDims = dimensions[2 * i + 1] ? 2 : 1;
        in[i].dims.d[0] = dimensions[2 * i];
        in[i].dims.d[1] = dimensions[2 * i + 1];
        in[i].type = static_cast<DataType>(types[i]);
        dynamic[i].desc = in[i];
        dynamic[i].min = dynamic[i].opt = dynamic[i].max = in[i].dims;
    }
    for (int i = 0; i < knnmoe::kOutputs; ++i)
        dynamic[kCount + i].desc.type =
            i == knnmoe::kNeighborIds ? DataType::kINT64 : DataType::kFLOAT;
    for (int i = 0; i < kCount + knnmoe::kOutputs; ++i)
        if (!build->supportsFormatCombination(i, dynamic, kCount, knnmoe::kOutputs)) return -5;
    if (build->configurePlugin(dynamic, kCount, nullptr, knnmoe::kOutputs) != 0) return -2;
    std::vector<unsigned char> workspace(
        build->getWorkspaceSize(dynamic, kCount, nullptr, knnmoe::kOutputs), 0xff);
    if (runtime->onShapeChange(in, kCount, out, knnmoe::kOutputs) != 0) return -3;
    for (int i = 0; i < 2; ++i)
        if (runtime->enqueue(in, out, inputs, outputs, workspace.data(), nullptr) != 0) return -4;
    return 0;
}
}
