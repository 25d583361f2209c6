"""Families that keepwarm has by itself and through transformers: the same start, logits and steps in fp32 and fp64."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from tests.support.models import whole_model
from tests.support.ranks import run_ranks
from tests.support.transformers.models import SEED, Run, batch_of, spec_of, train_on_rank, whole_stage

BOTH = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3", "smollm3"]
WITHIN = {"fp32": 1e-5, "fp64": 1e-9}
pytestmark = pytest.mark.dist


class AtLeastFp64(TorchFunctionMode):
    """Casts to fp32 give fp64: transformers computes norms and rotary tables in fp32 whatever the model's dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def trained(spec: AnyModelSpec, run: Run) -> list[Any]:
    """The results of the steps, on this rank."""
    if run.precision == "fp64" and not spec.is_native:
        with AtLeastFp64():
            return train_on_rank(spec, run, None, 0)[0]
    return train_on_rank(spec, run, None, 0)[0]


@pytest.mark.parametrize("precision", WITHIN)
@pytest.mark.parametrize("family", [BOTH[0], *(pytest.param(one, marks=pytest.mark.long) for one in BOTH[1:])])
def test_native_family_and_its_class_train_alike(family: str, precision: str) -> None:
    spec = spec_of(family)
    native = model_spec_from_hf_config(dict(spec.config))
    run = Run(steps=20, documents=True, precision=precision)
    ours, theirs = (run_ranks(1, trained, one, run, deadline=200.0)[0] for one in (native, spec))
    for first, second in zip(ours, theirs, strict=True):
        assert (second.loss, second.grad_norm) == pytest.approx((first.loss, first.grad_norm), rel=WITHIN[precision])
        assert second.tokens == first.tokens


@pytest.mark.parametrize("family", BOTH)
def test_native_family_and_its_class_have_the_same_start_and_logits(family: str) -> None:
    spec = spec_of(family)
    native = model_spec_from_hf_config(dict(spec.config))
    ours, theirs = whole_model(native, SEED), whole_stage(spec)
    named = dict(theirs.named_parameters())
    assert [name for name, value in ours.named_parameters() if not torch.equal(value, named[name])] == []
    tokens, _, documents = batch_of(0)
    with torch.no_grad():
        expected = ours(tokens, documents=documents)
        apart = (theirs(tokens, documents=documents) - expected).abs().max()
    assert apart <= 1e-5 * expected.abs().max()
