#!/usr/bin/env bash
# Bring .venv up to date with requirement files, quietly and only when they changed:
#
#     scripts/setup.sh requirements.txt [requirements-dev.txt ...]
#
# PYTHON chooses the interpreter, PIP_ARGS adds options for pip (an index with CPU builds of torch, for example).
# With SYSTEM=1 nothing is installed: the packages must already be there for PYTHON.
set -eEuo pipefail   # E: the trap below holds inside functions too
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
log=$venv/setup.log
fail() { echo "error: $*" >&2; exit 2; }
suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

python=
if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a command on this machine: give the path of a Python 3.11 to 3.13, or leave PYTHON out."
    suitable "$PYTHON" || fail "Python 3.11, 3.12 or 3.13 is needed; PYTHON=$PYTHON is" \
        "$("$PYTHON" --version 2>/dev/null | grep -i '^python' || echo another program)."
    python=$PYTHON
else
    candidates=(python3 python3.13 python3.12 python3.11)
    [ "${SYSTEM:-}" = 1 ] || candidates=("$venv/bin/python" "${candidates[@]}")
    for candidate in "${candidates[@]}"; do
        if suitable "$candidate"; then python=$candidate; break; fi
    done
    [ -n "$python" ] || fail "Python 3.11, 3.12 or 3.13 is needed; python3 is $(python3 --version 2>&1 || true)." \
        "Install one of them, or name it: PYTHON=/path/to/python3.12"
fi

if [ "${SYSTEM:-}" = 1 ]; then
    # Only whether each package is there, not its version: the machine's own versions are what is wanted here.
    exec "$python" - "$@" <<'PY'
import importlib.util
import re
import sys

modules = {"hydra-core": "hydra", "pytest-xdist": "xdist"}
optional = {"wandb", "tensorboard", "optuna", "submitit", "mypy", "ruff", "types-PyYAML", "setuptools"}
optional |= {"pytorch-optimizer", "adam-mini", "bitsandbytes", "nbclient", "nbformat", "ipykernel"}
lines = [line for path in sys.argv[1:] if "oracles" not in path for line in open(path) if line.strip() and not line.startswith("#")]
names = [re.split("[=<>~! \n]", line)[0] for line in lines]
missing = [n for n in names if n not in optional and importlib.util.find_spec(modules.get(n, n)) is None]
if missing:
    print(f"error: SYSTEM=1 installs nothing, and {sys.executable} lacks {', '.join(missing)}. Install what is missing "
          f"there (python -m pip install {' '.join(missing)}), or leave SYSTEM=1 out.", file=sys.stderr)
    sys.exit(2)
PY
fi

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
fingerprint() { { version "$python"; echo "${PIP_ARGS:-}"; cat "$1"; } | cksum; }
current() { [ "$(cat "$venv/.setup-$1" 2>/dev/null)" = "$(fingerprint "$1")" ]; }

usable=yes   # an environment that was moved, copied from another machine or made by another Python is not
[ "$(version "$venv/bin/python")" = "$(version "$python")" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || usable=
outdated=()
for file in "$@"; do current "$file" || outdated+=("$file"); done
if [ -n "$usable" ] && [ ${#outdated[@]} -eq 0 ]; then exit 0; fi

echo "installing ${outdated[*]:-$*} into $venv: once, 2 to 10 minutes, about 3 GB to download where PyPI's torch comes" \
    "with CUDA (Linux), 0.6 GB elsewhere; log in $log"

exec 3>&2   # where a command's own messages go to the log
broken() {
    local status=$?
    trap - ERR
    [ "$BASH_SUBSHELL" -eq 0 ] || exit "$status"   # its parent says so
    exec 2>&3
    { echo "The end of $log:"; { tail -n 15 "$log" 2>/dev/null || true; } | sed 's/^/    /'; } >&2
    fail "the installation stopped (status $status): the lines above say why. It needs a network and about 8 GB of disk;" \
        "run the same command again to go on, or add SYSTEM=1 on a machine that has the packages already."
}
trap broken ERR

if [ -z "$usable" ]; then
    messages=$(mktemp)
    made=0
    "$python" -m venv --clear "$venv" >"$messages" 2>&1 || made=$?
    mkdir -p "$venv"
    mv "$messages" "$log"
    (exit $made)
fi
{ date; "$venv/bin/python" --version; } >"$log" 2>&1
requirements=()
alone=()   # what tests compare with declares dependencies that the comparison does not need (torchvision, scipy)
for file in "$@"; do
    if [ "$file" = requirements-oracles.txt ]; then alone=(-r "$file"); else requirements+=(-r "$file"); fi
done
# shellcheck disable=SC2086  # PIP_ARGS is a list of words
install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input ${PIP_ARGS:-} "$@" >>"$log" 2>&1; }
install "${requirements[@]}"
# In a folder of their own, which tests/conftest.py adds: `accelerate launch` imports timm wherever it finds it, and fails
# without torchvision.
[ ${#alone[@]} -eq 0 ] || install --no-deps --upgrade --target "$venv/oracles" "${alone[@]}"
for file in "$@"; do fingerprint "$file" >"$venv/.setup-$file"; done
