"""The verbs that reach a provider: launch --to runpod and --to sky, status, stop, reap, pull."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import hardware, planner, reap
from infra.launch import runpod, runpod_pod, sky, sky_cluster, sky_sweep
from infra.launch.base import (
    Job,
    LaunchError,
    Rendered,
    check_data,
    check_image,
    present_secrets,
)
from infra.launch.sky_sdk import SkyPilot
from infra.pull import Host, Pulled, is_at, open_source
from infra.pull import pull as bring
from infra.runpod_api import ProviderError, connect
from nanochat.rundir import EXIT_DONE, EXIT_UNFIT_NODE, RunDirError
from nanochat.spec import RunSpec, load_spec


def launch_runpod(args: argparse.Namespace, spec: RunSpec, path: Path) -> int | Rendered:
    """Plan the run on every offer given, then ask for pods; for a dry run what would be sent.

    Raises LaunchError with the reason where no offer can do it.
    """
    options = runpod.RunPodOptions(
        image=args.image,
        volume=None if args.volume == "none" else args.volume,
        max_usd_per_hour=args.max_usd_per_hour,
        data_centers=tuple(filter(None, (args.data_centers or "").split(","))),
        detach=args.detach,
        secrets=present_secrets(os.environ),
    )
    for job in _jobs(args, spec, path)[0]:  # before the account is asked, which knows the volume
        check_data(job, job.spec.data.path, options.volume is not None)
    launcher = None
    if not args.dry_run:
        options = replace(options, image=check_image(options.image))
        launcher = runpod_pod.open_launcher()
    volumes = _volumes(options) if launcher is None else launcher.volumes
    jobs, refused = _jobs(args, spec, path, _free_gib(options, volumes))
    for reason in refused:
        sys.stderr.write(f"left out: {reason}\n")
    if launcher is None:
        return runpod.render(jobs, options, volumes)
    return launcher.submit(jobs, options)


def _free_gib(options: runpod.RunPodOptions, volumes: Sequence[runpod.Volume]) -> float | None:
    """Most space that the smallest of the fitting volumes can have; None where it is not told."""
    if options.volume is None:
        return None
    sizes_gb = [v.size_gb for v in runpod.fitting_volumes(options, volumes) if v.size_gb]
    return min(sizes_gb) * 1e9 / hardware.GIB if sizes_gb else None


def _jobs(
    args: argparse.Namespace, spec: RunSpec, path: Path, free_gib: float | None = None
) -> tuple[list[Job], list[str]]:
    """The run, planned on each offer that can do it, and why the others cannot.

    Raises LaunchError where none can.
    """
    offers = list(filter(None, (args.offers or "").split(","))) or [spec.offer]
    jobs, refused = [], []
    for offer in offers:
        overrides = list(args.overrides)
        if offer != spec.offer:
            overrides.append(f'offer="{offer}"')
        job, refusal = _planned(args, path, tuple(overrides), free_gib)
        price, most = float(job.plan["usd_per_hour"]), args.max_usd_per_hour
        if refusal is None and most is not None and price > most:
            refusal = f"costs ${price:.2f}/h, more than --max-usd-per-hour {most:g}"
        if refusal is None:
            jobs.append(job)
        else:
            refused.append(f"{offer}: {refusal}")
    if not jobs:
        raise LaunchError("no offer can do it:\n  " + "\n  ".join(refused))
    return jobs, refused


def _planned(
    args: argparse.Namespace,
    path: Path,
    overrides: tuple[str, ...],
    free_gib: float | None = None,
    own: tuple[str, ...] = (),
) -> tuple[Job, str | None]:
    """The run with these overrides on its spec's offer, and why the plan refuses it, or None.

    own: overrides that stand in the command of the place already, before these.
    """
    asked = load_spec(path, (*own, *overrides))
    made = planner.make_plan(asked, hardware.parse_offer(asked.offer), free_gib=free_gib)
    job = Job(config=args.config[1:], overrides=overrides, spec=asked, plan=made.to_json())
    return job, "; ".join(made.reasons) if made.verdict == "refused" else None


def launch_sky(args: argparse.Namespace, spec: RunSpec, path: Path) -> int | Rendered:
    """The run on a cluster of SkyPilot's, or a sweep as managed jobs; for a dry run what is sent.

    Raises LaunchError where the plan of a run is refused.
    """
    options = sky.SkyOptions(
        image=args.image,
        task=Path(args.task) if args.task else None,
        infra=args.infra,
        spot=args.spot,
        detach=args.detach,
    )
    if args.infra and (args.spot or args.sweep):
        raise LaunchError(
            f"there is no network volume on {args.infra}: a machine that is taken back takes the "
            "run and its ledger along, and the next one begins anew, with the whole budget. "
            "--spot and --sweep are for RunPod"
        )
    if args.infra:
        sys.stderr.write(
            f"no network volume on {args.infra}: the run ends with its machine, and each launch "
            "has the whole budget; nanochat pull brings the weights before\n"
        )
    points = sky_sweep.points(spec, args.sweep) if args.sweep else [()]
    own = sky.own_overrides(args.config[1:], options)
    size_gb = sky.volume_gb(args.config[1:], options)
    free_gib = None if size_gb is None else size_gb * 1e9 / hardware.GIB
    jobs, refused = [], []
    for point in points:
        overrides = (*args.overrides, *point)
        job, refusal = _planned(args, path, overrides, free_gib, own)
        jobs.append(job)
        if refusal is not None:
            refused.append(f"{job.name}: {refusal}")
    if refused:
        raise LaunchError("the plan refuses\n  " + "\n  ".join(refused))
    if args.sweep and args.dry_run:
        return sky.render_sweep(jobs, options)
    if args.sweep:
        return sky.submit_sweep(jobs, options, SkyPilot())
    if args.dry_run:
        return sky.render(jobs[0], options)
    return sky.submit(jobs[0], options, SkyPilot())


def _volumes(options: runpod.RunPodOptions) -> Sequence[runpod.Volume]:
    """The account's volumes; in a dry run without a key or a network the one asked for stands."""
    if options.volume is None:
        return []
    try:
        return runpod_pod.open_launcher().volumes
    except LaunchError:
        return [runpod.Volume(f"(id of {options.volume})", options.volume, "(its data centre)")]


