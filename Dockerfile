# The image of reproducible records: CUDA 13.0 with its compiler, the Python of Ubuntu 24.04, the pinned packages.
#
#   docker build -t rwkv-speedrun .
#   docker run -it --rm --gpus all -v $(pwd):/rwkv-speedrun rwkv-speedrun ./run_rwkv7.sh --adam_lr 0.0026 --fast_cuda
#   docker run -it --rm -v $(pwd):/rwkv-speedrun rwkv-speedrun ./run_rwkv7.sh --track tiny          (no GPU)
#   docker run -it --rm -v $(pwd):/rwkv-speedrun rwkv-speedrun ./test.sh
#
# The checkout is mounted, not copied: what runs is what its log holds, and records/ stays outside.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# torch.compile and Triton compile against Python.h; git names the commit in the log. Only the revisions with which
# Ubuntu closes security holes are open: it keeps no older ones.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    'g++=4:13.2.0-*' 'git=1:2.43.0-*' 'python3.12=3.12.3-*' 'python3.12-dev=3.12.3-*' 'python3.12-venv=3.12.3-*' \
 && rm -rf /var/lib/apt/lists/* \
 && git config --system --add safe.directory /rwkv-speedrun

COPY requirements.txt constraints.txt /image/
COPY data/requirements.txt /image/data/
COPY records/requirements.txt /image/records/
COPY tests/requirements.txt /image/tests/
RUN python3.12 -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c /image/constraints.txt \
    -r /image/requirements.txt -r /image/data/requirements.txt -r /image/records/requirements.txt \
    -r /image/tests/requirements.txt

# The image's id in every log: equal ids, equal packages. The list stays beside it.
RUN { dpkg-query -W; /opt/venv/bin/python -m pip list --format=freeze; } >/etc/rwkv-speedrun-packages \
 && echo "cuda ${CUDA_VERSION}, packages sha256:$(sha256sum </etc/rwkv-speedrun-packages | cut -c 1-64)" \
    >/etc/rwkv-speedrun-image

# The entrypoint becomes whoever owns the checkout (uid 1000 where none is mounted). That user need not be known here,
# so home and name are given: torch asks for both.
COPY dev/as_owner.sh /usr/local/bin/as_owner
RUN install -d -m 1777 /home/racer && install -d -o 1000 -g 1000 /rwkv-speedrun
ENV PATH=/opt/venv/bin:${PATH} CUDA_HOME=/usr/local/cuda HOME=/home/racer USER=racer LOGNAME=racer
WORKDIR /rwkv-speedrun
ENTRYPOINT ["as_owner"]
CMD ["bash"]
