"""What only a GPU can show; skipped without one. `pytest tests/unit -m gpu`"""

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat import loss as loss_module
from nanochat.distributed import choose_float32_kernels
from nanochat.gpt import GPT
from nanochat.loss import head_loss, softcap
from nanochat.machine import MachineStats
from nanochat.optim import build_optimizer, orthogonalize
from nanochat.rundir import RunDir
from nanochat.scaling import GPTConfig
from tests.toyrun import finish, kill_tree, losses, start, wait_for, weights_digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    # torch's own, when the compiler is imported
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

CONFIG = GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=256, seq_len=256, vocab_size=1000)


@pytest.fixture(autouse=True)
def gpu_settings() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    choose_float32_kernels("cuda")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.compiler.reset()


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative distance to float64, in the Frobenius norm."""
    exact = exact.double().cpu()
    return float((ours.double().cpu() - exact).norm() / exact.norm())


def trained(config: GPTConfig) -> GPT:
    """A model none of whose matrices is zero, as after the first steps."""
    model = GPT(config)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def rows(config: GPTConfig, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    idx = torch.randint(0, config.vocab_size, (n, config.seq_len + 1), generator=generator)
    targets = idx[:, 1:].contiguous()
    targets[:, ::7] = -100
    return idx[:, :-1].contiguous(), targets


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("n_kv_head", [2, 1], ids=["multi-head", "grouped-query"])
def test_bf16_loss_and_gradients_are_those_of_float64(compiled: bool, n_kv_head: int) -> None:
    config = GPTConfig(**{**vars(CONFIG), "n_kv_head": n_kv_head})
    exact = trained(config).double()
    idx, targets = rows(config)
    exact_loss = exact(idx, targets)
    exact_loss.backward()
    model = trained(config).cuda()
    call = torch.compile(model, fullgraph=True) if compiled else model
    with torch.autocast("cuda", torch.bfloat16):
        loss = call(idx.cuda(), targets.cuda())
    loss.backward()
    assert abs(loss.item() - exact_loss.item()) < 2e-3
    wanted = dict(exact.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.grad.dtype == torch.float32
        assert error(weight.grad, wanted[name].grad) < 2e-2, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_of_the_head_over_several_chunks(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, reduction: str
) -> None:
    n, width, vocab = 1000, 256, 5003
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cuda", 300 * vocab * 2)
    monkeypatch.setitem(loss_module.BLOCK_BYTES, "cuda", 128 * vocab * 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator).bfloat16()
    weight = torch.randn(vocab, width, generator=generator) * 0.3
    targets = torch.randint(0, vocab, (n,), generator=generator)
    targets[::5] = -100
    upstream = torch.linspace(0.5, 1, n) if reduction == "none" else torch.tensor(0.7)

    x64, w64 = x.double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(softcap(x64 @ w64.T), targets, reduction=reduction)
    (exact * upstream).sum().backward()
    x_gpu, w_gpu = x.cuda().requires_grad_(), weight.cuda().requires_grad_()
    value = head_loss(x_gpu, w_gpu, targets.cuda(), reduction, compiled=compiled)
    (value * upstream.cuda()).sum().backward()

    assert value.dtype == torch.float32
    assert error(value, exact) < 1e-3
    assert x_gpu.grad.dtype == torch.bfloat16 and error(x_gpu.grad, x64.grad) < 1e-2
    assert w_gpu.grad.dtype == torch.float32 and error(w_gpu.grad, w64.grad) < 1e-2


@pytest.mark.parametrize("shape", [(3, 256, 1024), (3, 1024, 256), (5, 128, 128)])
def test_newton_schulz_in_bf16(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(stack.cuda()).float())
    assert float(values.max()) < 1.3
    near_one = ((values > 0.5) & (values < 1.3)).float().mean()
    assert float(near_one) > 0.95  # a square Gaussian matrix has a few values near zero
    assert error(orthogonalize(stack.cuda()), orthogonalize(stack.double())) < 0.05


def test_steps_of_the_optimizer_are_those_of_the_cpu() -> None:
    idx, targets = rows(CONFIG)
    losses_of = {}
    for device in ("cpu", "cuda"):
        model = trained(CONFIG).to(device)
        optimizer = build_optimizer(
            model,
            embedding_lr=0.2,
            unembedding_lr=0.004,
            matrix_lr=0.02,
            weight_decay=0.01,
            n_embd=CONFIG.n_embd,
        )
        losses_of[device] = []
        for _ in range(8):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(idx.to(device), targets.to(device))
            loss.backward()
            optimizer.step(max_grad_norm=1.0)
            losses_of[device].append(loss.item())
    assert losses_of["cpu"][-1] < losses_of["cpu"][0] - 0.5
    torch.testing.assert_close(
        torch.tensor(losses_of["cuda"]), torch.tensor(losses_of["cpu"]), rtol=2e-2, atol=0
    )


def test_documents_in_one_row_equal_documents_alone() -> None:
    model = trained(CONFIG).cuda()
    idx, targets = (t.cuda() for t in rows(CONFIG, 2))
    cuts = (0, 50, 60, 200, CONFIG.seq_len)
    doc_ids = torch.zeros_like(idx, dtype=torch.int32)
    for i, start_at in enumerate(cuts[:-1]):
        doc_ids[:, start_at:] = i
    alone = torch.cat(
        [
            model(idx[:, a:b], targets[:, a:b], reduction="none")
            for a, b in zip(cuts, cuts[1:], strict=False)
        ],
        dim=1,
    )
    # RoPE is relative, so a document may start anywhere in a row
    eager = model(idx, targets, doc_ids=doc_ids, reduction="none")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    flex = compiled(idx, targets, doc_ids=doc_ids, reduction="none")
    torch.testing.assert_close(eager, alone, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(flex, alone, rtol=1e-2, atol=1e-2)


def test_statistics_of_the_gpu() -> None:
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    held = torch.ones(2**28, device="cuda")
    stats = MachineStats([uuid]).sample()
    assert 0 <= stats["gpu_util"] <= 100
    assert 1.0 <= stats["gpu_memory_gib"] <= stats["gpu_memory_total_gib"]
    assert stats["gpu_power_w"] > 0
    assert held.sum() == 2**28


def test_killed_on_a_gpu_it_finishes_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    overrides = ("runtime.deterministic=true", 'runtime.dtype="bf16"')
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    code, err = finish(whole.path, *overrides)
    assert code == 0, err
    process = start(killed.path, *overrides)
    after = random.Random(0).randint(5, 40)
    wait_for(lambda: (killed.progress("base_train").get("step") or 0) >= after)
    kill_tree(process)
    code, err = finish(killed.path, *overrides)
    assert code == 0, err
    for stage in ("base_train", "mid_train", "chat_sft"):
        assert weights_digest(killed, stage) == weights_digest(whole, stage)
        assert losses(killed, stage) == losses(whole, stage)
    assert any("gpu_util" in record for record in whole.metrics())
