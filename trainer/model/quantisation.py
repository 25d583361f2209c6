"""Configs of published weights with fewer bits: which keepwarm reads as the numbers that they stand for. Torch-free."""

from collections.abc import Mapping
from typing import Any

FIELD = "quantization_config"
BLOCK = 128
"""Rows and columns that share a factor, unless the config says otherwise."""


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return why quantised weights with this config cannot be read; None if they can, or are not quantised."""
    method = method_of(config)
    if method is None or method == "mxfp4":
        return None
    if method != "fp8":
        named = method or "an unnamed method"
        return (
            f"{FIELD}: its weights are quantised with {named}; only fp8 in blocks and mxfp4 are read: dequantise them"
        )
    quantised = config[FIELD]
    if quantised.get("activation_scheme", "dynamic") != "dynamic":
        return f"{FIELD}: activation_scheme = {quantised['activation_scheme']!r} is not supported, only 'dynamic'"
    block = block_of(config)
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        return f"{FIELD}: weight_block_size = {quantised['weight_block_size']!r} is no pair of sizes"
    return None


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return how the weights are quantised; "" without a name, None if they are not."""
    quantised = config.get(FIELD)
    if not quantised:
        return None
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    return method if isinstance(method, str) else ""


def block_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the rows and columns that share a factor."""
    block = config[FIELD].get("weight_block_size")
    return (BLOCK, BLOCK) if block is None else tuple(block) if isinstance(block, list | tuple) else ()


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the same model with its weights as they are after reading."""
    return {name: value for name, value in config.items() if name != FIELD}
