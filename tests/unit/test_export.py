"""The exported folder against Hugging Face transformers, and read back."""

import json
import random
import string
from pathlib import Path

import bpe_texts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import ANSWERS, FOLLOW_UP, conversations
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM

from nanochat import export, hf
from nanochat.chat import cli
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.load import Loaded, load_trained, open_trained
from nanochat.rundir import EXIT_SPEC, RunDir
from nanochat.scaling import GPTConfig
from nanochat.spec import SpecError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    CharTokenizer,
    Tokenizer,
    render_conversation,
    render_for_completion,
)

TEXTS = [
    "the cat and the hat",
    "What's 12345.678 + 9?  \n\n\tdef f(x):\r\n    return x\n",
    "naïve café — 東京, Привет, שלום 👩‍🚀 e\u0301",
    " leading", "trailing  ", "\n", "a\x00b", "don't I'LL we've", "...!!!\n\n", "\u00a0\u2003x",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("export") / "model"
    assert export.main([str(tiny_run.path), "--to", str(to)]) == 0
    return to


@pytest.fixture(scope="module")
def ours(tiny_run: RunDir) -> Loaded:
    return load_trained(tiny_run)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> NanoChatForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, NanoChatForCausalLM)
    return model.eval()


def test_transformers_gives_the_same_logits(ours: Loaded, theirs: NanoChatForCausalLM) -> None:
    idx = torch.randint(300, (3, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours.model(idx), atol=1e-4, rtol=0)


def test_transformers_says_the_same(ours: Loaded, theirs: NanoChatForCausalLM) -> None:
    engine = Engine(ours.model, ours.tokenizer, max_batch=1)
    end = ours.tokenizer.special_id("assistant_end")
    for question, answer in ANSWERS.items():
        if not isinstance(answer, str):
            continue  # the calculator is not in transformers
        messages = [{"role": "user", "content": question}]
        prompt = render_for_completion(ours.tokenizer, {"messages": messages})
        said = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0]
        expected = engine.generate([prompt], max_tokens=40)[0]
        assert said.tolist()[len(prompt) :] == [*expected, end]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_the_same_ids(folder: Path, ours: Loaded, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode(text, add_special_tokens=False) == ours.tokenizer.encode(text)
    assert theirs.decode(ours.tokenizer.encode(text)) == text


def test_the_tokenizer_gives_the_same_ids_on_the_corpus(tmp_path: Path) -> None:
    """On what rustbpe is held to: every kind of text, and arbitrary ones."""
    corpus = [text for kind in bpe_texts.KINDS for text in bpe_texts.texts(kind, 100)]
    rng = random.Random(0)
    corpus += [bpe_texts.strange_text(rng, corpus) for _ in range(200)]
    ours = Tokenizer.train(corpus, 2048, num_threads=1)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hf.tokenizer_json(ours)), encoding="utf-8")
    theirs = HFTokenizer.from_file(str(path))
    assert len(ours.description["merges"]) > 1700
    for text in corpus:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text


def test_the_tokenizer_knows_the_special_tokens(folder: Path, ours: Loaded) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [
        ours.tokenizer.special_id(name) for name in SPECIAL_TOKENS
    ]
    assert len(theirs) == ours.tokenizer.vocab_size


@pytest.mark.parametrize(
    "messages",
    [
        *(c["messages"] for c in conversations()),
        FOLLOW_UP[:1],
        FOLLOW_UP[:3],
        [{"role": "system", "content": "Be brief."}, *FOLLOW_UP],
        [{"role": "user", "content": "  blanks \n"}, {"role": "assistant", "content": "\n x  "}],
        [{"role": "user", "content": "{{ braces }} {% %} 'quotes' \"both\" \\n"}],
    ],
)
def test_the_chat_template_gives_the_same_tokens(
    folder: Path, ours: Loaded, messages: list[dict]
) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert whole == render_conversation(ours.tokenizer, {"messages": messages}, 10_000)[0]
    if messages[-1]["role"] == "user":
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == render_for_completion(ours.tokenizer, {"messages": messages})


