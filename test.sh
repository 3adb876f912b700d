#!/usr/bin/env bash
# Sets up and runs every test; arguments go to pytest:  ./test.sh -k wkv7,  ./test.sh tests/test_pydocs.py
set -eu
cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null
. ./setup.sh
setup_python requirements.txt data/requirements.txt records/requirements.txt tests/requirements.txt
named=""
for argument in "$@"; do
    [ -e "${argument%%::*}" ] && named=1
done
[ -n "$named" ] || set -- tests "$@"
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"  # OpenMP threads that spin long stall each other on a busy machine
exec "$PYTHON" -m pytest -q --durations=10 "$@"
