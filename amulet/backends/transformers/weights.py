"""Detects changes of a model's weights and adapters, and identifies them.

Keys and values of past answers, cached answers and packed copies are valid only for the weights
that they were computed with. Users change those: they load, train, merge and switch adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from amulet.backends.transformers.cpu.packed_layers import PackedLayer
from amulet.errors import ModelError

SAMPLES = 4  # values read per tensor, because writes through `.data` leave no other trace
CHUNK = 512  # numbers of 8 bytes with one checksum
PLAIN = (torch.Tensor, nn.Parameter)
CAPTURING = "transformers.utils.output_capturing"


@torch.no_grad()
def weights_state(model: nn.Module) -> Any:
    """Return a value that differs, by `==`, once weights, adapters or hooks have changed.

    It takes only a millisecond, so it reads just a few values per tensor: a write through `.data`
    that misses these goes unnoticed. Other writes, and replaced tensors, are always noticed.
    """
    found: list[Any] = []
    samples: dict[Any, list[torch.Tensor]] = {}
    left = [model]
    while left:  # `modules()` and `parameters()` take five times as long
        module = left.pop()
        own = vars(module)
        found.append(id(module))
        if module is not model:  # hooks of the whole model don't affect keys
            found += [*hooks(module), id(own.get("forward"))]
        if is_adapter(module):
            found.append(_adapters(module))
        # Some are rewritten in every pass with equal values.
        buffers = () if _rewrites(module) else own["_buffers"].values()
        tensors = [*own["_parameters"].values(), *buffers]
        if isinstance(module, PackedLayer):
            tensors.append(module.bias)
        for tensor in (part for each in tensors if each is not None for part in parts(each)):
            if tensor.is_meta:  # Accelerate creates it in every pass
                continue
            found.append(tensor.data_ptr())
            if isinstance(tensor, nn.Parameter) and not tensor.is_inference():
                found.append(tensor._version)
            count = tensor.numel()
            if count and tensor.is_contiguous():
                spread = tensor.as_strided((min(count, SAMPLES),), (max(count // SAMPLES, 1),))
                samples.setdefault((tensor.device, tensor.dtype), []).append(spread)
        left += [child for child in own["_modules"].values() if child is not None]
    for taken in samples.values():
        found.append(torch.cat(taken).view(torch.uint8).cpu().numpy().tobytes())
    return found


def weights_digest(model: Any) -> str:
    """Return 64 hex digits that differ between models whose weights or active adapters differ.

    It reads all weights once. `model` may also be a stand-in with `named_parameters`.
    """
    digest = hashlib.sha256()
    for name, tensor in _named_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in parts(tensor):
            if not part.is_meta:
                digest.update(_checksums(part.detach()))
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if is_adapter(module):
                digest.update(f"{name} {_adapters(module)}\n".encode())
    return digest.hexdigest()


def parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the tensors that hold a tensor's numbers: itself, or the parts of one of torchao."""
    if type(tensor) in PLAIN or not hasattr(tensor, "__tensor_flatten__"):
        return (tensor,)
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(tensor, name))]


def hooks(module: nn.Module) -> list[int]:
    """Return the keys of a module's forward hooks, without those by which Transformers captures.

    Those collect hidden states and attention weights, and return nothing. Transformers installs
    them in the first pass that is asked for these, such as that of LLaVA's vision tower.
    """
    own = vars(module)
    both = [*own["_forward_hooks"].items(), *own["_forward_pre_hooks"].items()]
    return [key for key, hook in both if getattr(hook, "__module__", None) != CAPTURING]


def _named_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, buffers, packed weights, and those that Accelerate has offloaded."""
    if not isinstance(model, nn.Module):
        yield from model.named_parameters()
        return
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            yield f"{name}.{type(module).__name__}", module.weight
            if module.bias is not None:
                yield f"{name}.bias", module.bias
        own = vars(module)
        elsewhere = _weights_elsewhere(module)
        for kind in ("_parameters",) if _rewrites(module) else ("_parameters", "_buffers"):
            for key, tensor in own[kind].items():
                if tensor is not None and tensor.is_meta and elsewhere is not None:
                    tensor = elsewhere[key]
                if tensor is not None:
                    yield f"{name}.{key}", tensor


def _rewrites(module: nn.Module) -> bool:
    """Tell whether it is a rotary embedding whose buffers differ in passes of longer rows."""
    kinds = str(vars(module).get("rope_type", ""))
    return "longrope" in kinds or "dynamic" in kinds


def _weights_elsewhere(module: nn.Module) -> Any:
    """Return the mapping from which Accelerate loads a module's weights for a pass, or None."""
    return next(_hook_values(module, "weights_map"), None)


def execution_device(model: PreTrainedModel) -> torch.device:
    """Return the device where a model's passes start; Accelerate moves offloaded weights there."""
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        for device in _hook_values(module, "execution_device"):
            return torch.device(device)
    raise ModelError(
        "The model's weights are on the meta device: it has shapes but no values. Load them with "
        "from_pretrained."
    )


def _hook_values(module: nn.Module, name: str) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if (value := getattr(each, name, None)) is not None:
            yield value


def decoder_of(model: Any) -> PreTrainedModel:
    """Return the Transformers model inside a PEFT model, or the model itself.

    Raises:
        ModelError: its adapters change more than the layers of that model.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return cast("PreTrainedModel", model)
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if (
            config.is_prompt_learning
            or getattr(config, "is_adaption_prompt", False)
            or getattr(config, "alora_invocation_tokens", None)
            or kind in ("XLORA", "POLY", "SHADOW")
        ):
            raise ModelError(
                f"The adapter {name!r} is of the kind {kind}, which changes more than "
                "layers; Amulet supports adapters that change layers, such as LoRA."
            )
    return cast("PreTrainedModel", model.base_model.model)


def _checksums(tensor: torch.Tensor) -> bytes:
    """Return sums over the tensor's bits, each of a few thousand bytes, and a few of its bytes.

    A changed value changes a sum, and this is much faster than a digest of everything.
    """
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = len(raw) // (8 * CHUNK) * (8 * CHUNK)
    sums = raw[:whole].view(torch.int64).view(-1, CHUNK).sum(dim=1)
    spread = raw[:: max(1, len(raw) // CHUNK)]
    parts = (sums.view(torch.uint8), spread, raw[whole:])
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def is_adapter(module: nn.Module) -> bool:
    """Tell whether a module is one of PEFT's, which adds adapters to another module."""
    return isinstance(getattr(type(module), "disable_adapters", None), property)


def _adapters(module: Any) -> str:
    """Return the active adapters of a PEFT module and their scales."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return repr([getattr(module, name, None) for name in names])
