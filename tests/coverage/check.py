"""Compares answers with those of Transformers' `generate`, token by token."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor
from transformers.cache_utils import Cache

from amulet.backends.transformers.backend import TransformersBackend
from amulet.backends.transformers.general import CACHES, backend_of
from amulet.backends.transformers.support import why_not_in_rows
from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from amulet.errors import ModelError
from tests.coverage.models import END, Entry, build

TOKENS, STRENGTH = 14, 2.0
CHUNK = 24  # ids in one pass of a prefill: prompts take several
DRAWS = ((0, 1.6), (1, 2.5), (2, 4.0))  # seed and gain: a model that repeats itself tells little
VARIETY = 6
CACHED = {  # what a layer of a cache holds
    "DynamicLayer": "full attention",
    "DynamicSlidingWindowLayer": "sliding attention",
    "LinearAttentionLayer": "recurrent",
    "LinearAttentionAndFullAttentionLayer": "hybrid",
}

_numbers = random.Random(7)


def _ids(count: int) -> list[int]:
    return [_numbers.randrange(8, 256) for _ in range(count)]


BEGINNING = _ids(21)
SHORT, PLAIN, BASE, LONG = _ids(4), _ids(37), [*BEGINNING, *_ids(12)], [*BEGINNING, *_ids(44)]
PREFERRED, LONG_PREFERRED = [*BEGINNING, *_ids(19)], [*_ids(9), *LONG]


class Result(NamedTuple):
    """What was found of a model type.

    Attributes:
        label: its name.
        verdict: "exact", "wrong", "fails", "refused" or "no reference".
        way: "in rows" or "row after row"; "" where it is not decoded.
        kinds: of its layers.
        note: why, or which of the checks; why an exact one is decoded row after row.
    """

    label: str
    verdict: str
    way: str = ""
    kinds: str = ""
    note: str = ""


def examine(entry: Entry) -> Result:
    """Build a model and compare all that it decodes with `generate`."""
    try:
        model = _varied(entry)
    except Exception as error:
        return Result(entry.label, "no reference", note=f"can't be built: {_said(error)}")
    kinds = ", ".join(_kinds(model))
    try:
        backend_of(model)
    except ModelError as error:
        return Result(entry.label, "refused", kinds=kinds, note=_said(error))
    wide = copy.deepcopy(model)
    wide.set_experts_implementation("eager")  # the others take no float64
    wide = wide.double()
    try:
        generate(wide, [PLAIN])
    except Exception:  # it makes float32 tensors of its own
        wide = model
    reference = Reference(wide)
    if reference.failed:
        return Result(entry.label, "no reference", kinds=kinds, note=reference.failed)
    way, failed = "", []
    for name, check in CHECKS.items():
        backend = backend_of(wide)
        backend.chunk, backend.worth_sharing = min(backend.chunk, CHUNK), 8
        way = "in rows" if isinstance(backend, TransformersBackend) else "row after row"
        try:
            if not check(Engine(backend, prefix_bytes=2**26, drafts=True), reference):
                failed.append(name)
        except Exception as error:
            return Result(entry.label, "fails", way, kinds, f"{name}: {_said(error)}")
    if failed:
        return Result(entry.label, "wrong", way, kinds, ", ".join(failed))
    return Result(entry.label, "exact", way, kinds, why_not_in_rows(wide) or "")


def _varied(entry: Entry) -> Any:
    """Return the model whose plain answer has most different tokens."""
    best, most = None, -1
    for seed, gain in DRAWS:
        model = build(entry, seed, gain)
        try:
            variety = len(set(generate(model, [PLAIN])))
        except Exception:
            return model
        if variety > most:
            best, most = model, variety
        if most >= VARIETY:
            break
    return best


def _kinds(model: Any) -> list[str]:
    """Return the kinds of layers that the config names, or else those of the model's cache."""
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not kinds:
        try:
            with torch.no_grad():
                out = model(input_ids=torch.tensor([SHORT]), use_cache=True, return_dict=True)
        except Exception:  # it will be found below, by its own name
            return []
        cache = next((out[name] for name in CACHES if out.get(name) is not None), None)
        cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder's one
        if not isinstance(cache, Cache):
            return ["no cache" if cache is None else "a cache of its own"]
        kinds = [CACHED.get(type(layer).__name__, "other") for layer in cache.layers]
    return sorted({kind.replace("_", " ") for kind in kinds})


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def generate(model: Any, prompts: list[list[int]]) -> list[int]:
    """Return Transformers' greedy answer, guided where there is a second prompt."""
    ids, guided = torch.tensor([prompts[0]]), {}
    if len(prompts) == 2:
        base = torch.tensor([prompts[1]])
        guided = {
            "guidance_scale": 1 + STRENGTH,
            "negative_prompt_ids": base,
            "negative_prompt_attention_mask": torch.ones_like(base),
        }
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            **guided,
        )
    answer: list[int] = out[0, len(prompts[0]) :].tolist()
    return answer


