#!/usr/bin/env bash
# Runs a command that may take minutes, and shows that it moves:  scripts/watched.sh LOG COMMAND...
# All output goes to LOG. On a terminal one line is rewritten with the newest output; elsewhere a line is printed
# every 20 seconds. If the command fails, the end of LOG is printed and the command's exit status returned.
set -u
log="$1"
shift
mkdir -p "$(dirname "$log")"
start=$SECONDS
"$@" >"$log" 2>&1 </dev/null &
command=$!
trap 'kill "$command" 2>/dev/null; exit 130' INT TERM
if [[ -t 1 ]]; then every=1; else every=20; fi
next=$every
while kill -0 "$command" 2>/dev/null; do
    sleep 0.2
    elapsed=$((SECONDS - start))
    ((elapsed >= next)) || continue
    next=$((elapsed + every))
    newest="$(tail -c 400 "$log" | tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1 | tr -cd '[:print:]' | cut -c 1-80)"
    if [[ -t 1 ]]; then printf '\r\033[K    %3d s  %s' "$elapsed" "$newest"; else printf '    %3d s  %s\n' "$elapsed" "$newest"; fi
done
wait "$command"
status=$?
[[ -t 1 ]] && printf '\r\033[K'
if ((status != 0)); then
    tail -n 40 "$log"
    echo "failed with exit status $status; the whole output is in $log"
fi
exit "$status"
