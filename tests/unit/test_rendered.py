"""Conversations rendered to mapped files: what is read back, by whom, and after a kill."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat import rendered as module
from nanochat.distributed import Dist
from nanochat.rendered import Rendered, render
from nanochat.tasks import Mixture
from nanochat.tokenizer import Tokenizer, render_conversation
from tests.unit.ranks import on_ranks

TOKENIZER = Tokenizer.train(["spell the word copy what is this a b c d e f"] * 4, 300)
SIZES = {"copying": 30, "spelling": 20, "identity": 9}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)


def rendered_in(folder: Path, sizes: dict[str, int] = SIZES) -> Rendered:
    return render(Mixture(sizes, "train", 3), TOKENIZER, folder, Dist(), lambda _: None)


def test_it_holds_what_rendering_gives(tmp_path: Path) -> None:
    found = rendered_in(tmp_path)
    expected = [render_conversation(TOKENIZER, c, 10_000) for c in Mixture(SIZES, "train", 3)]
    assert len(found) == len(expected) == 59
    for (ids, mask), (expected_ids, expected_mask) in zip(found, expected, strict=True):
        assert (ids.tolist(), mask.tolist()) == (expected_ids, expected_mask)
    end = TOKENIZER.special_id("assistant_end")
    assert all(ids[-1] == end for ids, _ in found), "none is cut, however long"
    assert found.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert found.num_tokens == found.lengths.sum()
    with pytest.raises(IndexError):
        found[59]


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rendered_in(tmp_path)
    blocks = sorted(tmp_path.glob("*/block_*"))
    assert len(blocks) == 8
    # a kill: one block is missing, one is torn
    blocks[3].unlink()
    blocks[5].write_bytes(blocks[5].read_bytes()[:-4])
    made: list[Any] = []
    monkeypatch.setattr(
        module,
        "render_conversation",
        lambda *a: made.append(a) or render_conversation(*a),
    )
    again = rendered_in(tmp_path)
    assert len(made) == 16 and again.fingerprint == whole.fingerprint
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(whole, again, strict=True))


def test_another_mixture_has_another_fingerprint_and_replaces_it(tmp_path: Path) -> None:
    first = rendered_in(tmp_path).fingerprint
    second = rendered_in(tmp_path, SIZES | {"copying": 31})
    assert second.fingerprint != first and len(second) == 60
    assert len(list(tmp_path.iterdir())) == 1


def render_on_rank(dist: Dist, folder: Path) -> tuple[str, int]:
    module.CHUNK = 8
    mixture = Mixture(SIZES, "train", 3)
    mapped = render(mixture, TOKENIZER, folder, dist, lambda _: None)
    return mapped.fingerprint, len(mapped)


def test_ranks_share_the_work_and_see_the_same(tmp_path: Path) -> None:
    alone = rendered_in(tmp_path / "alone")
    shared = on_ranks(2, render_on_rank, tmp_path / "shared")
    assert shared == [(alone.fingerprint, len(alone))] * 2
