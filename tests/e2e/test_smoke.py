"""`make smoke` as a person would: from nothing to a chat, offline, and what its report promises."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanochat.rundir import RunDir
from nanochat.tasks import make_task

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        named = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.links += [value or "" for name, value in attrs if name in named]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    home = tmp_path_factory.mktemp("home")
    run_dir = tmp_path_factory.mktemp("smoke") / "run"
    out = subprocess.run(
        ["make", "smoke", f"RUN={run_dir}"],
        cwd=ROOT,
        env={**os.environ, "NANOCHAT_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-4000:]
    yield RunDir(run_dir)


def test_base_training_beats_a_bigram_model_and_a_third_of_the_bits(smoke: RunDir) -> None:
    outcome = smoke.outcome("base_train")
    assert outcome is not None
    facts = outcome.facts
    assert facts["val_bpb_last"] < 0.65 * facts["val_bpb_first"]
    assert facts["val_bpb_last"] < facts["bigram_bpb"]


def test_two_families_are_learnt_that_the_base_model_does_not_know(smoke: RunDir) -> None:
    score = {(m["stage"], m["task"]): m["value"] for m in smoke.metrics() if "task" in m}
    tasks = {task for _, task in score}
    learnt = [t for t in tasks if score["base_train", t] < 0.2 and score["chat_sft", t] >= 0.8]
    assert len(learnt) >= 2, score


def test_the_report_shows_it(smoke: RunDir) -> None:
    report = (smoke.path / "report.md").read_text()
    for want in ("BASE", "MID", "SFT", "copying", "bigram", "val_bpb"):
        assert want in report
    page = Page((smoke.path / "report.html").read_text())
    plots = list(smoke.report_dir.glob("*.png"))
    assert len(plots) >= 5 and page.tags["svg"] == len(plots)
    assert page.tags["script"] == page.tags["link"] == 0
    assert [link for link in page.links if not link.startswith("#")] == []


def test_chat_answers_held_out_instances(smoke: RunDir) -> None:
    """Prompts that were in no training data."""
    spec = json.loads(smoke.spec_file.read_text())
    task = make_task("copying", "test", spec["seed"])
    right = 0
    for i in range(5):
        example = task.example(i)
        prompt = example.conversation["messages"][0]["content"]
        out = subprocess.run(
            [".venv/bin/nanochat", "chat", str(smoke.path), "--prompt", prompt],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        right += task.evaluate(example, out.stdout.strip())
    assert right >= 3
