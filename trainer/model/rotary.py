"""Rotary position embedding (Su et al., 2021) in the half-split form of GPT-NeoX and Llama, and its scaled frequencies.

The frequencies of a spec are pure functions of the spec and, for two types, of the length of the sequence:

    default    f_i = theta^(-2i / size)
    linear     f_i / factor (kaiokendev, 2023; Chen et al., 2023)
    dynamic    theta grows with the sequence beyond the original context (NTK-aware; bloc97 and emozilla, 2023)
    llama3     f_i / factor for long waves, f_i for short ones, a blend between (Llama 3.1's reference code)
    yarn       the same by numbers of rotations, and warmer attention (Peng et al., 2023)
    longrope   f_i divided by factors of its own, found by search; another list beyond the original context (Ding et
               al., 2024)

For `dynamic` and `longrope` the length is that of the whole sequence given to the model, packed documents included: it
is known without a look at the data, equal on all ranks, and what transformers takes for an unpacked sequence.
"""

import math

import torch

from keepwarm.trainer.model.spec import ModelSpec, RopeScalingSpec

Table = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines."""


def rotation(positions: torch.Tensor, frequencies: torch.Tensor, factor: float = 1.0) -> Table:
    """Return cosines and sines `[..., 1, size / 2]` for integer `positions` `[...]`, in the type of the frequencies.

    Both are multiplied by `factor`. The dim of size 1 broadcasts over the heads.
    """
    angles = positions.to(frequencies.dtype)[..., None, None] * frequencies
    cosine, sine = angles.cos(), angles.sin()
    return (cosine, sine) if factor == 1.0 else (cosine * factor, sine * factor)


def rotation_of(spec: ModelSpec, positions: torch.Tensor, dtype: torch.dtype, *, scaled: bool) -> Table:
    """Return cosines and sines for all positions of a sequence, in fp32, or fp64 for models of `dtype` fp64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = plain_frequencies(spec.rotating, spec.rope_theta, wide, positions.device)
    if spec.rope_scaling is None or not scaled:
        return rotation(positions, plain)
    found = scaled_frequencies(spec, plain, len(positions))
    return rotation(positions, found, spec.attention_factor)


def plain_frequencies(size: int, theta: float, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Return `theta^(-2i / size)` for i below size / 2 (Su et al., 2021)."""
    exponents = torch.arange(0, size, 2, dtype=torch.int64, device=device).to(dtype) / size
    return 1.0 / theta**exponents


def scaled_frequencies(spec: ModelSpec, plain: torch.Tensor, length: int) -> torch.Tensor:
    """Return the scaled frequencies for sequences of `length` tokens."""
    scaling, original = spec.rope_scaling, spec.original_length
    assert scaling is not None
    match scaling.type:
        case "linear":
            return plain / scaling.factor
        case "dynamic":
            theta = dynamic_theta(spec.rope_theta, spec.rotating, scaling.factor, length / original)
            return plain_frequencies(spec.rotating, theta, plain.dtype, plain.device)
        case "llama3":
            return llama3_frequencies(plain, scaling, original)
        case "yarn":
            return yarn_frequencies(plain, scaling, spec.rope_theta, original)
        case "longrope":
            factors = scaling.long_factors if length > original else scaling.short_factors
            return plain / torch.tensor(factors, dtype=plain.dtype, device=plain.device)


def dynamic_theta(theta: float, size: int, factor: float, growth: float) -> float:
    """Return `theta * (factor * g - (factor - 1))^(size / (size - 2))`, where g >= 1 is length / original length.

    The lowest frequency is then divided by about `factor * g - (factor - 1)`, the highest stays (NTK-aware scaling).
    """
    stretch: float = factor * max(growth, 1.0) - (factor - 1)
    return theta * math.pow(stretch, size / (size - 2))


def llama3_frequencies(plain: torch.Tensor, scaling: RopeScalingSpec, original: int) -> torch.Tensor:
    """Return f for waves shorter than `original / high`, f / factor for those longer than `original / low`.

    Between them `(1 - s) f / factor + s f`, with s growing linearly in `original / wavelength` from `low` to `high`.
    """
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    waves = original * plain / (2 * math.pi)
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def yarn_frequencies(plain: torch.Tensor, scaling: RopeScalingSpec, theta: float, original: int) -> torch.Tensor:
    """Return f for features that turn `beta_fast` times in the original context, f / factor for `beta_slow` times.

    Between them the share of f falls linearly in the index of the feature (Peng et al., 2023, section 3.2, "by parts").
    """
    size = 2 * len(plain)

    def index(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    span = high - low if high != low else 0.001
    scaled = ((torch.arange(len(plain), device=plain.device).to(plain.dtype) - low) / span).clamp(0, 1)
    return plain / scaling.factor * scaled + plain * (1 - scaled)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the first `2 * cosine.shape[-1]` features of every head of `x` `[micro, sequence, heads, head_dim]`."""
    half = cosine.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat((turned[0].to(x.dtype), turned[1].to(x.dtype), rest), dim=-1)


def positions_in(documents: torch.Tensor) -> torch.Tensor:
    """Return each token's position inside its document, int64 `[micro, sequence]`; `documents` is int32 of that shape.

    A document is a run of equal indices within one sample.
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(index)
    starts[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[:, 1:], 0)
    return index - starts.cummax(dim=1).values
