"""The terminal chat on a model that knows a few answers by heart."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.chat import cli
from nanochat.chat.session import Session, Settings, fit_conversation
from nanochat.engine import Engine
from nanochat.load import load_trained
from nanochat.rundir import EXIT_SPEC, RunDir
from nanochat.spec import SpecError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def run(tiny_run: RunDir) -> RunDir:
    return tiny_run


@pytest.fixture
def session(run: RunDir) -> Session:
    loaded = load_trained(run)
    engine = Engine(loaded.model, loaded.tokenizer, max_batch=1)
    return Session(loaded, engine, Settings(temperature=0.0, max_tokens=40))


def say(session: Session, text: str) -> str:
    return "".join(session.say(text))


def test_prompt_prints_the_answer_and_nothing_else(run: RunDir) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.chat.cli", str(run.path), "--prompt", "Who are you?"],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert (done.returncode, done.stdout.decode()) == (0, "A tiny model, très petit.\n")


def test_json_is_one_document_with_the_facts(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(run.path), "--prompt", "What is 27 + 45?", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["answer"] == "It is 72."  # the calculator's part is not shown
    assert document["stage"] == "chat_sft" and document["step"] == 7
    assert document["finish_reason"] == "stop"
    assert document["num_tokens"] > len("It is 72.") and document["tokens_per_s"] > 0


def test_best_is_the_lowest_validation_loss_also_of_a_char_model(
    char_run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    def facts(*options: str) -> dict:
        question = ["--prompt", "Say hi.", "--json", "--max-tokens", "9"]
        assert cli.main([str(char_run.path), *question, *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert facts()["step"] == 9
    best = facts("--best")
    assert (best["step"], best["answer"], best["num_tokens"]) == (7, "hi", 2)
    assert cli.main([str(char_run.path), "--best", "--prompt", "Who?"]) == EXIT_SPEC
    assert "not in the char vocabulary" in capsys.readouterr().err


def test_the_newest_stage_is_taken_unless_another_is_named(run: RunDir) -> None:
    assert load_trained(run).stage == "chat_sft"
    assert load_trained(run, "base").stage == load_trained(run, "base_train").stage == "base_train"


def test_base_continues_text(run: RunDir) -> None:
    loaded = load_trained(run, "base")
    engine = Engine(loaded.model, loaded.tokenizer, max_batch=1)
    reply = Session(loaded, engine, Settings(temperature=0.0, max_tokens=5)).say("the cat")
    assert reply.prompt_tokens == 1 + len(loaded.tokenizer.encode("the cat"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "-i", "mid", "--prompt", "x"], "no complete checkpoint of mid_train"),
        (["{run}", "--json"], "--json needs --prompt"),
        (["{run}", "--prompt", "x", "--temperature", "-1"], "temperature = -1.0"),
        (["{run}", "--prompt", "x", "--max-tokens", "0"], "at least 1"),
        (["{run}", "--prompt", "word " * 300], "the model's context has room for"),
        (["/nowhere", "--prompt", "x"], "is no run directory"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: RunDir, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([a.format(run=run.path) for a in arguments]) == EXIT_SPEC
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_run_without_checkpoint_or_tokenizer(run: RunDir, tmp_path: Path) -> None:
    bare = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
    shutil.rmtree(bare.tokenizer_dir)
    with pytest.raises(SpecError, match="no tokenizer yet"):
        load_trained(bare)
    shutil.rmtree(bare.path / "checkpoints")
    with pytest.raises(SpecError, match="no complete checkpoint yet"):
        load_trained(bare)


def test_replies_stream_in_pieces_and_follow_the_conversation(session: Session) -> None:
    pieces = list(session.say("Who are you?"))
    assert len(pieces) > 5 and "".join(pieces) == "A tiny model, très petit."
    assert all("\ufffd" not in piece for piece in pieces)  # è is two tokens
    session.reset()
    assert say(session, "Say hi.") == "hi"
    assert say(session, "Again?") == "hi hi"
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2


def test_an_abandoned_reply_keeps_what_was_said_and_frees_the_engine(session: Session) -> None:
    reply = session.say("Who are you?")
    first = next(reply.pieces)
    reply.pieces.close()
    assert reply.finish_reason == "cancelled"
    assert session.messages[-1] == {"role": "assistant", "content": first}
    assert session.engine.num_active == 0


def test_old_exchanges_are_left_out_when_the_context_is_full(session: Session) -> None:
    tokenizer = session.loaded.tokenizer
    for _ in range(12):
        session.messages += [
            {"role": "user", "content": "Say hi."},
            {"role": "assistant", "content": "hi"},
        ]
    assert say(session, "Again?").startswith("hi")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    messages.append({"role": "user", "content": "c"})
    whole = fit_conversation(tokenizer, messages, 1000)
    assert fit_conversation(tokenizer, messages, len(whole)) == whole
    shorter = fit_conversation(tokenizer, messages, len(whole) - 1)
    assert shorter == fit_conversation(tokenizer, messages[2:], 1000)


def test_commands(session: Session, tmp_path: Path) -> None:
    say(session, "Say hi.")
    file = tmp_path / "chat.json"
    assert str(file) in cli.run_command(session, f"/save {file}")
    assert "forgotten" in cli.run_command(session, "/reset")
    assert session.messages == []
    cli.run_command(session, f"/load {file}")
    assert session.messages == json.loads(file.read_text())["messages"]
    cli.run_command(session, "/temp 0.25")
    assert session.settings.temperature == 0.25
    assert "/reset" in cli.run_command(session, "/help")


@pytest.mark.parametrize(
    "line", ["/temp warm", "/temp 3", "/temp", "/save", "/load /nowhere", "/save /no/where", "/x"]
)
def test_wrong_commands_are_refused(session: Session, line: str) -> None:
    with pytest.raises(SpecError):
        cli.run_command(session, line)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        '{"messages": 3}',
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "x"}]}',
    ],
)
def test_files_that_hold_no_conversation(session: Session, tmp_path: Path, content: str) -> None:
    (tmp_path / "f").write_text(content)
    with pytest.raises(SpecError):
        session.load(tmp_path / "f")
    assert session.messages == []


def test_a_piped_chat(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/temp 0", "Say hi.", "", "/nonsense", "Again?", "/quit", "never read"])
    monkeypatch.setattr(cli, "make_reader", lambda: lambda: next(lines))
    assert cli.main([str(run.path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("chat_sft, step 7: 2 layers of width 64")
    assert out[1:3] == ["temperature = 0.0", "hi"] and out[-1] == "hi hi"
    assert next(lines) == "never read"
