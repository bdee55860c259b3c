"""The training stream: every token once, for any ranks, lengths, seeds and kills."""

import gc
import json
import math
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.bpb import bigram_bpb, evaluate_bpb
from nanochat.corpus import DataFile
from nanochat.data import IGNORE_INDEX, Loader, StepBatch, flat_tokens, validation_set
from nanochat.packing import BUFFER_PIECES, num_rows
from nanochat.sources import ConversationSource, Documents, ParquetSource, permutation
from nanochat.spec import SpecError
from tests.unit.byte_tokenizer import ByteTokenizer

BOS = 0
STRIDE = 1000


class NumberedSource:
    """Documents of given lengths; token `offset` of document d is d * STRIDE + offset + 1."""

    is_slow = False
    bos_id = BOS

    def __init__(self, lengths: Sequence[int], seed: int | None, is_slow: bool = False) -> None:
        self._lengths = lengths
        self._seed = seed
        self.is_slow = is_slow
        self.num_documents = len(lengths)
        self.fingerprint = f"{list(lengths)} {seed}"

    def fetch(self, epoch: int, start: int, stop: int) -> Documents:
        ids = permutation(len(self._lengths), self._seed, epoch)[start:stop]
        tokens = [np.arange(self._lengths[i], dtype=np.int32) + i * STRIDE + 1 for i in ids]
        for t in tokens:
            t[0] = BOS
        return Documents(ids, tokens)

    def tokens_of_an_epoch(self) -> Counter[int]:
        fetched = self.fetch(0, 0, self.num_documents)
        return Counter(np.concatenate(fetched.tokens).tolist())


def steps(source: object, num_steps: int, **options: object) -> list[StepBatch]:
    """The first steps, assembled in this thread."""
    with Loader(source, num_ahead=0, **options) as loader:  # type: ignore[arg-type]
        return [next(loader) for _ in range(num_steps)]


def same(a: StepBatch, b: StepBatch) -> bool:
    """Whether two batches are equal in all they say."""
    tensors = [(a.inputs, b.inputs), (a.targets, b.targets)]
    if a.doc_ids is not None and b.doc_ids is not None:
        tensors.append((a.doc_ids, b.doc_ids))
    facts = [(x.num_targets, x.num_tokens, x.epoch, x.documents, x.cursor) for x in (a, b)]
    return all(torch.equal(x, y) for x, y in tensors) and facts[0] == facts[1]


def rest_of_epochs(source: NumberedSource, cursor: dict, num_epochs: int) -> Counter[int]:
    """Tokens that are not consumed at a cursor, up to the end of `num_epochs` epochs."""
    rest: Counter[int] = Counter()
    for epoch, position, start in cursor.get("buffer", []):
        tokens = source.fetch(epoch, position, position + 1).tokens[0]
        rest.update(tokens[start : start + cursor["seq_len"]].tolist())
    offset = cursor.get("offset", 0)
    epoch, position = cursor["epoch"], cursor["document"]
    while epoch < num_epochs:
        for tokens in source.fetch(epoch, position, source.num_documents).tokens:
            rest.update(tokens[offset:].tolist())
            offset = 0
        epoch, position = epoch + 1, 0
    return rest


streams = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=40),
        "seed": st.one_of(st.none(), st.integers(0, 2**31 - 1)),
        "seq_len": st.integers(1, 50),
        "rows": st.integers(1, 4).map(lambda n: 12 // n),
        "packing": st.sampled_from(["continuous", "documents"]),
    }
)


@settings(max_examples=120, deadline=None)
@given(stream=streams, num_steps=st.integers(1, 6))
def test_every_token_of_an_epoch_is_an_input_exactly_once(stream: dict, num_steps: int) -> None:
    source = NumberedSource(stream["lengths"], stream["seed"])
    batches = steps(
        source,
        num_steps,
        seq_len=stream["seq_len"],
        rows_per_step=stream["rows"],
        packing=stream["packing"],
    )
    seen: Counter[int] = Counter()
    for batch in batches:
        kept = batch.targets != IGNORE_INDEX
        seen.update(batch.inputs[kept].tolist())
        assert int(kept.sum()) == batch.num_targets == batch.num_tokens
    # all that was consumed, and all that is still to come, is a whole number of epochs
    cursor = batches[-1].cursor
    num_epochs = cursor["epoch"] + 1
    everything = Counter(
        {token: n * num_epochs for token, n in source.tokens_of_an_epoch().items()}
    )
    assert seen + rest_of_epochs(source, cursor, num_epochs) == everything


