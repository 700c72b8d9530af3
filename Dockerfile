# moss-jt serve on a CPU. A reading of the documents is all that could check this file: it was never built.
#
#   docker build -t moss-jt .
#   docker run -p 127.0.0.1:8000:8000 -v moss:/data -e MOSS_JT_API_KEY=... moss-jt moss-tiny
#   docker run -v moss:/data --entrypoint moss-jt moss-jt convert fnlp/moss-moon-003-sft-plugin-int4
FROM python:3.11-slim

# Jittor compiles its operators when it first runs, so the compiler stays.
RUN apt-get update && apt-get install -y --no-install-recommends g++ make libgomp1 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/moss-jt
COPY . .
RUN pip install --no-cache-dir ".[serve,search,pictures]" && useradd --create-home moss && mkdir /data && chown moss /data

# Models, conversations and what Jittor compiles are in /data, and outlive the container.
ENV MOSS_JT_HOME=/data/moss-jt JITTOR_HOME=/data
USER moss
VOLUME /data
EXPOSE 8000
# A large model takes minutes to load, and /health says 503 until it is there.
HEALTHCHECK --start-period=15m --interval=30s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Docker's own port mapping decides who reaches it; without a key nobody does: give MOSS_JT_API_KEY.
ENTRYPOINT ["moss-jt", "serve", "--host", "0.0.0.0"]
CMD ["moss-tiny"]
