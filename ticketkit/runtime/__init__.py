"""The native side: `native` is the C ABI (the only ctypes), `ort` registers the operators with onnxruntime."""
