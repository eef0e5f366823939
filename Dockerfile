# A CPU image of `dsv3`: docker build -t dsv3-ref . && docker run --rm -it -v "$PWD:/data" dsv3-ref
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml MANIFEST.in LICENSE ./
COPY docs/package.md docs/package.md
COPY dsv3_ref dsv3_ref
COPY kernels kernels
RUN python -m venv /opt/dsv3 \
    && /opt/dsv3/bin/pip install --no-cache-dir "torch>=2.11,<3" --index-url https://download.pytorch.org/whl/cpu \
    && /opt/dsv3/bin/pip install --no-cache-dir ".[serve]"

FROM python:3.13-slim
RUN useradd --create-home learner && mkdir /data && chown learner /data
COPY --from=build /opt/dsv3 /opt/dsv3
ENV PATH=/opt/dsv3/bin:$PATH
USER learner
WORKDIR /data
ENTRYPOINT ["dsv3"]
CMD ["train", "--config", "tiny"]
