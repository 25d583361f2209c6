"""The loss inside the head: chunked or not, masked, with z-loss, split over the vocabulary."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.model.head import Head
from tests.support.models import losses_of
from tests.support.ranks import run_ranks

HIDDEN, VOCABULARY = 24, 88


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states `[3, 17, 24]`, targets with unequal numbers of ignored ones, weight."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 17, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (3, 17), generator=generator)
    targets[0, :5] = targets[1, ::2] = targets[2, 16] = IGNORED
    return x.to(dtype), targets, weight.to(dtype)


def head(weight: torch.Tensor, *, tokens_at_once: int = 1 << 20) -> Head:
    made = Head(HIDDEN, VOCABULARY).to(weight.dtype)
    made.weight = torch.nn.Parameter(weight.clone())
    made.chunk = tokens_at_once * len(weight)
    return made


def reference(x: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`[micro, 2]` by the library's cross-entropy over the whole of the logits."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).sum(1)
    squares = logits.logsumexp(-1).square() * (targets != IGNORED)
    return torch.stack((loss, squares.sum(1)), dim=1)


@pytest.mark.parametrize("z_weight", [0.0, 1e-3])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 17, 51, 1000])
def test_head_loss_and_gradients_equal_cross_entropy(tokens_at_once: int, z_weight: float) -> None:
    x, targets, weight = inputs()
    # Samples and columns weigh differently, so that no gradient hides in a sum.
    scale = torch.tensor([[1.0, 0.5], [2.0, 3.0], [0.1, 7.0]], dtype=torch.float64) * torch.tensor([1.0, z_weight])
    made = head(weight, tokens_at_once=tokens_at_once)
    ours_x, their_x, their_weight = (t.clone().requires_grad_() for t in (x, x, weight))
    ours, theirs = losses_of(made, ours_x, targets), reference(their_x, targets, their_weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (ours * scale).sum().backward()
    (theirs * scale).sum().backward()
    torch.testing.assert_close(ours_x.grad, their_x.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(made.weight.grad, their_weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tokens_at_once", [7, 1000])
def test_head_bias_is_in_logits_and_has_the_gradient_of_cross_entropy(tokens_at_once: int, cap: float | None) -> None:
    x, targets, weight = inputs()
    made = Head(HIDDEN, VOCABULARY, cap=cap, bias=True).double()
    made.weight = torch.nn.Parameter(weight.clone())
    made.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64))
    made.chunk = tokens_at_once * VOCABULARY
    bias = made.bias.detach().clone().requires_grad_()
    logits = F.linear(x, weight, bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(made(x), logits)
    made(x, targets)["main"].sum().backward()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED).backward()
    torch.testing.assert_close(made.bias.grad, bias.grad, rtol=1e-11, atol=1e-12)


def test_head_gradients_equal_numerical_derivatives() -> None:
    x, targets, weight = inputs()
    made = head(weight[:8], tokens_at_once=5)
    made.weight.requires_grad_(False)
    few = targets[:1].remainder(8).where(targets[:1] != IGNORED, IGNORED)
    assert torch.autograd.gradcheck(lambda part: losses_of(made, part, few), (x[:1].requires_grad_(),))


def test_head_sample_without_targets_has_no_loss_or_gradient() -> None:
    x, targets, weight = inputs()
    targets[1] = IGNORED
    made = head(weight, tokens_at_once=8)
    x.requires_grad_()
    loss = losses_of(made, x, targets)
    assert loss[1].tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert x.grad is not None
    assert not x.grad[1].any()
    assert x.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens_at_once", [7, 1000])
def test_head_loss_is_at_least_fp32(dtype: torch.dtype, tokens_at_once: int) -> None:
    x, targets, weight = inputs(dtype)
    made = head(weight, tokens_at_once=tokens_at_once)
    x.requires_grad_()
    loss = losses_of(made, x, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = F.cross_entropy(F.linear(x, weight).flatten(0, 1).to(loss.dtype), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss[:, 0].sum(), expected, rtol=1e-6, atol=0)
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_head_chunks_keep_no_logits() -> None:
    x, targets, weight = inputs()
    sizes: list[int] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    for tokens_at_once, keeps in ((51, True), (10, False)):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            head(weight, tokens_at_once=tokens_at_once)(x.requires_grad_(), targets)
        assert (51 * VOCABULARY in sizes) == keeps


def test_head_without_targets_returns_logits() -> None:
    x, _, weight = inputs()
    torch.testing.assert_close(head(weight)(x), F.linear(x, weight))


def _on_a_slice(tokens_at_once: int) -> tuple[torch.Tensor, ...]:
    """Loss, logits, partial gradient of `x` and gradient of the local rows, of one rank of the vocabulary group."""
    x, targets, weight = inputs()
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = VOCABULARY // size
    made = head(weight[rank * rows : (rank + 1) * rows], tokens_at_once=tokens_at_once)
    made.vocabulary_group, made.vocabulary_start = dist.group.WORLD, rank * rows
    x.requires_grad_()
    loss = losses_of(made, x, targets)
    loss.sum().backward()
    assert x.grad is not None
    assert made.weight.grad is not None
    return loss.detach(), made(x).detach(), x.grad, made.weight.grad


@pytest.mark.dist
@pytest.mark.parametrize("tokens_at_once", [10, 1000])
def test_head_vocabulary_slices_compose_to_the_whole(tokens_at_once: int) -> None:
    x, targets, weight = inputs()
    whole = head(weight)
    x.requires_grad_()
    expected = losses_of(whole, x, targets)
    expected.sum().backward()
    losses, logits, of_x, of_rows = zip(*run_ranks(4, _on_a_slice, tokens_at_once), strict=True)
    for rank in range(4):
        assert torch.equal(losses[rank], losses[0])
        torch.testing.assert_close(losses[rank], expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits[rank], whole(x).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(of_x), x.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat(of_rows), whole.weight.grad, rtol=1e-11, atol=1e-12)
