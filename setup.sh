# Finds or makes the Python, and launches the training scripts. Sourced by run_*.sh and test.sh from the repository's
# folder; works in bash 3.2 (macOS) under `set -eu`.
#
#   setup_python FILE...    sets and exports PYTHON (absolute): a Python that has what the requirement files name
#   launch SCRIPT ARGS...   makes the offline corpus if the arguments need it, then runs SCRIPT on the GPUs at hand
#
# Environment:
#   PYTHON=/path/to/python3   the Python to use, or, where it lacks packages, to make .venv with
#   NPROC=4                   processes to launch; default: one a GPU, at least one; one for the tiny track
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=HOST [MASTER_PORT=29500]
#                             one of two machines; the same on the other with NODE_RANK=1. run_slurm.sh sets them.
#   CUDA_VISIBLE_DEVICES=0,1  the GPUs to use; empty or -1: none
#   PIP_EXTRA_INDEX_URL=...   read by pip. On a machine without a GPU let it name the index of torch's CPU wheels:
#                             they are a tenth of the default Linux wheels, which bring the CUDA libraries.

# --------------------------------------------------------------------------------------------------------------------
# Python

# Arguments: requirement files. Prints what this Python lacks, comma separated; fails if it lacks anything.
# Only metadata is read, because importing torch takes seconds. Versions are free but for torch: its stable C++ API.
at_hand='
import re, sys
if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer")
from importlib.metadata import PackageNotFoundError, version
lacks = []
for path in sys.argv[1:]:
    for line in open(path):
        name = re.match(r"[\w.-]*", line).group()
        if not name:
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            lacks.append(name)
            continue
        if name == "torch" and [int(n) for n in re.findall(r"\d+", found)[:2]] < [2, 11]:
            lacks.append("torch 2.11 or newer (has %s)" % found)
if lacks:
    sys.exit(", ".join(lacks))
'

# Prints e.g. "3.11.2 venv" (or "no-venv": Debian ships ensurepip apart); fails if this is no working Python.
describe='
import sys
try:
    import ensurepip, venv
    has = "venv"
except ImportError:
    has = "no-venv"
print("%d.%d.%d %s" % (sys.version_info[:3] + (has,)))
'

setup_say() { printf 'setup: %s\n' "$*" >&2; }

