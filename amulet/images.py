"""Images in messages: which forms are read, their limits, and what of them reaches the model.

A message's image is a part of its content. `take_images` puts `MARK` in its place, so that all that
arranges messages goes on working on texts; the chat template gets the mark as a part again.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path, PurePath
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch

from amulet.errors import MissingPackageError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

MOST_IMAGES = 16  # in one chat
MOST_BYTES = 20 * 2**20  # of one image's file
MOST_KEPT = 256 * 2**20  # bytes of images as models see them, for the next turns
MOST_PIXELS = 50_000_000  # of one image: 150 MB once it is decoded
# Those that models are usually asked about. Pillow's other decoders are less tried, and that of
# PostScript starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Types of content parts, by what OpenAI's chat and Responses APIs and LangChain call them.
IMAGE_PARTS = ("image_url", "input_image", "image")
# Where such parts, and Anthropic's and Transformers', have the image itself.
PLACES = ("image_url", "source", "image", "base64", "data", "url", "path")
Place: TypeAlias = tuple[int, ...]  # a position by axis
# Drawn anew in every process, so that no text can contain it.
MARK = f"\U0010f6d6{token_hex(16)}\U0010f6d6"


@dataclass(eq=False)
class PromptImage:
    """An image as it stands in a prompt.

    Attributes:
        text: what the chat template's placeholder becomes: its placeholder tokens, one for each
            column that gets a vector of the image, and the tokens around them.
        ids: what these columns have for ids in a prompt's row. They are negative, and follow from a
            digest of what the model sees, so rows of unlike images never have a prefix in common.
        inputs: arguments of the model's `get_image_features`.
        features: the columns' vectors, `[vectors, columns, hidden size]`, once the model has
            computed them: the first is a column's embedding, others are for the first layers.
        places: the columns' positions from the image's first on, each by axis, once the model has
            told them.
    """

    text: str
    ids: tuple[int, ...]
    inputs: dict[str, torch.Tensor] = field(repr=False)
    features: torch.Tensor | None = field(default=None, repr=False)
    places: list[Place] | None = field(default=None, repr=False)


def take_images(messages: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return messages with `MARK` in the place of each image, and these parts in their order.

    Raises:
        RequestError: a message that is not the user's has an image, or there are too many.
    """
    taken, parts = [], []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple) and any(map(is_image, content)):
            if (role := message.get("role")) != "user":
                raise RequestError(
                    f"messages[{index}] ({role}) has an image: images are read in user messages; "
                    "put it into one."
                )
            parts += [part for part in content if is_image(part)]
            content = [MARK if is_image(part) else part for part in content]
            message = {**message, "content": content}
        taken.append(message)
    if len(parts) > MOST_IMAGES:
        raise RequestError(
            f"The messages have {len(parts)} images: at most {MOST_IMAGES} are read. Leave out "
            "earlier ones."
        )
    return taken, parts


def without_images(messages: Sequence[Any]) -> list[Any]:
    """Return messages without the images in their contents."""
    return _replaced(messages, lambda part: [])


def with_data_urls(messages: Sequence[Any]) -> list[Any]:
    """Return messages whose images are data: URLs, as JSON can hold them.

    Raises:
        RequestError: see `image_file`.
    """
    return _replaced(messages, lambda part: [_data_url(part)])


def _replaced(messages: Sequence[Any], other: Callable[[Any], list[Any]]) -> list[Any]:
    changed = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple) and any(map(is_image, content)):
            parts = ([part] if not is_image(part) else other(part) for part in content)
            message = {**message, "content": list(chain.from_iterable(parts))}
        changed.append(message)
    return changed


def _data_url(part: object) -> dict[str, Any]:
    file = image_file(part)
    if not isinstance(file, bytes):
        stored = BytesIO()
        open_image(file).save(stored, "PNG")
        file = stored.getvalue()
    url = f"data:image;base64,{base64.b64encode(file).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def is_image(part: object) -> bool:
    """Tell whether a content part is an image, of any form."""
    if isinstance(part, Mapping):
        return part.get("type") in IMAGE_PARTS
    return isinstance(part, bytes | PurePath) or _is_pil(part)


def _is_pil(part: object) -> bool:
    pil = sys.modules.get("PIL.Image")  # where it isn't imported, there are no objects of it
    return pil is not None and isinstance(part, pil.Image)


