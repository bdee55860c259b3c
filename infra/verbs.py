"""What each verb of the command line does, in one function per verb.

Facts go to stdout (one JSON document with --json), progress and errors to stderr.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from infra import cloud, hardware, nodes, planner, preflight
from infra import reap as reaping
from infra.budget import time_left_s
from infra.console import Console, render_status
from infra.guard import start_guard
from infra.launch import docker, slurm
from infra.launch.base import Job, LaunchError, Rendered, present_secrets
from infra.meter import Price, ledger_line, meter_of_this_pod
from infra.pointer import current_run
from infra.privileges import lost_with_container
from infra.processes import python_path
from infra.supervisor import Supervisor, state_of
from nanochat.offline import install_guard
from nanochat.rundir import (
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_SPEC,
    RunDir,
    RunDirError,
    StopReason,
    append_jsonl,
    find_run,
    is_same_machine,
    nanochat_home,
    read_jsonl,
)
from nanochat.spec import RunSpec, SpecError, describe_fields, load_spec

APP_DIR = Path(__file__).resolve().parent.parent
STALE_S = 30.0
SAVES_IN_GRACE = 2.5
"""The trainer saves anew where 1.5 times the last save fits, after the step it is in."""
LAUNCH_OPTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(slurm.FIELDS, (None, "slurm")),
    "image": ("", "docker", "runpod", "sky"),
    "volume": ("nanochat", "docker", "runpod"),
    "memory_gib": (None, "docker", "slurm"),
    "user": (None, "docker"),
    "no_network": (False, "docker"),
    "offers": (None, "runpod"),
    "max_usd_per_hour": (None, "runpod"),
    "data_centers": (None, "runpod"),
    "task": (None, "sky"),
    "infra": ("", "sky"),
    "spot": (False, "sky"),
    "sweep": (None, "sky"),
}
"""Options of `launch` that not every place takes: value where it is not given, places."""


def run_verb(args: argparse.Namespace) -> int:
    """Call the verb; user errors become one message and exit code 78."""
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "plan": plan,
        "run": run,
        "launch": launch,
        "status": status,
        "stop": stop,
        "reap": reap,
        "pull": pull,
        "report": report,
        "compare": compare,
        "sync": sync,
        "fetch": fetch,
        "doctor": doctor,
        "chat": use_model,
        "serve": use_model,
        "export": use_model,
    }
    install_guard()
    try:
        return verbs[args.verb](args)
    except (SpecError, RunDirError) as e:
        _say(_ready(args, f"nanochat {args.verb}: {e}"))
        return EXIT_SPEC
    except LaunchError as e:
        _say(f"nanochat {args.verb}: {e}")
        return e.exit_code


def version() -> int:
    """Print the version of the kit."""
    print(importlib.metadata.version("nanochat-kit"))
    return EXIT_DONE


def plan(args: argparse.Namespace) -> int:
    """All derived numbers of a spec; 78 when the run is refused, by a rehearsal too."""
    if args.fields:
        for name, default, text in describe_fields():
            print(name if name.startswith("[") else f"  {name} ({default})", "-", text)
        return EXIT_DONE
    if args.on == "?":
        _print(args.json, hardware.offers_json(), hardware.render_offers)
        return EXIT_DONE
    if args.config is None:
        raise SpecError("plan needs a spec, e.g. `nanochat plan @configs/smoke.toml`")
    spec = _load(args)
    offer = hardware.parse_offer(args.on or spec.offer)
    free_gib = (
        preflight.free_gib(RunDir(nanochat_home() / "runs" / spec.name)) if offer.cpu else None
    )
    made = planner.make_plan(spec, offer, free_gib=free_gib)
    rehearsal = _rehearse(spec, made.to_json()) if args.rehearse else None
    if rehearsal is not None:
        made = _held_to(made, rehearsal)
    document = made.to_json()
    if rehearsal is not None:
        document["rehearsal"] = rehearsal
    on_slurm = slurm.outlook(spec, document) if "slurm" in spec.model_fields_set else None
    if on_slurm:
        document["slurm"] = vars(on_slurm)
    slurm_line = f"\nSLURM: {on_slurm.render()}" if on_slurm else ""
    _print(args.json, document, lambda _: made.render() + slurm_line)
    if rehearsal is not None and not args.json:
        print(json.dumps(rehearsal, indent=2))
    return EXIT_SPEC if made.verdict == "refused" else EXIT_DONE


def run(args: argparse.Namespace) -> int:
    """Plan, preflight, then every stage under the supervisor; resumes what is half done."""
    spec = _load(args)
    run_dir = RunDir(args.run_dir or nanochat_home() / "runs" / spec.name)
    offer = hardware.parse_offer(spec.offer)
    made = planner.make_plan(spec, offer)
    frozen = run_dir.plan() if run_dir.plan_file.exists() else None
    if frozen is None and made.verdict == "refused":
        _say(made.render())
        return EXIT_SPEC
    document = made.to_json()
    if frozen is not None and is_same_machine(frozen, document):
        document = frozen
    meter = meter_of_this_pod(_quoted(document))
    problems = preflight.preflight(spec, made, run_dir)
    for problem in problems:
        _say(_ready(args, f"nanochat run: {problem.message}"))
    if problems and _is_spent_unstarted(spec, run_dir, meter()):
        _say("nanochat run: and machines that could not run it have used the budget up")
        return EXIT_BUDGET
    if problems:
        return preflight.exit_code(problems)
    if lost_with_container(run_dir.path):
        _say(
            "nanochat run: warning: no volume at /workspace, so the run is lost with this "
            "container. Keep it: docker run -v nanochat:/workspace ..."
        )
    console = Console(run_dir, spec.stages)
    ranks = hardware.num_ranks(spec.runtime)
    if spec.runtime.num_ranks is not None:
        ranks //= nodes.num_nodes()
    supervisor = Supervisor(
        spec, run_dir, document, meter(), ranks, console, nodes.first_node_command, meter
    )
    start_guard()
    exit_code = supervisor.run()
    if args.json:
        print(json.dumps(run_dir.status()))
    return exit_code


def _is_spent_unstarted(spec: RunSpec, run_dir: RunDir, price: Price) -> bool:
    """Whether the budget is used up, with what a rented machine has cost that cannot run.

    A controller that tries one machine after the other has no other bound than this.
    """
    if price.instance is None:
        return False
    lines = [ledger_line(price, event, time.time()) for event in ("start", "stop")]
    with contextlib.suppress(OSError):  # a volume that cannot be written is among the problems
        run_dir.create()
        for line in lines:
            append_jsonl(run_dir.ledger_file, line, durable=True)
        lines = list(read_jsonl(run_dir.ledger_file))
    return time_left_s(spec.budget, lines, time.time()) == 0.0


def _quoted(document: dict[str, Any]) -> Price:
    """The price that a plan expects: machine and volume."""
    return Price(
        document["usd_per_hour"],
        document.get("price_source", "plan"),
        storage_usd_per_hour=document.get("storage_usd_per_hour", 0.0),
    )


def launch(args: argparse.Namespace) -> int:
    """Render the job and submit it; the exit code is the run's, or 0 once a cluster has it."""
    _refuse_options_of_other_places(args)
    spec = _load(args)
    if args.to == "slurm":
        spec = slurm.with_fields(spec, {f: getattr(args, f) for f in slurm.FIELDS})
    if args.to in ("runpod", "sky"):
        to_cloud = cloud.launch_runpod if args.to == "runpod" else cloud.launch_sky
        sent = to_cloud(args, spec, _config_path(args))
        return _dry_run(args, sent) if isinstance(sent, Rendered) else sent
    made = planner.make_plan(spec, hardware.parse_offer(spec.offer))
    if made.verdict == "refused":
        _say(made.render())
        return EXIT_SPEC
    job = Job(
        config=args.config[1:], overrides=tuple(args.overrides), spec=spec, plan=made.to_json()
    )
    if args.to == "slurm":
        if not args.dry_run:
            return slurm.submit(job)
        return _dry_run(args, slurm.render(job))
    options = docker.DockerOptions(
        image=args.image,
        volume=args.volume,
        memory_gib=args.memory_gib,
        network=not args.no_network,
        detach=args.detach,
        user=args.user,
        secrets=present_secrets(os.environ),
    )
    if not args.dry_run:
        return docker.submit(job, options)
    return _dry_run(args, docker.render(job, options))