def remote_status(run_name: str) -> dict[str, Any] | None:
    """What a pod or a cluster of SkyPilot's says of a run; None where there is neither.

    Raises LaunchError where that is not known, since the provider does not answer.
    """
    if "/" in run_name:
        return None
    silent = None
    if api := connect():
        try:
            if found := runpod_pod.status(api, run_name):
                return found
        except LaunchError as e:
            silent = e
    found = sky_cluster.status(run_name)
    if found is None and silent is not None:
        raise silent
    return found


def remote_stop(run_name: str) -> int:
    """Stop a run in the cloud with a checkpoint and end its machine; the run's exit code."""
    if (api := connect()) and runpod_pod.find_pod(api, run_name):
        return runpod_pod.stop(runpod_pod.open_launcher(), run_name)
    return sky_cluster.stop(run_name, SkyPilot())


def reap_verb(args: argparse.Namespace) -> tuple[int, list[reap.Row]]:
    """One look (or one every so often): exit code 0, or 1 where something refuses to end."""
    api = runpod_pod.connect_or_explain()
    while True:
        try:
            rows = reap.reap(api, args.dry_run, max_age_h=args.max_age_h)
            told = reap.render(rows)
        except ProviderError as e:
            if args.every is None:
                raise LaunchError(str(e), EXIT_UNFIT_NODE) from None
            rows, told = [], f"{e}: what is billed is not known; asked again in {args.every:g} s"
        if args.every is None:
            return (1 if any(r.action == "refused" for r in rows) else EXIT_DONE), rows
        print(told, flush=True)  # noqa: T201 - one block per look
        time.sleep(args.every)


def pull_verb(args: argparse.Namespace) -> Pulled:
    """Bring a run's weights; a run whose pod still lives is fetched from it, also where an
    earlier pull of it is a folder of that name here."""
    to = Path(args.to)
    try:
        source = open_source(args.run_dir)
    except RunDirError:
        there = _files_in_cloud(args.run_dir)
        if there is None:
            raise
        return bring(there, to, args.best)
    if "/" not in args.run_dir and is_at(source, to):
        source = _files_in_cloud(args.run_dir) or source
    return bring(source, to, args.best)


def _files_in_cloud(run_name: str) -> Host | None:
    """The files of a run on its pod or cluster; None where there is none."""
    api = connect()
    pod = runpod_pod.find_pod(api, run_name) if api is not None else None
    if pod is not None and pod.address is not None:
        return runpod_pod.run_on_pod(pod.address, run_name)
    return sky_cluster.files_of(run_name)