def parts_of(content: str) -> list[dict[str, Any]]:
    """Return a content with marks as the parts that chat templates expect."""
    parts: list[dict[str, Any]] = []
    for text in content.split(MARK):
        parts += ({"type": "image"}, {"type": "text", "text": text})
    return [part for part in parts[1:] if part.get("text") != ""]


def image_file(part: object) -> bytes | Image:
    """Return the image of a content part: a file's bytes, or a PIL image.

    A text is never a path, so that nothing from a network can name a file of this machine, and no
    address is fetched, as it could be one that only this machine can reach.

    Raises:
        RequestError: it has none of the forms that are read, or is too large.
    """
    data, place = part, ""
    while isinstance(data, Mapping):
        place = next((key for key in PLACES if data.get(key) is not None), "")
        if not place:
            raise RequestError(
                f"An image part has the keys {sorted(map(str, data))}: expected a data: URL as in "
                '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}, or '
                '{"type": "image", "base64": ...}.'
            )
        data = data[place]
    if isinstance(data, str):
        return _decoded(data, is_url=place not in ("base64", "data"))
    if isinstance(data, Path):
        try:
            _check_size(data.stat().st_size)
            return data.read_bytes()
        except OSError as error:
            raise RequestError(f"The image can't be read: {error}.") from None
    if isinstance(data, bytes):
        _check_size(len(data))
        return data
    if _is_pil(data):
        image: Image = data  # type: ignore[assignment]
        return image
    raise RequestError(
        f"An image is a {type(data).__name__}: expected a data: URL, bytes, a PIL image or a "
        "pathlib.Path."
    )