@settings(max_examples=40, deadline=None)
@given(stream=streams)
def test_no_document_begins_twice_before_all_have_begun(stream: dict) -> None:
    source = NumberedSource(stream["lengths"], stream["seed"])
    batches = steps(
        source, 5, seq_len=stream["seq_len"], rows_per_step=12, packing=stream["packing"]
    )
    begun = [document for batch in batches for document in batch.documents]
    assert begun == sorted(begun, key=lambda d: d[0]), "epochs follow one another"
    assert len(set(begun)) == len(begun)
    num_begun = batches[-1].epoch * source.num_documents
    assert len(begun) == pytest.approx(num_begun)


@settings(max_examples=120, deadline=None)
@given(stream=streams)
def test_target_is_the_next_token_of_the_document_or_bos(stream: dict) -> None:
    source = NumberedSource(stream["lengths"], stream["seed"])
    [batch] = steps(
        source,
        1,
        seq_len=stream["seq_len"],
        rows_per_step=stream["rows"],
        packing=stream["packing"],
    )
    previous = None
    for token, target in zip(batch.inputs.flatten(), batch.targets.flatten(), strict=True):
        token, target = int(token), int(target)
        if target == IGNORE_INDEX:
            continue
        if token == BOS:
            length = stream["lengths"][(target - 1) // STRIDE] if target != BOS else 1
            assert target == BOS or ((target - 1) % STRIDE == 1 and length > 1)
        else:
            document, offset = divmod(token - 1, STRIDE)
            is_last = offset == stream["lengths"][document] - 1
            assert target == (BOS if is_last else token + 1)
        if stream["packing"] == "continuous" and previous is not None:
            assert token == previous
        previous = target


@settings(max_examples=30, deadline=None)
@given(
    stream=streams,
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3),
)
def test_killed_and_resumed_on_other_rank_counts_the_stream_is_the_same(
    stream: dict, worlds: list[int]
) -> None:
    source = NumberedSource(stream["lengths"], stream["seed"])
    options = {"seq_len": stream["seq_len"], "rows_per_step": 12, "packing": stream["packing"]}
    straight = steps(source, 2 * len(worlds), **options)
    cursor = None
    for k, world_size in enumerate(worlds):
        ranks = [
            steps(source, 2, **options, cursor=cursor, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        for i, expected in enumerate(straight[2 * k : 2 * k + 2]):
            parts = [rank[i] for rank in ranks]
            assert torch.equal(torch.cat([p.inputs for p in parts]), expected.inputs)
            assert torch.equal(torch.cat([p.targets for p in parts]), expected.targets)
            assert all(p.cursor == expected.cursor for p in parts)
            assert all(p.num_targets == expected.num_targets for p in parts)
        cursor = json.loads(json.dumps(straight[2 * k + 1].cursor))


def test_document_packing_keeps_whole_documents_apart_and_pads_little() -> None:
    lengths = [int(n) for n in np.random.RandomState(0).lognormal(3.5, 1.0, 3000).clip(1, 900)]
    source = NumberedSource(lengths, seed=1)
    batches = steps(source, 40, seq_len=128, rows_per_step=16, packing="documents")
    assert float(np.mean([b.padding for b in batches])) < 0.01
    for batch in batches[:4]:
        assert batch.doc_ids is not None
        for tokens, ids in zip(batch.inputs.tolist(), batch.doc_ids.tolist(), strict=True):
            named = {(i, (t - 1) // STRIDE) for t, i in zip(tokens, ids, strict=True) if t != BOS}
            assert len({i for i, _ in named}) == len(named), "one id covers one document"
    assert max(len(b.cursor["buffer"]) for b in batches) < BUFFER_PIECES + 900 // 128 + 1


def test_worker_threads_do_not_change_the_stream() -> None:
    options = {"seq_len": 32, "rows_per_step": 8}
    lengths = [1 + i % 70 for i in range(500)]
    expected = steps(NumberedSource(lengths, seed=3), 20, **options)
    with Loader(NumberedSource(lengths, 3, is_slow=True), **options, num_workers=3) as loader:
        assert all(same(next(loader), e) for e in expected)
        assert loader.wait_s > 0
    assert next(loader, None) is None, "a closed loader has ended"


@pytest.mark.parametrize("end", ["close", "drop"])
def test_no_thread_outlives_its_loader(end: str) -> None:
    before = set(threading.enumerate())
    loader = Loader(NumberedSource([10] * 500, 0, is_slow=True), seq_len=16, rows_per_step=8)
    next(loader)
    assert any(thread.name == "loader" for thread in set(threading.enumerate()) - before)
    if end == "close":
        loader.close()
    else:
        del loader
        gc.collect()
    left = [t for t in set(threading.enumerate()) - before if t.name == "loader"]
    assert not left


def test_errors_of_the_workers_reach_the_loop() -> None:
    class Broken(NumberedSource):
        def fetch(self, epoch: int, start: int, stop: int) -> Documents:
            if start > 0:
                raise SpecError("shard 7 is damaged")
            return super().fetch(epoch, start, stop)

    loader = Loader(Broken([10] * 500, seed=0, is_slow=True), seq_len=16, rows_per_step=8)
    with pytest.raises(SpecError, match="shard 7"):
        for _ in range(100):
            next(loader)


def test_cursor_of_other_data_or_packing_is_refused() -> None:
    source = NumberedSource([10] * 9, seed=0)
    [batch] = steps(source, 1, seq_len=8, rows_per_step=2)
    for changed in (
        {"source": NumberedSource([11] * 9, seed=0)},
        {"packing": "documents"},
        {"seq_len": 16},
    ):
        options = {"source": source, "packing": "continuous", "seq_len": 8, **changed}
        with pytest.raises(SpecError, match="made with other data"):
            Loader(**options, rows_per_step=2, cursor=batch.cursor, num_ahead=0)


# -- parquet


def write_shards(folder: Path, texts: list[list[str]], row_group_size: int) -> list[DataFile]:
    files = []
    for i, shard in enumerate(texts):
        path = folder / f"shard_{i:05d}.parquet"
        pq.write_table(pa.table({"text": shard}), path, row_group_size=row_group_size)
        files.append(DataFile(path, path.stat().st_size, None))
    return files


def test_parquet_gives_every_document_once_per_epoch_in_other_orders(tmp_path: Path) -> None:
    texts = [f"document {i} " + "x" * (i % 17) for i in range(400)]
    files = write_shards(tmp_path, [texts[:250], texts[250:]], row_group_size=11)
    source = ParquetSource(files, ByteTokenizer(), seed=5)
    orders = []
    for epoch in range(2):
        fetched = source.fetch(epoch, 0, 400)
        orders.append(fetched.ids.tolist())
        for number, tokens in zip(fetched.ids, fetched.tokens, strict=True):
            assert tokens.tolist() == [256, *texts[number].encode()]
        pieces = [source.fetch(epoch, a, min(a + 37, 400)).ids for a in range(0, 400, 37)]
        assert np.concatenate(pieces).tolist() == orders[-1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(400))
    assert orders[0] != orders[1] != list(range(400))
    in_order = ParquetSource(files, ByteTokenizer(), seed=None)
    assert in_order.fetch(0, 0, 400).ids.tolist() == list(range(400))


@pytest.mark.parametrize("packing", ["continuous", "documents"])
def test_parquet_resumes_bit_for_bit(tmp_path: Path, packing: str) -> None:
    texts = [f"{i} " * (1 + i % 40) for i in range(600)]
    files = write_shards(tmp_path, [texts], row_group_size=16)
    options = {"seq_len": 64, "rows_per_step": 8, "packing": packing}
    with Loader(ParquetSource(files, ByteTokenizer(), seed=9), **options) as loader:
        straight = [next(loader) for _ in range(150)]
    assert straight[-1].epoch > 1
    for at in (0, 31, 77, 130):
        again = ParquetSource(files, ByteTokenizer(), seed=9)
        with Loader(again, **options, cursor=straight[at].cursor, num_workers=2) as loader:
            assert all(same(next(loader), e) for e in straight[at + 1 : at + 15])


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    path = tmp_path / "shard_00000.parquet"
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(SpecError, match=r"shard_00000\.parquet .*data_fetch"):
        ParquetSource([DataFile(path, 15, None)], ByteTokenizer(), seed=0)
    pq.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(SpecError, match="no column text"):
        ParquetSource([DataFile(path, 15, None)], ByteTokenizer(), seed=0)
    pq.write_table(pa.table({"text": ["abc " * 500] * 200}), path, compression="NONE")
    damaged = bytearray(path.read_bytes())
    damaged[100:400] = b"\xff" * 300
    path.write_bytes(damaged)
    with pytest.raises(SpecError, match=r"shard_00000\.parquet .*UTF8.*data_fetch"):
        ParquetSource([DataFile(path, 15, None)], ByteTokenizer(), seed=0).fetch(0, 0, 1)


# -- conversations


@settings(max_examples=40, deadline=None)
@given(stream=streams, num_epochs=st.integers(1, 3))
def test_rows_are_counted_from_lengths_alone(stream: dict, num_epochs: int) -> None:
    """All of the last of these rows is of the last epoch, and the row behind it of the next."""
    source = NumberedSource(stream["lengths"], stream["seed"])
    orders = [permutation(source.num_documents, stream["seed"], e) for e in range(num_epochs)]
    lengths = np.array(stream["lengths"])
    count = num_rows((lengths[order] for order in orders), stream["seq_len"])
    batches = steps(
        source, count + 1, seq_len=stream["seq_len"], rows_per_step=1, packing="documents"
    )
    tokens = [batch.num_tokens for batch in batches]
    assert sum(tokens[:-1]) == num_epochs * lengths.sum() and tokens[-1] > 0


def test_a_document_that_waits_in_pieces_is_fetched_once_on_resume() -> None:
    source = NumberedSource([900, 7, 800], seed=None)
    [first] = steps(source, 1, seq_len=16, rows_per_step=4, packing="documents")
    waiting = {position for _, position, _ in first.cursor["buffer"]}
    assert len(first.cursor["buffer"]) > 90 and len(waiting) == 3
    fetched: list[int] = []
    fetch = source.fetch
    source.fetch = lambda e, a, b: fetched.extend(range(a, b)) or fetch(e, a, b)  # type: ignore
    steps(source, 0, seq_len=16, rows_per_step=4, packing="documents", cursor=first.cursor)
    assert sorted(fetched) == sorted(waiting)


@pytest.mark.parametrize("packing", ["continuous", "documents"])
def test_conversations_train_on_masked_in_tokens_only(packing: str) -> None:
    rendered = [
        ([BOS, 10 * i + 1, 10 * i + 2, 10 * i + 3, 10 * i + 4], [0, 0, 0, 1, 1])
        for i in range(1, 40)
    ]
    source = ConversationSource(rendered, bos_id=BOS, seed=2)
    batches = steps(source, 3, seq_len=11, rows_per_step=6, packing=packing)
    wanted = {token for ids, _ in rendered for token in ids[3:]}
    for batch in batches:
        targets = batch.targets[batch.targets != IGNORE_INDEX]
        assert set(targets.tolist()) <= wanted
        assert batch.num_targets == len(targets) > 0
    assert batches[1].epoch < 1
    seen = Counter(t for b in batches[:2] for t in b.targets.flatten().tolist() if t > 0)
    assert set(seen.values()) == {1}


# -- validation and bits per byte


@pytest.mark.parametrize("packing", ["continuous", "documents"])
def test_validation_rows_are_the_same_for_every_rank_count(packing: str) -> None:
    source = NumberedSource([1 + (7 * i) % 50 for i in range(40)], seed=None)
    options = {"seq_len": 16, "batch_rows": 4, "packing": packing}
    whole = validation_set(source, max_tokens=10**6, **options)
    assert whole.num_tokens == sum(source.tokens_of_an_epoch().values())
    for world_size in (2, 3, 5):
        shares = [
            validation_set(source, max_tokens=10**6, **options, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        assert len({len(list(share)) for share in shares}) == 1
        joined = torch.cat([share.targets for share in shares])
        assert torch.equal(joined[: len(whole.targets)], whole.targets)
        assert (joined[len(whole.targets) :] == IGNORE_INDEX).all()
    few = validation_set(source, max_tokens=48, **options)
    assert torch.equal(few.inputs, whole.inputs[:3])


def test_bpb_of_a_uniform_model_is_known_and_leaves_special_tokens_out() -> None:
    source = NumberedSource([30] * 8, seed=None)
    validation = validation_set(source, seq_len=16, max_tokens=10**6, batch_rows=4)
    token_bytes = np.full(8 * STRIDE, 2)
    token_bytes[BOS] = 0

    def nll(inputs: torch.Tensor, targets: torch.Tensor, doc_ids: object) -> torch.Tensor:
        return torch.full(inputs.shape, math.log(32.0))

    bpb = evaluate_bpb(nll, validation, token_bytes, torch.device("cpu"))
    assert bpb == pytest.approx(5 / 2)


def test_bigram_equals_the_formula_and_beats_unigram_on_text() -> None:
    train = np.array([0, 1, 0, 1, 0, 2])
    bpb = bigram_bpb(train, np.array([0, 1, 2, 2]), np.array([1, 1, 1]), vocab_size=3)
    p = [4 / 9, 3 / 9, 2 / 9]
    # 0 is followed by {1, 2} in 3 places, 1 by {0} in 2, 2 by nothing
    expected = [(2 + 2 * p[1]) / 5, (0 + 1 * p[2]) / 3, p[2]]
    assert bpb == pytest.approx(-np.log2(expected).mean())


def test_flat_tokens_is_the_start_of_the_order() -> None:
    source = NumberedSource([30] * 8, seed=None)
    whole = np.concatenate(source.fetch(0, 0, 8).tokens)
    assert flat_tokens(source, 10**6).tolist() == whole.tolist()
    assert flat_tokens(source, 77).tolist() == whole[:77].tolist()
