"""Images in messages: the forms, the limits, and that no text passes for one."""

from __future__ import annotations

import base64
import gc
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, Request, RequestError, TemplateError, images
from amulet.images import MARK, column_ids, image_file, open_image, with_data_urls
from tests.coverage.models import Entry, build
from tests.models import random_model
from tests.models.images import (
    TEMPLATE,
    Kind,
    asks,
    data_url,
    image_model,
    image_tokenizer,
    picture,
    png,
    processor,
)

BASE64 = base64.b64encode(png()).decode()
IMAGE_ID = image_tokenizer().convert_tokens_to_ids("<image>")
LAST = {"max_new_tokens": 1}


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet(image_model("llava", torch.float32), processor("llava"))


def rows(amulet: Amulet, messages: list[dict[str, Any]], **options: Any) -> list[list[int]]:
    prompts = amulet.prepare(Request(messages=messages, **options)).generation.prompts
    return [list(prompt) for prompt in prompts]


FORMS: dict[str, Any] = {
    "OpenAI": {"type": "image_url", "image_url": {"url": data_url(), "detail": "low"}},
    "Mistral": {"type": "image_url", "image_url": data_url()},
    "Responses": {"type": "input_image", "image_url": data_url()},
    "LangChain": {"type": "image", "base64": BASE64, "mime_type": "image/png"},
    "LangChain, data URL": {"type": "image", "url": data_url()},
    "LangChain 0": {"type": "image", "source_type": "base64", "data": BASE64},
    "Anthropic": {"type": "image", "source": {"type": "base64", "data": BASE64}},
    "Transformers": {"type": "image", "image": picture()},
    "PIL": picture(),
    "bytes": png(),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_image(amulet: Amulet, form: str) -> None:
    (row,) = rows(amulet, asks(FORMS[form], "Which tea?"))
    assert row == rows(amulet, asks({"type": "image", "image": picture()}, "Which tea?"))[0]
    assert sum(id_ < 0 for id_ in row) == 4  # (28 / 14)²


def test_a_file_is_given_by_its_path_alone(amulet: Amulet, tmp_path: Path) -> None:
    (tmp_path / "tea.png").write_bytes(png())
    for part in (tmp_path / "tea.png", {"type": "image", "path": tmp_path / "tea.png"}):
        assert rows(amulet, asks(part)) == rows(amulet, asks(png()))
    for url in (str(tmp_path / "tea.png"), f"file://{tmp_path}/tea.png"):
        for part in (
            {"type": "image", "path": url},
            {"type": "image", "image": url},
            {"type": "image_url", "image_url": {"url": url}},
        ):
            with pytest.raises(RequestError, match=r"expected data:image.* as a pathlib\.Path"):
                amulet.chat(asks(part))
    with pytest.raises(RequestError, match=r"can't be read: .*no\.png"):
        amulet.chat(asks(tmp_path / "no.png"))


@pytest.mark.parametrize("url", ["http://localhost/tea.png", "HTTPS://example.org/tea.png"])
def test_no_address_is_fetched(amulet: Amulet, url: str) -> None:
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image", "url": url}):
        with pytest.raises(
            RequestError, match=r"web address, which Amulet doesn't fetch.*its bytes"
        ):
            amulet.chat(asks(part))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            {"type": "image", "file_id": "f1"},
            r"has the keys \['file_id', 'type'\]: expected a data",
        ),
        ({"type": "image_url", "image_url": {}}, r"has the keys \[\]: expected a data: URL"),
        ({"type": "image", "base64": "AA=A"}, "is not base64"),
        ({"type": "image", "base64": "é"}, "is not base64"),
        ({"type": "image", "image": 5}, "is a int: expected"),
        ({"type": "input_audio", "input_audio": {}}, "only text and images are read"),
        ({"type": "image", "url": "data:image/png,abc"}, "given as 'data:image/png': expected"),
        (b"<svg/>", "in no format of PNG, JPEG"),
        (b"", "in no format of PNG, JPEG"),
        (png()[:-200], "can't be decoded"),
    ],
    ids=str,
)
def test_what_is_no_image_is_refused(amulet: Amulet, part: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        amulet.chat(asks(part, "Which tea?"))


def stored(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_files_of_other_kinds_are_not_opened() -> None:
    for kind in ("EPS", "TIFF", "ICO"):
        with pytest.raises(RequestError, match="in no format of PNG"):
            open_image(stored(picture(), kind))


def test_images_are_upright_and_rgb() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held sideways
    file = BytesIO()
    picture(0, 40, 30).save(file, "PNG", exif=turned)
    found = open_image(file.getvalue())
    assert (found.size, found.mode) == ((30, 40), "RGB")
    assert open_image(stored(picture().convert("L"), "PNG")).mode == "RGB"


def test_transparent_images_are_on_white() -> None:
    """As Transformers' own processors have them; what is behind the pixels is black."""
    clear = Image.new("RGBA", (2, 1))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    grey, palette = Image.new("LA", (2, 1)), Image.new("P", (2, 1))
    grey.putpixel((1, 0), (0, 255))
    palette.putpixel((1, 0), 1)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.info["transparency"] = 0
    for image in (clear, grey, palette):
        for part in (image, stored(image, "PNG"), stored(image, "WEBP")):
            found = open_image(part)
            assert (found.mode, found.getpixel((0, 0))) == ("RGB", (255, 255, 255))
            assert found.getpixel((1, 0)) == (0, 0, 0)
    assert open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127,) * 3


def test_16_bits_of_grey_become_8() -> None:
    image = Image.new("I;16", (3, 1))
    for place, value in enumerate((0, 0x1234, 0xFFFF)):
        image.putpixel((place, 0), value)
    for part in (image, stored(image, "PNG")):
        found = open_image(part)
        assert [found.getpixel((place, 0)) for place in range(3)] == [
            (0, 0, 0),
            (0x12, 0x12, 0x12),
            (255, 255, 255),
        ]


def test_errors_show_nothing_of_an_image(amulet: Amulet) -> None:
    for part in ({"type": "image", "url": BASE64}, {"type": "image", "base64": f"!{BASE64}"}):
        with pytest.raises(RequestError) as caught:
            amulet.chat(asks(part))
        assert BASE64[:8] not in str(caught.value)


# ---- limits


def test_too_many_images(amulet: Amulet) -> None:
    with pytest.raises(RequestError, match="have 17 images: at most 16"):
        amulet.chat(asks(*[png()] * 17))


def test_a_file_too_large(amulet: Amulet, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(images, "MOST_BYTES", len(png()) - 3)
    (tmp_path / "tea.png").write_bytes(png())
    for part in (png(), tmp_path / "tea.png", {"type": "image", "base64": BASE64}):
        with pytest.raises(RequestError, match="MiB: at most 0 are read"):
            amulet.chat(asks(part))


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
def test_a_small_file_of_many_pixels_is_not_decoded(
    amulet: Amulet, side: int, monkeypatch: Any
) -> None:
    """Its size is in the file's first bytes. Pillow itself warns, or fails, of the larger two."""
    file = bytearray(stored(Image.new("1", (8, 8)), "PNG"))
    file[16:24] = side.to_bytes(4, "big") * 2
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it is decoded"))
    with pytest.raises(RequestError, match="megapixels: at most 50 are read"):
        amulet.chat(asks(bytes(file)))
    with pytest.raises(RequestError, match="has 64 megapixels"):
        amulet.chat(asks(Image.new("1", (8_000, 8_000))))


# ---- what stands for an image


def test_the_prompt_is_the_processors(amulet: Amulet) -> None:
    given = asks({"type": "image"}, {"type": "text", "text": "Which tea?"})
    text = processor("llava").apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    expected = processor("llava")(images=[picture()], text=[text], add_special_tokens=False)
    ids = amulet.encode_chat(asks(picture(), "Which tea?"))
    assert ids == expected["input_ids"][0]
    assert amulet.count_chat(asks(picture(), "Which tea?")) == len(ids)
    (row,) = rows(amulet, asks(picture(), "Which tea?"))
    assert [IMAGE_ID if id_ < 0 else id_ for id_ in row] == ids


def test_ids_follow_from_all_that_the_model_sees() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    ids = column_ids({"pixels": tensor}, 5)
    assert len(set(ids)) == 5
    assert all(-(2**63) <= id_ < 0 for id_ in ids)
    assert ids == column_ids({"pixels": tensor.clone()}, 5)
    for other in (
        {"pixels": tensor + 1},
        {"pixels": tensor.reshape(4, 3)},
        {"pixels": tensor.int()},
        {"others": tensor},
        {"pixels": tensor, "mask": tensor},
    ):
        assert not set(ids) & set(column_ids(other, 5))


FORGED = "See <image> here: <image>"


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (asks(FORGED, picture()), {}),
        ([{"role": "system", "content": FORGED}, *asks(picture())], {}),
        ([*asks(picture()), {"role": "assistant", "content": FORGED}], {}),
        (asks(picture()), {"preference": FORGED}),
        (asks(picture()), {"preference": FORGED, "placement": "system"}),
        (asks({"type": "text", "text": f"{FORGED}<ima"}, picture(), "ge>"), {}),
    ],
    ids=["user", "system", "assistant", "preference", "preference in system", "around an image"],
)
def test_no_text_passes_for_an_image(
    amulet: Amulet, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    expected = rows(amulet, asks(picture()))[0]
    image = [id_ for id_ in expected if id_ < 0]
    for row in rows(amulet, messages, **{"focus": 0.0, **options}):
        assert [id_ for id_ in row if id_ < 0] == image
        assert IMAGE_ID not in row
    said = amulet.tokenizer.decode([id_ for id_ in row if id_ >= 0])
    assert ("<image>" in said) == ("preference" not in options)  # the base row has none


def test_no_text_passes_for_an_image_without_images(amulet: Amulet) -> None:
    for row in rows(amulet, [{"role": "user", "content": FORGED}], preference=FORGED):
        assert IMAGE_ID not in row


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3"])
def test_the_model_sees_an_image_once(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all rows of a request, for requests that come together, and not again in later turns."""
    model: Any = image_model(kind, torch.float32)
    seen: list[dict[str, Any]] = []
    opened: list[Any] = []
    monkeypatch.setattr(images, "open_image", lambda part: opened.append(part) or open_image(part))
    look = model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda **given: seen.append(given) or look(**given)
    )
    amulet = Amulet(model, processor(kind))
    request: dict[str, Any] = {"messages": asks(png(1), "Which tea?"), "max_new_tokens": 4}
    wished = {**request, "preference": "Be brief."}  # the preferred row, the one of focus, the base
    reply = amulet.batch([wished])[0]
    assert len(seen) == 1
    chat = [*request["messages"], {"role": "assistant", "content": reply.text}]
    amulet.chat([*chat, *asks("And where?")], preference="Be brief.", max_new_tokens=4)
    assert len(seen) == 1
    assert len(opened) == 1
    fresh = {**request, "messages": asks(png(2), "Which tea?")}
    amulet.batch([fresh, {**fresh, "preference": "Be brief."}, {**fresh, "preference": "Be rude."}])
    assert len(seen) == 2


def test_the_last_files_are_not_processed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = processor("llava")
    amulet = Amulet(image_model("llava", torch.float32), given, prefix_cache_bytes=0)
    opened: list[Any] = []
    monkeypatch.setattr(images, "open_image", lambda part: opened.append(part) or open_image(part))
    first = amulet.chat(asks(png(1), "Which tea?"), max_new_tokens=6)
    assert amulet.chat(asks(png(1), "Which tea?"), max_new_tokens=6) == first
    assert len(opened) == 1
    monkeypatch.setattr(images, "MOST_KEPT", 2 * 4 * 3 * 28 * 28)  # two images
    for seed, count in ((2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        amulet.count_chat(asks(png(seed)))
        assert len(opened) == count
    given.image_processor.image_mean = [0.1, 0.2, 0.3]  # then the model sees another image
    before, after = rows(amulet, asks(png(2)))[0], rows(amulet, asks(picture(2)))[0]
    assert before == after
    assert len(opened) == 6


class Slow:
    """Opens images when it is told to; may raise the first time, or whenever a file is broken."""

    def __init__(self, first: BaseException | None = None) -> None:
        self.first = first
        self.opened: list[bytes] = []
        self.begun, self.go_on = Event(), Event()

    def __call__(self, part: bytes) -> Any:
        self.opened.append(part)
        self.begun.set()
        assert self.go_on.wait(30)
        if self.first is not None and len(self.opened) == 1:
            raise self.first
        return open_image(part)


def read_together(reader: Any, slow: Slow, files: list[bytes]) -> list[Any]:
    """Read files in threads of their own, the first one first; return results, or errors."""

    def read(file: bytes) -> Any:
        try:
            return reader.read(file)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(files)) as threads:
        first = threads.submit(read, files[0])
        assert slow.begun.wait(30)
        others = [threads.submit(read, file) for file in files[1:]]
        wait(others, timeout=0.2)
        assert not any(other.done() for other in others)
        slow.go_on.set()
        return [future.result(30) for future in (first, *others)]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    slow = Slow()
    monkeypatch.setattr(images, "open_image", slow)
    return slow


@pytest.mark.parametrize("most", [images.MOST_KEPT, 0])
def test_an_image_that_is_being_read_is_waited_for(
    slow: Slow, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The playground asks its three columns at once."""
    monkeypatch.setattr(images, "MOST_KEPT", most)
    given: Any = processor("llava")
    reader: Any = Amulet(image_model("llava", torch.float32), given)._reader
    found = read_together(reader, slow, [png(1), png(1), png(1)])
    assert slow.opened == [png(1)]
    assert len({image.ids for image in found}) == 1
    assert len({image.inputs["pixel_values"].data_ptr() for image in found}) == 1
    del found
    gc.collect()
    assert len(reader._readings) == len(reader._kept) == (most > 0)


def test_other_images_are_not_waited_for(slow: Slow) -> None:
    given: Any = processor("llava")
    reader: Any = Amulet(image_model("llava", torch.float32), given)._reader
    found = read_together(reader, slow, [png(1), png(2)])
    assert sorted(slow.opened) == sorted([png(1), png(2)])
    assert found[0].ids != found[1].ids


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RequestError("no image")])
def test_who_waited_for_an_image_reads_it_after_an_error(slow: Slow, error: BaseException) -> None:
    slow.first = error
    given: Any = processor("llava")
    reader: Any = Amulet(image_model("llava", torch.float32), given)._reader
    first, *others = read_together(reader, slow, [png(1), png(1), png(1)])
    assert first is error
    assert slow.opened == [png(1)] * 2
    assert {image.ids for image in others} == {reader.read(png(1)).ids}


