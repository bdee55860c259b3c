"""The model against Hugging Face transformers, and against itself."""

import dataclasses
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention
from transformers import NanoChatConfig, NanoChatForCausalLM

from nanochat import gpt
from nanochat.gpt import GPT
from nanochat.kvcache import KVCache
from nanochat.scaling import GPTConfig

TINY = GPTConfig(n_layer=2, n_head=4, n_kv_head=4, n_embd=32, seq_len=32, vocab_size=61)
GROUPED = dataclasses.replace(TINY, n_kv_head=2)


def random_model(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A model with no zero matrices, so that every part of it shows in the logits."""
    model = GPT(config).to(dtype)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def random_tokens(config: GPTConfig, n_rows: int, n_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, config.vocab_size, (n_rows, n_tokens), generator=generator)


def transformers_twin(model: GPT) -> NanoChatForCausalLM:
    c = model.config
    twin = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            max_position_embeddings=c.seq_len,
        )
    )
    twin.load_state_dict(gpt.hf_state_dict(model))
    return twin.eval()


@pytest.fixture(params=[TINY, GROUPED], ids=["multi-head", "grouped-query"])
def config(request: pytest.FixtureRequest) -> GPTConfig:
    return request.param


def test_logits_equal_transformers(config: GPTConfig) -> None:
    model, idx = random_model(config), random_tokens(config, 3, 20)
    with torch.no_grad():
        theirs = transformers_twin(model)(idx).logits
        ours = model(idx)
    assert ours.dtype == torch.float32
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_logits_with_cache_equal_transformers_with_cache(config: GPTConfig) -> None:
    model, idx = random_model(config), random_tokens(config, 2, 20)
    twin = transformers_twin(model)
    cache = KVCache(config, 2, 32, device="cpu", dtype=torch.float32)
    past = None
    with torch.no_grad():
        for part in (idx[:, :7], idx[:, 7:8], idx[:, 8:15], idx[:, 15:16], idx[:, 16:]):
            theirs = twin(part, past_key_values=past, use_cache=True)
            past = theirs.past_key_values
            torch.testing.assert_close(
                model(part, kv_cache=cache), theirs.logits, atol=1e-4, rtol=0
            )
    assert cache.lengths.tolist() == [20, 20]


def test_loss_and_gradients_equal_transformers(config: GPTConfig) -> None:
    model, idx = random_model(config), random_tokens(config, 3, 21)
    targets = idx[:, 1:].clone()
    targets[0, :5] = -100
    twin = transformers_twin(model)
    logits = twin(idx[:, :-1]).logits
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    their_loss.backward()
    loss = model(idx[:, :-1], targets)
    loss.backward()
    torch.testing.assert_close(loss, their_loss)
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[gpt.hf_name(name)].grad, atol=1e-5, rtol=1e-3)


def test_hf_weights_round_trip_and_misfits_are_named() -> None:
    model, other = random_model(TINY), GPT(TINY)
    state = gpt.hf_state_dict(model)
    gpt.load_hf_state_dict(other, state)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    broken = {k: v for k, v in state.items() if k != "lm_head.weight"}
    broken |= {"extra.weight": torch.zeros(1), "model.embed_tokens.weight": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="missing lm_head.weight.*embed_tokens.*unknown extra"):
        gpt.load_hf_state_dict(other, broken)


def test_rows_of_different_lengths_decode_as_if_alone() -> None:
    model, idx = random_model(GROUPED), random_tokens(GROUPED, 3, 12)
    lengths = [5, 2, 9]
    cache = KVCache(GROUPED, 4, 16, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        alone = [model(idx[i : i + 1, : n + 2])[0] for i, n in enumerate(lengths)]
        for i, n in enumerate(lengths):
            model(idx[i : i + 1, :n], kv_cache=cache.rows(i, i + 1))
        for step in range(2):
            tokens = torch.stack([idx[i, n + step] for i, n in enumerate(lengths)])[:, None]
            together = model(tokens, kv_cache=cache.rows(0, 3))
            for i, n in enumerate(lengths):
                torch.testing.assert_close(together[i, 0], alone[i][n + step], atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [7, 4, 11, 0]


def test_padded_prefill_and_moved_rows_continue_as_if_alone() -> None:
    model, idx = random_model(TINY), random_tokens(TINY, 2, 12)
    cache = KVCache(TINY, 3, 16, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        last = model(idx[:, :8], kv_cache=cache.rows(0, 2), logit_positions=torch.tensor([7, 3]))
        torch.testing.assert_close(last[1, 0], model(idx[1:, :4])[0, 3], atol=1e-5, rtol=1e-5)
        assert last.shape == (2, 1, TINY.vocab_size)
        cache.set_length(1, 4)
        cache.copy_row(source=1, to=2)
        cache.copy_row(source=1, to=0)
        together = model(idx[1:, 4:6].expand(3, 2), kv_cache=cache)
        alone = model(idx[1:, :6])[0, 4:]
        for row in together:
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


def test_a_cache_that_is_too_long_or_full_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 32"):
        KVCache(TINY, 1, 33, device="cpu", dtype=torch.float32)
    cache = KVCache(TINY, 1, 8, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="9 tokens"):
        random_model(TINY)(random_tokens(TINY, 1, 9), kv_cache=cache)
    assert cache.lengths.tolist() == [0]


def test_documents_in_one_row_equal_documents_alone(config: GPTConfig) -> None:
    model, idx = random_model(config, torch.float64), random_tokens(config, 2, 21)
    targets = idx.roll(-1, 1)
    doc_ids = torch.tensor([[0] * 6 + [1] * 15, [4] * 10 + [2] * 1 + [3] * 10])
    loss = model(idx, targets, doc_ids=doc_ids, reduction="none")
    loss.sum().backward()
    packed_grad = model.wte.weight.grad
    model.zero_grad()
    for row, start, stop in ((0, 0, 6), (0, 6, 21), (1, 0, 10), (1, 10, 11), (1, 11, 21)):
        alone = model(
            idx[row : row + 1, start:stop], targets[row : row + 1, start:stop], reduction="none"
        )
        alone.sum().backward()
        # RoPE depends on distances only; float32 tables of cos and sin leave 1e-6.
        torch.testing.assert_close(loss[row, start:stop], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_grad, model.wte.weight.grad, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(loss, model(idx, targets, reduction="none"), atol=1e-2)


def test_block_mask_of_a_gpu_equals_the_dense_mask() -> None:
    q, k, v = torch.randn(3, 2, 4, 128, 8, generator=torch.Generator().manual_seed(0))
    doc_ids = torch.arange(128)[None] // torch.tensor([[17], [50]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex_attention says that it runs uncompiled here
        block = flex_attention(q, k, v, block_mask=gpt._document_block_mask(doc_ids))
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=gpt.document_mask(doc_ids)
    )
    torch.testing.assert_close(block, dense, atol=1e-5, rtol=1e-5)


def test_a_gpu_skips_other_documents_where_the_model_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where its blocks are compiled one by one, as FSDP2 needs it."""
    gpu = torch.device("cuda", 1)
    assert gpt.skips_blocks(gpu, True)
    assert not gpt.skips_blocks(gpu, False) and not gpt.skips_blocks(torch.device("cpu"), True)
    asked: list[bool] = []
    monkeypatch.setattr(gpt, "skips_blocks", lambda _, compiled: asked.append(compiled))
    model, idx = GPT(TINY), torch.zeros(1, 4, dtype=torch.int64)
    for model.compiled_by_block in (False, True):
        model(idx, doc_ids=idx)
    assert asked == [False, True]


def test_compiled_blocks_take_a_new_block_mask_without_compiling_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph of a block has no break, and other documents are no reason for another graph."""
    torch._dynamo.reset()
    model = GPT(dataclasses.replace(TINY, n_layer=1, seq_len=128)).eval()
    model.init_weights(0)
    idx = torch.randint(0, 50, (2, 128), generator=torch.Generator().manual_seed(0))
    documents = [torch.arange(128)[None] // torch.tensor([[17 + i], [50]]) for i in range(2)]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)  # no matrix is zero
        dense = [model(idx, doc_ids=ids) for ids in documents]
        monkeypatch.setattr(gpt, "skips_blocks", lambda device, is_compiled: True)
        counter = CompileCounter()
        model.blocks[0].compile(fullgraph=True, backend=counter)
        for ids, expected in zip(documents, dense, strict=True):
            torch.testing.assert_close(model(idx, doc_ids=ids), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


def test_recomputed_blocks_give_the_same_gradients() -> None:
    config = dataclasses.replace(TINY, dropout=0.2)
    model, idx = random_model(config), random_tokens(config, 2, 16)
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        model(idx, idx).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_dropout_acts_in_training_only() -> None:
    config = dataclasses.replace(TINY, dropout=0.5)
    model, idx = random_model(config), random_tokens(config, 2, 16)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_d20_has_the_parameters_of_nanochat() -> None:
    config = GPTConfig(
        n_layer=20, n_head=10, n_kv_head=10, n_embd=1280, seq_len=2048, vocab_size=65536
    )
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == 560_988_160
    assert model.num_matmul_params() == 560_988_160 - 65536 * 1280


def test_initial_weights_follow_the_seed_alone() -> None:
    with torch.device("meta"):
        late = GPT(TINY)
    late = late.to_empty(device="cpu")
    torch.manual_seed(99)
    late.init_weights(seed=7)
    early = GPT(TINY)
    early.init_weights(seed=7)
    other = GPT(TINY)
    other.init_weights(seed=8)
    for name, p in early.state_dict().items():
        assert torch.equal(p, late.state_dict()[name]), name
        assert torch.equal(p, other.state_dict()[name]) == (not p.any()), name
    assert torch.equal(early.cos, late.cos)
    assert early.wte.weight.std().item() == pytest.approx(1, rel=0.1)
    assert early.blocks[0].mlp.c_fc.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert not early.blocks[0].mlp.c_proj.weight.any()
    assert early(random_tokens(TINY, 1, 4)).abs().max() == 0


def test_bf16_autocast_stays_near_float32() -> None:
    model, idx = random_model(TINY), random_tokens(TINY, 2, 16)
    loss = model(idx, idx)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(idx, idx)
        assert model(idx).dtype == torch.float32
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(rounded, loss, atol=0.05, rtol=0.05)
