"""After training: ONNX export, int8, a classifier without torch, benchmarks and reports."""
