"""The `amulet` command: chat, compare and doctor, and the commands that sub-packages register.

Torch is imported only when a command needs the model, so `amulet --help` is quick.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from amulet import __version__
from amulet.console import Device, DType, Model, load, readable_errors, where_to_read
from amulet.errors import AmuletError, RequestError, one_line
from amulet.evaluation.cli import register as register_eval
from amulet.evaluation.report_cli import register as register_report
from amulet.evaluation.tune_cli import register as register_tune
from amulet.output.comparison import wished
from amulet.plan.cli import register as register_plan
from amulet.playground.cli import register as register_playground
from amulet.preference import DEFAULT_STEERING, Steering
from amulet.rendering.pieces import harmless
from amulet.rendering.terminal import answer_text, legend_text
from amulet.reply import Reply
from amulet.request import Request
from amulet.serve.cli import register as register_serve
from amulet.starter import register as register_starter

if TYPE_CHECKING:
    from amulet import Amulet, ReplyStream

app = typer.Typer(
    name="amulet",
    help="Steer a local language model: your preference acts on every token of an answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_PREFERENCE = typer.Option(
    "--preference",
    "-p",
    metavar="TEXT",
    help="What the answer should be like; repeatable.",
)
Strength = Annotated[
    float | None,
    typer.Option(
        help="How strongly to steer; 0 uses the prompt alone. Default: "
        f"{DEFAULT_STEERING.strength:g}."
    ),
]
Floor = Annotated[
    float | None,
    typer.Option(
        help="Plausibility floor, 0 (off) to 1; keeps answers coherent. Default: "
        f"{DEFAULT_STEERING.floor:g}."
    ),
]
Placement = Annotated[
    str | None,
    typer.Option(
        help="Where the preference goes: user, system or both. Default: "
        f"{DEFAULT_STEERING.placement}."
    ),
]
Focus = Annotated[
    float | None,
    typer.Option(
        help="How strongly to hold the answer to the question, 0 (off, one row less) to 10. "
        f"Default: {DEFAULT_STEERING.focus:g}."
    ),
]
LoopGuard = Annotated[
    int | None,
    typer.Option(
        help="Tokens of itself that an answer may repeat freely; 0 is off. Default: "
        f"{DEFAULT_STEERING.loop_guard}."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above 0 samples.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling, for reproducible answers.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="Image that the first question is about, a file or a web address, for models that "
        "read images; repeatable.",
    ),
]
Limit = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum tokens per answer.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"amulet {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Steer a local language model: your preference acts on every token of an answer."""


@app.command()
def chat(
    model: Model = None,
    preference: Annotated[list[str] | None, _PREFERENCE] = None,
    image: Images = None,
    strength: Strength = None,
    floor: Floor = None,
    placement: Placement = None,
    focus: Focus = None,
    loop_guard: LoopGuard = None,
    max_new_tokens: Limit = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = "auto",
) -> None:
    """Chat with the model. /help lists the commands; Ctrl-C stops an answer."""
    options = {
        "preference": preference,
        "strength": strength,
        "floor": floor,
        "placement": placement,
        "focus": focus,
        "loop_guard": loop_guard,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    with readable_errors():
        _check(options)
        images = _read_images(image)
        amulet = load(model, device, dtype)
        _check_reading(amulet, images)
        Chat(amulet, options, images).run()


@app.command()
def compare(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question to ask.")],
    preference: Annotated[list[str], _PREFERENCE],
    model: Model = None,
    image: Images = None,
    strength: Strength = None,
    floor: Floor = None,
    placement: Placement = None,
    focus: Focus = None,
    loop_guard: LoopGuard = None,
    max_new_tokens: Limit = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = "auto",
) -> None:
    """Show three answers to a question: plain, preference in the prompt only, and steered."""
    shared = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    prompted = {**shared, "preference": preference, "placement": placement, "floor": floor}
    steered = {**prompted, "strength": strength, "focus": focus, "loop_guard": loop_guard}
    steered["trace"] = True  # the colours come from it
    with readable_errors():
        _check(steered)
        wished(preference)
        images = _read_images(image)
        amulet = load(model, device, dtype)
        _check_reading(amulet, images)
        gain = amulet.steering.strength if strength is None else strength
        answers = [
            LiveAnswer("plain", shared),
            LiveAnswer("prompt only (strength 0)", {**prompted, "strength": 0.0}),
            LiveAnswer(f"steered (strength {gain:g})", steered),
        ]
        messages = [_asked(question, images)]
        with Live(_side_by_side(answers), console=Console(), refresh_per_second=8) as live:
            for answer in answers:
                for _ in answer.decode(amulet, messages):
                    live.update(_side_by_side(answers))
                live.update(_side_by_side(answers))
            live.update(Group(_side_by_side(answers), legend_text()))


@app.command()
def doctor() -> None:
    """Show versions, device, models and extras, and the command that installs what is missing.

    The exit code is 1 if a requirement is missing.
    """
    from amulet.doctor import examine

    signs = {"ok": ("✓", "green"), "note": ("•", "yellow"), "bad": ("✗", "red")}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    findings = examine()
    for finding in findings:
        sign, colour = signs[finding.state]
        text = Text(finding.text)
        if finding.fix:
            text.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(sign, colour), finding.topic, text)
    Console().print(table)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


