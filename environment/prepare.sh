#!/bin/sh
# Runs prepare.py with the first Python 3.11 or newer that works; prepare.py then chooses the one to build with.
# A name on PATH proves nothing: a version manager's shim exists for versions that are not switched on.
set -u
here=$(dirname "$0")
for python in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-9]*/bin/python; do
    if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" "$here/prepare.py" "$@"
    fi
done
echo "MeshLM needs Python 3.11, 3.12 or 3.13 and found none on PATH or under pyenv: install one, or name it with PYTHON=/path/to/python" >&2
exit 1
