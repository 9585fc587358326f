#!/usr/bin/env bash
# From a fresh clone to the Hessian spectrum of SmolLM2-135M: bash launch/quickstart.sh [--set section.key=value ...]
# Installs into .venv (launch/setup.sh), then runs launch/configs/smollm2.toml over 2 ranks on this machine. Run again, it
# goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
# one rank a GPU at most; without GPUs the two share the cores
gpus=$("${VENV:-.venv}/bin/python" -c 'import torch; print(torch.cuda.device_count())')
exec bash launch/torchrun.sh -n $((gpus == 1 ? 1 : 2)) launch/configs/smollm2.toml "$@"