class LiveAnswer:
    """One answer while it is decoded: its text so far, and its speed after the prefill."""

    def __init__(self, title: str, options: dict[str, Any]) -> None:
        self.title = title
        self.options = options
        self.text = ""
        self.tokens = 0
        self.reply: Reply | None = None
        self._first: tuple[float, int] | None = None
        self._last = 0.0

    def decode(self, amulet: Amulet, messages: list[dict[str, Any]]) -> Iterator[str]:
        """Yield the pieces as they arrive; closing the generator stops the decode."""
        with amulet.stream(messages, **self.options) as stream:
            yield from self._follow(stream)
            self.reply = stream.reply

    def _follow(self, stream: ReplyStream) -> Iterator[str]:
        try:
            for piece in stream:
                self._tick(stream)
                piece = harmless(piece)  # a model must not send control codes to the terminal
                self.text += piece
                yield piece
        finally:
            self._tick(stream)  # the end-of-turn token has no text

    def _tick(self, stream: ReplyStream) -> None:
        self._last, self.tokens = time.perf_counter(), stream.usage.completion_tokens
        if self.tokens:
            self._first = self._first or (self._last, self.tokens)

    @property
    def figures(self) -> str:
        """Words, tokens, and milliseconds per token without the prefill and the first token."""
        if self._first is None:
            return "–"
        started, tokens = self._first
        pace = ""
        if self.tokens > tokens:
            pace = f" · {1000 * (self._last - started) / (self.tokens - tokens):.1f} ms/token"
        return f"{len(self.text.split())} words · {self.tokens} tokens{pace}"


def _side_by_side(answers: list[LiveAnswer]) -> Table:
    table = Table(expand=True, show_footer=True)
    for answer in answers:
        table.add_column(answer.title, footer=Text(answer.figures, style="dim"), ratio=1)
    table.add_row(
        *(
            Text(answer.text) if answer.reply is None else answer_text(answer.reply)
            for answer in answers
        )
    )
    return table


