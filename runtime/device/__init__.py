"""Running on a CUDA device: resident memory, gates on kernels, engines on one stream."""
