# The operator's image. Any base with Python 3.11 and its venv module does.
#   docker build -t finetune-operator .
# Behind a private CA: --build-arg SSL_CERT_FILE=... --build-arg UV_SYSTEM_CERTS=1, the file mounted into the build.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS uv
ARG SSL_CERT_FILE
RUN python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --quiet --no-cache-dir ${SSL_CERT_FILE:+--cert "$SSL_CERT_FILE"} uv==0.13.9

# The locked dependencies as plain lists: whatever else changes in pyproject.toml leaves the layers made of them alone.
FROM uv AS requirements
ARG UV_SYSTEM_CERTS
WORKDIR /src
COPY pyproject.toml uv.lock ./
RUN /opt/uv/bin/uv export --quiet --frozen --no-dev --no-emit-project --no-header --no-annotate --extra operator --output-file /operator.txt \
 && touch --date=@0 /operator.txt

# Our own packages, as a wheel's content: entry points and metadata included.
FROM uv AS project
ARG UV_SYSTEM_CERTS
WORKDIR /src
COPY pyproject.toml README.md ./
COPY crds crds
COPY operator operator
COPY trainer_image trainer_image
RUN /opt/uv/bin/uv build --quiet --no-cache --wheel --out-dir /wheel \
 && /opt/uv/bin/uv pip install --quiet --no-cache --no-deps --compile-bytecode --python python3 --target /project /wheel/*.whl

FROM ${BASE}
RUN groupadd --gid 10001 finetune && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp finetune
ARG SSL_CERT_FILE
ARG UV_SYSTEM_CERTS
WORKDIR /app
# Dependencies: a layer that changes with what is locked only.
COPY --from=requirements /operator.txt ./requirements.txt
RUN python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --quiet --no-cache-dir ${SSL_CERT_FILE:+--cert "$SSL_CERT_FILE"} uv==0.13.9 \
 && /opt/uv/bin/uv venv --quiet --python python3 \
 && /opt/uv/bin/uv pip install --quiet --no-cache --compile-bytecode --requirement requirements.txt \
 && rm -r /opt/uv
# The base may come without the standard library's bytecode, and no pod could keep what it compiles: it would at each start.
RUN python3 -m compileall -q -x '/(site-packages|dist-packages|tests?|lib2to3)/' "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=project /project /app/project
ENV PATH=/app/.venv/bin:$PATH PYTHONPATH=/app/project PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["python", "-m", "finetune_operator"]
