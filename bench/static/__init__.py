"""What compilers make of the GPU kernels, without a GPU: compiled ahead of time for every target, read back from the cubins."""
