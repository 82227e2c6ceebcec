"""The quantisation types (serve_app.quant_names, which the configuration knows too)."""

from serve_app.quant_names import MIXES, WRITABLE, QuantType, encodable, recipe_name

__all__ = ["MIXES", "WRITABLE", "QuantType", "encodable", "recipe_name"]
