#!/bin/sh
# Print a Python >= 3.12 that can make a virtual environment; say what to install if there is none.
# Every candidate is run: a pyenv shim may exist and yet fail, and Debian splits ensurepip off.

check='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))'
tried=

try() { # candidates: exits with the first that works
    for python; do
        path=$(command -v "$python" 2>/dev/null) || continue
        if PYTHONDONTWRITEBYTECODE=1 "$path" -c "$check" >/dev/null 2>&1; then
            printf '%s\n' "$path"
            exit 0
        fi
        tried="$tried $path"
    done
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    echo "PYTHON=$PYTHON is no Python >= 3.12 with venv and ensurepip: looking for another" >&2
fi
# Oldest first: constraints.txt is tested with 3.12, and Megatron has no wheels from 3.14 on.
for version in 3.12 3.13 3.14 3.15; do
    try "python$version" "$HOME/.pyenv/versions/$version".*/bin/python3 \
        "/usr/local/bin/python$version" "/opt/homebrew/bin/python$version" \
        "/opt/python$version/bin/python3" /opt/*/bin/"python$version"
done
try python3

cat >&2 <<EOF
No Python >= 3.12 with the modules venv and ensurepip was found.
Tried and rejected:${tried:- nothing}
Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; or pyenv install 3.12),
or name it: make PYTHON=/path/to/python3.12 ...
EOF
exit 1
