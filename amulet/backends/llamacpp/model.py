"""`GGUFModel`: a GGUF file's weights, metadata and vocabulary, loaded by llama.cpp.

llama-cpp-python's low-level API has one Python function per function of llama.cpp. The objects here
own the pointers and free them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from amulet.errors import MissingPackageError, ModelError, OutOfMemoryError

logger = logging.getLogger("amulet.llama_cpp")

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}
INSTALL = 'pip install "amulet-integrations[gguf]"'
GGUF_MAGIC = b"GGUF"
_WARNING, _ERROR = 3, 4  # of ggml_log_level
_NO_MEMORY = ("failed to allocate", "unable to allocate", "out of memory")

_said: deque[str] = deque(maxlen=4)  # llama.cpp's last errors
_lock = threading.Lock()
_library: Any = None


def library() -> Any:
    """Return llama-cpp-python's C functions; redirects llama.cpp's log to Python's logging.

    Raises:
        MissingPackageError: it is not installed, or its library can't be loaded.
    """
    global _library
    with _lock:
        if _library is None:
            try:
                from llama_cpp import llama_cpp
            except ImportError as error:
                raise MissingPackageError(
                    f"GGUF files need the package llama-cpp-python: {INSTALL} ({error})."
                ) from None
            except (OSError, RuntimeError) as error:  # built for another system, or incomplete
                raise MissingPackageError(
                    f"llama-cpp-python is installed, but its library can't be loaded: {error}. "
                    "Build it for this machine: pip install --force-reinstall --no-deps "
                    "--no-cache-dir --no-binary :all: llama-cpp-python"
                ) from error
            # By default, llama.cpp writes hundreds of lines to standard error.
            llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
            _library = llama_cpp
        return _library


def _log(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    if level == _ERROR:
        _said.append(line)
    # Its warnings concern what is handled here, and its errors are raised.
    logger.log(logging.INFO if level in (_WARNING, _ERROR) else logging.DEBUG, "%s", line)


_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log)


@contextmanager
def reasons() -> Iterator[Callable[[], str]]:
    """Yield a function that returns the errors logged by llama.cpp in this block."""
    _said.clear()
    yield lambda: " ".join(_said)[:400] or "llama.cpp gave no reason"


class GGUFModel:
    """The model in a GGUF file, as `Amulet.from_gguf` loads it; holds no state of requests.

    Args:
        path: the file, or the first of several.
        name: the model's name; by default the file's name without its suffix.
        gpu_layers: layers on the GPU; None means all, if llama.cpp was built for a GPU.
        threads: threads per pass; None means as many as PyTorch may use.
        context: tokens in the KV cache over all rows, and the maximum for a prompt with its
            answer; None means the window that the model was trained with, and no limit over all
            rows.
        kv_type: type of the KV cache, from `KV_TYPES`: "q8_0" takes half of the memory of "f16";
            "f32" does without flash attention, which rounds to f16.
        progress: called with the fraction loaded, 0 to 1.

    Raises:
        ModelError: the file is not a causal language model, or an option is invalid.
        MissingPackageError: llama-cpp-python is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        gpu_layers: int | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv_type: str = "f16",
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name.removesuffix(".gguf")
        self.threads = threads
        self.context = context
        self.kv_type = kv_type
        _check_options(threads, context, kv_type)
        _check_file(self.path)
        self.lib = lib = library()
        parameters = lib.llama_model_default_params()
        if gpu_layers is not None:
            parameters.n_gpu_layers = gpu_layers
        if progress is not None:

            def tell(share: float, _: Any) -> bool:
                progress(share)
                return True

            parameters.progress_callback = lib.llama_progress_callback(tell)
        with reasons() as reason:
            self.pointer = lib.llama_model_load_from_file(os.fsencode(self.path), parameters)
            if not self.pointer:
                raise _not_loaded(self.path, reason())
        # Not at the interpreter's exit, when the decode thread may still be in a pass.
        weakref.finalize(self, lib.llama_model_free, self.pointer).atexit = False
        if not lib.llama_model_has_decoder(self.pointer) or any(
            is_other(self.pointer)
            for is_other in (lib.llama_model_has_encoder, lib.llama_model_is_diffusion)
        ):
            raise ModelError(
                f"{self.path} is not a causal language model (a decoder that writes text)."
            )
        self.vocab = lib.llama_model_get_vocab(self.pointer)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self.vocab))
        recurrent = lib.llama_model_is_recurrent(self.pointer)
        self.any_length = not (recurrent or lib.llama_model_is_hybrid(self.pointer))

    def __repr__(self) -> str:
        return f"GGUFModel({self.name!r})"

    @property
    def window(self) -> int:
        """The context window in tokens, for prompt and answer together."""
        trained = int(self.lib.llama_model_n_ctx_train(self.pointer))
        return trained if self.context is None else min(trained, self.context)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer, according to the file or to llama.cpp."""
        lib, vocab = self.lib, self.vocab
        return frozenset(i for i in range(self.vocab_size) if lib.llama_vocab_is_eog(vocab, i))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The file's metadata as text; llama.cpp abridges arrays."""
        found = {}
        for i in range(self.lib.llama_model_meta_count(self.pointer)):
            key = self._text(self.lib.llama_model_meta_key_by_index, i)
            found[key] = self._text(self.lib.llama_model_meta_val_str_by_index, i)
        return found

    @property
    def description(self) -> str:
        """Architecture, size and quantisation in a few words."""
        return self._text(self.lib.llama_model_desc)

    @property
    def chat_templates(self) -> dict[str, str]:
        """The file's chat templates by name; the main one is "default"."""
        key = "tokenizer.chat_template"
        found = {"default": self.metadata[key]} if key in self.metadata else {}
        for name, text in self.metadata.items():
            if name.startswith(f"{key}."):
                found[name.removeprefix(f"{key}.")] = text
        return found

    @cached_property
    def digest(self) -> str:
        """A digest of the file's bytes, 64 hex digits; the file is read once."""
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(2**22):
                found.update(block)
        return found.hexdigest()

    def _text(self, ask: Callable[..., int], *arguments: Any) -> str:
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = ask(self.pointer, *arguments, buffer, size)
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    # ---- vocabulary ----

    def tokenize(self, text: str, *, special: bool, parse: bool = True) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any text without lone surrogates.
            special: add the vocabulary's tokens for the start and end of a text.
            parse: convert the names of control tokens in the text to these tokens.
        """
        raw = text.encode()
        room = len(raw) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, room, special, parse)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def piece(self, token_id: int, special: bool) -> bytes:
        """Return a token's bytes; with `special`, also those of a control token's name."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self.lib.llama_token_to_piece(self.vocab, token_id, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def token(self, token_id: int) -> str:
        """Return a token in the vocabulary's spelling, such as "Ġhello" or "▁hello"."""
        return str(self.lib.llama_vocab_get_text(self.vocab, token_id).decode("utf-8", "replace"))

    def attributes(self) -> list[int]:
        """Return each token's attributes, as bits of `llama_token_attr`."""
        ask, vocab = self.lib.llama_vocab_get_attr, self.vocab
        return [ask(vocab, token_id) for token_id in range(self.vocab_size)]


def _check_options(threads: int | None, context: int | None, kv_type: str) -> None:
    for option, value in (("threads", threads), ("context", context)):
        if value is not None and value < 1:
            raise ModelError(f"{option}={value!r}: expected 1 or more, or None.")
    if kv_type not in KV_TYPES:
        raise ModelError(f"kv_type={kv_type!r}: expected one of {', '.join(KV_TYPES)}.")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it begins with {magic!r}, expected {GGUF_MAGIC!r}. Give "
            "a model's .gguf file, or its folder to Amulet.from_pretrained."
        )


def _not_loaded(path: Path, reason: str) -> ModelError | OutOfMemoryError:
    if any(sign in reason.lower() for sign in _NO_MEMORY):
        return OutOfMemoryError(
            f"{path} does not fit into memory: use a file with fewer bits per weight, or fewer "
            f"gpu_layers. {reason}"
        )
    return ModelError(
        f"{path} can't be loaded: {reason}. The file is incomplete, or newer than this llama.cpp "
        "(pip install --upgrade llama-cpp-python)."
    )
