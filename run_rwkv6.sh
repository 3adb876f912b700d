#!/usr/bin/env bash
# Trains RWKV-6 on all GPUs of this machine, on one, or on the CPU; every argument goes to train_rwkv6.py.
#   ./run_rwkv6.sh --help
#   ./run_rwkv6.sh --track tiny        a small model on the text inside Python: no download, no GPU
# The first start makes .venv. Paths are taken from this folder. NPROC=n sets the number of processes (setup.sh).
set -eu
cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null
. ./setup.sh
setup_python requirements.txt
launch train_rwkv6.py "$@"
