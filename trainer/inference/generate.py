"""Generate text: one token at a time, drawn from the model's distribution."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from keepwarm.trainer.convert.huggingface.exporter import check_tensors, model_spec_of
from keepwarm.trainer.convert.native import PREFIX, NativeCheckpoint
from keepwarm.trainer.model.decoder import Decoder, StageModule

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 0.8
    """0: always the most likely token."""
    top_k: int | None = None
    """Choose only among the k most likely tokens."""
    top_p: float = 1.0
    """Choose only among the most likely tokens with total probability p (nucleus sampling, Holtzman et al., 2020)."""


def load_model(native: NativeCheckpoint, *, dtype: torch.dtype, device: torch.device) -> StageModule:
    """Load the whole model from a checkpoint of any layout, reading one tensor at a time.

    Raises:
        CheckpointError: a tensor is missing, damaged or does not fit; names it.
    """
    spec = model_spec_of(native)
    check_tensors(native, spec)
    decoder = Decoder(spec, seed=0)
    with torch.device("meta"):
        part = decoder.build_stage(range(spec.layers), embed=True, head=True)
    part = part.to(dtype).to_empty(device=device)
    part.tie()
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            stored = native.tensors[PREFIX + decoder.canonical(name)]
            held = torch.empty(stored.shape, dtype=_TORCH[stored.dtype])
            native.read(PREFIX + decoder.canonical(name), 0, held.reshape(-1).view(torch.uint8).numpy())
            parameter.copy_(held)
    return part.eval()


def generate(
    part: StageModule, prompt: Sequence[int], sampling: Sampling, *, seed: int, stop: Callable[[int], bool]
) -> Iterator[int]:
    """Yield tokens that follow `prompt` (at least one token), until `stop` is true for a token, which is not yielded.

    The model sees the last `max_sequence_length` tokens. Equal arguments give equal tokens on the same device.
    """
    device = next(part.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    seen = list(prompt)
    while True:
        window = torch.tensor([seen[-part.spec.max_sequence_length :]], device=device)
        with torch.inference_mode():
            token = choose(part(window)[0, -1].float(), sampling, random)
        if stop(token):
            return
        yield token
        seen.append(token)


def choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Choose one token from `logits` `[vocabulary]`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, tokens = (logits / sampling.temperature).sort(descending=True, stable=True)
    probabilities = ordered.softmax(0)
    # Always keep the token that reaches p, so that at least one remains.
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p
    if sampling.top_k is not None:
        kept[sampling.top_k :] = False
    return int(tokens[torch.multinomial(probabilities * kept, 1, generator=random)])
