#!/bin/sh
# Entrypoint of the Docker image: runs a command as the owner of the folder it is called in, the mounted checkout. So
# nothing runs as root, and records/ belongs to whoever started the run. With `docker run --user` it changes nothing.
#   as_owner ./run_rwkv7.sh --track tiny
set -eu
owner=$(stat -c %u .)
if [ "$(id -u)" -ne 0 ] || [ "$owner" -eq 0 ]; then  # root's own checkout, as in rootless Docker: only root may write
    exec "$@"
fi
exec setpriv --reuid="$owner" --regid="$(stat -c %g .)" --clear-groups -- "$@"
