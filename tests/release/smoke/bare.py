"""Without any extra: the quick start works, and an error names the extra that is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import amulet_integrations  # noqa: F401  (needs no framework)
from amulet import Amulet, Grammar, MissingPackageError

for package in ("langchain_core", "llama_index", "fastapi", "openai", "matplotlib", "llguidance"):
    assert importlib.util.find_spec(package) is None, f"{package} came without its extra"

amulet = Amulet.embedded()
question = [{"role": "user", "content": "What is a black hole?"}]
plain = amulet.chat(question, max_new_tokens=60)
steered = amulet.chat(question, max_new_tokens=60, preference="Answer in one short sentence.")
print(plain.text, steered.text, sep="\n")
assert plain.text.startswith("A black hole is a region in space")
assert 0 < len(steered.text.split()) < len(plain.text.split())

for extra, attempt in (
    ("remote", lambda: Amulet.connect("http://127.0.0.1:9")),
    ("grammar", lambda: amulet.chat(question, grammar=Grammar.regex("[a-z]+"))),
    ("eval", lambda: amulet.strength_curve("Hi", "Be brief.", max_new_tokens=2).figure()),
):
    said = "nothing"
    try:
        attempt()
    except MissingPackageError as error:
        said = str(error)
    assert f"amulet-integrations[{extra}]" in said, said

folder = sys.executable.rpartition("/")[0]
version = subprocess.run([f"{folder}/amulet", "--version"], capture_output=True, text=True)
assert version.stdout.startswith("amulet "), version
doctor = subprocess.run([f"{folder}/amulet", "doctor"], capture_output=True, text=True)
assert doctor.returncode == 0, doctor.stdout
serve = subprocess.run([f"{folder}/amulet", "serve"], capture_output=True, text=True)
assert serve.returncode == 1, serve
assert "amulet-integrations[serve]" in serve.stderr, serve.stderr
