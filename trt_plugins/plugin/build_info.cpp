// What this library was built from, as text in the file: library.py reads it without loading it.
//
// TensorRT's major version matters: ILogger and ILoggerFinder have another layout in 11 than in 10.
#include <NvInferVersion.h>
#include <cuda_runtime_api.h>

#ifndef KNNMOE_SOURCE
#define KNNMOE_SOURCE unknown
#endif

#define KNNMOE_TEXT_OF(...) #__VA_ARGS__
#define KNNMOE_TEXT(...) KNNMOE_TEXT_OF(__VA_ARGS__)

extern "C" __attribute__((used, visibility("hidden"))) const char knnmoe_build_info[] =
    "knnmoe-plugin-build:{"
    "\"source\":\"" KNNMOE_TEXT(KNNMOE_SOURCE) "\","
    "\"tensorrt\":\"" KNNMOE_TEXT(NV_TENSORRT_MAJOR) "." KNNMOE_TEXT(NV_TENSORRT_MINOR) "."
    KNNMOE_TEXT(NV_TENSORRT_PATCH) "\","
    "\"cuda\":" KNNMOE_TEXT(CUDART_VERSION) ","
    "\"architectures\":[" KNNMOE_TEXT(__CUDA_ARCH_LIST__) "]}";
