"""The command `amulet init`: copies a starter program to a folder."""

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
# The package that each starter imports first, and the extra that installs it.
NEEDS = {
    "langchain-rag": ("langgraph", "langchain"),
    "langgraph-agent": ("langgraph", "langchain"),
    "llamaindex-chat": ("llama_index", "llama-index"),
}

Kind = Annotated[
    Literal["langchain-rag", "langgraph-agent", "llamaindex-chat"],
    typer.Argument(help="The starter to copy."),
]
Folder = Annotated[
    Path | None,
    typer.Argument(metavar="FOLDER", help="A new or empty folder. Default: the starter's name."),
]


def register(app: typer.Typer) -> None:
    """Add the command `init`."""
    app.command("init")(init)


def init(kind: Kind = "langchain-rag", folder: Folder = None, model: Model = None) -> None:
    """Write a small starter program: a RAG chain, an agent with memory, or a chat."""
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
    """Copy a starter to a folder; return the relative paths of its files.

    Args:
        kind: a key of `NEEDS`.
        folder: created with its parents if missing.
        model: the model that the program loads; None is the embedded one.

    Raises:
        RequestError: the folder is not empty or can't be written.
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
                f"The folder {str(folder)!r} is not empty, and nothing is overwritten: give a new "
                f"one, as in `amulet init {kind} another-folder`."
            )
        for path, name in zip(files, names, strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        main = folder / "main.py"
        main.write_text(_with_model(main.read_text("utf-8"), model), "utf-8")
    except OSError as error:
        raise RequestError(
            f"Can't write to the folder {str(folder)!r}: {error.strerror}. Give another one."
        ) from None
    return names


def _with_model(text: str, model: str | None) -> str:
    """Return the program with this model and without the parts for the embedded one."""
    if model is None:
        return text
    local = Path(model).expanduser()
    name = str(local.resolve()) if local.exists() else model  # the program runs in its own folder
    text = re.sub(r"^# -+\n.*^# -+\n\n", "", text, flags=re.DOTALL | re.MULTILINE)
    return text.replace(".embedded(", f"(model={json.dumps(name, ensure_ascii=False)}, ")
