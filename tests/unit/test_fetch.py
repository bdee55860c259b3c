"""fetch against a hub on this machine: what it brings, what it survives, what it says."""

import copy
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from infra import download, fetch, hub
from infra.download import Downloader, DownloadError, Refused, Remote
from nanochat import corpus, touches
from nanochat.rundir import atomic_write_json, read_json
from nanochat.spec import RunSpec, SpecError
from nanochat.storage import sha256_of
from tests.twin.hub import COMMIT, Fault, Hub
from tests.twin.published import ONE, repositories

ROOT = Path(__file__).resolve().parent.parent.parent
GSM8K_TEST = f"gsm8k/main/test-{ONE}"
STORE = f"openai/gsm8k/main/test-{ONE}"


def spec_of(**sections: Any) -> RunSpec:
    return RunSpec.model_validate({"name": "fetched", "model": {"depth": 2}, **sections})


def all_tasks() -> RunSpec:
    """A spec that reads every published set."""
    mixture = {"smoltalk": 10, "mmlu_aux": 5, "gsm8k": 5, "identity": 3}
    return spec_of(
        data={"source": "fineweb_edu", "num_shards": 2},
        base_train={"num_steps": 1},
        mid_train={"num_steps": 1, "mixture": mixture},
        chat_sft={"num_steps": 1, "mixture": {"arc_easy": 2, "arc_challenge": 2}},
        chat_rl={"num_steps": 1},
        evaluate={"tasks": ["core", "arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"]},
    )


ONLY_GSM8K = spec_of(data={"source": "fineweb_edu"}, evaluate={"tasks": ["gsm8k"]})


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that has everything, and HF_ENDPOINT set to it."""
    monkeypatch.delenv("NANOCHAT_OFFLINE")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as running:
        running.repositories.update(repositories())
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def unknown_lock(twin: Hub) -> dict[str, Any]:
    """The kit's lock with nothing known of any file."""
    sources = copy.deepcopy(touches.package_lock())
    for source in sources.values():
        source["revision"] = None
        source["files"] = {name: {"size": None, "sha256": None} for name in source["files"]}
    sources["core"]["files"]["eval_bundle.zip"]["url"] = f"{twin.url}/files/eval_bundle.zip"
    return sources


def bring(twin: Hub, spec: RunSpec, to: Path, **options: Any) -> fetch.Result:
    options = {"lock": unknown_lock(twin), "first_wait_s": 0.01, **options}
    return fetch.fetch(spec, to, **options)


def test_it_brings_what_the_stages_touch_and_nothing_else(twin: Hub, tmp_path: Path) -> None:
    result = bring(twin, all_tasks(), tmp_path)
    assert result.problems == [] and result.exit_code == 0
    wanted = {t.path for t in touches.touched_files(all_tasks()) if t.required}
    there = {
        str(p.relative_to(tmp_path))
        for p in tmp_path.rglob("*")
        if p.is_file() and not p.name.startswith(".") and p.name != "data.lock.json"
    }
    assert there == wanted and result.files_fetched == len(wanted) == 21
    for path in wanted:
        source, _, name = path.partition("/")
        repository = touches.package_lock()[source].get("hub", "files")
        assert (tmp_path / path).read_bytes() == twin.repositories[repository][name]
        entry = touches.folder_lock(tmp_path / source)[name]
        assert entry["sha256"] == sha256_of(tmp_path / path)
        assert entry["known_from"] == "first fetch"
    assert read_json(tmp_path / "arc" / "data.lock.json")["revision"] == COMMIT
    assert read_json(tmp_path / "core" / "data.lock.json")["licence"] is None


def test_again_it_asks_nobody(twin: Hub, tmp_path: Path) -> None:
    bring(twin, all_tasks(), tmp_path)
    twin.requests.clear()
    assert bring(twin, all_tasks(), tmp_path).files_fetched == 0
    assert twin.requests == []


