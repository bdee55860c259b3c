"""The report and `compare`: from files alone, on whole, half and damaged runs."""

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from nanochat import compare, formats, plots
from nanochat.document import Code, Document, Paragraph, Section, Table, to_html, to_markdown
from nanochat.metrics import Metrics
from nanochat.records import read_run, score_rows
from nanochat.rundir import Outcome, RunDir, RunDirError, append_jsonl, atomic_write_json
from nanochat.spec import load_spec
from nanochat.stages import report

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "smoke.toml"
NASTY = "</pre><script>alert(1)</script> | `x` ```` [a](b) <b>\n\x1b[2J"


def train(run: RunDir, stage: str, num_steps: int, *, killed: bool = False, **facts: Any) -> None:
    """Write what a training stage writes."""
    m = Metrics(run, stage)
    for step in range(num_steps + 1):
        if step:
            m.log_step(
                step,
                loss=1 + 3 * math.exp(-step / 20),
                lr=0.02,
                grad_norm=0.5,
                tokens_per_s=9000.0,
                mfu=None,
                step_s=0.25,
                loader_wait_s=0.001,
                num_tokens=step * 2048,
                epoch=0,
            )
        if step % 20 == 0:
            m.log_val(step, val_bpb=2 + 2 * math.exp(-step / 20))
            m.log_sample(step, "def ", NASTY if step else "\x00")
    m.close()
    if not killed:
        told = {
            "num_steps": num_steps,
            "num_tokens": num_steps * 2048,
            "val_bpb_first": 4.0,
            "val_bpb_best": 2.0,
            "val_bpb_last": 2.1,
            "peak_memory_gib": 0.5,
        }
        outcome = Outcome(
            stage, "done", step=num_steps, num_steps=num_steps, seconds=90.0, facts=told | facts
        )
        run.write_outcome(outcome)


@pytest.fixture
def empty(tmp_path: Path) -> RunDir:
    """A run directory with nothing but its spec."""
    run = RunDir(tmp_path / "toy")
    run.create()
    run.freeze_spec(load_spec(CONFIG, ['runtime.webhook_url="https://hook/SECRET"']))
    return run


@pytest.fixture
def half(empty: RunDir) -> RunDir:
    """Killed in the middle of base training, in the middle of a line."""
    train(empty, "base_train", 60, killed=True)
    with open(empty.metrics_file, "a") as f:
        f.write('{"stage": "base_train", "step": 61, "lo')
    return empty


@pytest.fixture
def full(empty: RunDir) -> RunDir:
    """A finished run with a restart, a roll-back, scores and a plan."""
    fill(empty)
    return empty


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """As `full`, with its report; not to be changed."""
    run = RunDir(tmp_path_factory.mktemp("drawn") / "toy")
    run.create()
    run.freeze_spec(load_spec(CONFIG))
    fill(run)
    report.main(run)
    return run


def fill(run: RunDir) -> None:
    planned = {
        "stage": "base_train",
        "num_steps": 60,
        "num_tokens": 60 * 2048,
        "hours": 0.02,
        "usd": 0.05,
        "tokens_per_s": 8000.0,
        "mfu": 0.3,
        "memory_gib": {"total": 0.75},
    }
    plan = {"n_params": 2_162_688, "offer": "cpu", "hours": 0.1, "usd": 0.25, "stages": [planned]}
    atomic_write_json(run.plan_file, plan)
    for event, at_s in (("start", 0), ("heartbeat", 100), ("start", 110), ("stop", 400)):
        record = {"event": event, "time": 1e9 + at_s, "usd_per_hour": 36.0, "source": "spec"}
        append_jsonl(run.ledger_file, record)
    compression = [
        {"text": "numbers", "tokenizer": t, "bytes": 100, "tokens": 50, "bytes_per_token": r}
        for t, r in (("ours", 2.0), ("gpt2", 2.5))
    ]
    facts = {"vocab_size": 1024, "compression": compression}
    run.write_outcome(Outcome("tok_train", "done", seconds=5.0, facts=facts))
    run.write_outcome(
        Outcome(
            "data_fetch",
            "done",
            seconds=1.0,
            facts={
                "sha256": {"train.parquet": "ab" * 32, "val.parquet": None},
                "published_sha256": {"gsm8k/test.parquet": "cd" * 32},
            },
        )
    )
    train(run, "base_train", 60, bigram_bpb=2.75)
    again = Metrics(run, "base_train", resume_step=40)  # killed at 60, continued from 40
    for step in range(41, 61):
        again.log_step(step, loss=1.0, step_s=0.25, num_tokens=step * 2048)
    again.log_event("rollback", "loss 99 at batch 41; the batch is left out", step=40)
    again.close()
    train(run, "mid_train", 40)
    train(run, "chat_sft", 40)
    restart = {"stage": "base_train", "event": "restart", "message": "was killed (exit -9)"}
    append_jsonl(run.metrics_file, restart | {"time_s": time.time()})
    run.append_resolved("device_batch_size", stage="base_train", value=8, reason="out of memory")
    m = Metrics(run, "evaluate")
    for stage, value in (("base_train", 0.0), ("mid_train", 0.7), ("chat_sft", 0.95)):
        m.log_task(stage, "copying", "accuracy", value, 0.028, 60, 0.0)
    m.log_task("base_train", "core", "centered_accuracy", -0.0123, 0.004, 2000, None)
    m.log_task("chat_sft", "arc_easy", "accuracy", 0.26, None, 2376, 0.25)
    m.close()
    run.write_outcome(Outcome("evaluate", "done", seconds=20.0))
    for stage, completion in (("base_train", NASTY), ("chat_sft", "cat")):
        results = run.path / "evaluations" / stage / "copying.jsonl"
        results.parent.mkdir(parents=True)
        for index in range(5):
            line = {"index": index, "prompt": f"Copy {index}: cat", "completion": completion}
            append_jsonl(results, line | {"correct": completion == "cat"})
    run.write_status({"state": "RUNNING", "spent_usd": 4.0, "used_s": 400.0})


