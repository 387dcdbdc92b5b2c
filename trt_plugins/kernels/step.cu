// The kernels of step.cuh, by the name under which a host finds them (see step_kernels.py).
#include "step.cuh"

#define KNNMOE_STEP_KERNEL(name, params, ...)                                   \
    extern "C" __global__ void __launch_bounds__(knnmoe::kStepWarps* knnmoe::kLanes) \
        name(const __grid_constant__ knnmoe::params p) {                        \
        knnmoe::__VA_ARGS__(p);                                                 \
    }

// The number is the most experts; a lane holds a 32nd of them.
#define KNNMOE_EVERY_ROUTE_KERNEL(X)                            \
    X(knnmoe_step_route_64, RouteParams, step_route<2>)         \
    X(knnmoe_step_route_128, RouteParams, step_route<4>)        \
    X(knnmoe_step_route_256, RouteParams, step_route<8>)        \
    X(knnmoe_step_route_1024, RouteParams, step_route<32>)      \
    X(knnmoe_step_assign_64, RouteParams, step_assign<2>)       \
    X(knnmoe_step_assign_128, RouteParams, step_assign<4>)      \
    X(knnmoe_step_assign_256, RouteParams, step_assign<8>)      \
    X(knnmoe_step_assign_1024, RouteParams, step_assign<32>)    \
    X(knnmoe_step_heaviest_64, RouteParams, step_heaviest<2>)   \
    X(knnmoe_step_heaviest_128, RouteParams, step_heaviest<4>)  \
    X(knnmoe_step_heaviest_256, RouteParams, step_heaviest<8>)  \
    X(knnmoe_step_heaviest_1024, RouteParams, step_heaviest<32>)

KNNMOE_EVERY_ROUTE_KERNEL(KNNMOE_STEP_KERNEL)
KNNMOE_STEP_KERNEL(knnmoe_step_append, AppendParams, step_append)
