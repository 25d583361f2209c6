# keepwarm on CPUs: docker build -f docker/cpu.Dockerfile -t keepwarm:cpu .
# For a smaller image, name the index of torch's CPU builds: --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.11-slim-bookworm

ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt . \
    && useradd --uid 1000 --create-home keepwarm

USER 1000
WORKDIR /home/keepwarm
ENTRYPOINT ["keepwarm"]
CMD ["--help"]