setup_path() {  # NAME: its absolute path, as the shell would find it
    local path
    path=$(type -P -- "$1") || return 1
    case $path in /*) ;; *) path=$PWD/$path ;; esac
    printf '%s\n' "$path"
}

setup_python() {
    local candidate path lacks chosen=${PYTHON:-}
    for candidate in ${chosen:+"$chosen"} python3 python; do
        if ! path=$(setup_path "$candidate"); then
            [ -z "$chosen" ] && continue
            setup_say "PYTHON=$chosen: no such program"
            return 1
        fi
        if lacks=$("$path" -c "$at_hand" "$@" 2>&1); then
            PYTHON=$path
            export PYTHON
            return 0
        fi
        if [ -n "$chosen" ]; then
            setup_say "PYTHON=$chosen lacks $(printf '%s\n' "$lacks" | tail -n 1): using .venv"
            break
        fi
    done
    PYTHON=$PWD/.venv/bin/python
    export PYTHON
    setup_packages "$chosen" "$@"
}

# The folder .venv/installed holds a copy of every requirement file whose installation came to its end. So an
# interrupted or outdated one is seen at once and without starting Python, and pip runs again.
setup_packages() {  # PYTHON-OR-EMPTY FILE...
    local chosen=$1 file complete=1
    shift
    for file in "$@"; do
        cmp -s -- "$file" ".venv/installed/${file//\//_}" || complete=""
    done
    [ -n "$complete" ] && [ -x "$PYTHON" ] && return 0
    if [ ! -e .venv/installed ] && "$PYTHON" -c "$at_hand" "$@" 2>/dev/null; then
        return 0  # a whole .venv made by hand, or by another tool
    fi

    if ! "$PYTHON" -c 'import sys, pip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        setup_venv "$chosen" || return 1
    fi
    setup_say "installing $* into .venv (some minutes the first time: torch is large)"
    if [ "$(uname -s)" = Linux ] && [ -z "${PIP_EXTRA_INDEX_URL:-}" ] && ! type -P nvidia-smi >/dev/null; then
        setup_say "no NVIDIA driver here: PIP_EXTRA_INDEX_URL can name the index of torch's CPU wheels (see setup.sh)"
    fi
    mkdir -p .venv/installed
    for file in "$@"; do  # FILE... becomes -r FILE...
        rm -f -- ".venv/installed/${file//\//_}"
        shift
        set -- "$@" -r "$file"
    done
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; then
        setup_say "pip failed (above). Start again to go on, or bring a Python that has it all: PYTHON=/path/to/python3"
        return 1
    fi
    for file in "$@"; do
        [ "$file" = -r ] || cp -- "$file" ".venv/installed/${file//\//_}"
    done
}

setup_venv() {  # PYTHON-OR-EMPTY: makes .venv with it, or with the first Python that fits
    local candidate path about version found="" bare=""
    [ -n "$1" ] || set -- python3 python python3.13 python3.12 python3.11 python3.10
    for candidate in "$@"; do
        path=$(setup_path "$candidate") || continue
        about=$("$path" -c "$describe" 2>/dev/null) || continue
        version=${about% *}
        case $about in
            3.1[0-3].*" venv")
                setup_say "making .venv with $candidate (Python $version)"
                "$path" -m venv --clear .venv
                return ;;
            3.1[0-3].*) bare=${bare:-$version} ;;
            *) found="$found${found:+, }$candidate is $version" ;;
        esac
    done
    if [ -n "$bare" ]; then
        setup_say "Python $bare cannot make .venv, it lacks venv or ensurepip. Debian, Ubuntu: apt install python3-venv"
    else
        setup_say "no Python 3.10 to 3.13 (${found:-none at all}). Install one or name it: PYTHON=/path/to/python3.12"
    fi
    return 1
}

# --------------------------------------------------------------------------------------------------------------------
# Launch

count_gpus() {  # without torch, whose import takes seconds
    local all visible one n=0
    all=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
    if [ "${CUDA_VISIBLE_DEVICES+set}" != set ] || [ "$all" -eq 0 ]; then
        echo "$all"
        return
    fi
    visible=${CUDA_VISIBLE_DEVICES//,/ }
    for one in $visible; do  # CUDA stops at the first entry that names no GPU; MIG and UUID entries are taken as good
        case $one in
            -*) break ;;
            *[!0-9]*) ;;
            *) [ "$one" -lt "$all" ] || break ;;
        esac
        n=$((n + 1))
    done
    echo "$n"
}

# For a run on the CPU. Freed memory stays with the process: to give it back costs a page fault for every 4 KB at every
# step, a fifth of a step. And OpenMP threads that spin long stall each other on a busy machine. race.py does the same.
cpu_environment() {
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2147483647}" MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
}

launch() {  # SCRIPT ARGS...
    local argument last="" help="" tiny="" data="" n
    for argument in "$@"; do
        case $argument in
            -h | --help) help=1 ;;
            --track=*) [ "$argument" = --track=tiny ] && tiny=1 || tiny="" ;;
            --data | --data=*) data=1 ;;
            *) if [ "$last" = --track ]; then [ "$argument" = tiny ] && tiny=1 || tiny=""; fi ;;
        esac
        last=$argument
    done
    if [ -n "$help" ]; then
        exec "$PYTHON" "$@"
    fi
    if [ -n "$tiny" ] && [ -z "$data" ]; then
        "$PYTHON" data/pydocs.py
    fi
    n=${NPROC:-$([ -n "$tiny" ] && echo 1 || count_gpus)}  # tiny's 2 sequences a step are done sooner by one
    nodes=${NNODES:-1}
    [ "$(count_gpus)" -gt 0 ] || cpu_environment
    case $n in *[!0-9]*) setup_say "NPROC=$n is not a number of processes"; return 1 ;; esac
    case $nodes in *[!0-9]*) setup_say "NNODES=$nodes is not a number of machines"; return 1 ;; esac
    [ "$n" -gt 0 ] || n=1
    if [ "$n" -gt 1 ] || [ "$nodes" -gt 1 ]; then
        WORLD_SIZE=$((n * nodes)) "$PYTHON" "$@" --check >/dev/null || return  # one line here, n tracebacks below
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # torch.distributed.run's own default, without its warning
        set -- --nproc_per_node="$n" "$@"
        if [ "$nodes" -gt 1 ]; then
            if [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-${SLURM_NODEID:-}}" ]; then
                setup_say "NNODES=$nodes needs MASTER_ADDR=the first machine, NODE_RANK=0 on it, 1 on the next ..."
                return 1
            fi
            set -- --nnodes="$nodes" --node_rank="${NODE_RANK:-$SLURM_NODEID}" --master_addr="$MASTER_ADDR" \
                --master_port="${MASTER_PORT:-29500}" "$@"
        else
            set -- --standalone "$@"
        fi
        exec "$PYTHON" -m torch.distributed.run "$@"
    fi
    exec "$PYTHON" "$@"
}
