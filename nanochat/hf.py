"""The folder that Hugging Face transformers loads as NanoChatForCausalLM: written and read.

    config.json generation_config.json model.safetensors (or shards and their index)
    tokenizer.json tokenizer_config.json chat_template.jinja

- The same ids, logits and chat tokens as here; `tests/unit/test_export.py` holds both to it.
- transformers is not needed, neither to write nor to read.
- One difference remains: a special token written out in a message (`<|bos|>`) is text here, and the
  special token for transformers' chat template, which knows only strings.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from nanochat.gpt import GPT, NORM_EPS, ROPE_THETA, hf_state_dict, load_hf_state_dict
from nanochat.loss import SOFTCAP
from nanochat.rundir import atomic_write_text
from nanochat.scaling import GPTConfig
from nanochat.spec import SpecError
from nanochat.tokenizer import (
    NUM_BYTES,
    SPECIAL_TOKENS,
    CharTokenizer,
    Tokenizer,
    TokenizerLike,
)

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
ORIGIN = "nanochat_kit"
"""Key in config.json; transformers keeps what it does not know."""
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% set system = '' %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('user and assistant must take turns, beginning with the user') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|user_start|>' + (system if loop.first else '') + message['content'] + '<|user_end|>' }}"
    "{% else %}"
    "{{ '<|assistant_start|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'python' %}"
    "{{ '<|python_start|>' + part['text'] + '<|python_end|>' }}"
    "{% elif part['type'] == 'python_output' %}"
    "{{ '<|output_start|>' + part['text'] + '<|output_end|>' }}"
    "{% else %}{{ raise_exception('unknown part of type ' + part['type']) }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|assistant_end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)
"""As tokenizer.render_conversation and render_for_completion."""


# -----------------------------------------------------------------------------
# Writing


def write_folder(
    folder: Path, model: GPT, tokenizer: TokenizerLike, origin: dict[str, Any]
) -> None:
    """Write a model, in the dtype of its weights, and its tokenizer. origin: what `read_origin` is
    to give back (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model*.safetensors"), folder / WEIGHTS_INDEX):
        old.unlink(missing_ok=True)
    weights = {name: weight.contiguous() for name, weight in hf_state_dict(model).items()}
    save_torch_state_dict(weights, folder, max_shard_size=MAX_SHARD_SIZE)
    stop_ids = [tokenizer.special_id("assistant_end"), tokenizer.bos_id]
    documents = {
        CONFIG: {**_config(model, tokenizer), ORIGIN: origin},
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": stop_ids,
            "pad_token_id": stop_ids[0],
        },
        TOKENIZER: tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "pad_token": "<|assistant_end|>",
            "model_max_length": model.config.seq_len,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, document in documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=False)
        atomic_write_text(folder / name, text + "\n")
    atomic_write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)


def _config(model: GPT, tokenizer: TokenizerLike) -> dict[str, Any]:
    """transformers' NanoChatConfig."""
    c = model.config
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": 4 * c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "max_position_embeddings": c.seq_len,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "final_logit_softcapping": SOFTCAP,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.special_id("assistant_end"),
        "pad_token_id": tokenizer.special_id("assistant_end"),
        "dtype": DTYPE_NAMES[model.lm_head.weight.dtype],
    }


def tokenizer_json(tokenizer: TokenizerLike) -> dict[str, Any]:
    """The tokenizer as the tokenizers library reads it."""
    first_special = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    added = [
        {
            "id": first_special + i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, name in enumerate(SPECIAL_TOKENS)
    ]
    is_bpe = tokenizer.description["kind"] == "bpe"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "post_processor": None,
        **(_bpe_parts(tokenizer) if is_bpe else _char_parts(tokenizer)),
    }


def _bpe_parts(tokenizer: TokenizerLike) -> dict[str, Any]:
    merges = tokenizer.description["merges"]
    ids = range(NUM_BYTES + len(merges))
    symbols = [_as_symbols(tokenizer.decode_bytes([i])) for i in ids]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.description["pattern"]},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _vocab(symbols, tokenizer.vocab_size),
            "merges": [[symbols[left], symbols[right]] for left, right in merges],
        },
    }


def _char_parts(tokenizer: TokenizerLike) -> dict[str, Any]:
    alphabet = tokenizer.description["alphabet"]
    return {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": _vocab(alphabet, tokenizer.vocab_size),
            # a name that is no token makes the library refuse unknown characters, as here
            "unk_token": tokenizer.description["unknown"] or "<|unknown|>",
        },
    }


def _vocab(symbols: Sequence[str], vocab_size: int) -> dict[str, int]:
    """Every id once: ordinary tokens, unused ids, special tokens."""
    names = [*symbols]
    names += [f"<|unused_{i}|>" for i in range(len(names), vocab_size - len(SPECIAL_TOKENS))]
    return {name: i for i, name in enumerate([*names, *SPECIAL_TOKENS])}


# -----------------------------------------------------------------------------
# Reading


def is_folder(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / CONFIG).is_file() and (path / TOKENIZER).is_file()


