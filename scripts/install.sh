#!/usr/bin/env bash
# Installs vrthinker, editable, into a virtual environment:  scripts/install.sh VENV
# Its native module is compiled while pip fetches torch and the other packages that it needs.
set -u
venv="$1"
cd "$(dirname "$0")/.."
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
logs=build/logs
mkdir -p "$logs"
export PATH="$PWD/$venv/bin:$PATH"
[[ $venv == /* ]] && export PATH="$venv/bin:$PATH"

echo "==> compiling vrthinker._core in the background"
"${pip[@]}" install --no-compile -v --no-deps --no-build-isolation -e . >"$logs/native.log" 2>&1 </dev/null &
native=$!
trap 'kill "$native" 2>/dev/null' EXIT

make --no-print-directory VENV="$venv" "$venv/.torch" || exit
echo "==> the packages that vrthinker needs"
"$venv/bin/python" - >"$venv/requirements.txt" <<'PY' || exit
import tomllib
with open("pyproject.toml", "rb") as project:
    print("\n".join(tomllib.load(project)["project"]["dependencies"]))
PY
scripts/watched.sh "$logs/install.log" "${pip[@]}" install --no-compile -r "$venv/requirements.txt" || exit
kill -0 "$native" 2>/dev/null && echo "==> waiting for the compiler"
wait "$native"
status=$?
if ((status != 0)); then
    tail -n 40 "$logs/native.log"
    echo "compiling failed with exit status $status; the whole output is in $logs/native.log"
fi
exit "$status"
