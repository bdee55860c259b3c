#!/bin/bash
# `nanochat` on a login or devel node, where only the SIF and bash are needed: a verb runs inside
# the SIF, and what is not in there (sbatch, squeue) runs here.
# usage: export NANOCHAT_HOME=/scratch/$USER/nanochat; infra/slurm/nanochat.sh VERB …
# The SIF is nanochat.sif beside NANOCHAT_HOME, or what NANOCHAT_SIF names.
set -euo pipefail

fail() { echo "nanochat.sh: $2" >&2; exit "$1"; }

home=${NANOCHAT_HOME:-}
[ "$(basename "$home")" = nanochat ] ||
  fail 78 "set NANOCHAT_HOME to a folder called nanochat on scratch, e.g. /scratch/$USER/nanochat; it is '$home'"
scratch=$(dirname "$home")
[ -w "$scratch/." ] || fail 78 "$scratch is not a folder that can be written"
sif=${NANOCHAT_SIF:-$scratch/nanochat.sif}
for module in "" apptainer singularity; do
  [ -z "$module" ] || module load "$module" > /dev/null 2>&1 || true
  apptainer=$(command -v apptainer || command -v singularity) && break
done
[ -n "$apptainer" ] ||
  fail 77 "there is no apptainer here, nor a module of that name; docs/ptolemy.md has an installation without root"
[ -f "$sif" ] || fail 78 "there is no $sif; build it: infra/slurm/build_sif.sh SOURCE $sif"
mkdir -p "$home/tmp" "$scratch/apptainer"
export APPTAINER_CACHEDIR="$scratch/apptainer" APPTAINER_TMPDIR="$home/tmp"

nanochat() {
  local options=(--containall --no-home --bind "$scratch" --env "NANOCHAT_HOME=$home")
  case "$PWD/" in "$scratch"/*) ;; *) options+=(--bind "$PWD") ;; esac
  for secret in WANDB_API_KEY HF_TOKEN; do
    [ -z "${!secret:-}" ] || export "APPTAINERENV_$secret=${!secret}"   # not on a command line
  done
  for place in HF_ENDPOINT https_proxy http_proxy no_proxy SSL_CERT_FILE; do
    [ -z "${!place:-}" ] || options+=(--env "$place=${!place}")
  done
  "$apptainer" --quiet exec "${options[@]}" --pwd "$PWD" "$sif" nanochat "$@"
}

words=" $* "
if [ "${1:-}" = launch ] && [[ $words == *" --to slurm "* || $words == *" --to=slurm "* ]]; then
  [[ $words == *" --scratch"* ]] || set -- "$@" --scratch "$scratch"
  [[ $words == *" --sif"* ]] || set -- "$@" --sif "$sif"
  if [[ $words == *" --dry-run "* ]]; then
    nanochat "$@"
    exit
  fi
  script=$(nanochat "$@" --dry-run)
  name=$(sed -n 's/^#SBATCH --job-name=//p' <<< "$script")
  queued=$(squeue --noheader --user="$USER" --name="$name" --format='job %i is %T')
  [ -z "$queued" ] || fail 78 "${name#nanochat-} is queued already: $queued. scancel ends it; for a second run give another name in the spec"
  job=$(sbatch --parsable <<< "$script")
  echo "job ${job%%;*} is queued; $0 status ${name#nanochat-}, tail -F $scratch/$name-${job%%;*}.out"
elif [ "${1:-}" = status ]; then
  jobs=$(squeue --noheader --user="$USER" --sort=i --format='%j job %i %T, %R, start %S, left %L' | sed -n 's/^nanochat-//p')
  [[ $words == *" --json "* ]] || [ -z "$jobs" ] || printf 'queue:\n%s\n\n' "$jobs"
  nanochat "$@"
else
  nanochat "$@"
fi