def test_a_lost_or_cut_file_is_named_and_brought_again(twin: Hub, tmp_path: Path) -> None:
    bring(twin, all_tasks(), tmp_path)
    (tmp_path / GSM8K_TEST).unlink()
    cut = tmp_path / "core" / "eval_bundle.zip"
    cut.write_bytes(cut.read_bytes()[:100])
    checked = fetch.check(all_tasks(), tmp_path, lock=unknown_lock(twin))
    assert checked.exit_code == 78
    assert sorted(p.split()[0] for p in checked.problems) == ["core/eval_bundle.zip", GSM8K_TEST]
    assert bring(twin, all_tasks(), tmp_path).files_fetched == 2
    assert fetch.check(all_tasks(), tmp_path, lock=unknown_lock(twin)).problems == []


def test_check_reads_every_byte(twin: Hub, tmp_path: Path) -> None:
    bring(twin, ONLY_GSM8K, tmp_path)
    content = bytearray((tmp_path / GSM8K_TEST).read_bytes())
    content[200] ^= 1
    (tmp_path / GSM8K_TEST).write_bytes(content)
    (problem,) = fetch.check(ONLY_GSM8K, tmp_path, lock=unknown_lock(twin)).problems
    assert "does not have the sha256" in problem and GSM8K_TEST in problem


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=500), Fault(status=502), Fault(status=503)],
        [Fault(status=429, retry_after="0")],
        [Fault(status=429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")],
        [Fault(cut_after=0), Fault(cut_after=700), Fault(cut_after=300)],
        [Fault(cut_after=700), Fault(no_ranges=True)],
        [Fault(cut_after=700), Fault(off_by=5)],
        [Fault(flip=True)],
        [Fault(cut_after=400), Fault(flip=True), Fault(cut_after=900)],
    ],
    ids=lambda faults: "-".join(
        str(f.status or ("flip" if f.flip else f.cut_after or "range")) for f in faults
    ),
)
def test_it_survives(twin: Hub, tmp_path: Path, faults: list[Fault]) -> None:
    twin.faults[STORE] += faults
    result = bring(twin, ONLY_GSM8K, tmp_path)
    assert result.problems == []
    assert twin.faults[STORE] == []
    assert (tmp_path / GSM8K_TEST).read_bytes() == twin.repositories["openai/gsm8k"][STORE[13:]]


def test_a_cut_transfer_continues_where_it_ended(twin: Hub, tmp_path: Path) -> None:
    twin.faults[STORE].append(Fault(cut_after=700))
    bring(twin, ONLY_GSM8K, tmp_path)
    ranges = [r.headers.get("Range") for r in twin.requests if r.path.endswith(f"/store/{STORE}")]
    assert ranges == [None, "bytes=700-"]


def test_a_killed_fetch_continues_in_another_process(twin: Hub, tmp_path: Path) -> None:
    remote = Remote(f"{twin.url}/files/eval_bundle.zip")
    content = twin.repositories["files"]["eval_bundle.zip"]
    (tmp_path / ".eval_bundle.zip.part").write_bytes(content[:1000])
    arrived: list[int] = []
    with download.httpx.Client() as client:
        done = Downloader(client, arrived.append).fetch(remote, tmp_path / "eval_bundle.zip")
    assert done.size == len(content) == 1000 + sum(arrived)
    assert (tmp_path / "eval_bundle.zip").read_bytes() == content


def test_a_file_that_changed_between_two_attempts_is_begun_again(twin: Hub, tmp_path: Path) -> None:
    """Its size is equal and its hash unknown: only the ETag tells."""
    remote = Remote(f"{twin.url}/files/eval_bundle.zip")
    content = twin.repositories["files"]["eval_bundle.zip"]
    (tmp_path / ".eval_bundle.zip.part").write_bytes(b"x" * 1000)
    (tmp_path / ".eval_bundle.zip.etag").write_text('"of another version"')
    with download.httpx.Client() as client:
        Downloader(client).fetch(remote, tmp_path / "eval_bundle.zip")
    assert (tmp_path / "eval_bundle.zip").read_bytes() == content


