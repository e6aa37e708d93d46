FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY rlm_tasks rlm_tasks
COPY scheduler scheduler
COPY resilience resilience
RUN pip install --no-cache-dir -c constraints.txt .
USER nobody
CMD ["celery", "-A", "rlm_tasks", "worker", "-l", "info"]
