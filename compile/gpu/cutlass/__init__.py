"""CUTLASS's sparse GEMMs, compiled here with nvcc and called through a C interface."""
