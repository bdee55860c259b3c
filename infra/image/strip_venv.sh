#!/bin/sh
# Build step: leave out of a virtual environment what nothing reads at run time (the packages' own
# tests and static libraries, about 180 MB), and byte-compile the rest, since in a read-only
# container each process would compile it anew: 8 s more for every `import torch`.
set -eu
packages=$(echo "$1"/lib/python3*/site-packages)
find "$packages" -type d -name tests -prune -exec rm -r {} +
find "$packages" -type f -name '*.a' -delete
"$1/bin/python" -m compileall -q -j 0 "$packages" || true
