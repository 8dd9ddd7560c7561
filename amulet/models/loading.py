"""Loads a causal language model and its tokenizer, with clear errors if it can't.

Only safetensors weights are read: pickle files run code when they are opened. Torch and
Transformers are imported inside the functions, so that importing this module stays cheap.
"""

from __future__ import annotations

import json
import logging
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from amulet.errors import (
    MissingPackageError,
    ModelError,
    OutOfMemoryError,
    is_out_of_memory,
    shown,
)
from amulet.models.collector import paused_collector
from amulet.models.given import call_for

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]

logger = logging.getLogger("amulet")

DTYPES = ("float32", "bfloat16", "float16")
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
PROCESSOR_TEMPLATE = "chat_template.json"  # older versions' file of models that read images
_OTHER_CLASS = "Unrecognized configuration class"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# Options of the model that apply to the tokenizer, which is in the same place.
TOKENIZER_OPTIONS = ("cache_dir", "force_download", "gguf_file", "local_files_only", "subfolder")


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    pack: bool | Literal["int8", "int4"] = True,
    **options: Any,
) -> Loaded:
    """Return `(model, tokenizer)`, the model in eval mode.

    In the tokenizer's place is the processor, where Amulet reads images with such a model.

    Args:
        name_or_path: a hub name such as "Qwen/Qwen3-0.6B", or the folder of a saved model or
            PEFT adapter.
        device: the device of the whole model. None, without `device_map` and
            `quantization_config`, means cuda, else mps, else cpu.
        dtype: "auto" (as saved), "float32", "bfloat16", "float16" or a floating `torch.dtype`.
        device_map: Accelerate's placement over several devices, such as "auto"; excludes `device`.
        quantization_config: a Transformers quantization config.
        revision, token: the hub's branch, tag or commit, and the access token.
        trust_remote_code: run Python code that comes with the model; read that code first.
        attn_implementation: such as "sdpa", "eager" or "flash_attention_2".
        pack: on the CPU, store the linear layers' weights in the best layout for decoding;
            the model then can't be trained or given other weights. "int8" and "int4" also round
            them: half of bfloat16's memory and faster for a few rows, at some loss; see
            `pack_linears`.
        options: further options of Transformers' `from_pretrained`, such as `gguf_file`, the
            name of a GGUF file there; its weights are made dense.

    Raises:
        ModelError: an option is invalid, or the model can't be loaded; says why.
        MissingPackageError: loading needs a package that is not installed.
        OutOfMemoryError: the weights do not fit into memory.
    """
    dtype = _checked_dtype(dtype)
    if device is not None and device_map is not None:
        raise ModelError(
            f"device={str(device)!r} and device_map={device_map!r} were both given: "
            'give device for one device, or device_map (such as "auto") for several.'
        )
    if device is not None:
        device_map = {"": _checked_device(device)}
    elif device_map is None and quantization_config is None:
        device_map = {"": default_device()}
    given = quantization_config
    if given is not None and not isinstance(given, dict) and not hasattr(given, "quant_method"):
        raise ModelError(
            f"quantization_config={shown(given)}: expected a config of Transformers, such as "
            "BitsAndBytesConfig(load_in_4bit=True)."
        )
    source = _checked_source(name_or_path, options)
    shared = {"revision": revision, "token": token}
    shared = {name: value for name, value in shared.items() if value is not None}
    shared["trust_remote_code"] = trust_remote_code
    chosen = {
        "device_map": device_map,
        "quantization_config": quantization_config,
        "attn_implementation": attn_implementation,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    with paused_collector():
        import_module("amulet.backends.transformers.general")  # most of Transformers
        from safetensors import SafetensorError
        from transformers import AutoTokenizer

    try:
        # The tokenizer first, because it is small, and an error here saves loading the weights.
        tokenizer = AutoTokenizer.from_pretrained(
            _tokenizer_source(source),
            **shared,
            **{name: options[name] for name in TOKENIZER_OPTIONS if name in options},
        )
        _take_processor_template(tokenizer, source, shared, options)
        loaded = _load_model(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **shared,
            **chosen,
            **options,
        )
    except ImportError as error:
        raise MissingPackageError(f"{source}: {_first_lines(error)}") from error
    except (  # Transformers checks few options: of a wrong one it looks up an attribute
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        SafetensorError,
    ) as error:
        if is_out_of_memory(error):
            raise _no_room(source, error) from error
        raise ModelError(_explain(source, error)) from error
    except MemoryError as error:
        raise _no_room(source, error) from error
    model, report = loaded
    _check_complete(source, report)
    model.eval()
    from amulet.backends.transformers.vision import knows_images

    if pack and quantization_config is None:
        from amulet.backends.transformers.cpu.packing import pack_linears

        pack_linears(model, pack)
    if knows_images(model):
        return model, _processor(source, shared, options) or tokenizer
    return model, tokenizer


def _load_model(source: str, **options: Any) -> Any:
    """Load a checkpoint's causal class, or, if it has none, the class that reads images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except ValueError as error:
        if _OTHER_CLASS not in str(error):
            raise
    return AutoModelForImageTextToText.from_pretrained(source, **options)


def _processor(
    source: str, shared: dict[str, Any], options: dict[str, Any]
) -> ProcessorMixin | None:
    """Load a model's processor; None, and a line in the log, where that isn't possible."""
    from transformers import AutoProcessor, ProcessorMixin

    auto: Any = AutoProcessor  # it has no types
    places = {name: options[name] for name in TOKENIZER_OPTIONS if name in options}
    try:
        processor = auto.from_pretrained(source, **shared, **places)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        reason = _first_lines(error)
    else:
        if isinstance(processor, ProcessorMixin):
            return processor
        reason = "it has none"
    logger.warning("%s reads no images: its processor can't be loaded: %s", source, reason)
    return None


def _take_processor_template(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    shared: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Give a tokenizer without a chat template that of its processor, if any."""
    from transformers.utils.hub import cached_file

    if tokenizer.chat_template is not None or "gguf_file" in options:
        return
    places = {name: options[name] for name in TOKENIZER_OPTIONS if name in options} | {
        name: shared[name] for name in ("revision", "token") if name in shared
    }
    try:
        file = cached_file(source, PROCESSOR_TEMPLATE, **places)
    except OSError:  # there is no such file
        return
    told = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    tokenizer.chat_template = told.get("chat_template")


def default_device() -> str:
    """Return "cuda" if available, else "mps", else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    import torch

    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "auto":
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        named: torch.dtype = getattr(torch, dtype)
        return named
    raise ModelError(
        f'dtype={dtype!r}: expected "auto", "float32", "bfloat16", "float16" '
        "or a floating-point torch.dtype."
    )


def _checked_device(device: str | torch.device) -> str:
    import torch

    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ModelError(
            f'device={device!r}: expected "cpu", "cuda", "cuda:<number>" or "mps".'
        ) from None
    fix = f'give device="{default_device()}", or leave device out'
    if checked.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ModelError(
                f"device={str(device)!r}: torch {torch.__version__} sees no CUDA GPU here; {fix}."
            )
        if checked.index is not None and checked.index >= count:
            raise ModelError(
                f"device={str(device)!r}: there are {count} CUDA GPUs, numbered from 0; {fix}."
            )
    if checked.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(
            f"device={str(device)!r}: torch {torch.__version__} has no MPS here; {fix}."
        )
    return str(checked)


def _checked_source(name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> str:
    """Return the hub name, or the folder after checking that it contains a model."""
    given = os.fspath(name_or_path)
    path = Path(given).expanduser()
    if given.strip() and path.is_dir():  # Path("") would be the current folder
        folder = path / options.get("subfolder", "")
        if "gguf_file" not in options:
            _check_folder(folder)
        elif not (folder / options["gguf_file"]).is_file():
            raise ModelError(
                f"gguf_file={options['gguf_file']!r}: there is no such file in {folder}."
            )
        return str(path)
    if path.is_file():
        named = f', and gguf_file="{path.name}"' if path.suffix == ".gguf" else ""
        raise ModelError(f"{given} is a file: give the folder that contains it{named}.")
    # A hub name is "name" or "owner/name"; anything else must be a folder.
    parts = given.split("/")
    if given == "embedded" or given.startswith(("http://", "https://")):
        raise ModelError(f"model {given!r} is no folder and no hub name. Use {call_for(given)}.")
    if not given.strip() or "\\" in given or len(parts) > 2 or parts[0] in ("", ".", "..", "~"):
        raise ModelError(
            f"model {given!r}: there is no such folder. Give the folder of a saved model, or a "
            'hub name such as "Qwen/Qwen3-0.6B".'
        )
    return given


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder.")
    adapter = (folder / "adapter_config.json").is_file()
    gguf = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf and not (folder / "config.json").is_file():
        raise ModelError(f'{folder} holds GGUF files: name one, such as gguf_file="{gguf[0]}".')
    if not adapter and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a saved model: it has no config.json. Give the folder that "
            "save_pretrained wrote, or one downloaded from the hub."
        )
    if adapter and find_spec("peft") is None:
        raise MissingPackageError(f"{folder} is a PEFT adapter: run `pip install peft`.")
    suffixes = {file.suffix for file in folder.iterdir()}
    if ".safetensors" in suffixes:
        return
    if suffixes & PICKLE_SUFFIXES:
        raise ModelError(
            f"{folder} {_ONLY_PICKLE} Convert it once: load it with Transformers if you trust "
            "its origin, then save_pretrained to another folder."
        )
    raise ModelError(f"{folder} has a config but no weights: no *.safetensors file is there.")


_ONLY_PICKLE = (
    "has only pickle weights (such as pytorch_model.bin), which can run code when opened; "
    "expected *.safetensors."
)


def _tokenizer_source(source: str) -> str:
    """Return the tokenizer's location; an adapter without one uses its base model's."""
    folder = Path(source)
    config = folder / "adapter_config.json"
    if not config.is_file() or any((folder / name).is_file() for name in TOKENIZER_FILES):
        return source
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return str(base or source)


def _explain(source: str, error: Exception) -> str:
    """Convert an error of Transformers to what was given, what is wrong and how to fix it."""
    said = str(error)
    if "trust_remote_code" in said:
        return (
            f"{source} needs Python code from its repository, which was not run. Read that code, "
            "then pass trust_remote_code=True."
        )
    if "unexpected keyword argument" in said:
        return f"{source}: unknown option; check its spelling ({_first_lines(error)})."
    if "file named model.safetensors" in said:
        return f"{source} has no *.safetensors weights, or {_ONLY_PICKLE} Look for another copy."
    if _OTHER_CLASS in said:
        return f"{source} is not a causal language model (a decoder that writes text)."
    if isinstance(error, OSError) and not Path(source).is_dir():
        return (
            f"{source}: neither a local folder nor a model that the hub returned. Check the name, "
            "the network (HF_HUB_OFFLINE forbids it), and for a private or gated model pass "
            f"token=. The hub's client said: {_first_lines(error)}"
        )
    return f"{source} can't be loaded: {type(error).__name__}: {_first_lines(error)}"


def _no_room(source: str, error: Exception) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{source} does not fit into memory: load it in a smaller dtype, or on another device. "
        f"{_first_lines(error)}"
    )


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__


def _check_complete(source: str, report: dict[str, Any]) -> None:
    # Transformers fills missing weights with random numbers and only warns.
    absent = sorted(str(key) for key in report.get("missing_keys", ()))
    if absent:
        raise ModelError(
            f"{source}: {len(absent)} of the model's weights are not in its files, the first is "
            f"{absent[0]}. The copy is not complete, or is not a causal language model."
        )
