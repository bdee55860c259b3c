"""What a run takes beside its training steps: bytes on the volume."""

from pathlib import Path

import pytest

from infra.estimates import data_bytes, data_tokens
from nanochat.spec import load_spec
from nanochat.touches import package_lock

REPO = Path(__file__).resolve().parents[2]


def test_data_that_is_there_takes_no_more_of_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    spec = load_spec(REPO / "configs" / "cpu_small.toml", ["data.cache=true"])
    whole = data_bytes(spec, missing_only=False)
    assert data_bytes(spec, missing_only=True) == whole
    shard = tmp_path / "data/fineweb_edu/shard_00000.parquet"
    of_another_spec = tmp_path / "data/tokens/abc/tokens.bin"
    for file, size in ((shard, 1000), (of_another_spec, 500)):
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(size))
    about = package_lock()["fineweb_edu"]["about_bytes_per_file"]
    assert data_bytes(spec, missing_only=True) == whole - about
    cached = 2 * (data_tokens(spec) or 0.0) / (1 - spec.data.val_fraction)
    made = data_bytes(spec, missing_only=True, is_cached=True)
    assert made == pytest.approx(whole - about - cached)
    assert data_bytes(spec, missing_only=False) == whole - about + 1000
