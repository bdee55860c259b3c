"""Chat in a terminal: `python -m nanochat.chat.cli RUN_DIR`, or one answer with `--prompt`.

Answers stream; Ctrl-C ends the answer being written, Ctrl-D the chat. Exits 78 with a message for
wrong arguments or a run that has nothing to talk to yet.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat.arguments import chat_parser
from nanochat.chat.session import Session, Settings
from nanochat.checkpoint import CheckpointError
from nanochat.engine import Engine
from nanochat.load import dtype_named, open_trained
from nanochat.offline import install_guard
from nanochat.rundir import EXIT_DONE, EXIT_SPEC, RunDirError, nanochat_home
from nanochat.spec import SpecError

HELP = """\
/reset          forget the conversation
/save FILE      write the conversation to a file
/load FILE      go on with a saved conversation
/temp NUMBER    temperature of the answers; 0 is the likeliest answer
/help           this list
/quit           end (also Ctrl-D); Ctrl-C ends an answer"""


def main(argv: Sequence[str] | None = None) -> int:
    """Chat or answer; returns the exit code of the contract."""
    args = chat_parser().parse_args(argv)
    install_guard()
    try:
        session = open_session(args)
        if args.prompt is not None:
            answer_once(session, args.prompt, args.json)
        else:
            chat(session)
    except (SpecError, RunDirError, CheckpointError, ValueError) as e:
        print(f"nanochat chat: {e}", file=sys.stderr)
        return EXIT_SPEC
    return EXIT_DONE


def open_session(args: argparse.Namespace) -> Session:
    """Load the model that the arguments name. Raises SpecError, RunDirError, CheckpointError."""
    if args.json and args.prompt is None:
        raise SpecError("--json needs --prompt")
    if args.max_tokens < 1:
        raise SpecError(f"--max-tokens {args.max_tokens}: at least 1")
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if args.prompt is not None else Settings.temperature
    loaded = open_trained(
        args.run_dir,
        args.stage,
        which="best" if args.best else "latest",
        device=args.device,
        dtype=dtype_named(args.dtype),
    )
    engine = Engine(loaded.model, loaded.tokenizer, max_batch=1, keep_weights=False)
    settings = Settings(temperature, args.top_k, args.max_tokens, args.seed)
    return Session(loaded, engine, settings)


def answer_once(session: Session, prompt: str, as_json: bool) -> None:
    """Print the answer to one prompt, and nothing else."""
    started_s = time.monotonic()
    reply = session.say(prompt)
    for piece in reply:
        if not as_json:
            print(piece, end="", flush=True)
    if not as_json:
        print()
        return
    elapsed_s = time.monotonic() - started_s
    document = {
        "prompt": prompt,
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "stage": session.loaded.stage,
        "step": session.loaded.step,
        "prompt_tokens": reply.prompt_tokens,
        "num_tokens": reply.num_tokens,
        "tokens_per_s": round(reply.num_tokens / elapsed_s, 1),
    }
    print(json.dumps(document, ensure_ascii=False))


# -----------------------------------------------------------------------------
# Interactive


def chat(session: Session) -> None:
    """Read questions and commands until the end."""
    config, loaded = session.loaded.model.config, session.loaded
    print(
        f"{loaded.stage}, step {loaded.step}: {config.n_layer} layers of width {config.n_embd}. "
        "/help lists the commands."
    )
    read_line = make_reader()
    while True:
        try:
            line = read_line().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                print(run_command(session, line))
            elif line:
                print_reply(session, line)
        except SpecError as e:
            print(e)


def make_reader() -> Callable[[], str]:
    """Reads a line: with history and editing on a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    history = nanochat_home() / "chat_history"
    history.parent.mkdir(parents=True, exist_ok=True)
    prompt: PromptSession[str] = PromptSession(history=FileHistory(str(history)))
    return lambda: prompt.prompt("> ")


def print_reply(session: Session, text: str) -> None:
    """Stream the reply; Ctrl-C ends it and keeps what was said."""
    reply = session.say(text)
    try:
        for piece in reply:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        reply.pieces.close()
        print(" [ended]", end="")
    print()


def run_command(session: Session, line: str) -> str:
    """Do what a line that begins with / asks; returns what to say. Raises SpecError."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/help":
        return HELP
    if command == "/reset":
        session.reset()
        return "The conversation is forgotten."
    if command in ("/save", "/load") and not argument:
        raise SpecError(f"{command} needs the name of a file")
    if command == "/save":
        session.save(Path(argument))
        return f"{len(session.messages)} messages are in {argument}."
    if command == "/load":
        session.load(Path(argument))
        return f"{len(session.messages)} messages from {argument}."
    if command == "/temp":
        session.settings.temperature = parse_temperature(argument)
        return f"temperature = {session.settings.temperature}"
    raise SpecError(f"unknown command {command}\n{HELP}")


def parse_temperature(text: str) -> float:
    """0 to 2. Raises SpecError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 2:
        raise SpecError(f"/temp {text}: a number from 0 to 2 is expected")
    return value


if __name__ == "__main__":
    sys.exit(main())
