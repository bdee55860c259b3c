"""The arranged forward pass against the model it was made from."""

import pytest
import torch

from nanochat import inference
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.inference import Inference, PlainProduct, can_pack
from nanochat.kvcache import KVCache
from nanochat.loss import softcap
from nanochat.scaling import GPTConfig

SEQ_LEN, VOCAB_SIZE = 48, 200


@pytest.fixture(params=[(2, 2), (4, 1)], ids=["all_heads", "grouped"])
def model(request: pytest.FixtureRequest) -> GPT:
    n_head, n_kv_head = request.param
    config = GPTConfig(
        n_layer=2,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=32,
        seq_len=SEQ_LEN,
        vocab_size=VOCAB_SIZE,
    )
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model


@pytest.fixture(params=["packed", "plain"])
def arranged(request: pytest.FixtureRequest, model: GPT, monkeypatch) -> Inference:  # type: ignore[no-untyped-def]
    if request.param == "plain":
        monkeypatch.setattr(inference, "can_pack", lambda _: False)
    elif not can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    made = Inference(model, torch.float32)
    assert isinstance(made.head, PlainProduct) == (request.param == "plain")
    return made


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, shape)


@torch.inference_mode()
def test_whole_prompts(model: GPT, arranged: Inference) -> None:
    idx, last = random_ids(3, 20), torch.tensor([19, 4, 0])
    expected = model(idx, logit_positions=last)[:, 0]
    torch.testing.assert_close(softcap(arranged(idx, last)), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_with_a_cache_and_rows_of_different_lengths(model: GPT, arranged: Inference) -> None:
    ours, theirs = (
        KVCache(model.config, 3, SEQ_LEN, device="cpu", dtype=torch.float32) for _ in "ab"
    )
    for row, length in enumerate((5, 11, 1)):
        idx = random_ids(1, length)
        model(idx, kv_cache=theirs.rows(row, row + 1))
        arranged(idx, torch.tensor([length - 1]), ours.rows(row, row + 1))
    for n_tokens in (1, 1, 4, 1):
        idx = random_ids(3, n_tokens)
        last = torch.full((3,), n_tokens - 1)
        expected = model(idx, kv_cache=theirs, logit_positions=last)[:, 0]
        given = softcap(arranged(idx, last, ours))
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours.lengths, theirs.lengths)


@torch.inference_mode()
def test_the_fixed_shape_step(model: GPT, arranged: Inference) -> None:
    """Equal to the ordinary step, and rows not in use keep what they hold."""
    ours, theirs = (
        KVCache(model.config, 4, SEQ_LEN, device="cpu", dtype=torch.float32) for _ in "ab"
    )
    for row, length in enumerate((5, 11, 7)):
        idx = random_ids(1, length)
        for cache in (ours, theirs):
            arranged(idx, torch.tensor([length - 1]), cache.rows(row, row + 1))
    for _ in range(4):
        idx = random_ids(4)
        given = arranged.decode_rows(idx, ours.lengths, ours.keys, ours.values)
        ours.rows(0, 2).finish(1)
        expected = arranged(idx[:2, None], torch.zeros(2, dtype=torch.int64), theirs.rows(0, 2))
        torch.testing.assert_close(given[:2], expected, atol=1e-5, rtol=1e-5)
    assert ours.lengths.tolist() == [9, 15, 7, 0]
    for mine, other in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        assert torch.equal(mine[2, :, :7], other[2, :, :7])


@torch.inference_mode()
def test_bf16_is_close(model: GPT) -> None:
    idx, last = random_ids(2, 20), torch.tensor([19, 19])
    exact = model(idx, logit_positions=last)[:, 0]
    rounded = softcap(Inference(model, torch.bfloat16)(idx, last))
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.05


@torch.inference_mode()
def test_the_model_can_be_emptied(model: GPT) -> None:
    idx, last = random_ids(2, 20), torch.tensor([19, 3])
    expected = model(idx, logit_positions=last)[:, 0]
    arranged = Inference(model, torch.float32, keep_weights=False)
    matrices = sum(p.numel() for name, p in model.named_parameters() if "wte" not in name)
    assert matrices == 0
    torch.testing.assert_close(softcap(arranged(idx, last)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_compiled_steps_say_the_same() -> None:
    from test_engine import TOKENIZER, make_model, prompts_of

    model = make_model()
    prompts = prompts_of(7, 20)
    plain = Engine(model, TOKENIZER, max_batch=3).generate(prompts, max_tokens=24)
    compiled = Engine(model, TOKENIZER, max_batch=3, compile=True)
    compiled.prefill_tokens_per_step = 4
    assert compiled.generate(prompts, max_tokens=24) == plain
