#!/bin/bash
# `nanochat` on a login or devel node, where only the SIF and bash are needed: a verb runs inside
# the SIF, and what is not in there (sbatch, squeue) runs here.
# usage: export NANOCHAT_HOME=/scratch/$USER/nanochat; infra/slurm/nanochat.sh VERB …
# The SIF is nanochat.sif beside NANOCHAT_HOME, or what NANOCHAT_SIF names.
set -euo pipefail

fail() { echo "nanochat.sh: $2" >&2; exit "$1"; }

user=$(id -un)                            # $USER is not set everywhere: cron, srun --export=NONE
home=${NANOCHAT_HOME:-}
[ "$(basename "$home")" = nanochat ] ||
  fail 78 "set NANOCHAT_HOME to a folder called nanochat on scratch, e.g. /scratch/$user/nanochat; it is '$home'"
scratch=$(dirname "$home")
[ -w "$scratch/." ] || fail 78 "$scratch is not a folder that can be written"
sif=${NANOCHAT_SIF:-$scratch/nanochat.sif}
module=                                   # what `launch --module` names
before=
programs="apptainer singularity"
for word; do
  [ "$before" != --module ] || module=$word
  [[ $word != --module=* ]] || module=${word#*=}
  before=$word
done
if [ -n "$module" ]; then                 # asked for, so before what is on PATH anyway
  module load "$module" > /dev/null 2>&1 ||
    echo "nanochat.sh: there is no module $module, or it does not load; looking for another Apptainer" >&2
  [[ $module != singularity* ]] || programs="singularity apptainer"
fi
for name in $programs; do
  apptainer=$(command -v "$name") && break
  module load "$name" > /dev/null 2>&1 || true
  apptainer=$(command -v "$name") && break
done
[ -n "$apptainer" ] ||
  fail 77 "there is no apptainer here, nor a module of that name; docs/ptolemy.md has an installation without root"
[ -f "$sif" ] || fail 78 "there is no $sif; build it: infra/slurm/build_sif.sh SOURCE $sif"
mkdir -p "$home/tmp" "$scratch/apptainer"
export TMPDIR="$home/tmp"                 # until bash 5.1 a here-string is a file there; /tmp may be full
export APPTAINER_CACHEDIR="$scratch/apptainer" APPTAINER_TMPDIR="$home/tmp"
export SINGULARITY_CACHEDIR="$scratch/apptainer" SINGULARITY_TMPDIR="$home/tmp"

# A variable for what runs in the SIF, by its environment and not on a command line.
pass() { export "APPTAINERENV_$1=$2" "SINGULARITYENV_$1=$2"; }

nanochat() {
  local options=(--containall --no-home --bind "$scratch" --env "NANOCHAT_HOME=$home")
  options+=(--env "USER=$user" --env "LOGNAME=$user")       # for $USER in paths of the spec
  case "$PWD/" in "$scratch"/*) ;; *) options+=(--bind "$PWD") ;; esac
  [ ! -e /dev/nvidiactl ] || options+=(--nv)                # a chat on a GPU node
  # The GPUs of this job, where it has some of a node's.
  [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || pass CUDA_VISIBLE_DEVICES "$CUDA_VISIBLE_DEVICES"
  for secret in WANDB_API_KEY HF_TOKEN; do
    [ -z "${!secret:-}" ] || pass "$secret" "${!secret}"
  done
  for place in HF_ENDPOINT https_proxy http_proxy no_proxy SSL_CERT_FILE; do
    [ -z "${!place:-}" ] || options+=(--env "$place=${!place}")
  done
  [ ! -f "${SSL_CERT_FILE:-}" ] || options+=(--bind "$SSL_CERT_FILE")
  "$apptainer" --quiet exec "${options[@]}" --pwd "$PWD" "$sif" nanochat "$@"
}

# Jobs of a run, or of all: name|id|state|reason or nodes|start|time left|jobs ahead
queue_rows() {
  local id job state why start left partition nodes ahead
  command -v squeue > /dev/null || return 0
  squeue --noheader --user="$user" --sort=i ${1:+"--name=nanochat-$1"} \
    --format='%i|%j|%T|%r|%S|%L|%P|%N' |
    while IFS='|' read -r id job state why start left partition nodes; do
      [[ $job == nanochat-* ]] || continue
      ahead=
      if [ "$state" = PENDING ]; then
        ahead=$(squeue --noheader --states=PENDING --partition="$partition" --sort=-p,i --format=%i |
          sed "/^$id\$/q" | grep -cvx "$id" || true)
      else
        why=$nodes
      fi
      echo "${job#nanochat-}|$id|$state|$why|$start|$left|$ahead"
    done
}

in_queue() {  # the same for people
  local name id state why start left ahead
  queue_rows "$1" | while IFS='|' read -r name id state why start left ahead; do
    if [ "$state" = PENDING ]; then
      echo "$name: job $id PENDING ($why), $ahead jobs ahead, start $start"
    else
      echo "$name: job $id $state on $why, $left of it left"
    fi
  done
}

words=" $* "
name=                                   # of a run, where the verb is about one
case "${1:-}" in
  status | stop) for word in "${@:2}"; do [[ $word == -* ]] || name=$(basename "$word"); done ;;
esac
has_begun() { [ -f "$home/runs/$name/spec.json" ]; }    # a refused job leaves only slurm.jsonl there
if [ "${1:-}" = launch ] && [[ $words == *" --to slurm "* || $words == *" --to=slurm "* ]]; then
  [[ $words != *" --ssh"* ]] ||
    fail 78 "this is the cluster already: without --ssh (that is for a machine with the kit installed)"
  [[ $words == *" --scratch"* ]] || set -- "$@" --scratch "$scratch"
  [[ $words == *" --sif"* ]] || set -- "$@" --sif "$sif"
  if [[ $words == *" --dry-run "* ]]; then
    nanochat "$@"
    exit
  fi
  command -v sbatch > /dev/null ||
    fail 77 "there is no sbatch here: run this on a login node, or pipe what --dry-run prints to sbatch there"
  for word; do shift; [ "$word" = --json ] || set -- "$@" "$word"; done    # the script is for sbatch
  script=$(nanochat "$@" --dry-run)
  sed -n '/^$/q; s/^# Missing: /nanochat.sh: /p' <<< "$script" >&2
  job_name=$(sed -n 's/^#SBATCH --job-name=//p' <<< "$script")
  queued=$(squeue --noheader --user="$user" --name="$job_name" --format='job %i is %T')
  [ -z "$queued" ] || fail 78 "${job_name#nanochat-} is queued already: $queued. scancel ends it; for a second run give another name in the spec"
  job=$(sbatch --parsable <<< "$script")
  sed -n 's/^# Plan: //p' <<< "$script"
  echo "job ${job%%;*} is queued; $0 status ${job_name#nanochat-}, tail -F $scratch/$job_name-${job%%;*}.out"
elif [ "${1:-}" = status ] && [[ $words == *" --json "* ]]; then
  if command -v squeue > /dev/null; then
    ! rows=$(queue_rows "$name") || pass NANOCHAT_SQUEUE "${rows//$'\n'/;}"
  fi
  nanochat "$@"
elif [ "${1:-}" = status ]; then
  lines=$(in_queue "$name") || lines=      # a controller that does not answer hides no run
  [ -z "$lines" ] || printf 'queue:\n%s\n\n' "$lines"
  # A run that has not begun has nothing else to tell.
  if [ -z "$lines" ] || [ -z "$name" ] || has_begun; then nanochat "$@"; fi
elif [ "${1:-}" = stop ] && [ -n "$name" ]; then
  code=0
  if has_begun; then nanochat "$@" || code=$?; fi
  # Its job ends by itself then. One that waits in the queue, has not got as far, or is on a dead
  # node does not, and would go on with the run.
  for _ in {1..30}; do
    jobs=$(in_queue "$name") ||
      fail 1 "SLURM does not say whether a job of $name is left, which would go on with it. When it answers again: scancel --name=nanochat-$name"
    [[ $code = 0 && ($jobs == *" RUNNING "* || $jobs == *" COMPLETING "*) ]] || break
    sleep 1
  done
  if [ -n "$jobs" ]; then
    scancel --user="$user" --name="nanochat-$name"
    echo "cancelled $jobs"
  elif ! has_begun; then
    nanochat "$@" || code=$?
  fi
  exit "$code"
else
  nanochat "$@"
fi
