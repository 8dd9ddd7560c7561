"""Images in prompts: which models' are exact here, and the vectors of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from amulet.backends.transformers.support import why_not_in_rows
from amulet.backends.transformers.weights import execution_device
from amulet.errors import DecodeError
from amulet.images import PromptImage

# Model types whose answers about images are the tokens of `generate`; a test decodes each of them.
# Their images' columns are attended to as any other and have its place as their position.
READ = {"idefics3", "llava"}


def knows_images(model: Any) -> bool:
    """Tell whether a model is one whose images are read, given its processor."""
    return model.config.model_type in READ and hasattr(model, "get_image_features")


def why_no_images(model: Any, processor: object) -> str | None:
    """Return why a Transformers model can't be asked about images, or None.

    Args:
        model: a model that `check_decoder` accepts.
        processor: the model's, if it was given.
    """
    kind = model.config.model_type
    if not hasattr(model, "get_image_features"):
        return f"{kind} reads text alone"
    if not knows_images(model):
        return f"of image models Amulet serves {', '.join(sorted(READ))}, not {kind}"
    if processor is None:
        return (
            "its processor was not given (Amulet.from_pretrained loads it where Pillow is "
            'installed: pip install "amulet-integrations[images]"; or give '
            "Amulet(model, processor))"
        )
    if reason := why_not_in_rows(model):
        return f"it is decoded row after row, since {reason}"
    return None


def embeddings(
    model: PreTrainedModel, tokens: torch.Tensor, images: Sequence[PromptImage]
) -> torch.Tensor:
    """Return the vectors of a pass, `[rows, width, hidden size]`.

    Args:
        model: for which `why_no_images` finds no reason.
        tokens: ids `[rows, width]`; negative ones are columns of images.
        images: all those that they may belong to.
    """
    embed: Any = model.get_input_embeddings()
    vectors: torch.Tensor = embed(tokens.clamp(min=0))
    for image in images:
        own = torch.tensor(image.ids, device=tokens.device)
        rows, columns, places = torch.nonzero(tokens[..., None] == own, as_tuple=True)
        if len(places):
            vectors[rows, columns] = _features(model, image)[places].to(vectors)
    return vectors


def _features(model: Any, image: PromptImage) -> torch.Tensor:
    """Return an image's vectors, `[columns, hidden size]`; once for all rows and passes."""
    if image.features is None:
        device = execution_device(model)
        inputs = {
            name: tensor.to(device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in image.inputs.items()
        }
        found = model.get_image_features(**inputs, return_dict=True).pooler_output
        parts = found if isinstance(found, list | tuple) else [found]
        image.features = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if len(image.features) != len(image.ids):
            raise DecodeError(
                f"The model made {len(image.features)} vectors of an image, and its processor "
                f"{len(image.ids)} columns: load both from the same checkpoint."
            )
    return image.features
