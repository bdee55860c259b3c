#!/bin/sh
# The oracle's virtual environment: tests/oracle/venv.sh DIR. It sees the packages of .venv (torch is
# there already, in the same version) and adds what lm-eval needs from its own lock.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
main=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$root/.venv/bin/python" -m venv "$1"
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo "$main" > "$site/kit.pth"
"$1/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
  -r "$root/tests/oracle/requirements.lock"
touch "$1/.ready"
