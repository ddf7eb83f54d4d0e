# One image for both: `operator` (the controller) and `mover` (the Jobs). Docs: docs/image.md.
# The second stage starts from nothing, so the image has no shell, no package manager, no pip and no compiler.
ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS build
# pip's own variables, for whoever builds behind a mirror or from a folder of wheels; unset, pip does what it always does.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
WORKDIR /src
COPY requirements/build.txt requirements/image.txt requirements/
# An environment without pip: the base's own one fills it, by the hashes of the locks and from wheels alone.
RUN python3 -m venv --without-pip /opt/checkpoint-operator \
    && python3 -m pip --python /opt/checkpoint-operator/bin/python3 install --no-cache-dir --no-compile --no-deps \
        --only-binary :all: --require-hashes -r requirements/image.txt \
    && python3 -m venv --without-pip /opt/build \
    && python3 -m pip --python /opt/build/bin/python3 install --no-cache-dir --no-deps \
        --only-binary :all: --require-hashes -r requirements/build.txt
COPY deploy/image/rootfs.py deploy/image/
RUN python3 deploy/image/rootfs.py base /opt/checkpoint-operator /base
COPY pyproject.toml README.md ./
COPY operator/ operator/
RUN /opt/build/bin/python3 -m hatchling build -t wheel -d /opt/wheel \
    && python3 -m pip --python /opt/checkpoint-operator/bin/python3 install --no-cache-dir --no-compile --no-deps --no-index \
        /opt/wheel/*.whl \
    && python3 deploy/image/rootfs.py package /opt/checkpoint-operator /package

FROM scratch
ARG PYTHON_IMAGE
ARG VERSION=0.1.0
ARG REVISION
LABEL org.opencontainers.image.title="checkpoint-operator" \
      org.opencontainers.image.description="Moves training checkpoints from volumes to object stores: the operator and its mover" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
COPY --from=build /base/ /
COPY --from=build /package/ /
# Bytecode is in the image; /tmp is the one place that may be written (a volume, where the root is read-only).
# No plugin of pydantic is looked for: every start would read the metadata of all packages for it.
ENV PATH=/opt/checkpoint-operator/bin \
    HOME=/tmp \
    LANG=C.UTF-8 \
    PYDANTIC_DISABLE_PLUGINS=__all__ \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 65532:65532
# No entry point: who runs the image says which of the two (`command: [mover]`).
CMD ["operator"]
