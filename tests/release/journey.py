"""The newcomer's journey: a clean environment, the wheel, its README, a chain and an index.

    python -m tests.release.journey [dist/amulet_integrations-….whl]

Every snippet of the README runs as a program of its own, then what a newcomer writes next
(`tests/release/newcomer/`). The last line says how long it took beyond downloads and installing:
by the clock, and in processor time, which other work on the machine doesn't lengthen.
"""

from __future__ import annotations

import re
import resource
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tests.release.environments import Environment, install_models, make, newest_wheel

LIMIT = 300.0  # seconds
SERVER = "http://127.0.0.1:8000"  # the README's
# Clients of the server in the README's snippets; who reads these has them, and no extra does.
CLIENTS = ("langchain-openai>=1", "llama-index-llms-openai-like>=0.8")
OWN = Path(__file__).parent / "newcomer"


def main(wheel: Path) -> float:
    """Make the journey and return its processor time in seconds; raises where a step fails."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        environment = make(Path(folder) / "venv", share_torch=False)
        environment.pip("install", "--quiet", f"{wheel}[all]", *CLIENTS)
        install_models(environment)
        print(f"installed in {time.perf_counter() - started:.0f} s")
        snippets = readme_snippets(environment)
        own = {path.name: path.read_text("utf-8") for path in sorted(OWN.glob("*.py"))}
        spent = 0.0
        started = time.perf_counter()
        # The embedded model is converted at its first use, and that is part of the journey.
        cache = {"AMULET_CACHE": f"{folder}/cache"}
        for name, code in {**snippets, **own}.items():
            before = _children()
            with _server(environment, cache) if SERVER in code else nullcontext():
                done = environment.run("-c", code, further=cache)
            spent += (used := _children() - before)
            print(f"\n--- {name}: {used:.0f} s of processor time\n{done.stdout.strip()}")
        clock = time.perf_counter() - started
    print(f"\nThe journey took {clock:.0f} s by the clock, {spent:.0f} s of processor time.")
    return spent


def readme_snippets(environment: Environment) -> dict[str, str]:
    """Return the Python snippets of the README that came with the wheel, by their first lines.

    Raises:
        LookupError: the wheel carries no README with snippets.
    """
    of_package = "importlib.metadata.metadata('amulet-integrations')"
    code = f"import importlib.metadata; print({of_package}.get_payload())"
    readme = environment.run("-c", code).stdout
    found = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if len(found) < 3:
        raise LookupError("The wheel's description is not the README, or has lost its snippets.")
    return {f"README {i}: {snippet.splitlines()[0]}": snippet for i, snippet in enumerate(found, 1)}


@contextmanager
def _server(environment: Environment, further: dict[str, str]) -> Iterator[None]:
    """Run `amulet serve`, as the README says to do for its snippets about clients."""
    with environment.start("amulet", "serve", further=further) as server:
        try:
            while not _is_ready():
                if server.poll() is not None:
                    raise RuntimeError("`amulet serve` ended; is something else on its port?")
                time.sleep(0.2)
            yield
        finally:
            server.terminate()


def _is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"{SERVER}/health"):
            return True
    except urllib.error.URLError:  # nobody listens yet, or it is loading its model
        return False


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    used = main(Path(arguments[0]).resolve() if arguments else newest_wheel())
    if used > LIMIT:
        sys.exit(f"expected at most {LIMIT:.0f} s of processor time")
