"""Compares every decoder of Transformers with `generate`; writes docs/models-table.md.

python -m tests.coverage.scan            all of them
python -m tests.coverage.scan llama ...  some, without writing
python -m tests.coverage.scan --keep results.json --most 40
                                         the next forty that the file doesn't hold yet
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

from tests.coverage.check import Result, examine
from tests.coverage.models import Entry, entries

LIMIT = 90  # seconds of a processor for one model
PAGE = Path(__file__).parents[2] / "docs" / "models-table.md"
HEAD = """# Model types

Written by `make coverage` with Transformers {version}: {count} model types and variants, each as
a tiny model with random weights in float64 (float32 where it can't be). What is decoded on a CPU is
compared token by token with Transformers' `generate`: a plain answer, a steered one (with its
guidance, or a `generate` for each row where that fails), four answers of unlike lengths in one
batch, and a conversation's second turn over what was kept of the first. There are two ways of
decoding: [in rows, and row after row](models.md#which-models). "image-text" is the class that also
reads images, decoded without any; what follows a colon is a setting that checkpoints have.

{summary}

| model type | tokens | decoded | kinds of layers |
|---|---|---|---|
"""
WHY = """
## Why row after row

"""
NOT_COMPARED = """
## Not compared

Transformers can't build these tiny models here, or its `generate` fails with them:

"""
VERDICTS = {
    "exact": "the same",
    "wrong": "**others**",
    "fails": "**fails**",
    "refused": "refused",
    "no reference": "not compared",
}


def guarded(entry: Entry) -> Result:
    """Examine in a child process: what the model loads, leaks or breaks is its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        try:
            said = json.dumps(examine(entry))
        except BaseException as error:
            said = json.dumps(
                Result(entry.label, "fails", note="".join(traceback.format_exception(error)[-3:]))
            )
        os.write(writing, said[:60000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        return Result(entry.label, "fails", note=f"it took {LIMIT} s, or crashed")
    return Result(*json.loads(said))


def page(results: list[Result]) -> str:
    """Return the table as a page of the documentation."""
    counts = Counter(result.verdict for result in results)
    ways = Counter(result.way for result in results if result.verdict == "exact")
    summary = (
        f"The same tokens: {counts['exact']} ({ways['in rows']} in rows, {ways['row after row']} "
        f"row after row). Others: {counts['wrong']}. Fails: {counts['fails']}. Refused, since they "
        "have an encoder, read an image with every text or don't write token by token: "
        f"{counts['refused']}. Not compared, since Transformers "
        f"can't decode the tiny model: {counts['no reference']}."
    )
    results = sorted(results, key=lambda result: result.label)
    lines = [
        f"| {r.label} | {VERDICTS[r.verdict]} | {r.way} | {r.kinds} |"
        for r in results
        if r.verdict != "no reference"
    ]
    slow: dict[str, list[str]] = {}
    for result in results:
        if result.verdict == "exact" and result.note:
            slow.setdefault(result.note, []).append(result.label)
    why = [f"- {reason}: {', '.join(labels)}" for reason, labels in sorted(slow.items())]
    left = [f"- {r.label}: `{_quotable(r.note)}`" for r in results if r.verdict == "no reference"]
    version = transformers.__version__
    head = HEAD.format(version=version, count=len(results), summary=summary)
    parts = [head + "\n".join(lines)]
    for title, found in ((WHY, why), (NOT_COMPARED, left)):
        parts += [title + "\n".join(found)] if found else []
    return "\n".join(parts) + "\n"


def _quotable(error: str) -> str:
    """Return an error's first sentence, without what is another one in another run."""
    sentence = error.partition(". ")[0]
    return re.sub(r"0x[0-9a-f]+|/\S*/", "…", sentence.replace("`", "'"))[:160].strip()


def main() -> None:
    """Examine all model types, or those named."""
    parser = argparse.ArgumentParser(prog="python -m tests.coverage.scan")
    parser.add_argument("labels", nargs="*", help="model types; without them, all")
    parser.add_argument("--keep", type=Path, help="file of results, which are not found again")
    parser.add_argument("--most", type=int, help="how many to examine")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    known: dict[str, Result] = {}
    if given.keep and given.keep.is_file():
        known = {one[0]: Result(*one) for one in json.loads(given.keep.read_text())}
    labels = [entry.label for entry in entries()]
    begun = time.monotonic()
    asked = [e for e in entries() if (e.label in given.labels or not given.labels)]
    asked = [e for e in asked if given.labels or e.label not in known][: given.most]
    for entry in asked:
        result = known[entry.label] = guarded(entry)
        print(f"{result.label:36} {result.verdict:13} {result.way:14} {result.note}", flush=True)
        if given.keep:
            given.keep.write_text(json.dumps(list(known.values())))
    results = [known[label] for label in labels if label in known]
    counts = Counter(result.verdict for result in results)
    print(dict(counts), f"{len(results)} in all, {time.monotonic() - begun:.0f} s")
    if len(results) == len(labels):
        PAGE.write_text(page(results), encoding="utf-8")
        print(PAGE)
    if counts["wrong"] or counts["fails"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
