# `make repro` and `make test` as outside, in an environment where every file was compared with its hash:
#
#   docker build --tag vlm-vqa .
#   docker build --tag vlm-vqa:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
#
# docs/reproducibility.md says how to run it, and which command names the images by their digests.
ARG BASE=debian:12.12-slim
ARG UV=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV} AS uv

FROM ${BASE}
# The distribution's own security updates are wanted, so no versions here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 vqa \
    && install --directory --owner vqa /home/vqa/vlm-vqa
# It brings the same Python 3.11 to either base.
COPY --from=uv /uv /usr/local/bin/uv
USER 10001
WORKDIR /home/vqa/vlm-vqa
COPY --chown=vqa . .
RUN make setup INSTALLER=uv LOCKED=yes
ENV PATH=/home/vqa/vlm-vqa/.venv/bin:$PATH
CMD ["make", "repro"]
