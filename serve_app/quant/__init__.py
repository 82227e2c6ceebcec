"""Block types, and matrices kept in them."""

from serve_app.quant.encode import dequantize, quantize

__all__ = ["dequantize", "quantize"]
