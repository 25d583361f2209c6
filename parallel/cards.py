"""GPUs that plans know: what their data sheets promise. Pure and torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One kind of GPU, and the machine that it usually is in."""

    name: str
    tflops: float
    """Dense matrix products in bf16, 10^12 floating-point operations per second."""
    memory: float
    """GiB."""
    memory_bandwidth: float
    """Bytes per second."""
    link: float
    """Bytes per second that a card sends to the other cards of its node, and receives at the same time."""
    network: float
    """Bytes per second that a card's share of the network carries in each direction."""
    per_node: int = 8


CARDS = {
    card.name: card
    for card in (
        Card(name="A100", tflops=312.0, memory=80.0, memory_bandwidth=2.0e12, link=300e9, network=25e9),
        Card(name="H100", tflops=989.0, memory=80.0, memory_bandwidth=3.35e12, link=450e9, network=50e9),
        Card(name="H200", tflops=989.0, memory=139.0, memory_bandwidth=4.8e12, link=450e9, network=50e9),
        Card(name="B200", tflops=2250.0, memory=178.0, memory_bandwidth=8.0e12, link=900e9, network=50e9),
    )
}
"""Cards in SXM form, from the vendor's data sheets; the network is that of the vendor's own machines of 8 cards."""
