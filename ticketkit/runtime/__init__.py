"""The native side.

`native` is the C ABI (the only ctypes), `geometry` what it is told of a layer, `ort` registers the operators with onnxruntime.
"""
