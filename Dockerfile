# One image for worker, beat, flower and the command line.
# Add your operations in an image on top of it, or mount them as a volume: docs/deployment.md.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY rlm_tasks rlm_tasks
COPY scheduler scheduler
COPY resilience resilience
RUN python -m venv /opt/rlm \
    && /opt/rlm/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[flower,llm,otel,redbeat]' \
    && /opt/rlm/bin/pip uninstall --yes --quiet setuptools pip

FROM python:3.11-slim
ENV PATH=/opt/rlm/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# USER is a number, so that Kubernetes can check that it is not root.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin rlm
COPY --from=build /opt/rlm /opt/rlm
WORKDIR /app
USER 10001:10001
CMD ["celery", "-A", "rlm_tasks", "worker", "-c", "auto", "-l", "info"]