def test_an_image_that_nobody_can_read_is_an_error_for_each(slow: Slow) -> None:
    given: Any = processor("llava")
    reader: Any = Amulet(image_model("llava", torch.float32), given)._reader
    errors = read_together(reader, slow, [b"Green.", b"Green."])
    assert [type(error) for error in errors] == [RequestError] * 2
    assert errors[0] is not errors[1]
    del errors  # their tracebacks hold what was read
    gc.collect()
    assert len(reader._readings) == len(reader._kept) == 0


def test_what_is_kept_of_a_file_is_all_that_takes_memory() -> None:
    """LLaVA-OneVision's processor gets an image twice where the chat has others."""
    given: Any = processor("llava_onevision")
    reader = Amulet(image_model("llava_onevision", torch.float32), given)._reader
    assert reader is not None
    for is_only in (True, False):
        for tensor in reader.read(png(), is_only).inputs.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_mark_that_is_no_image_is_an_error(amulet: Amulet) -> None:
    """It is a random text, drawn anew in each process; and whoever knew it would gain nothing."""
    for said in ({"content": MARK}, asks(MARK, picture())[0]):
        with pytest.raises(TemplateError, match=r"shows [12] of [01] images"):
            amulet.chat([{"role": "user", **said}])


def test_a_template_that_drops_images() -> None:
    given: Any = processor("llava")
    given.tokenizer.chat_template = given.chat_template = TEMPLATE.replace("'<image>'", "''")
    with pytest.raises(TemplateError, match=r"shows 0 of 1 images.*template that the model's proc"):
        Amulet(image_model("llava", torch.float32), given).chat(asks(picture(), "Which tea?"))


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_only_the_user_has_images(amulet: Amulet, role: str) -> None:
    chat = [*asks("Hi"), {"role": role, "content": [picture()]}]
    with pytest.raises(
        RequestError, match=rf"messages\[1\] \({role}\) has an image: images are re"
    ):
        amulet.chat(chat)