def test_the_chat_template_refuses_what_we_refuse(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in (FOLLOW_UP[1:], [*FOLLOW_UP[:1], *FOLLOW_UP[:1]]):
        with pytest.raises(Exception, match="take turns"):
            theirs.apply_chat_template(messages)


def test_the_folder_is_read_back(folder: Path, ours: Loaded) -> None:
    again = open_trained(str(folder))
    assert (again.model_id, again.stage, again.step) == ("tiny-sft", "chat_sft", 7)
    assert again.tokenizer.fingerprint == ours.tokenizer.fingerprint
    state, expected = again.model.state_dict(), ours.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_chat_and_serve_take_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(folder), "--prompt", "Say hi."]) == 0
    assert capsys.readouterr().out == "hi\n"
    assert cli.main([str(folder), "--prompt", "Say hi.", "-i", "sft"]) == EXIT_SPEC
    assert "no stages" in capsys.readouterr().err


def test_the_card_tells_the_facts(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "stage `chat_sft`, step 7" in card and "| layers, width, heads | 2, 64, 2 |" in card


def test_bf16_weights(tiny_run: RunDir, tmp_path: Path, ours: Loaded) -> None:
    assert export.main([str(tiny_run.path), "--to", str(tmp_path), "--dtype", "bf16"]) == 0
    half = open_trained(str(tmp_path), dtype=torch.bfloat16)
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert half.model.cos.dtype == torch.float32
    name = "blocks.0.attn.c_q.weight"
    assert torch.equal(half.model.state_dict()[name], ours.model.state_dict()[name].bfloat16())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_and_grouped_queries(
    tmp_path: Path, ours: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, seq_len=32, vocab_size=300)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    monkeypatch.setattr(hf, "MAX_SHARD_SIZE", "100KB")
    hf.write_folder(tmp_path, model, ours.tokenizer, {})
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, _ = hf.read_folder(tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(300, (2, 30))
    with torch.no_grad():
        assert torch.equal(again(idx), model(idx))
        torch.testing.assert_close(twin(idx).logits, model(idx), atol=1e-4, rtol=0)
    monkeypatch.undo()
    hf.write_folder(tmp_path, model, ours.tokenizer, {})  # in one file: the shards go
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("unknown", [None, "_"])
def test_a_char_tokenizer(tmp_path: Path, unknown: str | None) -> None:
    tokenizer = CharTokenizer(string.ascii_lowercase + " _é", 64, unknown)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=8, seq_len=8, vocab_size=64))
    hf.write_folder(tmp_path, model, tokenizer, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the café" + ("?!" if unknown else "")
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode("the café")) == "the café"
    again = hf.read_folder(tmp_path)[1]
    assert again.fingerprint == tokenizer.fingerprint


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8))
@settings(max_examples=30)
def test_any_vocabulary_is_read_back(texts: list[str]) -> None:
    tokenizer = Tokenizer.train([*texts, "an ordinary text, an ordinary text"], 300)
    document = json.loads(json.dumps(hf.tokenizer_json(tokenizer)))
    again = hf.tokenizer_from_json(document, Path("tokenizer.json"))
    assert again.fingerprint == tokenizer.fingerprint


def test_several_merges_per_token_are_understood(folder: Path, ours: Loaded) -> None:
    """Files made from tiktoken's ranks list every pair that makes a token."""
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    every_pair = [
        [name[:i], name[i:]]
        for name in sorted(vocab, key=vocab.__getitem__)
        if not name.startswith("<|")
        for i in range(1, len(name))
        if name[:i] in vocab and name[i:] in vocab
    ]
    document["model"]["merges"] = every_pair
    again = hf.tokenizer_from_json(document, folder)
    assert again.fingerprint == ours.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "llama"}, "of type 'llama'"),
        ("config.json", {"hidden_act": "silu"}, "hidden_act = silu"),
        ("config.json", {"intermediate_size": 64}, "intermediate_size = 64"),
        ("config.json", {"vocab_size": 400}, "the tokenizer has 300 ids, the model 400"),
        ("config.json", {"num_hidden_layers": 3}, "missing model.layers.2"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": {"a": 1}}}, "Unigram"),
        ("tokenizer.json", {"added_tokens": [{"content": "z", "id": 999}]}, "the last ids"),
    ],
)
def test_other_folders_are_refused(
    folder: Path, tmp_path: Path, file: str, change: dict, message: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    document = json.loads((folder / file).read_text())
    (tmp_path / file).write_text(json.dumps({**document, **change}))
    with pytest.raises(SpecError, match=message):
        open_trained(str(tmp_path))


def test_a_folder_of_something_else_is_left_alone(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert export.main([str(tiny_run.path), "--to", str(tmp_path)]) == EXIT_SPEC
    assert "holds something else" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