def test_too_many_faults_end_it_and_keep_what_came(twin: Hub, tmp_path: Path) -> None:
    twin.faults[STORE] += [Fault(cut_after=500)] + [Fault(status=503)] * 20
    result = bring(twin, ONLY_GSM8K, tmp_path, first_wait_s=0.001)
    assert result.exit_code == 75
    assert "HTTP 503" in result.problems[0] and "8 attempts" in result.problems[0]
    assert (tmp_path / GSM8K_TEST).with_name(f".test-{ONE}.part").stat().st_size == 500
    twin.faults.clear()
    assert bring(twin, ONLY_GSM8K, tmp_path).problems == []


def test_a_file_of_the_wrong_hash_goes_to_quarantine(twin: Hub, tmp_path: Path) -> None:
    lock = unknown_lock(twin)
    size = len(twin.repositories["openai/gsm8k"][STORE[13:]])
    lock["gsm8k"]["files"][STORE[13:]] = {"size": size, "sha256": "0" * 64}
    result = bring(twin, ONLY_GSM8K, tmp_path, lock=lock)
    assert result.exit_code == 78
    assert "expected was 000" in result.problems[0] and "fetched 2 times" in result.problems[0]
    assert not (tmp_path / GSM8K_TEST).exists()
    assert len(list((tmp_path / "gsm8k" / "main" / ".quarantine").iterdir())) == 1


def test_a_file_of_another_size_than_the_lock_knows(twin: Hub, tmp_path: Path) -> None:
    lock = unknown_lock(twin)
    lock["gsm8k"]["files"][STORE[13:]] = {"size": 77, "sha256": "0" * 64}
    result = bring(twin, ONLY_GSM8K, tmp_path, lock=lock)
    assert result.exit_code == 78 and "the lock says 77" in result.problems[0]
    assert twin.num_requests(STORE) == 1


def test_the_hub_says_another_hash_than_the_lock(twin: Hub, tmp_path: Path) -> None:
    lock = unknown_lock(twin)
    lock["gsm8k"]["files"][STORE[13:]] = {"size": None, "sha256": "0" * 64}
    with pytest.raises(SpecError, match="another file than the one that the lock knows"):
        bring(twin, ONLY_GSM8K, tmp_path, lock=lock)
    assert twin.num_requests(STORE) == 0


def test_a_known_file_is_fetched_without_asking_for_facts(twin: Hub, tmp_path: Path) -> None:
    lock = unknown_lock(twin)
    content = twin.repositories["openai/gsm8k"][STORE[13:]]
    sha256 = hashlib.sha256(content).hexdigest()
    lock["gsm8k"] |= {"revision": "f" * 40}
    lock["gsm8k"]["files"][STORE[13:]] = {"size": len(content), "sha256": sha256}
    assert bring(twin, ONLY_GSM8K, tmp_path, lock=lock).problems == []
    assert not [r for r in twin.requests if r.path.startswith("/api/")]
    assert f"/resolve/{'f' * 40}/" in twin.requests[0].path
    beside = touches.folder_lock(tmp_path / "gsm8k")[STORE[13:]]
    assert beside["known_from"] == "lock of the kit"


def test_a_second_fetch_stays_with_the_revision_of_the_first(twin: Hub, tmp_path: Path) -> None:
    bring(twin, ONLY_GSM8K, tmp_path)
    twin.requests.clear()
    more = spec_of(
        data={"source": "fineweb_edu"}, mid_train={"num_steps": 1, "mixture": {"gsm8k": 3}}
    )
    bring(twin, more, tmp_path)
    assert not [r for r in twin.requests if "/revision/" in r.path]
    assert f"/resolve/{COMMIT}/main/train" in " ".join(r.path for r in twin.requests)


def test_a_file_that_the_publisher_has_not(twin: Hub, tmp_path: Path) -> None:
    del twin.repositories["openai/gsm8k"][STORE[13:]]
    with pytest.raises(SpecError, match=r"main/test-.* is not on http://127"):
        bring(twin, ONLY_GSM8K, tmp_path)
    lock = unknown_lock(twin)
    lock["core"]["files"]["eval_bundle.zip"]["url"] = f"{twin.url}/files/gone.zip"
    only_core = spec_of(data={"source": "fineweb_edu"}, evaluate={"tasks": ["core"]})
    result = bring(twin, only_core, tmp_path, lock=lock)
    assert result.exit_code == 78 and "HTTP 404" in result.problems[0]