class Chat:
    """A conversation in the terminal.

    Args:
        amulet: the model.
        options: of its answers.
        images: files' contents that the first question is about.
    """

    COMMANDS = (
        ("/preference TEXT", "what answers should be like; `off` answers plainly"),
        ("/strength NUMBER", "how strongly to steer; 0 uses the prompt alone"),
        ("/floor NUMBER", "plausibility floor, 0 (off) to 1"),
        ("/placement WHERE", "where the preference goes: system, user or both"),
        ("/focus NUMBER", "how strongly to hold the answer to the question, 0 (off) to 10"),
        ("/loop_guard NUMBER", "tokens of itself that an answer may repeat; 0 is off"),
        ("/image FILE", "attach a file or a web address to the next question; `off` removes all"),
        ("/clear", "forget the conversation so far, and its images"),
        ("/help", "show this"),
        ("/quit", "quit, as Ctrl-D does; Ctrl-C only stops an answer"),
    )

    def __init__(self, amulet: Amulet, options: dict[str, Any], images: list[bytes]) -> None:
        self._amulet = amulet
        self._options = options
        self._images = images
        self._messages: list[dict[str, Any]] = []
        self._console = Console(highlight=False)

    def run(self) -> None:
        """Read lines until /quit or the end of input."""
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` a history; Windows has none)
        self._note(
            f"{self._amulet.name.rpartition('/')[2]}. {self._state()} /help lists the commands."
        )
        if self._images:
            self._note(f"Your first question is sent with {_counted(self._images)}.")
        while True:
            try:
                line = input("you> ").strip()
            except KeyboardInterrupt:
                self._note("\nType /quit to quit.")
                continue
            except EOFError:
                self._console.print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._answer(line)
            except KeyboardInterrupt:  # while an image is downloaded
                self._note("\nStopped.")
            except AmuletError as error:
                self._note(one_line(error), style="red")
                self._note(where_to_read(error))

    def _answer(self, question: str) -> None:
        """Stream one answer. If Ctrl-C stops it, the text so far stays in the conversation."""
        messages = [*self._messages, _asked(question, self._images)]
        answer = LiveAnswer("", self._options)
        stopped = ""
        pieces = answer.decode(self._amulet, messages)
        try:
            for piece in pieces:
                self._console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            stopped = " · stopped"
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator: ends the decode
        self._console.print()
        self._note(answer.figures + stopped)
        if answer.text.strip():
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]
            self._images = []

    def _command(self, name: str, value: str = "") -> None:
        if name == "/help":
            width = max(len(usage) for usage, _ in self.COMMANDS)
            self._note("\n".join(f"{usage:<{width}}  {text}" for usage, text in self.COMMANDS))
        elif name == "/clear":
            self._messages, self._images = [], []
            self._note("The conversation is cleared.")
        elif name == "/image":
            self._attach(value.strip())
        elif name in ("/preference", *(f"/{setting}" for setting in Steering.model_fields)):
            self._set(name[1:], value.strip())
        else:
            self._note(f"{name} is not a command; /help lists them.", style="red")

    def _attach(self, given: str) -> None:
        """Attach an image to the next question, or remove those that are; say how many there are.

        Raises:
            RequestError: the model can't be asked about it; then it is not attached.
        """
        if given.lower() == "off":
            self._images = []
        elif given:
            if not self._amulet.reads_images:
                _check_reading(self._amulet, [b""])
            images = [*self._images, *_read_images([given], "/image")]
            _check_reading(self._amulet, images, self._messages)
            self._images = images
        if self._images:
            self._note(f"Your next question is sent with {_counted(self._images)}.")
        else:
            self._note("No image is attached; /image FILE attaches one.")

    def _set(self, option: str, value: str) -> None:
        """Change an option if the value is valid; without a value, show the settings."""
        if value:
            given = None if option == "preference" and value.lower() == "off" else value
            changed = {**self._options, option: given}
            _check(changed)
            self._options = changed
        self._note(self._state())

    def _state(self) -> str:
        request = _check(self._options)
        if not request.preference:
            return "No preference: answers are plain; /preference TEXT sets one."
        steering = request.steering(self._amulet.steering)
        wishes = " + ".join(preference.text for preference in request.preference)
        return (
            f"Preference: {wishes} (strength {steering.strength:g}, floor {steering.floor:g}, "
            f"placement {steering.placement}, focus {steering.focus:g}, "
            f"loop guard {steering.loop_guard})"
        )

    def _note(self, text: str, style: str = "dim") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)


def _asked(question: str, images: list[bytes]) -> dict[str, Any]:
    """Return a question about images, or about none, as the user's message."""
    return {"role": "user", "content": [*images, question] if images else question}


def _counted(images: list[bytes]) -> str:
    return "1 image" if len(images) == 1 else f"{len(images)} images"


def _read_images(given: list[str] | None, option: str = "--image") -> list[bytes]:
    """Return the bytes of files, or of what is at web addresses.

    Raises:
        RequestError: one is no image, or can't be read; the message begins with the option.
    """
    if not given:
        return []
    from amulet.images import image_file, open_image

    images = []
    for one in given:
        is_web = one.lower().startswith(("http://", "https://"))
        try:
            data = image_file(_downloaded(one) if is_web else _path(one))
            open_image(data)
        except RequestError as error:
            raise RequestError(f"{option} {one}: {one_line(error)}") from None
        images.append(cast(bytes, data))
    return images


def _downloaded(url: str) -> bytes:
    """Return what is at an address that the user of this terminal gave."""
    from http.client import HTTPException
    from urllib.request import urlopen

    from amulet.images import MOST_BYTES

    try:
        with urlopen(url, timeout=30) as response:
            data: bytes = response.read(MOST_BYTES + 3)  # the least that is refused
            return data
    except (OSError, ValueError, HTTPException) as error:
        raise RequestError(f"It can't be downloaded: {error}.") from None


def _path(text: str) -> Path:
    """Return a path as it is typed, or as terminals write a file that is dropped on them."""
    path = Path(text)
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: ~name of no known user
        path = path.expanduser()
        if not path.exists():
            return Path(" ".join(shlex.split(text))).expanduser()
    return path


def _check_reading(
    amulet: Amulet, images: list[bytes], messages: Sequence[dict[str, Any]] = ()
) -> None:
    """Raise RequestError if the model can't be asked about these images after the messages."""
    if images:
        amulet.encode_chat([*messages, _asked("?", images)])


def _check(options: dict[str, Any]) -> Request:
    """Return the options as a request; raises RequestError for one that is out of range."""
    return Request(messages=({"role": "user", "content": "?"},), **options)


register_starter(app)
register_eval(app)
register_report(app)
register_tune(app)
register_serve(app)
register_plan(app)
register_playground(app)
