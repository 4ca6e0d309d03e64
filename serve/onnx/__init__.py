"""The engine ``onnx``: decoders that ONNX Runtime runs."""
