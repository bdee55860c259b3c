"""The engine against its own definition: what a request says is what it would say alone."""

import random
from collections.abc import Iterator

import pytest
import torch

from nanochat.engine import Engine, Generation, Request
from nanochat.gpt import GPT
from nanochat.kvcache import KVCache
from nanochat.sampling import Sampling
from nanochat.scaling import GPTConfig

SPECIALS = [
    "bos",
    "user_start",
    "user_end",
    "assistant_start",
    "assistant_end",
    "python_start",
    "python_end",
    "output_start",
    "output_end",
]
VOCAB_SIZE = 128 + len(SPECIALS)


class AsciiTokenizer:
    """One token per ASCII character, special tokens behind them."""

    bos_id = 128
    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("ascii")

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)

    def special_id(self, name: str) -> int:
        return 128 + SPECIALS.index(name)


TOKENIZER = AsciiTokenizer()


def make_model(seq_len: int = 64) -> GPT:
    config = GPTConfig(
        n_layer=2, n_head=2, n_kv_head=1, n_embd=32, seq_len=seq_len, vocab_size=VOCAB_SIZE
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


def greedy_by_hand(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """The slow definition: no cache, one token at a time, no calculator."""
    ids = list(prompt)
    model.eval()
    stop = {TOKENIZER.bos_id, TOKENIZER.special_id("assistant_end")}
    for _ in range(max_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
        if len(ids) == model.config.seq_len:
            break
    return ids[len(prompt) :]


def prompts_of(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [rng.randint(0, longest) for _ in range(count)]
    return [[128, *(rng.randrange(128) for _ in range(n))] for n in lengths]


class Script:
    """Stands for a model that says a given text whatever the prompt, and then ends."""

    def __init__(self, script: list[int], prompt_len: int) -> None:
        self.script = script
        self.prompt_len = prompt_len
        self.fed: list[int] = []

    def __call__(self, idx: torch.Tensor, last: torch.Tensor, cache: KVCache) -> torch.Tensor:
        cache.finish(idx.size(1))
        self.fed += idx[0].tolist()
        said = int(cache.lengths[0]) - self.prompt_len
        end = TOKENIZER.special_id("assistant_end")
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, self.script[said] if said < len(self.script) else end] = 1.0
        return logits


def scripted_engine(model: GPT, script: Script) -> Engine:
    engine = Engine(model, TOKENIZER, max_batch=1)
    engine._forward = script  # type: ignore[assignment]
    return engine


def test_greedy_batch_equals_each_prompt_alone_without_a_cache(model: GPT) -> None:
    prompts = prompts_of(7, 20)
    engine = Engine(model, TOKENIZER, max_batch=3)
    together = engine.generate(prompts, max_tokens=24)
    assert together == [greedy_by_hand(model, p, 24) for p in prompts]
    assert engine.num_active == engine.num_waiting == 0


def test_requests_join_and_leave_between_steps(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=3)
    engine.prefill_tokens_per_step = 4  # prompts take several steps to join
    rng = random.Random(1)
    prompts = prompts_of(30, 18, seed=2)
    lengths = [rng.randint(1, 15) for _ in prompts]
    waiting = list(zip(prompts, lengths, strict=True))
    generations: list[Generation] = []
    while len(generations) < len(prompts) or any(g.finish_reason is None for g in generations):
        for _ in range(rng.randint(0, 2)):
            if waiting:
                prompt, max_tokens = waiting.pop(0)
                generations.append(
                    engine.submit(Request(prompt=tuple(prompt), max_tokens=max_tokens))
                )
        engine.step()
        assert engine.num_active <= 3
    for prompt, max_tokens, g in zip(prompts, lengths, generations, strict=True):
        assert g.ids == greedy_by_hand(model, prompt, max_tokens)
    assert int(engine._cache.lengths.sum()) == 0


def test_cancelled_requests_free_their_rows_and_disturb_no_other(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=4)
    engine.prefill_tokens_per_step = 3
    rng = random.Random(3)
    prompts = prompts_of(60, 15, seed=4)
    generations = [engine.submit(Request(prompt=tuple(p), max_tokens=12)) for p in prompts]
    while any(g.finish_reason is None for g in generations):
        engine.step()
        if rng.random() < 0.5:
            engine.cancel(rng.choice(generations))
    outcomes = {g.finish_reason for g in generations}
    assert "cancelled" in outcomes and len(outcomes) > 1
    for prompt, g in zip(prompts, generations, strict=True):
        whole = greedy_by_hand(model, prompt, 12)
        assert g.ids == (whole[: len(g.ids)] if g.finish_reason == "cancelled" else whole)
    assert engine.num_active == engine.num_waiting == int(engine._cache.lengths.sum()) == 0


def test_equal_prompts_share_one_prefill(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=8)
    fed = 0
    forward = engine._forward

    def counting(idx: torch.Tensor, *args: object) -> torch.Tensor:
        nonlocal fed
        fed += idx.size(1) if idx.size(1) > 1 else 0
        return forward(idx, *args)

    engine._forward = counting  # type: ignore[assignment]
    prompt = prompts_of(1, 20, seed=5)[0] + [1, 2, 3]
    answers = engine.generate([prompt] * 5, max_tokens=10, temperature=1.0)
    assert fed == len(prompt)
    assert len({tuple(a) for a in answers}) > 1  # each by its own seed
    again = [
        engine.generate([prompt], max_tokens=10, temperature=1.0, seeds=[i])[0] for i in range(5)
    ]
    assert again == answers


def test_a_seed_gives_the_same_tokens_in_any_company(model: GPT) -> None:
    prompt = [128, 5, 6, 7]
    engine = Engine(model, TOKENIZER, max_batch=5)
    for settings in ({"top_k": 10}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}, {}):
        alone = engine.generate([prompt], max_tokens=20, temperature=0.8, seeds=[77], **settings)
        others = prompts_of(4, 10, seed=6)
        mixed = engine.generate(
            [*others, prompt], max_tokens=20, temperature=0.8, seeds=[1, 2, 3, 4, 77], **settings
        )
        assert mixed[-1] == alone[0]


def test_stream_yields_what_generate_returns_and_stops_when_closed(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=2)
    prompt = [128, 1, 2]
    whole = engine.generate([prompt], max_tokens=16)[0]
    assert list(engine.stream(prompt, max_tokens=16)) == whole
    stream: Iterator[int] = engine.stream(prompt, max_tokens=16)
    assert next(stream) == whole[0]
    assert engine.num_active == 1
    stream.close()  # type: ignore[attr-defined]
    assert engine.num_active == 0


def test_the_context_ends_a_generation(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=2, max_seq_len=20)
    prompts = [[128, *range(16)], [128, *range(18)]]
    generations = engine.complete([Request(prompt=tuple(p), max_tokens=50) for p in prompts])
    for prompt, g in zip(prompts, generations, strict=True):
        if g.finish_reason == "length":
            assert len(prompt) + len(g.ids) == 20
        assert g.ids == greedy_by_hand(model, prompt, 20 - len(prompt))
    assert "length" in {g.finish_reason for g in generations}


def test_prompts_that_cannot_be_answered_are_refused(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=1, max_seq_len=10)
    with pytest.raises(ValueError, match="empty"):
        engine.submit(Request(prompt=(), max_tokens=1))
    with pytest.raises(ValueError, match="10 tokens of context"):
        engine.submit(Request(prompt=(1,) * 10, max_tokens=1))
    with pytest.raises(ValueError, match="max_tokens = 0"):
        engine.submit(Request(prompt=(1,), max_tokens=0))


def tool_call(expression: str, after: str = "") -> list[int]:
    t = TOKENIZER
    return [
        t.special_id("python_start"),
        *t.encode(expression),
        t.special_id("python_end"),
        *t.encode(after),
    ]


def test_the_calculator_answers_inside_the_text(model: GPT) -> None:
    output = [TOKENIZER.special_id("output_start"), *b"72", TOKENIZER.special_id("output_end")]
    # the script goes on behind the forced tokens, which take the place of its own words
    script = Script(tool_call("27 + 45", "!" * len(output) + "72"), prompt_len=1)
    engine = scripted_engine(model, script)
    g = engine.complete([Request(prompt=(128,), max_tokens=50)])[0]
    call = tool_call("27 + 45")
    assert g.ids == [*call, *output, *b"72"]
    assert g.forced == [False] * len(call) + [True] * len(output) + [False] * 2
    assert g.finish_reason == "stop"
    assert script.fed == [128, *g.ids]


def test_an_expression_without_a_value_is_left_to_the_model(model: GPT) -> None:
    script = Script(tool_call("import os", "no"), prompt_len=1)
    g = scripted_engine(model, script).complete([Request(prompt=(128,), max_tokens=50)])[0]
    assert g.ids == script.script
    assert not any(g.forced)


def test_next_logits_are_those_behind_the_last_token(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=1)
    prompts = prompts_of(6, 20, seed=8)
    logits = engine.next_logits(prompts)
    for prompt, row in zip(prompts, logits, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


def test_sampling_settings_without_meaning_are_refused() -> None:
    for wrong in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="allowed"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_kernels_chosen_for_training_serve_prompts_only(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, max_batch=2)
    forward, seen = engine._forward, []

    def watched(idx: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append((idx.size(1) > 1, torch.get_float32_matmul_precision()))
        return forward(idx, *args)

    engine._forward = watched  # type: ignore[assignment]
    torch.set_float32_matmul_precision("medium")
    try:
        engine.generate([[128, 1, 2], [128, 3, 4]], max_tokens=3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {(True, "medium"), (False, "highest")}
