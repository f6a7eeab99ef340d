"""Number formats in plain torch: quantize, dequantize, pack, unpack. Pure functions, no state, traceable by Inductor."""
