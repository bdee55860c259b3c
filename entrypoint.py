"""The verbs of nanochat kit: parse the command line, call one function, return its exit code.

No logic and no torch here, also indirectly, so that every `--help` answers at once; what a verb
needs is imported when it runs.
"""

import os
import sys
from collections.abc import Sequence

from infra.privileges import enter_image
from nanochat.arguments import EXIT_SPEC, Parser, chat_parser, export_parser, serve_parser

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


MODEL_VERBS = {
    "chat": (chat_parser, "talk to a trained model"),
    "serve": (serve_parser, "a web page and an OpenAI-compatible API on port 8000"),
    "export": (export_parser, "weights for Hugging Face transformers"),
}


def build_parser() -> Parser:
    """One subcommand per verb of the contract."""
    parser = Parser(
        prog="nanochat",
        description="Train a small chat model from nothing: plan, run, talk to it.",
        epilog="Exit codes: 0 done, 70 training failed, 75 stopped (run again to resume), "
        "76 budget spent, 77 node unfit, 78 wrong spec, data or arguments.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    as_json = Parser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    spec = Parser(add_help=False)
    spec.add_argument("config", metavar="@CONFIG", help="run spec, e.g. @configs/smoke.toml")
    spec.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="change a field; the value is a TOML literal. `nanochat plan --fields` lists them",
    )
    a_run = Parser(add_help=False)
    a_run.add_argument("run_dir", metavar="RUN_DIR", help="run directory, or the name of a run")

    p = verbs.add_parser("plan", parents=[as_json], help="parameters, memory, hours, dollars")
    p.add_argument("config", nargs="?", metavar="@CONFIG", help="run spec")
    p.add_argument("overrides", nargs="*", metavar="section.field=value")
    p.add_argument("--on", metavar="OFFER", help="plan for N x GPU type, or cpu; `?` lists them")
    p.add_argument("--rehearse", action="store_true", help="also two steps with fake tensors")
    p.add_argument("--fields", action="store_true", help="list every field of a spec with its help")

    p = verbs.add_parser("run", parents=[spec, as_json], help="every stage; again: resume")
    p.add_argument("--run-dir", metavar="DIR", help="default: NANOCHAT_HOME/runs/NAME")

    p = verbs.add_parser("launch", parents=[spec, as_json], help="run it elsewhere")
    p.add_argument(
        "--to", required=True, choices=["docker", "runpod", "slurm", "sky"], help="where"
    )
    p.add_argument("--dry-run", action="store_true", help="what would be sent, and its worst case")
    p.add_argument("--image", default="", help="default: the image of this version")
    p.add_argument("--volume", default="nanochat", help="volume by name, or an existing folder")
    p.add_argument("--memory-gib", type=float, help="memory limit of the container")
    p.add_argument("--user", metavar="UID:GID", help="user that owns the files of the run")
    p.add_argument("--no-network", action="store_true", help="cut the container off")
    p.add_argument("--detach", action="store_true", help="return as soon as it runs")
    in_cloud = p.add_argument_group("runpod")
    in_cloud.add_argument("--offers", metavar="A,B", help="offers in order; default: the spec's")
    in_cloud.add_argument("--max-usd-per-hour", type=float, help="price ceiling of a pod")
    in_cloud.add_argument("--data-centers", metavar="A,B", help="default: where the volume is")
    in_sky = p.add_argument_group("sky")
    in_sky.add_argument("--task", metavar="FILE", help="default: the one of sky/ that runs @CONFIG")
    in_sky.add_argument("--infra", default="", help="another cloud than the task's, e.g. lambda")
    in_sky.add_argument("--spot", action="store_true", help="interruptible machines")
    in_sky.add_argument(
        "--sweep",
        action="append",
        metavar="section.field=A,B",
        help="a managed job per value, which share budget.max_usd; several: every combination",
    )
    in_slurm = p.add_argument_group("slurm", "as the section [slurm] of the spec; `plan --fields`")
    for name in ("account", "partition", "qos", "gres", "time", "scratch", "sif", "module", "ssh"):
        in_slurm.add_argument(f"--{name}")
    for name in ("nodes", "max-jobs", "signal-s", "cpus-per-task"):
        in_slurm.add_argument(f"--{name}", type=int)
    in_slurm.add_argument("--no-requeue", dest="requeue", action="store_false", default=None)

    p = verbs.add_parser("status", parents=[as_json], help="what runs, its exit code and cost")
    p.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="default: every known run")

    p = verbs.add_parser("stop", help="stop a run with a checkpoint")
    p.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="default: this machine's run")

    p = verbs.add_parser("reap", parents=[as_json], help="end pods that are past their budget")
    p.add_argument("--dry-run", action="store_true", help="say what would be ended")
    p.add_argument("--every", type=float, metavar="S", help="look again every S seconds, for ever")
    p.add_argument(
        "--max-age-h",
        type=float,
        default=48.0,
        metavar="H",
        help="also end pods older than this whose budget is not known here (default: 48)",
    )

    p = verbs.add_parser("pull", parents=[a_run, as_json], help="bring the weights of a run")
    p.add_argument("--best", action="store_true", help="lowest validation loss, not the newest")
    p.add_argument("--to", required=True, metavar="DIR", help="a run directory to chat with")

    verbs.add_parser("report", parents=[a_run], help="write report.md, report.html and plots")

    p = verbs.add_parser("compare", parents=[as_json], help="runs side by side")
    p.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")

    verbs.add_parser("sync", parents=[a_run, as_json], help="push offline tracker files")

    p = verbs.add_parser("fetch", parents=[spec, as_json], help="bring the data of a spec")
    p.add_argument("--to", metavar="DIR", help="data folder (default: NANOCHAT_HOME/data)")
    p.add_argument("--check", action="store_true", help="compare with the locks, no network")

    p = verbs.add_parser("doctor", parents=[as_json], help="this machine, and what it lacks")
    p.add_argument("config", nargs="?", metavar="@CONFIG", help="check for this spec")
    p.add_argument("overrides", nargs="*", metavar="section.field=value")

    for verb, (parser_of, text) in MODEL_VERBS.items():
        verbs.add_parser(verb, parents=[parser_of(add_help=False)], help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code of the contract."""
    enter_image(argv)
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if others and (not hasattr(args, "overrides") or any(o.startswith("-") for o in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:  # argparse takes positionals in one piece only: these stood behind an option
        args.overrides = [*args.overrides, *others]
    args.after_verb = argv[1:]
    from infra import verbs

    if args.version:
        return verbs.version()
    if args.verb is None:
        parser.print_help()
        return EXIT_SPEC
    try:
        return verbs.run_verb(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `nanochat plan … | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
