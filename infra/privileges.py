"""In the image: which user a verb runs as, and where it may write.

* The image starts as root, because SkyPilot and RunPod set pods up as root, and they also reach
  `nanochat` by ssh, past the entry point. So the command itself changes to the user `nanochat` and
  starts again: a fresh process has its own /proc entry and shows the change from outside.
* A fresh volume belongs to root; the run's places on it are given to the user first.
* Everything belongs to group 0 and is writable by it, so that every `--user UID:0` can go on with
  what another left.
* With any `--user` and with a read-only root file system, home, temporary files and compile
  caches lie below NANOCHAT_HOME; an unknown uid has the home `/`, and /tmp may be unwritable.

Outside of the image nothing happens. Standard library only: it runs before anything else.
"""

import contextlib
import os
import stat
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

IMAGE_FILE = Path("/opt/nanochat/image.json")
"""Made by the image's build; where it stands, this is the image."""
USER = "nanochat"
UID = 1000
GID = 0
UMASK = 0o002
VOLUME = Path("/workspace")
PLACE_OPTIONS = ("--run-dir", "--to")
"""Options of the verbs that name a folder to write in."""
TMP_MIN_FREE_BYTES = 1 << 30
"""Apptainer's --containall gives a /tmp of 64 MB."""


def enter_image(argv: Sequence[str] | None = None, image_file: Path = IMAGE_FILE) -> None:
    """Become the user of the image, with places to write. Does not return where that restarts.

    `argv` is the command line without the program's name; default: that of this process.
    """
    if not image_file.is_file():
        return
    os.umask(UMASK)
    home = image_home()
    if os.geteuid() == 0:
        words = sys.argv[1:] if argv is None else argv
        for place in (home, *_named_places(words)):
            # What cannot be given away is reported where it is written to, with the verb's advice.
            with contextlib.suppress(OSError):
                _give_place(place)
        if _become_user():
            os.environ.update(USER=USER, LOGNAME=USER)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    set_places(os.environ, home)


def image_home() -> Path:
    """NANOCHAT_HOME in the image: as given, else on /workspace, whether a volume or not."""
    return Path(os.environ.get("NANOCHAT_HOME") or VOLUME / "nanochat")


def lost_with_container(path: Path, image_file: Path = IMAGE_FILE) -> bool:
    """Whether a path lies in the container itself, so that its end is the end of what is there."""
    return image_file.is_file() and _on_root_file_system(_nearest_existing(path))


def set_places(environ: MutableMapping[str, str], home: Path) -> None:
    """Point what writes to places below `home`, and make them.

    HOME is always replaced, since the engine sets one that may not be written; of the others, what
    a user has set is kept.
    """
    environ.update(NANOCHAT_HOME=str(home), HOME=str(home / "home"))
    environ.setdefault("USER", USER)
    places = {
        "TORCHINDUCTOR_CACHE_DIR": home / "cache" / "inductor",
        "TRITON_CACHE_DIR": home / "cache" / "triton",
        "MPLCONFIGDIR": home / "cache" / "matplotlib",
    }
    if not _is_roomy(Path("/tmp")):
        places["TMPDIR"] = home / "tmp"
    for name, path in places.items():
        environ.setdefault(name, str(path))
    for name in ("HOME", *places):
        # A read-only volume still allows `status`, `plan` and `--help`.
        with contextlib.suppress(OSError):
            Path(environ[name]).mkdir(parents=True, exist_ok=True)


def hand_over(folder: Path, uid: int, gid: int) -> None:
    """Give a root-owned folder and the root-owned entries in it to a user and a group.

    What belongs to anybody else stays theirs, links are not followed, other file systems are not
    entered, and a folder that is not root's is not searched. Raises OSError.
    """
    top = folder.stat()
    if top.st_uid != 0:
        return
    for parent, names, files in os.walk(folder, followlinks=False):
        for name in [*names, *files]:
            entry = os.path.join(parent, name)
            found = os.lstat(entry)
            if found.st_dev != top.st_dev:
                names[:] = [n for n in names if n != name]
            elif found.st_uid == 0 and not _has_other_names(found):
                os.chown(entry, uid, gid, follow_symlinks=False)
    # Last, so that a walk that was cut short is done again.
    os.chown(folder, uid, gid)
    os.chmod(folder, stat.S_IMODE(top.st_mode) | stat.S_ISGID | stat.S_IRWXG)


def _give_place(place: Path) -> None:
    """Make a folder and give it to the user of the image, unless that could break the container.

    In the container's own file system only a folder without contents is given away: /root in other
    hands, for one, locks ssh out.
    """
    place.mkdir(parents=True, exist_ok=True)
    if not _on_root_file_system(place) or not any(place.iterdir()):
        hand_over(place, UID, GID)


def _become_user() -> bool:
    """Change to the user of the image; False where this root is not allowed to."""
    try:
        os.setgroups([])
        os.setgid(GID)
        os.setuid(UID)
    except OSError as e:
        # A user namespace with one id (Apptainer's --fakeroot), or no capability to change it.
        sys.stderr.write(f"nanochat: going on as root, becoming {USER} is not allowed: {e}\n")
        return False
    return True


def _named_places(words: Sequence[str]) -> list[Path]:
    """Folders that the command line names to write in."""
    places = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in PLACE_OPTIONS and value and not value.startswith("-"):
            places.append(Path(value))
    return places


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _on_root_file_system(path: Path) -> bool:
    return path.stat().st_dev == Path("/").stat().st_dev


def _has_other_names(found: os.stat_result) -> bool:
    """Whether this is a file that may also stand in a folder which is none of the user's."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink > 1


def _is_roomy(folder: Path) -> bool:
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize >= TMP_MIN_FREE_BYTES
