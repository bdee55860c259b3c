#!/bin/sh
# Build the image (or a stage of it) from this checkout. usage: build.sh TAG [docker build options]
# Cache mounts need BuildKit: clients up to 22 have it built in, later ones as the plugin buildx.
set -eu
cd "$(dirname "$0")/../.."
tag=$1
shift
if ! command -v docker > /dev/null; then
  echo "Docker is not installed: apt-get install docker.io, or docs.docker.com/engine/install" >&2
  exit 1
fi
client=
for candidate in $(which -a docker); do
  if "$candidate" buildx version > /dev/null 2>&1; then
    client=$candidate
  else
    case "$("$candidate" --version)" in
      "Docker version 18.09"* | "Docker version 19."* | "Docker version 2"[0-2].*) client=$candidate ;;
    esac
  fi
  [ -z "$client" ] || break
done
if [ -z "$client" ]; then
  echo "This Docker has no BuildKit: apt-get install docker-buildx (or docker-buildx-plugin)" >&2
  exit 1
fi
revision=unknown
if git rev-parse HEAD > /dev/null 2>&1; then
  revision=$(git rev-parse HEAD)
  [ -z "$(git status --porcelain)" ] || revision=$revision-changed
fi
version=${tag##*:}
DOCKER_BUILDKIT=1 exec "$client" build --tag "$tag" \
  --build-arg "VERSION=${version%-test}" \
  --build-arg "REVISION=$revision" \
  --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)" \
  "$@" .