def markdown_of(run: RunDir) -> str:
    """report.md without its plots, which take most of the time."""
    return to_markdown(report.make_document(read_run(run), {}), "report")


def table_row(markdown: str, label: str) -> list[str]:
    row = re.findall(rf"^\| {re.escape(label)} \|.*$", markdown, re.M)[0]
    return [cell.strip() for cell in row.strip("| ").split("|")]


def test_the_table_of_every_metric_per_stage(full: RunDir) -> None:
    text = markdown_of(full)
    assert "| Metric | BASE | MID | SFT | RL | Chance | Examples |" in text
    assert table_row(text, "CORE")[1:] == ["-0.012 ± 0.004", "-", "-", "-", "-", "2,000"]
    assert table_row(text, "ARC-Easy")[1:] == ["-", "-", "0.260", "-", "0.25", "2,376"]
    assert table_row(text, "copying")[1:4] == ["0.000 ± 0.028", "0.700 ± 0.028", "0.950 ± 0.028"]
    assert text.index("| CORE") < text.index("| ARC-Easy") < text.index("| copying")


def test_what_was_learned_paid_and_repeated(full: RunDir) -> None:
    text = markdown_of(full)
    assert "from 4.000 to 2.000 bits per byte (-50.0 %)" in text
    assert "below the 2.750 of a bigram model" in text
    base = "| base_train | done | 1 min 30 s | $0.90 | 20 | $0.05 |"
    assert base in text  # 90 s at 36 dollars per hour; 20 steps of a quarter second done again
    assert "| whole run |  | 6 min 40 s | $4.00 | - | - |" in text
    assert "| starting, stopping, killed work |  | 1 min 44 s" in text
    assert "| base_train | 60 | 122,880 | 1 min 12 s → 1 min 30 s |" in text
    assert "8,000 → 9,000 | 30.0 % → - | 0.75 GiB → 0.50 GiB |" in text
    assert "reason out of memory" in text
    assert "| Starts | 2 |" in text


def test_events_provenance_and_source_size(full: RunDir) -> None:
    text = markdown_of(full)
    assert "the batch is left out" in text and "was killed (exit -9)" in text
    assert "base_train starts from step 40" in text
    for name in ("Python", "torch", "sha256 of train.parquet", "Source lines"):
        assert len(table_row(text, name)[1]) > 0
    assert int(table_row(text, "Source files")[1].replace(",", "")) > 30
    assert table_row(text, "sha256 of val.parquet")[1] == "no lock knows it"
    assert table_row(text, "sha256 of gsm8k/test.parquet")[1] == "cd" * 32
    assert "| numbers | 100 | 2.00 | 2.50 |" in text


def test_the_first_answers_of_each_task(full: RunDir) -> None:
    rows = re.findall(r"^\| copying \| Copy .*$", markdown_of(full), re.M)
    assert [row.split("|")[2].strip() for row in rows] == [f"Copy {i}: cat" for i in range(3)]
    assert rows[0].endswith("| right: cat |") and "wrong: " in rows[0]


