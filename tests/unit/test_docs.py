"""What the documents tell a reader to type is accepted: plans are not refused, launches render."""

import re
import shlex
from pathlib import Path

import pytest

from entrypoint import main

ROOT = Path(__file__).resolve().parents[2]
COMMENT = re.compile(r"\s{3,}\S.*|\s+#.*")
"""Words for the reader stand behind several blanks."""


def commands() -> list[tuple[str, str]]:
    """(document, command) of every plan and launch that stands on a line of its own."""
    found = []
    for path in sorted(ROOT.glob("docs/*.md")):
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *(?:\.venv/bin/)?nanochat +((?:plan|launch) .*)", text, re.M):
            line = re.sub(r"^(\w+) +", r"\1 ", line)
            command = re.sub(r"(?<=\S) {2,}(?=[-'@\w.]+=|--)", " ", line)
            found.append((path.name, COMMENT.sub("", command).strip()))
    return found


@pytest.mark.parametrize(("document", "command"), commands())
def test_a_command_of_the_documents_is_accepted(
    document: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.chdir(ROOT)
    words = [w for w in shlex.split(command) if w not in ("…", "...")]
    if words[0] == "launch" and "--dry-run" not in words:
        words.append("--dry-run")
    if "slurm" in words and "--scratch" not in words:  # nanochat.sh fills it in
        words += ["--scratch", "/scratch/me", "--sif", "/scratch/me/nanochat.sif"]
    code = main(words)
    assert code == 0, f"{document}: {command}\n{capsys.readouterr().err}"


def test_there_are_commands() -> None:
    assert len(commands()) > 10
