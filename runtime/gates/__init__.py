"""Gates: the seam between two segments, as NumPy reference, ONNX graph and faiss search."""