def read_folder(folder: Path) -> tuple[GPT, TokenizerLike]:
    """A model, in the dtype that its weights were written in, and its tokenizer.

    Raises SpecError for a folder of another kind of model or tokenizer.
    """
    config = _gpt_config(folder)
    tokenizer = tokenizer_from_json(_read_json(folder / TOKENIZER), folder / TOKENIZER)
    if tokenizer.vocab_size != config.vocab_size:
        raise SpecError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    weights = _read_weights(folder)
    model = GPT(config)
    cast_weights(model, next(iter(weights.values())).dtype)
    try:
        load_hf_state_dict(model, weights)
    except ValueError as e:
        raise SpecError(f"{folder}: {e}") from None
    return model, tokenizer


def cast_weights(model: GPT, dtype: torch.dtype) -> None:
    """Change the dtype of the weights; the tables of RoPE stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / WEIGHTS_INDEX
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise SpecError(f"{folder} has no {name}")
        weights |= load_file(folder / name)
    return weights


def read_origin(folder: Path) -> dict[str, Any]:
    """What `write_folder` was told; empty for a folder that others wrote."""
    origin = _read_json(folder / CONFIG).get(ORIGIN, {})
    return origin if isinstance(origin, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SpecError(f"{path} cannot be read: {e}") from None


def _gpt_config(folder: Path) -> GPTConfig:
    c = _read_json(folder / CONFIG)
    if c.get("model_type") != "nanochat":
        raise SpecError(f"{folder} holds a model of type {c.get('model_type')!r}, not nanochat")
    rope = c.get("rope_parameters") or {}
    fixed = {
        "hidden_act": (c.get("hidden_act", "relu2"), "relu2"),
        "intermediate_size": (c["intermediate_size"], 4 * c["hidden_size"]),
        "final_logit_softcapping": (c.get("final_logit_softcapping", SOFTCAP), SOFTCAP),
        "rms_norm_eps": (c.get("rms_norm_eps", NORM_EPS), NORM_EPS),
        "rope_theta": (rope.get("rope_theta", c.get("rope_theta", ROPE_THETA)), ROPE_THETA),
        "attention_bias": (c.get("attention_bias", False), False),
        "tie_word_embeddings": (c.get("tie_word_embeddings", False), False),
    }
    for name, (found, wanted) in fixed.items():
        if found != wanted:
            raise SpecError(f"{folder}: {name} = {found}, but only {wanted} is known here")
    return GPTConfig(
        n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"],
        n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
        n_embd=c["hidden_size"],
        seq_len=c["max_position_embeddings"],
        vocab_size=c["vocab_size"],
    )


def tokenizer_from_json(document: dict[str, Any], where: Path) -> TokenizerLike:
    """The tokenizer in a tokenizer.json. Raises SpecError where it is none of ours."""
    model = document["model"]
    added = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
    vocab = {**model.get("vocab", {}), **added}
    vocab_size = max(vocab.values()) + 1
    first_special = vocab_size - len(SPECIAL_TOKENS)
    if any(vocab.get(name) != first_special + i for i, name in enumerate(SPECIAL_TOKENS)):
        raise SpecError(f"{where}: the last ids are not {', '.join(SPECIAL_TOKENS)}, in this order")
    ordinary = {
        i: name
        for name, i in vocab.items()
        if i < first_special and not name.startswith("<|unused_")
    }
    if model["type"] == "WordLevel":
        unknown = model.get("unk_token")
        alphabet = "".join(ordinary.values())
        known = unknown if unknown in ordinary.values() else None
        return CharTokenizer(alphabet, vocab_size, known)
    if model["type"] != "BPE":
        raise SpecError(f"{where} is of type {model['type']}, not BPE")
    tokens = [_as_bytes(ordinary[i]) for i in sorted(ordinary)]
    if tokens[:NUM_BYTES] != [bytes([b]) for b in range(NUM_BYTES)]:
        raise SpecError(f"{where}: the first {NUM_BYTES} ids are not the bytes in their order")
    return Tokenizer(_merges_of(tokens, where), vocab_size, _pattern_of(document, where))


def _pattern_of(document: dict[str, Any], where: Path) -> str:
    steps = document["pre_tokenizer"].get("pretokenizers", [document["pre_tokenizer"]])
    for step in steps:
        if step["type"] == "Split":
            return str(step["pattern"]["Regex"])
    raise SpecError(f"{where} has no split pattern")


def _merges_of(tokens: list[bytes], where: Path) -> list[tuple[int, int]]:
    """The pair that each token behind the bytes is made of: what is left of its bytes when all
    earlier merges have been applied. (The file's own list may name several pairs per token.)"""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i in range(NUM_BYTES, len(tokens)):
        parts = [bytes([b]) for b in tokens[i]]
        while len(parts) > 2:
            pairs = [ids.get(left + right, i) for left, right in pairwise(parts)]
            best = min(pairs)
            if best >= i:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2:
            raise SpecError(f"{where}: token {i}, {tokens[i]!r}, is no merge of two earlier ones")
        merges.append((ids[parts[0]], ids[parts[1]]))
    return merges


def _byte_symbols() -> list[str]:
    """GPT-2's stand-ins: a printable character for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    symbols = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [symbols[b] for b in range(256)]


_SYMBOLS = _byte_symbols()
_BYTES = {symbol: byte for byte, symbol in enumerate(_SYMBOLS)}


def _as_symbols(token: bytes) -> str:
    return "".join([_SYMBOLS[b] for b in token])


def _as_bytes(symbols: str) -> bytes:
    try:
        return bytes([_BYTES[symbol] for symbol in symbols])
    except KeyError as e:
        raise SpecError(f"token {symbols!r} is not written in GPT-2's symbols for bytes") from e
