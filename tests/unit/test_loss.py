"""The chunked loss against torch's cross-entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F

from nanochat import loss
from nanochat.loss import head_loss, softcap

N_ROWS, WIDTH, VOCAB = 37, 8, 53


@pytest.fixture(autouse=True)
def several_chunks_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 10 * VOCAB * 8)
    monkeypatch.setitem(loss.BLOCK_BYTES, "cpu", 3 * VOCAB * 8 // torch.get_num_threads())


def inputs(dtype: torch.dtype, spread: float = 3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_ROWS, WIDTH, generator=generator).to(dtype) * spread
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype) * spread
    targets = torch.randint(0, VOCAB, (N_ROWS,), generator=generator)
    targets[::5] = loss.IGNORED_TARGET
    return x.requires_grad_(), weight.requires_grad_(), targets


def reference(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str):
    return F.cross_entropy(softcap(x @ weight.T), targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_equal_torch(reduction: str) -> None:
    x, weight, targets = inputs(torch.float64)
    upstream = torch.linspace(-1, 2, N_ROWS, dtype=torch.float64) if reduction == "none" else 0.7
    results = []
    for function in (head_loss, reference):
        value = function(x, weight, targets, reduction)
        (value * upstream).sum().backward()
        results.append((value.detach(), x.grad, weight.grad))
        x.grad = weight.grad = None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients_the_loss_is_the_same(reduction: str) -> None:
    x, weight, targets = inputs(torch.float64)
    with torch.no_grad():
        value = head_loss(x, weight, targets, reduction)
    torch.testing.assert_close(value, reference(x, weight, targets, reduction).detach())


def test_gradients_accumulate_over_micro_batches() -> None:
    x, weight, targets = inputs(torch.float64)
    head_loss(x, weight, targets, "sum").backward()
    whole = weight.grad
    weight.grad = None
    for part in (slice(0, 20), slice(20, None)):
        head_loss(x[part], weight, targets[part], "sum").backward()
    torch.testing.assert_close(weight.grad, whole)


def test_extreme_logits_stay_finite() -> None:
    x, weight, targets = inputs(torch.float32, spread=1e4)
    value = head_loss(x, weight, targets, "mean")
    value.backward()
    torch.testing.assert_close(value, reference(x, weight, targets, "mean"))
    assert x.grad.isfinite().all()


def test_no_valid_target_gives_zero() -> None:
    x, weight, targets = inputs(torch.float32)
    value = head_loss(x, weight, torch.full_like(targets, loss.IGNORED_TARGET), "mean")
    value.backward()
    assert value == 0
    assert not weight.grad.any()


def test_features_in_bf16_and_a_float32_head() -> None:
    x, weight, targets = inputs(torch.float32, spread=1.0)
    half = x.detach().bfloat16().requires_grad_()
    value = head_loss(half, weight, targets, "mean")
    value.backward()
    assert (value.dtype, half.grad.dtype, weight.grad.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    expected = reference(x, weight, targets, "mean")
    torch.testing.assert_close(value, expected, atol=0.05, rtol=0.05)


def test_operators_declare_their_shapes_and_gradients() -> None:
    x, weight, targets = inputs(torch.float64)
    row_weights = torch.rand(N_ROWS, dtype=torch.float64)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(loss._row_losses, (x, weight, targets, False), test_utils=checks)
    torch.library.opcheck(
        loss._weighted_loss, (x, weight, targets, row_weights, False), test_utils=checks
    )
