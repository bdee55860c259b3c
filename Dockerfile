# One image for every place: a laptop's CPU, a cloud GPU under SkyPilot or RunPod, and, converted to
# a SIF, a SLURM cluster. docs/docker.md says how to use it and why it is cut like this.
#
#   base -> tools -> wheel -------------------+
#   base -> system -> dependencies -> runtime -+-> app --+-> kit -> image
#                                      data (by fetch) --+       -> test
#
# Build arguments:
#   DATA              smoke, cpu, d20, none or a config's name: what /opt/nanochat/data holds
#   HF_ENDPOINT       a mirror of the Hugging Face hub to fetch it from
#   SKYPILOT_RUNTIME  1 or 0: with what SkyPilot and RunPod else install at the price of the GPUs
#   REQUIREMENTS      lock file of the Python packages; another one brings another torch or CUDA
#   VERSION, REVISION, CREATED   for the labels

ARG BASE=debian:bookworm-slim

# ---------------------------------------------------------------------------------------------
# tools of the build, with their hashes

FROM ${BASE} AS tools
RUN --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    --mount=type=cache,target=/var/cache/apt,sharing=locked \
    apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-pip
COPY infra/image/tools.lock /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install --quiet --break-system-packages --root-user-action=ignore \
      --require-hashes -r /build/tools.lock
# What the stages below mount, and where: BuildKit leaves an empty file or folder at every place
# of a mount that was not there, so they mount over Debian's own empty /mnt and /media.
COPY infra/image/strip_venv.sh /build/dependencies/strip-venv
COPY infra/image/strip_venv.sh /build/runtime/strip-venv
COPY infra/image/uv infra/image/skypilot-runtime.lock /build/runtime/
RUN cp /usr/local/bin/uv /build/dependencies/uv && cp /usr/local/bin/uv /build/runtime/real-uv

# ---------------------------------------------------------------------------------------------
# the Rust tokenizer as an abi3 wheel; rustc-web is the newest compiler that bookworm has

FROM tools AS wheel
RUN --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    --mount=type=cache,target=/var/cache/apt,sharing=locked \
    apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      cargo-web gcc libc6-dev
WORKDIR /build/rustbpe
COPY rustbpe /build/rustbpe
RUN --mount=type=cache,target=/root/.cargo/registry \
    --mount=type=cache,target=/build/target \
    CARGO_TARGET_DIR=/build/target maturin build --release --locked --quiet \
      --interpreter python3 --out /build/wheels \
 && cargo metadata --locked --features python --format-version 1 \
      --filter-platform x86_64-unknown-linux-gnu \
      > /build/cargo-metadata.json

# ---------------------------------------------------------------------------------------------
# Debian packages: Python, a compiler for Triton and inductor, and what SkyPilot and RunPod expect

