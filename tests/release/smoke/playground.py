"""The extra `playground`: the page, its script and its style come out of the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.parse
import urllib.request

server = subprocess.Popen(
    [f"{sys.executable.rpartition('/')[0]}/amulet", "playground", "--port", "0"],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
)
try:
    said = ""
    while not (found := re.search(r"Playground: (http://\S+)", said)):
        line = server.stdout.readline()  # type: ignore[union-attr]
        assert line, f"the server ended:\n{said}"
        said += line
    url = found[1]
    page = urllib.request.urlopen(url).read().decode()
    assets = re.findall(r'(?:src|href)="([^":]+\.(?:js|css|svg))"', page)
    assert {asset.rpartition(".")[2] for asset in assets} >= {"js", "css"}, page
    for asset in assets:
        answer = urllib.request.urlopen(urllib.parse.urljoin(url, asset))
        print(asset, answer.headers["content-type"], len(answer.read()), "bytes")
finally:
    server.terminate()
    assert server.wait(60) == 0
