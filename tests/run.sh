#!/usr/bin/env bash
# Install whatever the tests need, then lint, check types and run the whole suite: bash tests/run.sh [pytest arguments]
# bash tests/run.sh --fast [pytest arguments] leaves out what is marked slow or slurm, and installs neither MPI nor Slurm.
# Three files of tests at a time, one thread each: many wait (WORKERS=1 for one, whose output is easier to follow).
# As root on Debian or Ubuntu everything is installed; else it says what is missing and which tests that costs. Safe to
# run twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh --test

if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow and not slurm" "$@"
else
    can_install=
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && can_install=yes

    if ! bash launch/setup.sh --mpi --test; then
        [ -z "$can_install" ] || exit 1
        echo "run.sh: without MPI: the tests of mpirun, of the mpio store and of srun with PMIx are skipped" >&2
    fi

    missing=()
    for program in slurmctld slurmd munged unshare; do command -v "$program" >/dev/null || missing+=("$program"); done
    if [ ${#missing[@]} -gt 0 ]; then
        if [ -n "$can_install" ]; then
            echo "run.sh: apt-get install slurm-wlm munge" >&2
            { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
                </dev/null >/dev/null
        else
            echo "run.sh: without ${missing[*]} (apt-get install slurm-wlm munge): tests/system/test_slurm.py is skipped" >&2
        fi
    fi
    [ "$(id -u)" = 0 ] ||
        echo "run.sh: not root: the local Slurm cluster cannot start; tests/system/test_slurm.py is skipped" >&2
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=${VENV:-.venv}/bin/python
# once: where PYTHONDONTWRITEBYTECODE is set, each of the hundreds of programs that tests start would do it, in 0.25 s
"$python" -m compileall -q hpc_hess
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" -m mypy
exec "$python" -m pytest -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
