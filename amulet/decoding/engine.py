"""The decode loop: `admit`, `step`, `retire`. Ids in, ids out; it knows no text, chat or HTTP.

One forward pass per step covers all rows of all generations. The scores of a generation's rows are
combined into one distribution; one token is chosen from it and appended to all of its rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from traceback import clear_frames
from typing import Any

import torch

from amulet.backends.base import Backend
from amulet.decoding.choice import append_token, choose_tokens
from amulet.decoding.generation import Generation
from amulet.decoding.prefix_cache import LEAST, KeptRow, Prefixes, shared_length
from amulet.decoding.prompt_lookup import NARROW, Draft
from amulet.errors import OutOfMemoryError, is_out_of_memory, one_line

logger = logging.getLogger("amulet")

DRAFT_TOKENS = 24  # limit on all rows' tokens in a step that checks drafts; more is not cheap
TOGETHER = 8  # times a pass's cost: so many tokens of several generations are prefilled together
AHEAD = 512  # tokens of an answer for which memory is planned in advance


class Engine:
    """Decodes any number of generations together. Not thread-safe: see `Driver`.

    Args:
        backend: what computes logits.
        prefix_bytes: memory for finished rows, which later prompts with the same prefix reuse; 0
            keeps nothing.
        drafts: guess what an answer will copy from its prompt, and check it in one pass.
    """

    def __init__(self, backend: Backend, prefix_bytes: int = 0, drafts: bool = False) -> None:
        self.backend = backend
        self.drafts = drafts and backend.any_length
        self.running: list[Generation] = []
        # Held while tokens are appended; a reader that holds it never sees a partial update.
        self.handing_over: AbstractContextManager[Any] = nullcontext()
        # Called after each step for which a prefill pauses.
        self.paused: Callable[[], object] = lambda: None
        self.prefixes = Prefixes(prefix_bytes)
        self._state = backend.state()  # the weights with which the kept rows were computed
        self._owners: list[tuple[Generation, int]] = []  # row i's generation, and its prompt
        # Those whose prompts are being prefilled, in rows after those of `_owners`.
        self._filling: Sequence[Generation] = ()
        self._waited_for = 0  # tokens prefilled since the last step

    @torch.inference_mode()
    def admit(self, *generations: Generation) -> None:
        """Prefill prompts, decode the generations' first tokens, and add them to the batch.

        Prefixes that a generation's rows share with each other, with a running row or with a kept
        row are copied. While other generations run, the prefill pauses for a decode step every
        `Backend.chunk` tokens. After an error none of the generations has a token.

        Args:
            generations: one, or several without images; see `together`.

        Raises:
            OutOfMemoryError: out of memory; the running generations are not affected.
        """
        first, prompts = len(self._owners), [p for g in generations for p in g.prompts]
        longest = max(map(len, prompts))
        joined, self._filling = False, generations
        try:
            with self._naming_shortage(first + len(prompts), longest):
                ahead = min(max(g.max_new_tokens for g in generations), AHEAD)
                self.backend.renew(longest + ahead, idle=not self.running)
                self._notice_weights()
                for generation in generations:
                    generation.computed_with = self._state
                self.backend.reserve(first + len(prompts), longest + 1)
                logits = self._prefill(prompts, first)
                joining = [generation for generation in generations if not generation.done]
                if logits is not None and joining:
                    self._join(joining, first, logits)
                    joined = True
        finally:
            self._filling = ()
            self.backend.drop(len(self._owners))
            if not joined:  # all failed, or were cancelled meanwhile
                self._clear_if_idle(failed=True)
        self.sweep()

    def together(self, waiting: Sequence[Generation]) -> int:
        """Return how many of the first waiting generations are best admitted together.

        A pass has a cost of its own, which short prompts share; long prompts would only delay the
        first tokens of others. A prompt that begins like one before it is admitted later and copies
        that beginning.
        """
        cost, tokens, bases = self.backend.pass_cost, 0, list[list[int]]()
        if not self.backend.any_length:  # rows of uneven length can't share a pass
            return 1
        for count, generation in enumerate(waiting):
            base = generation.prompts[-1]
            found = [self._find(prompt)[1] for prompt in generation.prompts]
            tokens += sum(map(len, generation.prompts)) - sum(found)
            repeats = any(shared_length(base, other) >= found[-1] + cost for other in bases)
            if tokens > TOGETHER * cost or generation.images or repeats:
                return max(count, 1)
            if self.prefixes.limit:  # else nothing is copied
                bases.append(base)
        return len(waiting)

    def _join(self, joining: Sequence[Generation], first: int, logits: torch.Tensor) -> None:
        """Add prefilled generations to the batch and decode their first tokens; undone on error.

        Args:
            joining: those of the prefilled ones that were not cancelled, at least one.
            first: the first of all prefilled rows.
            logits: after the prompt of each of these rows, `[rows, vocab]`.
        """
        place = len(self._owners)  # rows before `first` may have left during the prefill
        owners = [(g, i) for g in self._filling for i in range(len(g.prompts))]
        order = [row for row, (generation, _) in enumerate(owners) if generation in joining]
        for target, row in enumerate(order, place):
            if target < first + row:
                generation, i = owners[row]
                self.backend.copy_row(first + row, target, len(generation.prompts[i]))
        for generation in joining:
            self._prepare(generation, logits)
        self._owners += [owners[row] for row in order]
        self.running += joining
        try:
            self._decide(joining, logits, order)
        except BaseException:
            del self._owners[place:]
            self.running = [g for g in self.running if g not in joining]
            raise

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token of every running generation; finished ones leave the batch."""
        self._waited_for = 0
        if not self.running:
            return
        ids = [[generation.token_ids[-1]] for generation, _ in self._owners]
        starts = [
            len(generation.prompts[i]) + len(generation.token_ids) - 1
            for generation, i in self._owners
        ]
        drafts = self._draft(len(ids))
        width = 1 + max(map(len, drafts.values()))
        if width > 1:
            for row, (generation, _) in enumerate(self._owners):
                ids[row] += drafts[generation]
                ids[row] += [0] * (width - len(ids[row]))
        with self._naming_shortage(len(ids), max(starts)):
            self.backend.reserve(len(ids), max(starts) + width)
            with self.backend.working(len(ids) * width):
                logits = self.backend.step(ids, starts)  # [rows, width, vocab]
                self._accept(drafts, logits)
        self.sweep()

    def _draft(self, rows: int) -> dict[Generation, list[int]]:
        """Guess the next tokens of each running generation; see `Draft`."""
        drafts: dict[Generation, list[int]] = {generation: [] for generation in self.running}
        # No row may grow beyond its answer's limit, not even by tokens that are discarded.
        limit = min(g.max_new_tokens - len(g.token_ids) for g in self.running) - 1
        limit = min(limit, DRAFT_TOKENS // rows - 1) if self.drafts else 0
        if limit >= NARROW:
            for generation in self.running:
                if generation.draft is None:
                    generation.draft = Draft([max(i, 0) for i in generation.prompts[-1]])
                drafts[generation] = generation.draft.propose(generation.token_ids, limit)
        return drafts

    def _accept(self, drafts: dict[Generation, list[int]], logits: torch.Tensor) -> None:
        """Decode one token of each generation, plus one for each token guessed correctly.

        Args:
            drafts: the tokens guessed for each generation.
            logits: `[rows, width, vocab]`, after each row's last token and its guessed tokens.
        """
        going = list(self.running)
        rows = {owner: row for row, owner in enumerate(self._owners)}
        for place in range(logits.shape[1]):
            order = [rows[g, i] for g in going for i in range(len(g.prompts))]
            self._decide(going, logits[:, place], order)
            ended = [g for g in going if g.done or drafts[g][place : place + 1] != g.token_ids[-1:]]
            for generation in ended:
                if generation.draft is not None and drafts[generation]:
                    length = len(generation.token_ids)
                    generation.draft.learn(len(drafts[generation]), place, length)
            going = [generation for generation in going if generation not in ended]
            if not going:
                return

    def retire(self, generation: Generation, reason: str = "cancelled") -> None:
        """End a generation now; its rows leave the batch."""
        if not generation.done:
            generation.finish_reason = reason
        self.sweep()

    @torch.inference_mode()
    def sweep(self) -> None:
        """Drop the rows of finished generations; the last rows move into their places."""
        # Read once: other threads may cancel at any time.
        ended = {generation for generation in self.running if generation.done}
        if not ended:
            return
        self._keep_ended()
        owners = list(self._owners)
        for row in range(len(owners) - 1, -1, -1):
            if owners[row][0] in ended:
                generation, i = owners.pop()
                if row < len(owners):
                    length = len(generation.prompts[i]) + len(generation.token_ids) - 1
                    self.backend.copy_row(len(owners), row, length)
                    owners[row] = (generation, i)
        running = [generation for generation in self.running if generation not in ended]
        # Last and in one statement: an interrupted caller that cancels leaves the state unchanged.
        self._owners, self.running = owners, running
        if not self._filling:
            self.backend.drop(len(owners))
        self._clear_if_idle()

    def _notice_weights(self) -> None:
        """If the model's weights have changed, discard everything computed with the old ones."""
        state = self.backend.state()
        if state is not self._state:
            self.prefixes.clear()
            self._state = state

    def _clear_if_idle(self, failed: bool = False) -> None:
        if self.running or self._filling:
            return
        if failed:
            self.backend.clear()
        else:
            self.backend.rest()

    def _keep_ended(self) -> None:
        """Keep finished rows for later prompts with the same prefix; keep none on an error."""
        if not any(map(self._may_keep, self.running)):
            return
        with self._or_keep_nothing():
            self._notice_weights()
            for row, (generation, i) in enumerate(self._owners):
                if self._may_keep(generation):
                    ids = (*generation.prompts[i], *generation.token_ids[:-1])
                    self._keep(generation, row, ids)

    def _keep(self, generation: Generation, row: int, ids: tuple[int, ...]) -> None:
        """Keep a generation's row, unless other weights were noticed since it was admitted."""
        is_current = generation.computed_with is self._state
        if is_current and self.prefixes.takes(len(ids), self.backend.row_bytes(len(ids))):
            saved = self.backend.save_row(row, len(ids))
            self.prefixes.keep(KeptRow(ids, saved, self.backend.least(row)))

    @contextmanager
    def _or_keep_nothing(self) -> Iterator[None]:
        """Discard all kept rows if the block fails; no answer fails because of it."""
        try:
            yield
        except Exception as error:
            logger.info("No rows are kept: %.200s", one_line(error))
            self.prefixes.clear()  # running answers need the memory more

    def _may_keep(self, generation: Generation) -> bool:
        return bool(self.prefixes.limit) and generation.finish_reason in ("stop", "length")

    def fail_all(self, error: BaseException) -> None:
        """End every running generation with an error and free the cache."""
        for generation in self.running:
            generation.fail(error)
        self.running, self._owners = [], []
        self._filling = ()
        self.backend.clear()

    def _prepare(self, generation: Generation, logits: torch.Tensor) -> None:
        if not generation.sampling.is_greedy:
            generation.generator = torch.Generator(device=logits.device)
            if generation.seed is None:
                generation.generator.seed()
            else:
                generation.generator.manual_seed(generation.seed)
        if generation.sampling.repetition_penalty != 1.0:
            seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            plain = generation.prompts[-1] if generation.plain is None else generation.plain
            seen[torch.tensor(plain, device=logits.device)] = True
            generation.seen = seen

    def _prefill(self, prompts: Sequence[list[int]], first: int) -> torch.Tensor | None:
        """Fill the rows from `first` on; return the logits after each prompt, `[rows, vocab]`.

        Return None if all of the generations were cancelled during the prefill.
        """
        filled: list[int] = []
        for generation in self._filling:
            begun = self._begin(generation, first + len(filled))
            if begun is None:
                return None
            filled += begun
        left = [len(prompt) - length for prompt, length in zip(prompts, filled, strict=True)]
        # An answer ends within the model's window. Beyond it, padding may have no position.
        end = max(max(map(len, g.prompts)) + g.max_new_tokens for g in self._filling)
        room = [end - length for length in filled]
        logits: dict[int, torch.Tensor] = {}
        for rows in share_passes(left, room, self.backend):
            while any(filled[i] < len(prompts[i]) for i in rows):
                width = self._width(max(len(prompts[i]) - filled[i] for i in rows))
                chunks = [prompts[i][filled[i] : filled[i] + width] for i in rows]
                starts = [filled[i] for i in rows]
                keep = sorted({len(chunk) - 1 for chunk in chunks})
                if not self._give_way(width * len(rows)):
                    return None
                self.backend.reserve(first + len(prompts), max(starts) + width)
                # Padding on the right is harmless: its columns are beyond the row's end.
                out = self.backend.forward(
                    [chunk + [0] * (width - len(chunk)) for chunk in chunks],
                    starts,
                    first + rows[0],
                    keep,
                    self._filling[0].images,
                )
                for place, (i, chunk) in enumerate(zip(rows, chunks, strict=True)):
                    filled[i] += len(chunk)
                    logits[i] = out[place, keep.index(len(chunk) - 1)]
        for generation in self._filling:
            generation.images = ()  # their columns are computed
        return torch.stack([logits[i] for i in range(len(prompts))])

    def _begin(self, generation: Generation, first: int) -> list[int] | None:
        """Copy what a generation's rows share with others and with each other.

        Return how many ids of each prompt its row has then; None as for `_prefill`.
        """
        prompts = generation.prompts
        filled = [self._reuse(prompt, first + i) for i, prompt in enumerate(prompts)]
        generation.cached_tokens = filled[0]
        # The length of each row's common prefix with the base row, which is filled first.
        common = [common_prefix(prompt, prompts[-1]) for prompt in prompts[:-1]]
        base = len(common)
        for i, length in enumerate(common):
            length = min(length, filled[i])
            if filled[-1] < length and self.backend.least(first + i) <= length:
                self.backend.copy_row(first + i, first + base, length)
                filled[-1] = length
        # A separate pass for the shared prefix must pay off: the passes after it then start at a
        # cached position, which takes a mask on a GPU and more work elsewhere.
        shared = max(common, default=0)
        spared = sum(
            max(length - max(own, filled[-1]), 0)
            for length, own in zip(common, filled, strict=False)
        )
        if spared < max(self.backend.worth_sharing, max(map(len, prompts)) - shared):
            shared = 0
        branch = self._branch(prompts[-1], filled[-1])
        stops = {shared, branch}
        if not self.backend.any_length:  # a row can be copied only where it is
            stops.add(filled[-1])
        for stop in sorted(stops):
            computes = filled[-1] < stop
            while filled[-1] < stop:
                width = self._width(stop - filled[-1])
                if not self._give_way(width):
                    return None
                chunk = prompts[-1][filled[-1] : filled[-1] + width]
                self.backend.forward(
                    [chunk], [filled[-1]], first + base, [width - 1], generation.images
                )
                filled[-1] += width
            if computes and (stop == branch or not self.backend.any_length):
                with self._or_keep_nothing():
                    self._keep(generation, first + base, tuple(prompts[-1][:stop]))
            for i, length in enumerate(common):
                length = min(length, filled[-1])
                if filled[i] < length and self.backend.least(first + base) <= length:
                    self.backend.copy_row(first + base, first + i, length)
                    filled[i] = length
        return filled

    def _branch(self, prompt: list[int], filled: int) -> int:
        """Return where a prompt parts from a kept row that can't be cut back to there, or 0.

        A row is saved there, for the next prompt that begins alike.
        """
        length = min(self.prefixes.seen(prompt), len(prompt) - 1)
        return length if length - filled >= self.backend.worth_sharing else 0

    def _reuse(self, prompt: list[int], row: int) -> int:
        """Copy the prompt's longest prefix from a running or kept row; return its length."""
        source, length = self._find(prompt)
        if isinstance(source, KeptRow):
            self.backend.load_row(row, source.saved, length)
        elif source is not None:
            self.backend.copy_row(source, row, length)
        return length

    def _find(self, prompt: list[int]) -> tuple[KeptRow | int | None, int]:
        """Return the kept row, or the number of the running one, to copy a prompt's prefix from.

        Also its length. The prompt's last id is never copied: its logits are needed.
        """
        if not self.prefixes.limit:
            return None, 0
        kept, length = self.prefixes.find(prompt)
        length = min(length, len(prompt) - 1)
        running, longest = None, 0
        for other, (generation, i) in enumerate(self._owners):
            if generation.computed_with is not self._state:
                continue
            shared = min(shared_length(generation.prompts[i], prompt), len(prompt) - 1)
            if shared > longest and shared >= self.backend.least(other):
                running, longest = other, shared
        if running is not None and longest > max(length, LEAST):
            return running, longest
        return (kept, length) if length else (None, 0)

    def _give_way(self, tokens: int) -> bool:
        """Before a pass of `tokens` tokens, decode a step of the running generations if it is due.

        At most `Backend.chunk` tokens are prefilled between two steps, of one or several prompts.

        Returns:
            False if all generations being prefilled were cancelled during the step.
        """
        if self._waited_for + tokens > self.backend.chunk:
            try:
                self.step()
            except Exception as error:
                self.fail_all(error)
                raise
            self.paused()
        self._waited_for += tokens
        return not all(generation.done for generation in self._filling)

    def _decide(
        self, generations: Sequence[Generation], logits: torch.Tensor, order: Sequence[int]
    ) -> None:
        """Choose one token per generation, as `choose_tokens` does, and append it."""
        token_ids, mix = choose_tokens(generations, logits, order)
        traces = [
            mix.trace(i, token_id, generation.top_logprobs) if generation.trace else None
            for i, (generation, token_id) in enumerate(zip(generations, token_ids, strict=True))
        ]
        with self.handing_over:
            for generation, token_id, trace in zip(generations, token_ids, traces, strict=True):
                if generation.done:  # failed, or was cancelled during the step
                    continue
                if trace is not None:
                    generation.scores.append(trace)
                append_token(generation, token_id)

    @contextmanager
    def _naming_shortage(self, rows: int, tokens: int) -> Iterator[None]:
        """Raise OutOfMemoryError with the batch's size if the block runs out of memory."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            held = self.backend.nbytes / 2**20
            # Otherwise the error's traceback would keep the failed pass's tensors alive.
            clear_frames(error.__traceback__)
            self.prefixes.clear()
            raise OutOfMemoryError(
                f"Out of memory on {self.backend.device} with {rows} rows of up to {tokens} tokens "
                f"({held:.0f} MiB of KV cache); use fewer requests at once, a shorter prompt, or a "
                "smaller dtype."
            ) from error

    def _width(self, left: int) -> int:
        """Return how many of the `left` tokens of a prefill a row gets in the next pass.

        Passes have equal width, so the memory that one pass's activations free fits the next's.
        """
        if self._filling[0].images and self.backend.images_at_once:
            return left
        passes = -(-left // self.backend.chunk)
        return -(-left // passes)


def share_passes(left: Sequence[int], room: Sequence[int], backend: Backend) -> list[range]:
    """Group consecutive rows into passes so that the passes and their padding cost least.

    Args:
        left: how many ids each row lacks, at least 1.
        room: how many ids each row may get, padding included.
        backend: tells what a pass costs, how many ids it may have, and whether some may be padding.
    """
    best: list[tuple[int, list[range]]] = [(0, [])]  # for the first rows: none, one, two, ...
    for end in range(1, len(left) + 1):
        options, widest, narrowest, least = [], 0, left[end - 1], room[end - 1]
        for start in reversed(range(end)):
            widest, narrowest = max(widest, left[start]), min(narrowest, left[start])
            least = min(least, room[start])
            ids = widest * (end - start)
            fits = ids <= backend.chunk and widest <= least
            even = narrowest == widest
            if start < end - 1 and not (fits and (even or backend.any_length)):
                break
            cost, before = best[start]
            options.append((cost + ids + backend.pass_cost, [*before, range(start, end)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of two prompts' common prefix, leaving at least one id of each."""
    return min(shared_length(one, other), len(one) - 1, len(other) - 1)
