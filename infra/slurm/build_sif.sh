#!/bin/bash
# The image as a SIF, as any user. usage: build_sif.sh SOURCE SIF [options of apptainer build]
# SOURCE: an image of this machine's Docker, an archive of `docker save` (*.tar), or docker://HOST/NAME.
# It takes twice the size of the image beside the SIF meanwhile; nothing is left in home or /tmp.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 78; }
source=$1 sif=$(realpath -m "$2")     # folders below it go to Apptainer, which wants them absolute
shift 2
recipe=$(dirname "$0")/../../apptainer.def
for name in apptainer singularity; do
  apptainer=$(command -v "$name") && break
  module load "$name" > /dev/null 2>&1 || true
  apptainer=$(command -v "$name") && break
done
[ -n "$apptainer" ] ||
  { echo "There is no apptainer here, nor a module of that name; docs/ptolemy.md has an installation without root" >&2; exit 77; }
mkdir -p "$(dirname "$sif")"
work=$(mktemp -d "$(dirname "$sif")/.sif.XXXXXX")
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
export APPTAINER_TMPDIR="$work" APPTAINER_CACHEDIR="$work/cache" TMPDIR="$work"
export SINGULARITY_TMPDIR="$work" SINGULARITY_CACHEDIR="$work/cache"
# One copy of the layers less; nothing would use them again.
export APPTAINER_DISABLE_CACHE=true SINGULARITY_DISABLE_CACHE=true
case "$source" in
  docker://*) bootstrap=docker from=${source#docker://} ;;
  *.tar) bootstrap=docker-archive from=$source ;;
  *)
    command -v docker > /dev/null ||
      { echo "There is no Docker here; give an archive of docker save (*.tar) or docker://HOST/NAME" >&2; exit 78; }
    bootstrap=docker-archive from=$work/image.tar
    docker save --output "$from" "$source"
    ;;
esac
"$apptainer" build --force --build-arg "bootstrap=$bootstrap" --build-arg "from=$from" "$@" \
  "$work/made.sif" "$recipe"
digest=$(sha256sum "$work/made.sif")
mv "$work/made.sif" "$sif"
echo "${digest%% *}  $(basename "$sif")" > "$sif.sha256"     # for the report; sha256sum --check reads it
echo "$sif: $(du -h --apparent-size "$sif" | cut -f1)"
