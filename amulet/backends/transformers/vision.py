"""Images in prompts: which models' are exact here, and the vectors of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from amulet.backends.transformers.support import forward_parameters, why_not_in_rows
from amulet.backends.transformers.weights import execution_device
from amulet.errors import DecodeError
from amulet.images import Place, PromptImage

# Model types whose answers about images are the tokens of `generate`; a test decodes each of them.
# Their images' columns are attended to as any other. The Qwens' have positions on several axes.
READ = {"gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision"}
READ |= {"mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm"}
DEEP = {"qwen3_vl", "qwen3_vl_moe"}  # whose first layers each add vectors of the image (DeepStack)
AT_ONCE = {"gemma3"}  # whose images' columns attend to all of their image's: they are one pass
AXES = 3  # of a position there: time, height and width


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
    if kind in DEEP and "mm_encoder_outputs" not in forward_parameters(model):
        return f"{kind}'s images need a newer Transformers"
    if reason := why_not_in_rows(model):
        return f"it is decoded row after row, since {reason}"
    return None


def pass_inputs(
    model: PreTrainedModel, tokens: torch.Tensor, images: Sequence[PromptImage]
) -> dict[str, Any]:
    """Return what a pass gets in its ids' place; nothing where no column is an image's.

    Args:
        model: for which `why_no_images` finds no reason.
        tokens: ids `[rows, width]`; negative ones are columns of images.
        images: all those that they may belong to.
    """
    inside = tokens < 0
    if not inside.any():
        return {}
    layers: torch.Tensor | None = None  # [vectors of a column, rows, width, hidden size]
    for image in images:
        own = torch.tensor(image.ids, device=tokens.device)
        rows, columns, places = torch.nonzero(tokens[..., None] == own, as_tuple=True)
        if len(places):
            found = _features(model, image)
            if layers is None:
                layers = found.new_zeros(len(found), *tokens.shape, found.shape[-1])
            layers[:, rows, columns] = found[:, places]
    assert layers is not None
    config: Any = model.config
    if config.model_type in DEEP:
        first, *others = ([layer[inside]] for layer in layers)
        made = SimpleNamespace(pooler_output=first, deepstack_features=others)
        ids = tokens.masked_fill(inside, config.image_token_id)
        return {"input_ids": ids, "mm_encoder_outputs": {"image": made}}
    embed: Any = model.get_input_embeddings()
    vectors: torch.Tensor = embed(tokens.clamp(min=0))
    return {"inputs_embeds": torch.where(inside[..., None], layers[0].to(vectors), vectors)}


def _features(model: Any, image: PromptImage) -> torch.Tensor:
    """Return an image's vectors, see `PromptImage`; once for all rows and passes."""
    if image.features is None:
        device = execution_device(model)
        inputs = {
            name: tensor.to(device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in image.inputs.items()
        }
        made = model.get_image_features(**inputs, return_dict=True)
        layers = [made.pooler_output, *(getattr(made, "deepstack_features", None) or ())]
        image.features = torch.stack(list(map(_joined, layers)))
        if (count := image.features.shape[1]) != len(image.ids):
            raise DecodeError(
                f"The model made {count} vectors of an image, and its processor "
                f"{len(image.ids)} columns: load both from the same checkpoint."
            )
    return image.features


def _joined(found: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the vectors of an image's tiles as one tensor, `[columns, hidden size]`."""
    parts = [found] if isinstance(found, torch.Tensor) else found
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def own_images(tokens: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    """Return the columns of the image that each token is one of, `[rows, 1, width, columns]`.

    Args:
        tokens: ids `[rows, width]`; images are runs of negative ones, and whole.
        starts: the column of each row's first id.
    """
    rows, width = tokens.shape
    inside = tokens < 0
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    number = begins.cumsum(1) * inside  # of a token's image, from 1 on
    same = inside[:, :, None] & (number[:, :, None] == number[:, None])
    columns = torch.zeros(rows, 1, width, max(starts) + width, dtype=torch.bool, device=same.device)
    for row, start in enumerate(starts):
        columns[row, 0, :, start : start + width] = same[row]
    return columns


class Places:
    """The positions of rows with images whose columns have positions on several axes (M-RoPE).

    An image takes fewer positions than columns, so what follows it is at an earlier position than
    its column. Rows without such images have no entry: their columns are their positions.

    Args:
        model: any; only some have such positions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        tell = (getattr(module, "get_rope_index", None) for module in model.modules())
        self._tell: Any = next(filter(None, tell), None)
        self._image_id: int = getattr(model.config, "image_token_id", 0)
        self._known: dict[int, list[Place]] = {}  # of each row's columns up to its last image

    def serve(self, rows: int) -> bool:
        """Tell whether one of the first rows has an entry."""
        return any(row < rows for row in self._known)

    def of_pass(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        images: Sequence[PromptImage],
    ) -> torch.Tensor | None:
        """Return the positions of a pass, `[axes, rows, width]`; None where all are columns.

        Args:
            ids, starts, first, images: as for `Backend.forward`.
        """
        if self._tell is None:
            return None
        rows = range(first, first + len(ids))
        for row, new, start in zip(rows, ids, starts, strict=True):
            self.put(row, self.row(row, start))
            if images and min(new) < 0:
                self._learn(row, new, start, images)
        if not any(row in self._known for row in rows):
            return None
        places = [
            [_place(self._known.get(row, []), column) for column in range(start, start + len(new))]
            for row, new, start in zip(rows, ids, starts, strict=True)
        ]
        return torch.tensor(places).permute(2, 0, 1)

    def row(self, row: int, length: int) -> list[Place]:
        """Return what is known of a row's first columns."""
        return self._known.get(row, [])[:length]

    def put(self, row: int, known: list[Place]) -> None:
        """Replace what is known of a row."""
        if known:
            self._known[row] = known
        else:
            self._known.pop(row, None)

    def drop(self, first: int) -> None:
        """Forget the rows from `first` on."""
        self._known = {row: known for row, known in self._known.items() if row < first}

    def _learn(
        self, row: int, new: Sequence[int], start: int, images: Sequence[PromptImage]
    ) -> None:
        """Enter a row's columns up to the last one of an image among its new ids."""
        columns = {id_: (image, i) for image in images for i, id_ in enumerate(image.ids)}
        known = self._known.get(row, [])
        known = [*known, *(_place(known, column) for column in range(len(known), start))]
        last = max(i for i, id_ in enumerate(new) if id_ < 0)
        for id_ in new[: last + 1]:
            if id_ < 0:
                image, i = columns[id_]
                begun = known[len(known) - i] if i else _place(known, len(known))
                own = self._of_image(image)[i]
                known.append(tuple(a + b for a, b in zip(begun, own, strict=True)))
            else:
                known.append(_place(known, len(known)))
        self._known[row] = known

    def _of_image(self, image: PromptImage) -> list[Place]:
        if image.places is None:
            ids = torch.full((1, len(image.ids)), self._image_id)
            grid = {"image_grid_thw": image.inputs["image_grid_thw"]}
            places, _ = self._tell(ids, mm_token_type_ids=torch.ones_like(ids), **grid)
            image.places = [tuple(place) for place in places[:, 0].T.tolist()]
        return image.places


def _place(known: list[Place], column: int) -> Place:
    """Return a column's position, of text where it is behind those that are known."""
    if column < len(known):
        return known[column]
    after = max(known[-1]) + 1 if known else 0  # an image's last column is at its largest position
    return (after + column - len(known),) * AXES