class _Told(LogitsProcessor):  # type: ignore[misc]
    """Has `generate` write given ids."""

    def __init__(self, start: int, ids: list[int]) -> None:
        self._start, self._ids = start, ids

    def __call__(self, ids: Any, scores: Any) -> Any:
        place = ids.shape[1] - self._start
        if place >= len(self._ids):
            return scores
        told = torch.full_like(scores, -torch.inf)
        told[:, self._ids[place]] = 0
        return told


def told(model: Any, prompts: list[list[int]], guess: list[int]) -> list[int]:
    """Return the same, each row by a `generate` of its own that is told the answer so far.

    It is told all of a guess at once: as far as the guess is right, nothing need be repeated.
    """
    answer: list[int] = []
    while len(answer) < TOKENS and END not in answer:
        known = guess if guess[: len(answer)] == answer else list(answer)
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(len(known) + 1, TOKENS),
                    do_sample=False,
                    logits_processor=[_Told(len(prompt), known)],
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            rows.append([logits[0].double().log_softmax(-1) for logits in out.logits])
        for at in list(zip(*rows, strict=True))[len(answer) :]:
            answer.append(_guided(list(at)))
            if answer != known[: len(answer)]:
                break
    return answer


def _guided(rows: list[torch.Tensor]) -> int:
    return int((rows[-1] + (1 + STRENGTH) * (rows[0] - rows[-1])).argmax())


def whole_passes(model: Any, prompts: list[list[int]], positions: bool = False) -> list[int]:
    """Return the same by passes of all ids, without a cache."""
    options: dict[str, Any] = {"logits_to_keep": 1}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        options = {}
    answer: list[int] = []
    while len(answer) < TOKENS and END not in answer:
        rows = []
        for prompt in prompts:
            ids = torch.tensor([[*prompt, *answer]])
            if positions:
                options["position_ids"] = torch.arange(ids.shape[1])[None]
            with torch.no_grad():
                out = model(input_ids=ids, use_cache=False, **options)
            rows.append(out.logits[0, -1].double().log_softmax(-1))
        answer.append(_guided(rows))
    return answer


WAYS: list[Callable[..., list[int]]] = [
    generate,
    told,
    whole_passes,
    partial(whole_passes, positions=True),
]


class Reference:
    """What a model answers, as Transformers decodes it.

    Attributes:
        failed: why it can't, or "".
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[tuple[int, str], list[int] | None] = {}  # by the way and the prompts
        self.failed = ""
        self.answers([PLAIN])

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return the answer to a prompt, or to a preferred and a base one, by the first way.

        Guidance drops the cache of some models (Mamba), hands others too few ids (CPM-Ant), leaves
        the positions to the model where `generate` doesn't (RoBERTa), or fails: a `generate` of
        each row then tells what is right, or passes without a cache.
        """
        ways = (self._by(number, prompts) for number in range(len(WAYS)))
        found = next((answer for answer in ways if answer is not None), None)
        if found is None:
            return []
        self.failed = ""
        return [found]

    def agrees(self, prompts: list[list[int]], answer: list[int]) -> bool:
        """Whether an answer is the right one, by any of the ways."""
        return any(self._by(number, prompts, answer) == answer for number in range(len(WAYS)))

    def _by(
        self, number: int, prompts: list[list[int]], guess: list[int] | None = None
    ) -> list[int] | None:
        """Return the answer by one of the ways, which a guess only speeds up; None if it fails."""
        key = number, repr(prompts)
        if key not in self._known:
            try:
                options = {"guess": guess or []} if WAYS[number] is told else {}
                self._known[key] = WAYS[number](self.model, prompts, **options)
            except Exception as error:
                self._known[key] = None
                self.failed = self.failed or _said(error)
        return self._known[key]


def _asked(*prompts: list[int]) -> Generation:
    weights = [1 + STRENGTH] if len(prompts) == 2 else []
    return Generation(
        prompts=[list(prompt) for prompt in prompts],
        weights=weights,
        max_new_tokens=TOKENS,
        end_ids=frozenset({END}),
    )


def _alone(*prompts: list[int]) -> Callable[[Engine, Reference], bool]:
    def check(engine: Engine, reference: Reference) -> bool:
        generation = _asked(*prompts)
        engine.admit(generation)
        _run(engine)
        return reference.agrees(generation.prompts, generation.token_ids)

    return check


def _batch(engine: Engine, reference: Reference) -> bool:
    asked = [_asked(SHORT), _asked(PREFERRED, BASE), _asked(LONG_PREFERRED, LONG), _asked(PLAIN)]
    for generation in asked:
        engine.admit(generation)
        engine.step()
    _run(engine)
    return all(reference.agrees(one.prompts, one.token_ids) for one in asked)


def _next_turn(engine: Engine, reference: Reference) -> bool:
    first = _asked(PLAIN)
    engine.admit(first)
    _run(engine)
    second = _asked([*PLAIN, *first.token_ids, *SHORT])
    engine.admit(second)
    _run(engine)
    return reference.agrees(second.prompts, second.token_ids)


def _run(engine: Engine) -> None:
    while engine.running:
        engine.step()


CHECKS = {
    "plain": _alone(PLAIN),
    "steered": _alone(PREFERRED, BASE),
    "batch": _batch,
    "next turn": _next_turn,
}
