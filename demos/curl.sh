#!/bin/sh
# The reference's curl lines, and others, against a server: moss-jt serve moss-tiny --port 8000 --port 19324
set -eu
SERVER=${1:-http://127.0.0.1:8000}
REFERENCE=${2:-http://127.0.0.1:19324}
JSON="Content-Type: application/json"

# The reference's moss_api_demo.py: a conversation goes on by its uid.
first=$(curl -s -X POST "$REFERENCE" -H "$JSON" -d '{"prompt": "你是谁？"}')
printf '%s\n' "$first"
uid=$(printf '%s' "$first" | sed 's/.*"uid":"\([^"]*\)".*/\1/')
curl -s -X POST "$REFERENCE" -H "$JSON" -d "{\"prompt\": \"你是什么？\", \"uid\": \"$uid\"}"
echo

# OpenAI's interface, as a stream.
curl -sN "$SERVER/v1/chat/completions" -H "$JSON" \
    -d '{"messages": [{"role": "user", "content": "What is 37 times 48?"}], "stream": true}'

# MOSS Vortex's: up to the end of the commands, which the client runs.
curl -s "$SERVER/inference" -H "$JSON" \
    -d '{"x": "<|Human|>: What is 37 times 48?<eoh>\n<|Inner Thoughts|>:", "temperature": 0.01, "Calculator": true}'
echo