def _refuse_options_of_other_places(args: argparse.Namespace) -> None:
    """A ceiling or a volume that would be ignored is an error. Raises LaunchError."""
    for option, (unset, *places) in LAUNCH_OPTIONS.items():
        if getattr(args, option) != unset and args.to not in places:
            name = "no-requeue" if option == "requeue" else option.replace("_", "-")
            raise LaunchError(f"--{name} is for --to {' and '.join(places)}, not for {args.to}")


def _dry_run(args: argparse.Namespace, rendered: Rendered) -> int:
    document = {"to": args.to, "sent": rendered.text, "worst_case_usd": rendered.worst_case_usd}
    _print(args.json, document, lambda _: rendered.dry_run())
    return EXIT_DONE


def status(args: argparse.Namespace) -> int:
    """What runs, how far, its cost; with one run its exit code is returned when it has ended."""
    if args.run_dir and (containers := _containers(args.run_dir)):
        _print(args.json, containers[0], lambda c: f"{c['container']}: {c['message']}")
        return int(containers[0]["exit_code"] or EXIT_DONE)
    if args.run_dir and (queued := _only_queued(args.run_dir)):
        _print(args.json, queued, lambda q: f"{args.run_dir}: {q['message']}")
        return int(queued["exit_code"] or EXIT_DONE)
    if args.run_dir and (pod := _in_cloud(args.run_dir)):
        _print(args.json, pod, lambda p: f"{args.run_dir}: {p['message']}")
        return int(pod["exit_code"] or EXIT_DONE)
    if args.run_dir:
        runs = [find_run(args.run_dir)]
    else:
        runs = [RunDir(p.parent) for p in sorted((nanochat_home() / "runs").glob("*/spec.json"))]
    rows = [_status_of(r) for r in runs] + ([] if args.run_dir else _containers())
    document: Any = rows[0] if args.run_dir else rows
    _print(args.json, document, lambda _: render_status(rows))
    if args.run_dir and rows[0]["exit_code"] is not None:
        return int(rows[0]["exit_code"])
    return EXIT_DONE


