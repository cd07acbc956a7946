# The image of every worker and command: Python, the hash-pinned dependencies of requirements/base.txt, and our three packages.
#
#   docker build -t headgate .
#
# Nothing but the installer runs while it is built: no compiler is needed, for every dependency has a wheel. The final stage has no
# installer. It runs as 65532, writes nothing, and takes SIGTERM itself: a worker is its own process 1 and starts no others.

# Any image with Python 3.11 or 3.12, for both stages: what is installed in the first runs with the Python of the second. The digest is that of the index
# (amd64 and arm64) of October 2026. Renew it with each release, for a digest stands still while the tag gets security updates:
# `docker buildx imagetools inspect python:3.12-slim-bookworm` prints the newest.
ARG BASE=python:3.12-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3

FROM ${BASE} AS build
# A mirror, where there is no way out.
ARG PIP_INDEX_URL
COPY requirements/base.txt /tmp/base.txt
# The environment has no pip of its own: the first one installs into it.
RUN python3 -m venv /opt/installer \
 && python3 -m venv --without-pip /opt/headgate \
 && /opt/installer/bin/pip --python /opt/headgate/bin/python install \
      --no-cache-dir --disable-pip-version-check --no-input --require-hashes --only-binary :all: -r /tmp/base.txt
COPY shard_config /opt/headgate/app/shard_config
COPY ingest /opt/headgate/app/ingest
COPY workers /opt/headgate/app/workers
# What NumPy and SciPy bring to test themselves with is a tenth of everything.
RUN find /opt/headgate/lib -type d -name tests \( -path '*/numpy/*' -o -path '*/scipy/*' \) -prune -exec rm -rf {} +
# Ours beside the dependencies, so that nothing depends on a working directory; compiled, for the file system is read-only.
RUN site=$(/opt/headgate/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
 && mv /opt/headgate/app/* "$site" && rmdir /opt/headgate/app \
 && printf '#!/opt/headgate/bin/python\nimport sys\nfrom workers.cli import main\nsys.exit(main())\n' > /opt/headgate/bin/headgate \
 && chmod 755 /opt/headgate/bin/headgate \
 && /opt/headgate/bin/python -m compileall -q "$site/shard_config" "$site/ingest" "$site/workers"

FROM ${BASE}
# A base that brings pip leaves it here.
RUN rm -rf /usr/local/lib/python3*/site-packages/* /usr/local/lib/python3*/ensurepip /usr/local/bin/pip*
COPY --from=build /opt/headgate /opt/headgate
ENV PATH=/opt/headgate/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
ARG VERSION=0.1.0
ARG REVISION
LABEL org.opencontainers.image.title="headgate" \
      org.opencontainers.image.description="The metrics of hundreds of AWS accounts in one trustworthy, affordable, queryable store." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 65532:65532
WORKDIR /
EXPOSE 9100
# The exec form: signals reach the worker.
ENTRYPOINT ["headgate"]
CMD ["--help"]
