"""The errors that Amulet raises on purpose.

    AmuletError
    ├── RequestError (ValueError)     the caller's input is not valid
    │   ├── PromptTooLongError        prompt and answer don't fit the model's context window
    │   └── TemplateError             the chat template is missing or refuses the messages
    ├── ModelError                    the model or tokenizer can't be loaded or isn't supported
    │   └── MissingPackageError (ImportError)   an optional package is not installed
    ├── DecodeError (RuntimeError)    decoding started and could not continue
    │   └── OutOfMemoryError          the device has no room for the batch, or for the model
    └── EvaluationError               an evaluation's questions, run folder or judge are not usable

Each message says what was given, what was expected and how to fix it. The section to read is named
below the traceback (Python 3.11 and newer) and in the error's `help_page`.
"""

from __future__ import annotations

from typing import Any, ClassVar

# The page by its title, because the documentation has no fixed address. A class's section has its
# name.
HELP = "Amulet's documentation, Troubleshooting"


class AmuletError(Exception):
    """The base class: `except AmuletError` catches everything that Amulet raises on purpose.

    Attributes:
        help_page: titles of the page and section that list this error's messages and their fixes.
    """

    help_page: ClassVar[str] = HELP

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.help_page = f"{HELP}, {cls.__name__}"

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        # A note, not part of the message, which servers and programs read.
        self.__notes__ = [f"More: {self.help_page}"]


class RequestError(AmuletError, ValueError):
    """A request, message, preference or option is not valid; raised before any forward pass."""


class PromptTooLongError(RequestError):
    """The prompt exceeds the model's context window; the message states both lengths."""


class TemplateError(RequestError):
    """The tokenizer has no chat template, or its template refuses these messages."""


class ModelError(AmuletError):
    """A model or tokenizer can't be loaded, or its architecture isn't supported."""


class MissingPackageError(ModelError, ImportError):
    """An optional package is needed and not installed; the message names the pip command."""


class DecodeError(AmuletError, RuntimeError):
    """A decode step failed; the `Amulet` object stays usable."""


class OutOfMemoryError(DecodeError):
    """The device ran out of memory; the message states the batch's rows and tokens.

    Loading and packing a model raise it as well.
    """


class EvaluationError(AmuletError):
    """An evaluation's question file, rule, method, run folder or judge can't be used as given."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error from Python or PyTorch means that memory ran out.

    The GPU allocator raises `torch.OutOfMemoryError`. The CPU allocator, the driver and the
    libraries raise a plain `RuntimeError`, which only its text distinguishes from others.
    """
    if isinstance(error, AmuletError):  # classified already
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"}:  # by name: this module loads no torch
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(text in said for text in _NO_MEMORY)


# PyTorch's CPU allocator on Linux and on Windows, CUDA's driver, cuBLAS, and C++ libraries.
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "bad_alloc",
)


MOST_SHOWN = 120  # characters of a value in an error


def shown(given: object) -> str:
    """Return how an error shows what was given: itself, or its kind where that is long or bytes.

    >>> shown("Be brief.")
    "'Be brief.'"
    >>> shown("Be brief." * 50)
    '<str of 450 characters>'
    """
    kind = type(given).__name__
    if isinstance(given, str) and len(given) > MOST_SHOWN:
        return f"<{kind} of {len(given)} characters>"
    if isinstance(given, bytes | bytearray) or len(text := repr(given)) > MOST_SHOWN:
        return f"<{kind}>"
    return text


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
