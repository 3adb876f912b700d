#!/usr/bin/env bash
# Sets up and runs the tests, on all cores; arguments go to pytest:  ./test.sh -k wkv7,  ./test.sh tests/test_pydocs.py
#   ./test.sh --fast     those that take no build, no launcher and no second process: under a minute
set -eu
cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null
case "${1:-}" in -h | --help) sed -n 's/^# //p' "$0"; exit;; esac
. ./setup.sh
setup_python requirements.txt data/requirements.txt records/requirements.txt tests/requirements.txt
fast=""
named=""
for argument in "$@"; do
    shift
    if [ "$argument" = --fast ]; then fast=1; continue; fi
    [ -e "${argument%%::*}" ] && named=1
    set -- "$@" "$argument"
done
[ -z "$fast" ] || set -- -m "not slow" "$@"
[ -n "$named" ] || set -- -n auto --maxprocesses 8 --dist loadfile tests "$@"  # a worker takes seconds to start
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"  # OpenMP threads that spin long stall each other on a busy machine
exec "$PYTHON" -m pytest -q --durations=10 "$@"
