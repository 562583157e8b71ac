# One image for the server and the workers: adapterctl from the locks, run by a user without rights.
#
#   docker build -t adapterctl:cpu .
#   docker build -t adapterctl:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
# Which build of torch: CPU alone unless another index of pytorch.org is named.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/adapterctl
ENV PATH=/opt/adapterctl/bin:$PATH
WORKDIR /src/adapterctl
COPY requirements.lock requirements-eval.lock requirements-service.lock ./
# As `make` does it: torch first, with its own dependencies, which differ by build; the locks are complete for the rest.
RUN pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple \
        --constraint requirements.lock --constraint requirements-eval.lock --constraint requirements-service.lock \
        "$(grep '^torch==' requirements-eval.lock)" \
    && pip install --no-deps \
        --requirement requirements.lock --requirement requirements-eval.lock --requirement requirements-service.lock
COPY . .
RUN pip install --no-deps .

FROM python:${PYTHON}
RUN groupadd --gid 10001 adapterctl \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin adapterctl \
    && install --directory --owner 10001 --group 10001 /data /data/tmp
COPY --from=build /opt/adapterctl /opt/adapterctl
# Everything that is written goes below /data: locks, logs of jobs, and what a merge fetches and makes.
ENV PATH=/opt/adapterctl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    TMPDIR=/data/tmp \
    ADAPTERCTL_HOME=/data
USER 10001:10001
WORKDIR /data
EXPOSE 5000
ENTRYPOINT ["adapterctl"]
CMD ["serve", "--host", "0.0.0.0"]