# ---- models


def test_a_text_model_names_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(random_model("qwen2"), tokenizer)
    assert not amulet.reads_images
    said = "an image, and qwen2 takes none: qwen2 reads text alone. Leave the image out, describe"
    with pytest.raises(RequestError, match=said):
        amulet.chat(asks("Hi", png()))
    assert amulet.count_chat(asks("Hi", png())) == amulet.count_chat(asks("Hi"))


@pytest.mark.parametrize("kind", ["aya_vision", "paligemma"])
def test_an_image_model_that_is_not_served_names_itself(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    why = f"of image models Amulet serves gemma3, .*, not {kind}"
    amulet = Amulet(build(Entry(kind, kind, True)), tokenizer)
    assert not amulet.reads_images
    with pytest.raises(RequestError, match=f"an image, and {kind} takes none: {why}"):
        amulet.chat(asks("Hi", png()))


def test_a_model_without_its_processor() -> None:
    amulet = Amulet(image_model("llava", torch.float32), image_tokenizer())
    with pytest.raises(
        RequestError, match=r"llava takes none: its processor was not given.*Pillow"
    ):
        amulet.chat(asks(png()))
    assert amulet.chat(asks("Hi"), **LAST).token_ids


def test_a_saved_checkpoint_is_loaded_with_its_processor(tmp_path: Path) -> None:
    model = image_model("llava", torch.float32)
    model.save_pretrained(tmp_path)
    processor("llava").save_pretrained(tmp_path)
    loaded = Amulet.from_pretrained(str(tmp_path), device="cpu")
    assert loaded.reads_images
    chat = asks(picture(), "Which tea?")
    options = {"preference": "Be brief.", "max_new_tokens": 6}
    assert loaded.chat(chat, **options) == Amulet(model, processor("llava")).chat(chat, **options)


def test_a_checkpoint_whose_processor_fails_reads_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_model("llava", torch.float32).save_pretrained(tmp_path)
    image_tokenizer().save_pretrained(tmp_path)
    loaded = Amulet.from_pretrained(str(tmp_path), device="cpu")
    assert not loaded.reads_images
    assert "reads no images: its processor can't be loaded" in caplog.text
    assert loaded.chat(asks("Hi"), **LAST).token_ids


def test_vectors_of_another_number_than_columns(amulet: Amulet) -> None:
    given: Any = processor("llava")
    given.num_additional_image_tokens = 2
    with pytest.raises(Exception, match="made 4 vectors of an image, and its processor 5 columns"):
        Amulet(image_model("llava", torch.float32), given).chat(asks(picture()))


def test_a_remote_models_images_are_data_urls(tmp_path: Path) -> None:
    (tmp_path / "tea.png").write_bytes(png())
    sent = with_data_urls(asks("This", png(), picture(), tmp_path / "tea.png", FORMS["Anthropic"]))
    said, *parts = sent[0]["content"]
    assert said == "This"
    assert {part["image_url"]["url"][:11] for part in parts} == {"data:image;"}
    for part in parts:
        found = open_image(image_file(part))
        assert found.tobytes() == picture().tobytes()
    with pytest.raises(RequestError, match="doesn't fetch"):
        with_data_urls(asks({"type": "image", "url": "http://localhost/"}))