def _decoded(text: str, is_url: bool) -> bytes:
    """Return the bytes of a data: URL, or of base64 alone."""
    if is_url:
        head, comma, text = text.partition(",")
        kind = head.partition(":")[0].lower() if ":" in head else ""
        if kind in ("http", "https"):
            raise RequestError(
                "An image is given by its web address, which Amulet doesn't fetch: the address "
                "could be one that only this machine can reach. Download it yourself and send a "
                "data: URL (data:image/png;base64,...), or in Python its bytes."
            )
        if kind != "data" or not comma or not head.endswith(";base64"):
            # The beginning of base64 is the image's, so only an address is shown.
            shown = repr(head[:40]) if kind else "a text"
            raise RequestError(
                f"An image is given as {shown}: expected data:image/png;base64,... . A local file "
                "can be given in Python, as a pathlib.Path."
            )
    _check_size(3 * len(text) // 4)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"An image is not base64: {error}.") from None


def _check_size(size: int) -> None:
    if size > MOST_BYTES + 2:  # base64 tells the size but for its padding
        raise RequestError(
            f"An image has {size / 2**20:.0f} MiB: at most {MOST_BYTES // 2**20} are read. Make it "
            "smaller, or save it as JPEG."
        )


def open_image(part: object) -> Image:
    """Return the image of a content part, upright, in RGB, and on white where it is transparent.

    Raises:
        RequestError: it is no image, or too large; that is found before it is decoded.
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise MissingPackageError(
            'Images need the package pillow: pip install "amulet-integrations[images]"'
        ) from None
    found = image_file(part)
    try:
        image = Image.open(BytesIO(found), formats=FORMATS) if isinstance(found, bytes) else found
        pixels = image.width * image.height
        if pixels <= MOST_PIXELS:
            wide = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
            return _in_rgb(ImageOps.exif_transpose(image), wide)
    except UnidentifiedImageError:
        raise RequestError(f"An image is in no format of {', '.join(FORMATS)}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = 0
    except Exception as error:  # a decoder may raise anything
        raise RequestError(f"An image can't be decoded: {error}.") from None
    raise RequestError(
        f"An image has {f'{pixels / 1e6:.0f}' if pixels else 'far too many'} megapixels: at most "
        f"{MOST_PIXELS / 1e6:.0f} are read. Make it smaller."
    )


def _in_rgb(image: Image, wide: bool) -> Image:
    """Return an image in RGB.

    Pillow's own conversion shows what is behind transparent pixels, black as a rule, and makes
    almost every pixel of 16 bits white.

    Args:
        image: any.
        wide: whether its pixels have one channel of 16 bits.
    """
    if wide:
        image = image.point(lambda value: value / 256).convert("L")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = image.copy()
        white.paste("white", (0, 0, *image.size))
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


class _Read(NamedTuple):
    """What a `PromptImage` is made of."""

    text: str
    ids: tuple[int, ...]
    inputs: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())


class _Reading:
    """One file that a caller reads, or has read; others wait for `lock` and find it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: _Read | None = None


class ImageReader:
    """Reads images as a model's processor does.

    Args:
        processor: the model's.
        tokenizer: Amulet's copy; the processor's own may be in use elsewhere.
        token_id: the id that stands for a column of an image, by the model's config.

    Attributes:
        token: the chat template's placeholder of an image.
        tokens: the placeholder tokens; none may come from a text.
    """

    def __init__(self, processor: Any, tokenizer: PreTrainedTokenizerBase, token_id: int) -> None:
        self._processor = copy.copy(processor)
        self._processor.tokenizer = tokenizer
        self.token_id = token_id
        self.token: str = self._processor.image_token
        column = str(tokenizer.convert_ids_to_tokens(token_id))
        self.tokens = frozenset({self.token, column})
        # LLaVA-OneVision's cuts an image into tiles only where the chat has no other one.
        names = getattr(processor.image_processor, "model_input_names", ())
        self._counts = "batch_num_images" in names
        # By the digest of the file: those in use, and those kept, the least recently used first.
        self._readings: WeakValueDictionary[bytes, _Reading] = WeakValueDictionary()
        self._kept: dict[bytes, tuple[_Reading, int]] = {}  # with their bytes
        self._lock = threading.Lock()

    def read(self, part: object, is_only: bool = True) -> PromptImage:
        """Return what of a content part's image reaches the model.

        A chat's later turns bring the same files again; the last ones are not processed again, nor
        is one that another thread is reading: its result is waited for. After an error, each
        waiting thread reads the file itself.

        Args:
            part: the content part.
            is_only: whether the chat has no other image.

        Raises:
            RequestError: see `open_image`; or the processor refuses the image.
        """
        file = image_file(part)
        count = 2 if self._counts and not is_only else 1
        if not isinstance(file, bytes):
            return PromptImage(*self._processed(file, count))
        hasher = hashlib.sha256(f"{count} {self._processor.image_processor!r}".encode())
        hasher.update(file)
        key = hasher.digest()
        with self._lock:
            reading = self._readings.setdefault(key, _Reading())
        with reading.lock:
            found = reading.found
            if found is None:
                found = reading.found = self._processed(file, count)
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = reading, found.nbytes
            while sum(size for _, size in self._kept.values()) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return PromptImage(*found)

    def _processed(self, part: bytes | Image, count: int) -> _Read:
        """Return one of so many images alike in a chat."""
        image = open_image(part)
        try:
            made = self._processor(
                images=[[image] * count],
                text=[self.token * count],
                return_text_replacement_offsets=True,
            )
            ((replaced, *_),) = made.pop("text_replacement_offsets")
            (ids,) = made.pop("input_ids")
            for unused in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
                made.pop(unused, None)
            inputs = dict(made.convert_to_tensors("pt"))
            if count > 1:
                # Copies, as a part would keep the memory of the whole.
                inputs = {name: tensor[:1].clone() for name, tensor in inputs.items()}
        except Exception as error:  # another library's code, on an image of any shape
            raise RequestError(
                f"The model's image processor refuses an image of {image.width}x{image.height} "
                f"pixels: {error}"
            ) from None
        columns = list(ids).count(self.token_id) // count
        return _Read(replaced["replacement"], column_ids(inputs, columns), inputs)


def column_ids(inputs: Mapping[str, torch.Tensor], columns: int) -> tuple[int, ...]:
    """Return so many negative numbers, 63 bits of a digest of an image's tensors each."""
    digest = hashlib.shake_256()
    for name, tensor in sorted(inputs.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    numbers = struct.unpack(f"<{columns}Q", digest.digest(8 * columns))
    return tuple(-1 - (number >> 1) for number in numbers)


def with_columns(prompt: Sequence[int], token_id: int, images: Sequence[PromptImage]) -> list[int]:
    """Return a prompt with the images' own ids in the place of its placeholders'.

    Raises:
        RequestError: there are more or fewer of them.
    """
    columns = [id_ for image in images for id_ in image.ids]
    if (found := prompt.count(token_id)) != len(columns):
        raise RequestError(
            f"The prompt has {found} placeholders and the images {len(columns)} columns."
        )
    left = iter(columns)
    return [next(left) if id_ == token_id else id_ for id_ in prompt]
