"""Components of other packages that a job can name: training-loop callbacks and metric sinks. Torch-free."""

from keepwarm.options import Component
from keepwarm.registry import Registry

CALLBACKS: Registry[type[Component]] = Registry("callback", "keepwarm.callbacks", {}, Component)
"""Subclasses of `keepwarm.trainer.loop.callback.Callback`; job key `callbacks`."""

METRIC_SINKS: Registry[type[Component]] = Registry(
    "metric sink",
    "keepwarm.metric_sinks",
    {
        "tensorboard": "keepwarm.trainer.monitor.metric_sinks:TensorBoard",
        "wandb": "keepwarm.trainer.monitor.metric_sinks:WeightsAndBiases",
    },
    Component,
)
"""Subclasses of `keepwarm.trainer.monitor.metric_sinks.MetricSink`; job key `log.sinks`. metrics.jsonl is always on."""
