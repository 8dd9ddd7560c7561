"""The judge ArmoRM, the paper's reward model, which marks instruction following and more.

The published model comes with its own Python code, which is never run. Its 19 marks are one matrix
times the last token's hidden state, so its Llama body is loaded like any other and the matrix is
read from the weights. (Its gate, which combines the marks to one score, is not needed.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amulet.errors import EvaluationError, is_out_of_memory
from amulet.evaluation.judging import JudgeOptions, Tell, missing
from amulet.evaluation.run import Answer, Run
from amulet.models.loading import default_device
from amulet.prompting.chat_template import break_all, encode, token_pattern

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
HEADS = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)
# The marks that a run keeps, by their names in the run.
KEPT = {
    "instruction_following": "ultrafeedback-instruction_following",
    "coherence": "helpsteer-coherence",
    "verbosity": "helpsteer-verbosity",
    "complexity": "helpsteer-complexity",
    "helpfulness": "helpsteer-helpfulness",
}
PUBLISHED_LIMIT = 128  # tokens of question, preference and answer together

_WEIGHT = "regression_layer.weight"
_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*")


class ArmoRM:
    """The reward model: the 19 marks of `HEADS` for a question and an answer.

    Args:
        model: the body, a Transformers model whose output has `last_hidden_state`.
        tokenizer: its tokenizer, with the chat template that the model was trained with.
        weight: the matrix from hidden state to marks, `[19, hidden]`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weight: torch.Tensor
    ) -> None:
        expected = (len(HEADS), model.config.hidden_size)
        if tuple(weight.shape) != expected:
            raise EvaluationError(
                f"{_WEIGHT} has the shape {tuple(weight.shape)}: expected {expected}, one row for "
                f"each mark of {MODEL}."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.weight = weight.to(device=model.device).float()
        self._special = token_pattern([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])

    @classmethod
    def from_pretrained(
        cls, name_or_path: str = MODEL, device: str | None = None, dtype: Any = "auto"
    ) -> ArmoRM:
        """Load the model from the hub or a folder, only from safetensors, without its own code.

        Args:
            name_or_path: a hub id, or a folder with a copy.
            device: None means cuda, else mps, else cpu.
            dtype: "auto" (as saved: bfloat16), or a `torch.dtype`.

        Raises:
            EvaluationError: there is no such reward model.
        """
        from huggingface_hub.errors import HfHubHTTPError
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        try:
            folder = _folder(name_or_path)
            weight = _read_weight(folder, name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            with _only_errors():  # the gate's weights are not part of the body
                loaded: Any = AutoModel.from_pretrained(
                    folder,
                    dtype=dtype,
                    device_map={"": device or default_device()},
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, HfHubHTTPError, SafetensorError) as error:
            raise EvaluationError(
                f"The reward model {name_or_path!r} can't be loaded: expected {MODEL} or a folder "
                f"with a copy of it. {' '.join(str(error).split())[:300]}"
            ) from error
        model, report = loaded
        if report["missing_keys"]:
            raise EvaluationError(
                f"The reward model {name_or_path!r} lacks weights, the first is "
                f"{min(report['missing_keys'])}: its copy is not complete."
            )
        return cls(model.eval(), tokenizer, weight)

    def encode(self, question: str, answer: str, truncate: int | None = None) -> list[int]:
        """Return the token ids of the chat: the user asks the question, the assistant answers.

        Args:
            question: the question, including the preference.
            answer: the answer; names of control tokens in it stay text.
            truncate: keep only this many ids from the front, and encode as the paper's authors
                did: with a second start token if the template writes one, and with control
                tokens in the text converted. None keeps everything.
        """
        published = truncate is not None
        texts = [question, answer]
        if not published:
            texts = break_all(texts, self._special)
        chat = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), texts, strict=True)
        ]
        rendered = str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        if not published:
            return encode(self.tokenizer, rendered)
        ids = self.tokenizer(rendered, truncation=True, max_length=truncate)
        return list(ids["input_ids"])

    def marks(self, chats: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the marks of encoded chats, `[len(chats), 19]`, float32 on the CPU.

        The chats are read in one pass, with masked padding on the right.
        """
        import torch

        longest = max(map(len, chats))
        ids = torch.zeros(len(chats), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, chat in enumerate(chats):
            ids[row, : len(chat)] = torch.tensor(chat)
            mask[row, : len(chat)] = 1
        device = self.model.device
        with torch.inference_mode():
            hidden = self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            last = mask.sum(dim=1).to(device) - 1
            ends = hidden[torch.arange(len(chats), device=device), last]  # [chats, hidden]
            marks: torch.Tensor = ends.float() @ self.weight.T
        return marks.cpu()


def score_armorm(run: Run, options: JudgeOptions, tell: Tell | None = None) -> None:
    """Mark every answer of a run that lacks marks, longest first.

    A run that was decoded as published is also judged so, on `PUBLISHED_LIMIT` tokens.

    Args:
        run: its answers are read, its scores written after each batch.
        options: `model` (hub id or folder; None means the published model) and `batch_size`.
        tell: called with (answers marked, answers in all).

    Raises:
        EvaluationError: the model can't be loaded, or an answer is longer than its window.
    """
    answers = missing(run, "armorm")
    total = len(run.answers())
    if tell is not None:
        tell(total - len(answers), total)
    if not answers:
        return
    judge = ArmoRM.from_pretrained(options.model or MODEL)
    truncate = PUBLISHED_LIMIT if run.meta.settings.get("as_published") else None
    score_answers(run, answers, judge, batch_size=options.batch_size, truncate=truncate, tell=tell)


def score_answers(
    run: Run,
    answers: Sequence[Answer],
    judge: ArmoRM,
    *,
    batch_size: int = 8,
    truncate: int | None = None,
    tell: Tell | None = None,
) -> None:
    """Mark answers of a run, in batches of similar length, and store the marks in `KEPT`.

    The preference follows the question even if the method did not see it, so that all methods are
    judged by the same preference.

    Args:
        run: the run in which to store the marks.
        answers: the answers to mark.
        judge: the reward model.
        batch_size: answers read at once, at least 1.
        truncate: see `ArmoRM.encode`.
        tell: called with (answers marked, answers in all), over the whole run.
    """
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size!r}: expected 1 or more.")
    chats = [
        judge.encode(f"{answer.question} {answer.preference_text}", answer.answer, truncate)
        for answer in answers
    ]
    _check_window(judge, answers, chats)
    total = len(run.answers())
    done = total - len(answers)
    # Longest first, so that too little memory shows at once.
    order = sorted(range(len(chats)), key=lambda place: -len(chats[place]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for place, marks in zip(batch, _marks(judge, [chats[i] for i in batch]), strict=True):
            values = {name: marks[HEADS.index(head)] for name, head in KEPT.items()}
            run.append_scores("armorm", answers[place].key, values)
        done += len(batch)
        if tell is not None:
            tell(done, total)


def _marks(judge: ArmoRM, chats: Sequence[Sequence[int]]) -> list[list[float]]:
    try:
        marks: list[list[float]] = judge.marks(chats).tolist()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise EvaluationError(
            f"The memory is too small to mark {len(chats)} answers of {max(map(len, chats))} "
            "tokens at once: give a smaller batch_size, or judge without the answering model."
        ) from None
    return marks


def _check_window(judge: ArmoRM, answers: Sequence[Answer], chats: Sequence[Sequence[int]]) -> None:
    window = getattr(judge.model.config, "max_position_embeddings", None)
    for answer, chat in zip(answers, chats, strict=True):
        if window is not None and len(chat) > window:
            raise EvaluationError(
                f"The answer {answer.key!r} takes {len(chat)} tokens with its question, and the "
                f"reward model reads {window}: decode with a smaller --max-new-tokens."
            )


def _folder(name_or_path: str) -> Path:
    """Return the folder of a model, downloaded from the hub unless it is a local folder."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, allow_patterns=list(_FILES)))


def _read_weight(folder: Path, name: str) -> torch.Tensor:
    """Return the matrix, reading only the weights file that contains it."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if _WEIGHT in file.keys():  # noqa: SIM118  (it is no dict)
                weight: torch.Tensor = file.get_tensor(_WEIGHT)
                return weight
    raise EvaluationError(
        f"{name!r} has no {_WEIGHT} in its safetensors files: it is not the reward model. "
        f"Expected {MODEL} or a folder with a copy of it."
    )


@contextmanager
def _only_errors() -> Iterator[None]:
    """Silence Transformers' warnings in the block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logging.set_verbosity(before)