def test_a_machine_is_shown_once_whatever_was_edited_meanwhile(full: RunDir) -> None:
    m = Metrics(full, "chat_rl")
    (start,) = [r for r in full.metrics() if r.get("stage") == "chat_rl"]
    start["machine"]["git"] = {"commit": "c" * 40, "branch": "edited", "changed_files": 1}
    append_jsonl(full.metrics_file, start)
    m.close()
    record = read_run(full)
    assert len(record.machines) == 1 and record.git_states[-1]["branch"] == "edited"


def test_the_address_of_the_webhook_stays_out(full: RunDir) -> None:
    document = report.make_document(read_run(full), {})
    assert "SECRET" not in to_markdown(document, "report") + to_html(document)
    assert "SECRET" not in json.dumps(compare.compare([full]))


class Page(HTMLParser):
    """Which tags a page has, what it loads, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "path", "use", "rect"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_the_page_is_one_self_contained_file_whatever_the_model_writes(drawn: RunDir) -> None:
    html = (drawn.path / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert page.loads == [] and "script" not in page.tags and "link" not in page.tags
    assert "\x1b" not in html and "\x00" not in html
    assert page.tags.count("svg") == page.tags.count("figure") == 8
    assert {"summary", "scores", "training", "samples", "events", "spec"} <= set(page.ids)
    assert "prefers-color-scheme: dark" in html and "currentColor" in html
    assert page.open == []


def test_plots_lie_beside_the_text_that_shows_them(drawn: RunDir) -> None:
    text = (drawn.path / "report.md").read_text()
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(named) == 8
    for name in named:
        assert (drawn.path / name).read_bytes().startswith(b"\x89PNG")


def test_half_a_run_says_so_and_shows_what_there_is(half: RunDir) -> None:
    report.main(half)
    text, html = ((half.path / name).read_text() for name in ("report.md", "report.html"))
    assert "This run is not finished" in text and "base_train begun" in text
    assert "| Steps | 60 |" in text and "report/loss.png" in text
    assert "## Scores" not in text and "notice" in html


def test_a_run_that_has_only_begun_has_a_report(empty: RunDir) -> None:
    text = markdown_of(empty)
    assert "data_fetch not begun" in text and "| Parameters | " in text
    assert "![" not in text


def test_a_score_that_was_taken_again_replaces_the_old_one(full: RunDir) -> None:
    m = Metrics(full, "evaluate")
    m.log_task("chat_sft", "copying", "accuracy", 1.0, 0.0, 60, 0.0)
    m.close()
    text = markdown_of(full)
    assert table_row(text, "copying")[3] == "1.000 ± 0.000"


def test_no_run_directory_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no run directory"):
        report.main(RunDir(tmp_path))


def test_report_and_compare_work_without_torch(empty: RunDir) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from nanochat.rundir import RunDir\n"
        "from nanochat.stages.report import main\n"
        "from nanochat.compare import compare\n"
        "main(RunDir(sys.argv[1])); compare([RunDir(sys.argv[1])])"
    )
    command = [sys.executable, "-c", program, str(empty.path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Parameters" in (empty.path / "report.html").read_text()


def test_an_outcome_of_another_version_is_left_out(full: RunDir) -> None:
    atomic_write_json(full.outcome_file("mid_train"), {"stage": "mid_train", "verdict": "fine"})
    text = markdown_of(full)
    assert "mid_train begun" in text


def test_a_long_run_is_drawn_from_few_points(empty: RunDir) -> None:
    m = Metrics(empty, "chat_sft")
    for step in range(1, 5001):
        m.log_step(step, loss=step / 5000)
    m.close()
    svg = {p.name: p.svg for p in plots.draw(read_run(empty), empty.report_dir)}
    assert set(svg) == {"loss", "memory"} and len(svg["loss"]) < 60_000


def test_rewards_are_shown_and_what_their_gradient_descends_on_is_not(empty: RunDir) -> None:
    m = Metrics(empty, "chat_rl")
    m.log_reward(0, 0.25, stderr=0.1, n=16)
    for step in range(1, 9):
        m.log_step(step, loss=-0.5, reward=step / 8)
    m.log_reward(8, 0.75, stderr=0.1, n=16)
    m.close()
    facts = {"reward_first": 0.25, "reward_last": 0.75}
    empty.write_outcome(Outcome("chat_rl", "done", step=8, facts=facts))
    drawn = {p.name for p in plots.draw(read_run(empty), empty.report_dir)}
    assert {"reward", "val_reward"} <= drawn and "loss" not in drawn
    text = markdown_of(empty)
    assert table_row(text, "Held-out reward first")[-1] == "0.250"
    assert table_row(text, "Reward of rollouts at the end")[-1] == "0.562"
    assert "Loss at the end" not in text


def test_the_tasks_of_core_stand_in_a_table_of_their_own(full: RunDir) -> None:
    m = Metrics(full, "evaluate")
    m.log_task("base_train", "core.copa", "accuracy", 0.6, 0.05, 100, 0.5)
    m.log_task("base_train", "core.squad", "accuracy", 0.1, 0.03, 100, 0.0)
    m.log_task("base_train", "core", "centered_accuracy", 0.15, 0.02, 200, 0.0)
    m.close()
    text = markdown_of(full)
    assert table_row(text, "CORE")[1] == "0.150 ± 0.020"
    assert table_row(text, "copa")[1:] == ["0.600 ± 0.050", "0.50", "0.200", "100"]
    assert "core.copa" not in text.split("## Samples")[0]


def test_every_stage_is_planned_against_actual(full: RunDir) -> None:
    plan = full.plan() | {"other_stages": [{"stage": "evaluate", "hours": 0.5, "why": ""}]}
    full.plan_file.write_text(json.dumps(plan))
    full.write_outcome(Outcome("evaluate", "done", seconds=3600.0))
    section = markdown_of(full).split("## Plan against actual")[1]
    assert table_row(section, "evaluate")[3:5] == ["30 min 00 s → 1 h 00 min", "$18.00 → $36.00"]


# -- the document


def test_markdown_shows_text_as_it_is() -> None:
    table = Table(["a", "b"], [[NASTY, "1"]])
    blocks = [Paragraph(NASTY), table, Code(NASTY, caption="*x*")]
    text = to_markdown(Document("a | b", "*c*", [Section("S", blocks)]), "report")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [c for t in tokens for c in (t.children or [])]
    assert {c.type for c in inline} == {"text"}
    assert (
        "".join(c.content for c in inline).count("</pre><script>alert(1)</script> | `x` ````") == 2
    )
    assert [t.content for t in tokens if t.type == "fence"] == [NASTY + "\n"]
    assert [t.type for t in tokens].count("td_open") == 2


def test_html_escapes_text() -> None:
    html = to_html(Document(NASTY, NASTY, [Section(NASTY, [Paragraph(NASTY), Code(NASTY, NASTY)])]))
    assert "<script" not in html


# -- compare


def test_runs_side_by_side(full: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = RunDir(tmp_path / "other")
    other.create()
    other.freeze_spec(load_spec(CONFIG, ["model.depth=6"]))
    assert compare.main([str(full.path), str(other.path)]) == 0
    text = capsys.readouterr().out
    assert "|  | toy | other |" in text
    assert table_row(text, "model.depth")[1:] == ["4", "6"]
    assert table_row(text, "copying accuracy SFT")[1:] == ["0.950", "-"]
    assert table_row(text, "BASE val_bpb_best")[1:] == ["2.000", "-"]
    assert "seed" not in text  # it does not differ


def test_compare_as_json_is_one_document(full: RunDir, capsys: pytest.CaptureFixture) -> None:
    assert compare.main([str(full.path), str(full.path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second
    assert first["scores"]["CORE centered_accuracy BASE"] == -0.0123
    assert first["stages"]["BASE"]["num_steps"] == 60


def test_compare_names_a_run_that_is_none(
    full: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert compare.main([str(full.path), str(tmp_path / "no-such-run")]) == 78
    assert "no-such-run" in capsys.readouterr().err


def test_a_task_with_two_metrics_has_two_labelled_rows(full: RunDir) -> None:
    m = Metrics(full, "evaluate")
    m.log_task("chat_sft", "gsm8k", "accuracy", 0.1, None, 10, None)
    m.log_task("chat_sft", "gsm8k", "pass@8", 0.3, None, 10, None)
    m.close()
    labels = [label for label, _, _ in score_rows(read_run(full))]
    assert labels == ["CORE", "ARC-Easy", "GSM8K (accuracy)", "GSM8K (pass@8)", "copying"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.count(1_234), "1,234"),
        (formats.count(560_988_160), "560.99 M"),
        (formats.count(None), "-"),
        (formats.num_bytes(512), "512 B"),
        (formats.num_bytes(22_000_000), "21.0 MiB"),
        (formats.num_bytes(20 * 2**30), "20.00 GiB"),
        (formats.duration(3725), "1 h 02 min"),
        (formats.duration(59.9), "59.9 s"),
        (formats.usd(0.001), "< $0.01"),
        (formats.usd(0.0), "$0.00"),
        (formats.usd(1000), "$1,000.00"),
        (formats.pair(None, None, formats.gib), "-"),
        (formats.pair(1.0, None, formats.gib), "1.00 GiB → -"),
        (formats.pair(60, 60, formats.whole), "60"),
        (formats.utc(0), "1970-01-01 00:00:00"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected
