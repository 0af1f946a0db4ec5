"""csrc/ops/*/cuda*.cu without a GPU: built by g++ against a shim, launched as fibers or handed to the PTX emulator."""