def stop(args: argparse.Namespace) -> int:
    """Ask a run to stop with a checkpoint, and wait until it has; unnamed: this machine's."""
    if args.run_dir is None:
        here = current_run(nanochat_home())
        if here is None:
            raise RunDirError("no run has been started on this machine; which one is to stop?")
        args.run_dir = str(here)
    if _containers(args.run_dir):
        return docker.stop(args.run_dir)
    is_only_queued = not _is_here(args.run_dir) and bool(slurm.queue(args.run_dir))
    if not is_only_queued and _in_cloud(args.run_dir):
        return cloud.remote_stop(args.run_dir)
    exit_code, name = EXIT_DONE, args.run_dir
    if not is_only_queued:
        run_dir = find_run(args.run_dir)
        exit_code, name = _stop_here(run_dir), run_dir.path.name
    # Also of a run that has not answered: its node may be dead, and its next job would go on.
    for job_id in slurm.end_jobs(name, slurm.END_OF_JOB_S if exit_code == EXIT_DONE else 0.0):
        _say(f"cancelled job {job_id} of the queue")
    return exit_code


def reap(args: argparse.Namespace) -> int:
    """End pods of ours that are past their budget; 1 where one refuses to end."""
    exit_code, rows = cloud.reap_verb(args)
    _print(args.json, reaping.to_json(rows), lambda _: reaping.render(rows))
    return exit_code


def pull(args: argparse.Namespace) -> int:
    """Bring the weights of a run without optimizer state."""
    pulled = cloud.pull_verb(args)
    _print(args.json, vars(pulled), lambda _: pulled.render())
    return EXIT_DONE


def report(args: argparse.Namespace) -> int:
    """Write the report of a run from its files."""
    run_dir = find_run(args.run_dir)
    preflight.need_packages("matplotlib")
    code = subprocess.call(
        [sys.executable, "-c", _REPORT, str(run_dir.path)], stdout=sys.stderr, cwd=APP_DIR
    )
    if code == EXIT_DONE:
        print(run_dir.path / "report.md")
    return code


_REPORT = (
    "import sys; from pathlib import Path; from nanochat.rundir import RunDir; "
    "from nanochat.stages.report import main; main(RunDir(Path(sys.argv[1])))"
)


def compare(args: argparse.Namespace) -> int:
    """Put runs side by side."""
    paths = [str(find_run(r).path) for r in args.run_dirs]
    command = [sys.executable, "-m", "nanochat.compare", *paths]
    return subprocess.call(command + (["--json"] if args.json else []), cwd=APP_DIR)