FROM ${BASE} AS system
RUN --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    --mount=type=cache,target=/var/cache/apt,sharing=locked \
    apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      ca-certificates curl g++ gcc git ibverbs-providers libibverbs1 libpython3.11-dev \
      openssh-client openssh-server patch procps python3 rsync sudo tini \
 # Every pod makes its own host keys (ssh-keygen -A); a key in the image would be known to all.
 && rm -rf /etc/ssh/ssh_host_* /var/cache/debconf/*-old /var/log/* \
 && printf 'Acquire::Retries "0";\n' > /etc/apt/apt.conf.d/90nanochat \
 && useradd --uid 1000 --gid root --home-dir /workspace/nanochat/home --shell /bin/bash \
      --no-create-home nanochat \
 && install -d -o nanochat -g root -m 2775 /workspace
WORKDIR /workspace

# ---------------------------------------------------------------------------------------------
# Python packages, hashes enforced; CUDA's libraries come with torch, the driver from the host

FROM system AS dependencies
ARG REQUIREMENTS=requirements.lock
COPY ${REQUIREMENTS} /opt/nanochat/requirements.lock
RUN --mount=type=bind,from=tools,source=/build/dependencies,target=/mnt \
    --mount=type=cache,id=uv,target=/media \
    export UV_CACHE_DIR=/media UV_LINK_MODE=copy \
 && /mnt/uv venv --quiet --no-config --python /usr/bin/python3 /opt/nanochat/venv \
 && /mnt/uv pip install --quiet --python /opt/nanochat/venv/bin/python \
      --require-hashes --no-build -r /opt/nanochat/requirements.lock \
 && /mnt/strip-venv /opt/nanochat/venv \
 && echo /opt/nanochat/app > /opt/nanochat/venv/lib/python3.11/site-packages/nanochat-app.pth
ENV PATH=/opt/nanochat/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# ---------------------------------------------------------------------------------------------
# SkyPilot's in-pod runtime, so that a pod starts in seconds and without any internet

FROM dependencies AS runtime
ARG SKYPILOT_RUNTIME=1
RUN --mount=type=bind,from=tools,source=/build/runtime,target=/mnt \
    --mount=type=cache,id=uv,target=/media \
    if [ "${SKYPILOT_RUNTIME}" = 1 ]; then \
      export UV_CACHE_DIR=/media UV_LINK_MODE=copy \
   && install -D -m 755 /mnt/real-uv /opt/nanochat/bin/uv \
   && install -D -m 755 /mnt/uv /root/.local/bin/uv \
   && /mnt/real-uv venv --quiet --no-config --python /usr/bin/python3 /root/skypilot-runtime \
   && /mnt/real-uv pip install --quiet --python /root/skypilot-runtime/bin/python \
        --require-hashes -r /mnt/skypilot-runtime.lock \
   && /mnt/strip-venv /root/skypilot-runtime; \
    fi

# ---------------------------------------------------------------------------------------------
# the kit itself: everything that changes with the code, in one small layer

FROM runtime AS app
COPY pyproject.toml README.md LICENSE entrypoint.py /build/
COPY infra /build/infra
COPY nanochat /build/nanochat
COPY --from=wheel /build/wheels /build/wheels
COPY --from=wheel /build/cargo-metadata.json /build/
RUN --mount=type=bind,from=tools,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    cd /build \
 && uv pip install --quiet --no-cache --python /opt/nanochat/venv/bin/python --no-deps \
      --no-build-isolation --compile-bytecode --target /out/opt/nanochat/app wheels/*.whl . \
 && rm /out/opt/nanochat/app/.lock \
 && mv /out/opt/nanochat/app/bin /out/opt/nanochat/bin \
 && install -m 755 infra/image/entrypoint.sh /out/opt/nanochat/bin/entrypoint \
 && install -d /out/usr/local/bin \
 && ln -s /opt/nanochat/bin/nanochat /out/usr/local/bin/nanochat \
 && ln -s ../requirements.lock /out/opt/nanochat/app/requirements.lock
COPY configs /out/opt/nanochat/app/configs
# Every commit has another REVISION: what stands below a declaration is done again for each.
ARG VERSION=0
ARG REVISION=unknown
RUN cd /build \
 && python -m infra.image.describe /out/opt/nanochat --version "${VERSION}" \
      --revision "${REVISION}" --cargo-metadata cargo-metadata.json

# ---------------------------------------------------------------------------------------------
# data that every run finds before it looks anywhere else. Only what the fetch imports is copied, so
# that a change of other code neither asks a hub nor copies the data, tens of GB for d20, again.

FROM dependencies AS data
ARG DATA=smoke
ARG HF_ENDPOINT
WORKDIR /build
COPY infra/__init__.py infra/download.py infra/fetch.py infra/fetch_progress.py infra/hub.py \
     infra/
COPY infra/image/__init__.py infra/image/bake_data.py infra/image/
COPY nanochat/__init__.py nanochat/corpus.py nanochat/data.lock.json nanochat/embedded.py \
     nanochat/folders.py nanochat/rundir.py nanochat/spec.py nanochat/spec_errors.py nanochat/storage.py \
     nanochat/touches.py nanochat/
COPY configs configs
RUN --mount=type=cache,target=/var/cache/nanochat-data \
    --mount=type=secret,id=HF_TOKEN \
    mkdir -p /out \
 && python -m infra.image.bake_data "${DATA}" /var/cache/nanochat-data /out/opt/nanochat/data

# ---------------------------------------------------------------------------------------------

# everything together; only the last layer, a few MB, changes with the code

FROM runtime AS kit
COPY --from=data /out/ /
COPY --from=app /out/ /

# ---------------------------------------------------------------------------------------------
# the unit tests inside the image: make image-test

FROM kit AS test
COPY requirements.lock requirements-dev.lock /build/
# What only the tests need: the image's own packages, also those of another lock, are to be tested.
RUN --mount=type=bind,from=tools,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    --mount=type=cache,id=uv,target=/media \
    cd /build \
 && awk -F== 'FNR == NR { known[$1]; next } /^[a-z]/ { skip = $1 in known } !skip' \
      requirements.lock requirements-dev.lock > tests-only.lock \
 && UV_CACHE_DIR=/media UV_LINK_MODE=copy uv pip install --quiet --no-deps \
      --python /opt/nanochat/venv/bin/python --require-hashes -r tests-only.lock
COPY . /build/
WORKDIR /build
USER 1000:0
ENV HOME=/tmp HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
# Tests count processes: as PID 1, pytest would have those that nobody else waits for.
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-m", "pytest", "-p", "no:cacheprovider", "-m", "not long", "tests/unit"]

# ---------------------------------------------------------------------------------------------

FROM kit AS image
ARG VERSION=0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python3", "-P", "-m", "infra.image.health"]
LABEL org.opencontainers.image.title="nanochat kit" \
      org.opencontainers.image.description="Train a small chat model from nothing, anywhere" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.licenses="MIT"
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/nanochat/bin/entrypoint"]
CMD ["run", "@configs/smoke.toml"]
