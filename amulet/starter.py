"""`amulet init`: copies a starter, a small program to begin one's own with, into a folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from amulet.console import Model, readable_errors
from amulet.errors import RequestError

STARTERS = Path(__file__).with_name("starters")
# The package that each one imports first, and the extra that installs it.
NEEDS = {
    "langchain-rag": ("langgraph", "langchain"),
    "langgraph-agent": ("langgraph", "langchain"),
    "llamaindex-chat": ("llama_index", "llama-index"),
}

Kind = Annotated[
    Literal["langchain-rag", "langgraph-agent", "llamaindex-chat"],
    typer.Argument(help="What to begin with."),
]
Folder = Annotated[
    Path | None,
    typer.Argument(metavar="FOLDER", help="A new or empty folder; by default named as the kind."),
]


def register(app: typer.Typer) -> None:
    """Add the command `init`."""
    app.command("init")(init)


def init(kind: Kind = "langchain-rag", folder: Folder = None, model: Model = None) -> None:
    """Write a small program to begin with: a RAG chain, an agent with a memory, or a chat."""
    target = folder or Path(kind)
    with readable_errors():
        written = write(kind, target, model)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Written to {target}: {', '.join(written)}. Next:", markup=False)
    package, extra = NEEDS[kind]
    commands = [f"cd {shlex.quote(str(target))}", "python main.py"]
    if find_spec(package) is None:
        commands.insert(0, f"pip install 'amulet-integrations[{extra}]'")
    for command in commands:
        console.print(f"  {command}", markup=False)


def write(kind: str, folder: Path, model: str | None = None) -> list[str]:
    """Copy a starter into a folder; return the paths of its files in it.

    Args:
        kind: a key of `NEEDS`.
        folder: is made, with its parents.
        model: the name of the model that the program loads; None is the embedded one.

    Raises:
        RequestError: the folder has something in it, or can't be written.
    """
    if model is not None and not model.strip():
        raise RequestError("model: expected a hub id, a folder or a GGUF file, got an empty text.")
    source = STARTERS / kind
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    names = [path.relative_to(source).as_posix() for path in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RequestError(
                f"The folder {str(folder)!r} is not empty, and nothing is overwritten: name a new "
                f"one, as in `amulet init {kind} another-folder`."
            )
        for path, name in zip(files, names, strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        main = folder / "main.py"
        main.write_text(_with_model(main.read_text("utf-8"), model), "utf-8")
    except OSError as error:
        raise RequestError(
            f"Can't write to the folder {str(folder)!r}: {error.strerror}. Name another one."
        ) from None
    return names


def _with_model(text: str, model: str | None) -> str:
    """Return a program that loads this model, without what only the embedded one needs."""
    if model is None:
        return text
    local = Path(model).expanduser()
    name = str(local.resolve()) if local.exists() else model  # the program runs in its own folder
    text = re.sub(r"^# -+\n.*^# -+\n\n", "", text, flags=re.DOTALL | re.MULTILINE)
    return text.replace(".embedded(", f"(model={json.dumps(name, ensure_ascii=False)}, ")
