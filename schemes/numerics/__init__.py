"""Number formats in plain torch: quantize, dequantize, pack, unpack. Pure and traceable by Inductor."""
