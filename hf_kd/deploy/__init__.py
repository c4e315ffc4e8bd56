"""After training: ONNX export, int8, a classifier without torch, benchmarks and reports."""

# For errors: what brings onnx and onnxruntime along.
INSTALL = "pip install 'hf-kd[optimum]' (with transformers 4.57) or pip install 'hf-kd[onnx]' (with transformers 5)"
