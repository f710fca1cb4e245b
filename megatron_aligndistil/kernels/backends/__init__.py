"""Where the ops' arithmetic runs: PyTorch on any device, compiled loops on a CPU, Triton on a GPU.

All take and give the same: logits [C, V] of a tile, with any strides that the backend's own products made.
"""
