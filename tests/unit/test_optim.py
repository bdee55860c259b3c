"""One step against torch's own optimizers; training; state."""

import copy

import pytest
import torch

from nanochat import optim
from nanochat.gpt import GPT
from nanochat.optim import Optimizer, build_optimizer, muon_momentum, orthogonalize
from nanochat.scaling import GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, seq_len=16, vocab_size=33)
ADAM_SCALE = (CONFIG.n_embd / 768) ** -0.5


def make(dtype: torch.dtype = torch.float32, weight_decay: float = 0.0) -> tuple[GPT, Optimizer]:
    model = GPT(CONFIG).to(dtype)
    model.init_weights(seed=0)
    optimizer = build_optimizer(
        model,
        embedding_lr=0.2,
        unembedding_lr=0.004,
        matrix_lr=0.02,
        weight_decay=weight_decay,
        n_embd=CONFIG.n_embd,
    )
    return model, optimizer


def backward(model: GPT, seed: int) -> torch.Tensor:
    idx = torch.randint(0, 33, (4, 16), generator=torch.Generator().manual_seed(seed))
    loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    return loss.detach()


def torch_optimizers(model: GPT, weight_decay: float) -> list[torch.optim.Optimizer]:
    adam = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    return [
        torch.optim.AdamW([model.wte.weight], lr=0.2 * ADAM_SCALE, **adam),
        torch.optim.AdamW([model.lm_head.weight], lr=0.004 * ADAM_SCALE, **adam),
        torch.optim.Muon(
            model.blocks.parameters(), lr=0.02, momentum=0.95, weight_decay=weight_decay
        ),
    ]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_first_steps_equal_torch(weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's Muon multiplies in bf16, whose rounding badly conditioned gradients amplify without
    # bound: both multiply in float64 here.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    monkeypatch.setattr(optim, "newton_schulz_dtype", lambda x: torch.float64)
    model, optimizer = make(weight_decay=weight_decay)
    twin = copy.deepcopy(model)
    theirs = torch_optimizers(twin, weight_decay)
    for step in range(3):
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        for each in theirs:
            each.step()
            each.zero_grad()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=name)
            p.data.copy_(q)  # each step from equal weights


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonalize_applies_the_polynomial_to_singular_values(shape: tuple[int, ...]) -> None:
    stack = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(stack, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert s.min() > 0.5 and s.max() < 1.5
    torch.testing.assert_close(orthogonalize(stack), u @ torch.diag_embed(s) @ vt)
    assert not orthogonalize(torch.zeros(shape)).any()


def test_stacked_matrices_do_not_touch_each_other() -> None:
    stack = torch.randn(3, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(stack)[1], orthogonalize(stack[1:2])[0])


def test_lr_scale_zero_changes_nothing_and_gradients_are_used_up() -> None:
    model, optimizer = make(weight_decay=0.5)
    backward(model, 0)
    optimizer.set_lr_scale(0.0)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_gradient_norm_is_global_and_clipped() -> None:
    model, optimizer = make(torch.float64)
    backward(model, 0)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    norm = optimizer.step(max_grad_norm=0.01 * float(expected))
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    # After one step the second moment is (1 - beta2) * g^2 of the clipped gradient.
    clipped = optimizer.state_dict()["exp_avg_sq.lm_head.weight"].sum().div(0.05).sqrt()
    assert 0 < float(clipped) <= 0.01 * float(expected)


def test_training_learns_a_fixed_batch() -> None:
    model, optimizer = make()
    losses = []
    for step in range(40):
        optimizer.set_momentum(muon_momentum(step))
        losses.append(float(backward(model, seed=0)))
        optimizer.step()
    assert losses[0] == pytest.approx(3.4965, abs=1e-3)  # ln 33: the head starts at zero
    assert losses[-1] < 0.5


def test_momentum_warms_up_over_300_steps() -> None:
    assert [muon_momentum(s) for s in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_a_restored_state_continues_bit_for_bit() -> None:
    model, optimizer = make()
    for step in range(2):
        backward(model, step)
        optimizer.step()
    weights = copy.deepcopy(model.state_dict())
    state = {k: v.clone() for k, v in optimizer.state_dict().items()}
    other, restored = make()
    other.load_state_dict(weights)
    restored.load_state_dict(state)
    for step in range(2, 4):
        for m, o in ((model, optimizer), (other, restored)):
            backward(m, step)
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_names_every_parameter() -> None:
    model, optimizer = make()
    matrices = {n for n, _ in model.named_parameters() if n.startswith("blocks.")}
    expected = {f"momentum.{n}" for n in matrices} | {"num_steps"}
    for kind in ("exp_avg", "exp_avg_sq"):
        expected |= {f"{kind}.wte.weight", f"{kind}.lm_head.weight"}
    assert optimizer.state_dict().keys() == expected
    with pytest.raises(KeyError, match="num_steps"):
        optimizer.load_state_dict({})


def test_forgotten_gradients_do_not_reach_the_next_step() -> None:
    model, optimizer = make()
    backward(model, 0)
    optimizer.zero_grad()
    backward(model, 1)
    twin, other = make()
    backward(twin, 1)
    optimizer.step()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
