"""What a job names that other packages may add: callbacks of the training loop, and metric sinks. Torch-free."""

from keepwarm.options import Component
from keepwarm.registry import Registry

CALLBACKS: Registry[type[Component]] = Registry("callback", "keepwarm.callbacks", {}, Component)
"""Subclasses of `trainer.callback.Callback`; job key `callbacks`."""

METRIC_SINKS: Registry[type[Component]] = Registry(
    "metric sink",
    "keepwarm.metric_sinks",
    {"tensorboard": "trainer.metric_sinks:TensorBoard", "wandb": "trainer.metric_sinks:WeightsAndBiases"},
    Component,
)
"""Subclasses of `trainer.metric_sinks.MetricSink`; job key `log.sinks`. metrics.jsonl is always written."""
