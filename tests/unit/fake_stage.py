"""A stage for the supervisor's tests: does what FAKE_STAGE (a JSON plan) tells it per attempt.

`fake_stage.py STAGE RUN_DIR`; the plan maps a stage to a list of acts, one per attempt:
done, stopped_when_asked, fail:CODE, die, hang, again, ignore_stop, step_s:SECONDS (tells its speed,
then waits for a stop), vanish (takes the run directory along), done_behind (by the clock of a file
server that is a minute late), work_s:SECONDS (with no sign until then), lose_a_rank (fails for
another that is gone).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from nanochat.rundir import Outcome, RunDir, append_jsonl
from nanochat.stage import MISSES_RANK

stage, run = sys.argv[1], RunDir(Path(sys.argv[2]))
tries = run.path / f"{stage}.tries"
attempt = int(tries.read_text()) if tries.exists() else 0
tries.write_text(str(attempt + 1))
acts = json.loads(os.environ["FAKE_STAGE"])[stage]
act = acts[min(attempt, len(acts) - 1)]
append_jsonl(run.path / "acts.jsonl", {"stage": stage, "act": act, "pid": os.getpid()})
run.write_progress(stage, "train", step=1, median_step_s=0.01)

if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif act == "hang":
    signal.pause()
elif act == "ignore_stop":
    while True:
        run.write_progress(stage, "train", step=1)
        time.sleep(0.05)
elif act == "stopped_when_asked":
    while run.stop_request() is None:
        run.write_progress(stage, "train", step=1)
        time.sleep(0.02)
    run.write_outcome(Outcome(stage=stage, outcome="stopped", step=7))
elif act.startswith("fail:"):
    code = int(act.split(":")[1])
    run.write_outcome(Outcome(stage=stage, outcome="failed", message="because", exit_code=code))
elif act == "lose_a_rank":
    facts = {MISSES_RANK: True}
    outcome = Outcome(stage=stage, outcome="failed", message="no peer", exit_code=1, facts=facts)
    run.write_outcome(outcome)
elif act.startswith("work_s:"):
    time.sleep(float(act.split(":")[1]))
    run.write_outcome(Outcome(stage=stage, outcome="done"))
elif act.startswith("step_s:"):
    told = {"step": 50, "num_steps": 1000, "num_timed": 50, "save_s": 0.1, "eval_s": 0.2}
    while run.stop_request() is None:
        run.write_progress(stage, "train", median_step_s=float(act.split(":")[1]), **told)
        time.sleep(0.02)
    run.write_outcome(Outcome(stage=stage, outcome="stopped", step=60))
elif act == "vanish":
    run.path.rename(run.path.with_name("elsewhere"))
    time.sleep(60)
elif act == "again":
    run.write_outcome(Outcome(stage=stage, outcome="again", message="smaller"))
else:
    run.write_outcome(Outcome(stage=stage, outcome="done"))
    if act == "done_behind":
        os.utime(run.outcome_file(stage), (time.time() - 60.0,) * 2)