def sync(args: argparse.Namespace) -> int:
    """Push the tracker files that an offline run has left; for a machine with network."""
    from infra.sync import push

    result = push(find_run(args.run_dir))
    _print(args.json, vars(result), lambda _: result.render())
    return result.exit_code


def fetch(args: argparse.Namespace) -> int:
    """Bring what the spec's stages read, or check it without a network."""
    from infra import fetch as fetching
    from infra.fetch_progress import progress_here

    spec = _load(args)
    to = Path(args.to) if args.to else None
    if args.check:
        result = fetching.check(spec, to)
    else:
        result = fetching.fetch(spec, to, progress=progress_here())
    _print(args.json, vars(result), lambda _: result.render())
    return result.exit_code


def doctor(args: argparse.Namespace) -> int:
    """Facts about this machine; 77 or 78 when something that the spec needs is missing."""
    spec = _load(args) if args.config else None
    facts = preflight.doctor(spec)
    facts = [dataclasses.replace(f, fix=_ready(args, f.fix)) for f in facts]
    _print(args.json, [vars(f) for f in facts], lambda _: preflight.render_doctor(facts))
    return preflight.exit_code(facts)


def use_model(args: argparse.Namespace) -> NoReturn:
    """Become the program that loads the model: it needs torch, and the terminal's signals."""
    preflight.need_packages("torch", "rustbpe")
    module = {
        "chat": "nanochat.chat.cli",
        "serve": "nanochat.chat.web",
        "export": "nanochat.export",
    }
    command = [sys.executable, "-m", module[args.verb], *args.after_verb]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | python_path())


def _load(args: argparse.Namespace) -> RunSpec:
    return load_spec(_config_path(args), args.overrides)


def _config_path(args: argparse.Namespace) -> Path:
    """The config as it is named, else the kit's own of that name."""
    if not args.config.startswith("@"):
        raise SpecError(f"{args.config!r}: a config is given as @FILE, e.g. @configs/smoke.toml")
    path = Path(args.config[1:])
    if not path.exists() and (APP_DIR / path).exists():
        path = APP_DIR / path
    return path


def _ready(args: argparse.Namespace, text: str) -> str:
    """A message whose commands can be pasted: what stands for the spec is the one given here."""
    if not getattr(args, "config", None):
        return text
    return text.replace("@CONFIG", shlex.join([args.config, *args.overrides]))


def _is_here(run: str) -> bool:
    try:
        find_run(run)
    except RunDirError:
        return False
    return True


def _in_cloud(name: str) -> dict[str, Any] | None:
    """What a rented machine says of a run; None where there is none, or the run goes on here.

    A run of that name that has ended here, as a pulled one has, does not hide what is billed.
    """
    is_here = _is_here(name)
    if is_here and _goes_on(find_run(name)):
        return None
    try:
        found = cloud.remote_status(name)
    except LaunchError as e:
        if not is_here:
            raise
        _say(f"{e}: whether a machine of that name is billed is not known")
        return None
    if found is not None and is_here and found["state"] == "UNKNOWN":
        _say(found["message"])  # an entry for ssh is left of it, and the run has ended here
        return None
    if found is not None and is_here:
        _say(f"{find_run(name).path} has a run of that name too; a path, with a /, means that one")
    return found


def _containers(name: str | None = None) -> list[dict[str, Any]]:
    """What `launch --to docker` has made: all of it, or what a run's name means on this machine.

    That is a run here while it goes on, then a container that runs, then what has ended here.
    """
    is_here = name is not None and _is_here(name)
    if name is not None and ("/" in name or (is_here and _goes_on(find_run(name)))):
        return []
    try:
        found = docker.status(name) if docker.has_engine() else []
    except LaunchError as e:
        _say(f"containers are not looked at: {e}")
        return []
    return [row for row in found if row["exit_code"] is None] if is_here else found


def _goes_on(run_dir: RunDir) -> bool:
    found = run_dir.status() or {}
    age_s = time.time() - float(found.get("heartbeat") or 0.0)
    return found.get("state") == "RUNNING" and age_s <= STALE_S


def _only_queued(name: str) -> dict[str, Any] | None:
    """What SLURM says of a run that has not started yet; None where it has, or knows nothing."""
    return None if _is_here(name) else slurm.unstarted(name)