def test_the_rate_limit_of_the_api_is_waited_out(
    twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "WAIT", hub.tenacity.wait_none())
    twin.faults[f"/api/datasets/openai/gsm8k/paths-info/{COMMIT}"] += [Fault(status=429)] * 2
    assert bring(twin, ONLY_GSM8K, tmp_path).problems == []


def test_a_hub_that_does_not_answer_is_asked_again_later(
    twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "WAIT", hub.tenacity.wait_none())
    twin.faults[f"/api/datasets/openai/gsm8k/paths-info/{COMMIT}"] += [Fault(status=503)] * 4
    result = bring(twin, ONLY_GSM8K, tmp_path)
    assert result.exit_code == 75 and "run the same command again" in result.render()
    assert bring(twin, ONLY_GSM8K, tmp_path).exit_code == 0


def test_the_token_goes_to_the_hub_and_not_to_the_store(
    twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin.token = "hf_secret"
    with pytest.raises(SpecError, match="does not say what openai/gsm8k has|HF_TOKEN"):
        bring(twin, ONLY_GSM8K, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert bring(twin, ONLY_GSM8K, tmp_path).problems == []
    assert [r for r in twin.requests if "hf_secret" in r.headers.get("Authorization", "")]
    stored = [r for r in twin.requests if r.path.startswith("/store/")]
    assert stored and not any("Authorization" in r.headers for r in stored)
    assert "hf_secret" not in (tmp_path / "gsm8k" / "data.lock.json").read_text()


def test_retry_after_holds_every_thread_back(twin: Hub, tmp_path: Path) -> None:
    """While one thread waits for the server's leave, another one does not ask either."""
    slept: list[float] = []
    with download.httpx.Client() as client:
        downloader = Downloader(client)
        downloader._sleep = lambda seconds: slept.append(seconds) or downloader.cancel()  # type: ignore[method-assign,func-returns-value]
        twin.faults["files/eval_bundle.zip"] += [Fault(status=429, retry_after="77")]
        remote = Remote(f"{twin.url}/files/eval_bundle.zip")
        with pytest.raises(DownloadError):
            downloader.fetch(remote, tmp_path / "bundle.zip")
        assert slept == [77.0]
        downloader._cancelled = threading.Event()
        with pytest.raises(DownloadError):
            downloader.fetch(remote, tmp_path / "other.zip")
    assert 70 < slept[1] <= 77
    gets = [r for r in twin.requests if r.path == "/files/eval_bundle.zip"]
    assert len(gets) <= 3


def test_no_room_is_said_before_a_byte_is_fetched(
    twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "FLOOR_BYTES", 1 << 60)
    with pytest.raises(SpecError, match=r"GiB free\. Make room"):
        bring(twin, ONLY_GSM8K, tmp_path)
    assert twin.num_requests(STORE) == 0


def test_offline_is_respected(twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(SpecError, match="NANOCHAT_OFFLINE=1 forbids"):
        bring(twin, ONLY_GSM8K, tmp_path)
    assert twin.requests == []


def test_a_server_that_is_not_there_is_named_and_the_rest_is_fetched(
    twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_STALLED_ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}/eval_bundle.zip"
    lock = unknown_lock(twin)
    lock["core"]["files"]["eval_bundle.zip"]["url"] = gone
    spec = spec_of(data={"source": "fineweb_edu"}, evaluate={"tasks": ["core", "gsm8k"]})
    result = bring(twin, spec, tmp_path, lock=lock)
    (problem,) = result.problems
    assert gone in problem and "run the same command" in problem
    assert result.exit_code == 75 and (tmp_path / GSM8K_TEST).exists()


def test_a_folder_that_cannot_be_written(twin: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written .*--to DIR"):
        bring(twin, ONLY_GSM8K, tmp_path / "file" / "data")


def test_the_embedded_corpus_needs_no_hub(
    twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "stdlib_split", lambda val_fraction: (["train"] * 9, ["val"]))
    spec = spec_of(base_train={"num_steps": 1})
    result = bring(twin, spec, tmp_path)
    assert result.text == str(tmp_path / "embedded" / "val0.05") and twin.requests == []
    assert fetch.check(spec, tmp_path).problems == []
    shard = next((tmp_path / "embedded").rglob("train_*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "run the stage data_fetch first" in fetch.check(spec, tmp_path).problems[0]


def test_two_fetches_into_one_folder_follow_each_other(twin: Hub, tmp_path: Path) -> None:
    results: list[fetch.Result] = []
    threads = [
        threading.Thread(target=lambda: results.append(bring(twin, all_tasks(), tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.files_fetched for r in results) == [0, 21]
    assert fetch.check(all_tasks(), tmp_path, lock=unknown_lock(twin)).problems == []


def test_preflight_names_every_single_missing_file(
    twin: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    spec = all_tasks()
    bring(twin, spec, tmp_path / "data")
    assert touches.missing_files(spec) == {}
    for path in {t.path for t in touches.touched_files(spec) if t.required}:
        place = tmp_path / "data" / path
        aside = place.rename(place.with_name("aside"))
        assert [p for paths in touches.missing_files(spec).values() for p in paths] == [path]
        aside.rename(place)
        content = place.read_bytes()
        place.write_bytes(content[:-1])
        (shown,) = [p for paths in touches.missing_files(spec).values() for p in paths]
        assert shown.startswith(path) and f"has {len(content) - 1} bytes" in shown
        place.write_bytes(content)


def test_the_verb_fetches_checks_and_names_what_fails(twin: Hub, tmp_path: Path) -> None:
    def run(*extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "entrypoint.py", "fetch", "@configs/e2e.toml"]
        return subprocess.run(
            [*command, 'data.source="fineweb_edu"', "data.num_shards=2", *extra],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "NANOCHAT_HOME": str(tmp_path), "COLUMNS": "80"},
        )

    done = run("--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["files_fetched"] == 3 and document["exit_code"] == 0
    assert "3 of 3 files" in done.stderr
    (tmp_path / "data" / "fineweb_edu" / "shard_00001.parquet").unlink()
    checked = run("--check")
    assert checked.returncode == 78 and "shard_00001.parquet is missing" in checked.stdout


def test_the_lock_of_the_kit_names_every_file_of_every_task() -> None:
    sources = touches.package_lock()
    for task, splits in touches.TASK_FILES.items():
        for path in {path for files in splits.values() for path in files}:
            source, _, name = path.partition("/")
            assert name in sources[source]["files"], (task, path)
    for name, source in sources.items():
        assert "licence" in source and ("hub" in source or name == "core")
        for entry in source["files"].values():
            # what is known says where it was read
            assert entry["sha256"] is None or entry["read_at"].startswith("https://")


def test_a_task_without_a_training_split_cannot_be_trained_on() -> None:
    for task in ("mmlu", "humaneval", "core"):
        spec = spec_of(mid_train={"num_steps": 1, "mixture": {task: 3}})
        with pytest.raises(SpecError, match=f"{task} has no train split"):
            touches.touched_files(spec)


def test_a_refusal_is_a_download_error_with_the_way_out(twin: Hub, tmp_path: Path) -> None:
    twin.faults["files/eval_bundle.zip"].append(Fault(status=403))
    with download.httpx.Client() as client, pytest.raises(Refused, match="accept the conditions"):
        Downloader(client).fetch(Remote(f"{twin.url}/files/eval_bundle.zip"), tmp_path / "b.zip")


def test_a_damaged_lock_beside_the_data_is_made_again(twin: Hub, tmp_path: Path) -> None:
    bring(twin, ONLY_GSM8K, tmp_path)
    (tmp_path / "gsm8k" / "data.lock.json").write_text("{")
    (problem,) = fetch.check(ONLY_GSM8K, tmp_path, lock=unknown_lock(twin)).problems
    assert "no lock knows its sha256" in problem
    atomic_write_json(tmp_path / "gsm8k" / "data.lock.json", {})
    (tmp_path / GSM8K_TEST).unlink()
    assert bring(twin, ONLY_GSM8K, tmp_path).problems == []
