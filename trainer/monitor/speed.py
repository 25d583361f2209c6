"""Speed of a run: tokens per second, and on a GPU TFLOP/s and model FLOP utilisation (MFU)."""

from dataclasses import dataclass

import torch

from keepwarm.parallel.cards import CARDS


@dataclass(kw_only=True)
class Speed:
    """Running totals. MFU = tokens/s x model FLOPs per token / peak; recomputation is not counted."""

    flops_per_token: float
    gpus: int
    """Number of ranks, each with a GPU; 0 on CPUs."""
    peak_tflops: float | None
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, flops_per_token: float, *, ranks: int, device: torch.device) -> "Speed":
        """Create totals for a model with this many FLOPs per token; the peak follows from the card's name, if known."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((card.tflops for card in CARDS.values() if card.name in name), None)
        return cls(flops_per_token=flops_per_token, gpus=0 if device.type == "cpu" else ranks, peak_tflops=peak)

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.tokens += tokens
        self.seconds += seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def tflops_per_gpu(self, tokens_per_s: float) -> float | None:
        """Return the achieved TFLOP/s per card; None without a GPU."""
        if self.gpus == 0:
            return None
        return tokens_per_s * self.flops_per_token / self.gpus / 1e12

    def mfu(self, tokens_per_s: float) -> float | None:
        """Return the fraction of the card's peak; None if the card is unknown."""
        achieved = self.tflops_per_gpu(tokens_per_s)
        return None if achieved is None or self.peak_tflops is None else achieved / self.peak_tflops