def _rehearse(spec: RunSpec, document: dict[str, Any]) -> Any:
    preflight.need_packages("torch")
    result = subprocess.run(
        [sys.executable, "-m", "nanochat.rehearse"],
        input=json.dumps({"spec": spec.model_dump(mode="json"), "plan": document}),
        stdout=subprocess.PIPE,
        text=True,
        cwd=APP_DIR,
    )
    if result.returncode:
        raise SpecError("the rehearsal failed; the messages above say where")
    return json.loads(result.stdout)


def _held_to(made: planner.Plan, rehearsal: dict[str, Any]) -> planner.Plan:
    """The plan; refused where the rehearsal has counted other memory than was planned."""
    if rehearsal["ok"]:
        return made
    stage = rehearsal["stage"]
    off = [
        f"{term} {both['measured']:.2f} GiB (planned {both['planned']:.2f})"
        for term, both in rehearsal["memory_gib"].items()
        if not both["ok"]
    ]
    reason = (
        f"the rehearsal of {stage} counts other memory than this plan: {', '.join(off)}; the plan "
        f"cannot be relied on here, give {stage}.device_batch_size below the planned "
        f"{rehearsal['device_batch_size']}"
    )
    return dataclasses.replace(made, verdict="refused", reasons=(reason, *made.reasons))


def _stop_here(run_dir: RunDir) -> int:
    before = _status_of(run_dir)
    if before["state"] != "RUNNING":
        _say(f"{run_dir.path} does not run (state {before['state']})")
        return EXIT_DONE
    grace_s = _stop_grace_s(run_dir, before.get("stage"))
    run_dir.request_stop(StopReason.USER, time.time() + grace_s)
    deadline = time.monotonic() + grace_s + 10.0
    while time.monotonic() < deadline:
        if run_dir.lease_file.exists():
            time.sleep(0.2)
            continue
        _say(f"{run_dir.path} has stopped; run the same command again to resume")
        return EXIT_DONE
    _say(f"{run_dir.path} has not stopped within {grace_s + 10.0:.0f} s; it may be on a dead node")
    return 1


def _stop_grace_s(run_dir: RunDir, stage: str | None) -> float:
    """Time for a fresh checkpoint: a person waits, and what was trained since the last is paid."""
    planned_s = (run_dir.plan().get("stop") or {}).get("save_s") or 0.0
    measured_s = run_dir.progress(stage).get("save_s") if stage else None
    return max(run_dir.spec().stop_grace_s, SAVES_IN_GRACE * float(measured_s or planned_s))


def _status_of(run_dir: RunDir) -> dict[str, Any]:
    """status.json, and whether its writer still lives."""
    found = run_dir.status() or {
        "name": run_dir.path.name,
        "state": "PENDING",
        "exit_code": None,
        "heartbeat": None,
    }
    found["run_dir"] = str(run_dir.path)
    if in_slurm := slurm.describe(found["name"], run_dir):
        found["slurm"] = in_slurm
        _add_end_of_chain(found, in_slurm)
    silent_s = time.time() - float(found.get("heartbeat") or time.time())
    if found["state"] == "RUNNING" and silent_s > STALE_S:
        found["message"] = (
            f"no sign of life for {silent_s:.0f} s: killed, or its machine is gone; run the same "
            "command again to resume"
        )
    return found


def _add_end_of_chain(found: dict[str, Any], in_slurm: dict[str, Any]) -> None:
    """What ended a chain of jobs after the run's own last word: a job that was refused before the
    run began in it, or the chain's bound."""
    chain = in_slurm["chain"]
    if chain is None or in_slurm["queue"] or chain["exit_code"] in (None, EXIT_DONE):
        return
    if chain["last"] == "end" and chain["time"] >= int(found.get("heartbeat") or 0.0):
        found["exit_code"] = chain["exit_code"]
        found["state"] = str(state_of(chain["exit_code"]))
        found["message"] = f"job {chain['job']} on {chain['host']} ended the chain: " + (
            chain["reason"] or found.get("message") or "see its log"
        )


def _print(as_json: bool, document: Any, render: Callable[[Any], str]) -> None:
    print(json.dumps(document, indent=2, default=str) if as_json else render(document))


def _say(text: str) -> None:
    print(text, file=sys.stderr)
