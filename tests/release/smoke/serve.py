"""The extra `serve`: the server starts, answers a steered request, and goes at SIGTERM.

With an argument it first runs that command, given the server's address as its last argument.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

server = subprocess.Popen(
    [f"{sys.executable.rpartition('/')[0]}/amulet", "serve", "--port", "0"],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
)
try:
    said = ""
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
        line = server.stdout.readline()  # type: ignore[union-attr]
        assert line, f"the server ended:\n{said}"
        said += line
    url = found.group()
    while True:  # it answers 503 while the model is loaded
        try:
            urllib.request.urlopen(f"{url}/health")
            break
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(0.2)
    body = {
        "model": json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"],
        "messages": [{"role": "user", "content": "What is tea?"}],
        "max_tokens": 16,
        "preference": "Talk like a pirate.",
    }
    headers = {"Content-Type": "application/json"}
    sent = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", sent, headers)
    answer = json.load(urllib.request.urlopen(request))
    print(answer["choices"][0]["message"]["content"])
    assert answer["usage"]["completion_tokens"] == 16
    if sys.argv[1:]:
        subprocess.run([*sys.argv[1:], url], check=True)
finally:
    server.terminate()
    assert server.wait(60) == 0
