"""Users and places in the image: real changes of user in subprocesses, where the tests are root."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import privileges

ROOT = Path(__file__).resolve().parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")

SHOW = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from infra.privileges import enter_image
enter_image(image_file=Path({marker!r}))
umask = os.umask(0)
print(os.getuid(), os.getgid(), os.getgroups(), oct(umask), os.environ["HOME"], *sys.argv[1:])
"""


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that any user may start; a virtual environment below /root is not."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run([candidate, "-c", "import tomllib"], user=12345, check=True)
            return candidate
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip("no Python 3.11 that other users may start")


@pytest.fixture
def volume() -> Iterator[Path]:
    """A root-owned folder that everybody may enter, as a fresh volume is."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def script(python: str, volume: Path) -> Path:
    """A program that enters the image and shows who it has become."""
    marker = volume / "image.json"
    marker.touch()
    path = volume / "show.py"
    path.write_text(f"#!{python}\n" + SHOW.format(root=str(ROOT), marker=str(marker)))
    path.chmod(0o755)
    return path


def run(script: Path, *args: str, home: Path, user: int | None = None) -> str:
    """What the program prints, started with a command line as somebody."""
    environ = {"NANOCHAT_HOME": str(home), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [script, *args],
        env=environ,
        user=user,
        group=user,
        extra_groups=[] if user is not None else None,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@needs_root
def test_root_becomes_the_user_and_owns_its_places(script: Path, volume: Path) -> None:
    home = volume / "nanochat"
    shown = run(script, "run", "@x", "--run-dir", str(volume / "r" / "a"), home=home)
    assert shown == f"1000 0 [] 0o2 {home}/home run @x --run-dir {volume}/r/a\n"
    assert {home.stat().st_uid, (home / "home").stat().st_uid} == {1000}
    assert (volume / "r" / "a").stat().st_uid == 1000
    assert (home / "cache" / "inductor").stat().st_gid == 0
    assert home.stat().st_mode & 0o7777 == 0o2775


@needs_root
def test_any_other_user_stays_and_gets_places_to_write(script: Path, volume: Path) -> None:
    home = volume / "own"
    home.mkdir()
    os.chown(home, 12345, 12345)
    shown = run(script, home=home, user=12345)
    assert shown == f"12345 12345 [] 0o2 {home}/home\n"
    assert (home / "cache" / "triton").stat().st_uid == 12345


@needs_root
def test_a_home_that_cannot_be_written_is_no_error_yet(script: Path, volume: Path) -> None:
    shown = run(script, home=volume / "closed", user=12345)
    assert shown.startswith("12345 ")
    assert not (volume / "closed").exists()


def test_outside_of_the_image_nothing_changes(tmp_path: Path) -> None:
    before = dict(os.environ)
    privileges.enter_image(["run"], image_file=tmp_path / "none.json")
    assert dict(os.environ) == before
    assert not privileges.lost_with_container(Path("/"), image_file=tmp_path / "none.json")


def test_only_what_is_not_on_a_volume_is_lost_with_the_container(tmp_path: Path) -> None:
    marker = tmp_path / "image.json"
    marker.touch()
    assert privileges.lost_with_container(Path("/nowhere/yet"), marker)
    assert not privileges.lost_with_container(Path("/proc/self"), marker)


@needs_root
def test_handing_over_keeps_what_is_not_roots(volume: Path) -> None:
    top, outside = volume / "top", volume / "outside"
    (top / "deep").mkdir(parents=True)
    outside.write_text("not yours")
    (top / "deep" / "file").touch()
    (top / "theirs").touch()
    os.chown(top / "theirs", 4711, 4711)
    (top / "link").symlink_to(outside)
    (top / "hard").hardlink_to(outside)
    privileges.hand_over(top, 1000, 0)
    owners = {p.name: os.lstat(p).st_uid for p in top.rglob("*")}
    assert owners == {"deep": 1000, "file": 1000, "link": 1000, "theirs": 4711, "hard": 0}
    assert outside.stat().st_uid == 0
    assert top.stat().st_uid == 1000


@needs_root
def test_a_folder_of_the_user_is_not_searched(volume: Path) -> None:
    (volume / "deep").mkdir()
    os.chown(volume, 1000, 0)
    privileges.hand_over(volume, 1000, 0)
    assert (volume / "deep").stat().st_uid == 0
    os.chown(volume, 0, 0)


@needs_root
def test_a_folder_of_the_container_with_contents_is_not_given_away() -> None:
    before = Path("/root").stat().st_uid
    privileges._give_place(Path("/root"))
    assert Path("/root").stat().st_uid == before


def test_places_follow_the_home_and_the_users_own_are_kept(tmp_path: Path) -> None:
    environ = {"HOME": "/", "TRITON_CACHE_DIR": str(tmp_path / "mine"), "USER": "anna"}
    privileges.set_places(environ, tmp_path / "home")
    assert environ["HOME"] == str(tmp_path / "home" / "home")
    assert environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine")
    assert environ["USER"] == "anna"
    assert environ["NANOCHAT_HOME"] == str(tmp_path / "home")
    assert Path(environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    assert Path(environ["MPLCONFIGDIR"]).is_dir()


@pytest.mark.parametrize("free_bytes", [0, 1 << 40])
def test_a_small_tmp_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    monkeypatch.setattr(privileges, "TMP_MIN_FREE_BYTES", free_bytes)
    environ: dict[str, str] = {}
    privileges.set_places(environ, tmp_path)
    expected = None if free_bytes == 0 else str(tmp_path / "tmp")
    assert environ.get("TMPDIR") == expected


def test_home_is_on_the_volume_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_HOME")
    assert privileges.image_home() == Path("/workspace/nanochat")
    monkeypatch.setenv("NANOCHAT_HOME", "/ckpt/x")
    assert privileges.image_home() == Path("/ckpt/x")


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (["run", "@c", "--run-dir", "/v/a"], ["/v/a"]),
        (["run", "@c", "--run-dir=/v/a"], ["/v/a"]),
        (["fetch", "@c", "--to", "/v/data", "--check"], ["/v/data"]),
        (["fetch", "@c", "--to"], []),
        (["launch", "--to", "--dry-run"], []),
        (["status"], []),
    ],
)
def test_places_named_on_the_command_line(words: list[str], places: list[str]) -> None:
    assert privileges._named_places(words) == [Path(p) for p in places]
