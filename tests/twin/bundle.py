"""The whole of d20 at toy size: its config with all its stages, tasks and sources, made small.

The sets are made up, in the publishers' formats (tests/twin/published.py); the overrides leave out
none of them, so that what is proven of the small run is proven of d20's list of files.
"""

import copy
import json
from typing import Any

from nanochat.spec import RunSpec, load_spec
from nanochat.touches import package_lock, touched_files
from tests.twin.hub import Hub
from tests.twin.published import repositories

NUM_SHARDS = 2
CONFIG = "@configs/d20.toml"
OVERRIDES = (
    'offer="cpu"',
    "model.depth=2",
    "model.aspect_ratio=32",
    "model.head_dim=32",
    "model.seq_len=128",
    "model.vocab_size=512",
    "runtime.compile=false",
    "runtime.num_threads=1",
    "runtime.tensorboard=false",
    "checkpoint.free_floor_gib=0.05",
    f"data.num_shards={NUM_SHARDS}",
    "tok_train.max_chars=100000",
    "base_train.tokens_per_param=0.03",
    "base_train.total_batch_size=1024",
    "base_train.eval_tokens=4096",
    "mid_train.total_batch_size=2048",
    "mid_train.eval_tokens=4096",
    "mid_train.mixture={smoltalk=24, mmlu_aux=10, gsm8k=10, spelling=30, identity=6}",
    "chat_sft.total_batch_size=2048",
    "chat_sft.eval_tokens=4096",
    "chat_sft.mixture={arc_easy=6, arc_challenge=6, gsm8k=6, smoltalk=6, spelling=20, identity=6}",
    "chat_rl.num_steps=1",
    "chat_rl.prompts_per_step=2",
    "chat_rl.samples_per_prompt=2",
    "chat_rl.max_tokens=8",
    "chat_rl.eval_examples=4",
    "evaluate.max_examples=4",
    "evaluate.max_tokens=8",
)


def small_spec() -> RunSpec:
    """What the overridden config says."""
    return load_spec(CONFIG.removeprefix("@"), OVERRIDES)


def files() -> list[str]:
    """Every file that `fetch` has to bring, each once."""
    return list(dict.fromkeys(t.path for t in touched_files(small_spec()) if t.required))


def fill(hub: Hub) -> None:
    """Give a hub all the sets."""
    hub.repositories.update(repositories(num_shards=NUM_SHARDS))


def lock_of(hub: Hub) -> str:
    """nanochat/data.lock.json for the made-up files: nothing known of any, CORE at the hub."""
    sources: dict[str, Any] = copy.deepcopy(package_lock())
    for source in sources.values():
        source["revision"] = None
        source["files"] = {name: {"size": None, "sha256": None} for name in source["files"]}
    sources["core"]["files"]["eval_bundle.zip"]["url"] = f"{hub.url}/files/eval_bundle.zip"
    return json.dumps({"format": 1, "sources": sources})
