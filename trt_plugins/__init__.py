"""The blend on a CUDA device: its kernels, and the hosts that launch them."""
