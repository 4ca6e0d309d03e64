"""ONNX: a decoder with KV cache, its pruned weights stored small, for ONNX Runtime."""
