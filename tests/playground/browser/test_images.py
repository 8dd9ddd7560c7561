"""Images of a question: attached in three ways, sent, shown, kept, and written as code."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from io import BytesIO
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect

from amulet import Amulet
from amulet.serve.limits import Limits
from amulet.serve.store import MEMORY
from tests.models.images import data_url, image_model, png, processor
from tests.playground.browser.conftest import (
    Open,
    answer,
    ask,
    copied,
    posted,
    prefer,
    run,
    serving,
    shown_code,
)
from tests.serve.conftest import saying

# Gives the page's event a file, as the browser does for a real one.
GIVE = """([kind, type, name, bytes, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type }));
    if (text) data.setData("text/plain", text);
    const options = { bubbles: true, cancelable: true };
    const event = kind === "paste"
        ? new ClipboardEvent(kind, { ...options, clipboardData: data })
        : new DragEvent(kind, { ...options, dataTransfer: data });
    const target = kind === "paste" ? document.querySelector("textarea") : document.body;
    return target.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet(image_model("llava", torch.float32), processor("llava"))


@pytest.fixture(scope="module")
def url(amulet: Amulet) -> Iterator[str]:
    with serving(amulet, name="llava", thumbs=MEMORY) as (url, _):
        yield url


def give(page: Page, kind: str, name: str, file: bytes, text: str = "") -> bool:
    """Paste a file, or drop it; return whether the browser is to do what it does by itself."""
    mime = "image/png" if name.endswith(".png") else "text/plain"
    left: bool = page.evaluate(GIVE, [kind, mime, name, list(file), text])
    return left


def choose(page: Page, name: str, file: bytes) -> None:
    """Attach a file by the button."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach images").click()
    mime, _ = guess_type(name)
    chooser.value.set_files([{"name": name, "mimeType": mime, "buffer": file}])


def shorten(page: Page) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("Max tokens per answer").fill("6")
    page.get_by_label("Max tokens per answer").press("Tab")


def names(page: Page, label: str = "Attached images") -> list[str | None]:
    images = page.get_by_label(label).locator("img")
    for image in images.all():  # shown, and not refused by the policy
        expect(image).to_have_js_property("naturalWidth", 40)
    return [image.get_attribute("alt") for image in images.all()]


def content(question: str, *seeds: int) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in seeds]
    return [*images, {"type": "text", "text": question}]


def test_images_are_attached_sent_shown_and_kept(visit: Open, url: str) -> None:
    page = visit(url)
    sent = posted(page)
    shorten(page)
    choose(page, "leaf.png", png(1))
    page.get_by_label("Attached images").get_by_role("img", name="leaf.png").wait_for()
    expect(page.get_by_role("status").last).to_have_text("leaf.png is attached.")
    assert not give(page, "paste", "image.png", png(2))
    page.get_by_role("img", name="image.png").wait_for()
    assert give(page, "paste", "table.png", png(3), "a table as a text")  # the text is pasted
    assert not give(page, "dragover", "image.png", png(3))
    assert not give(page, "drop", "image.png", png(3))
    page.get_by_role("img", name="image-2.png").wait_for()
    assert names(page) == ["leaf.png", "image.png", "image-2.png"]

    remove = page.get_by_role("button", name="Remove image.png")
    remove.focus()
    page.keyboard.press("Enter")
    expect(remove).to_have_count(0)
    expect(page.get_by_label("Your question")).to_be_focused()
    expect(page.get_by_role("status").last).to_have_text("image.png is removed.")
    assert names(page) == ["leaf.png", "image-2.png"]

    ask(page, "Which tea?")
    answer(page, "plain")
    assert [body["messages"] for body in sent] == [
        [{"role": "user", "content": content("Which tea?", 1, 3)}]
    ]
    expect(page.get_by_label("Attached images")).to_have_count(0)
    assert names(page, "Images of the question") == ["leaf.png", "image-2.png"]

    page.get_by_role("button", name="Regenerate").wait_for()
    page.reload()
    assert names(page, "Images of the question") == ["leaf.png", "image-2.png"]
    page.get_by_role("button", name="Edit the question").click()
    page.get_by_label("The question", exact=True).fill("Which one?")
    page.get_by_role("button", name="Ask again").click()
    page.locator(".question", has_text="Which one?").wait_for()
    answer(page, "plain")
    page.get_by_role("button", name="Regenerate").wait_for()
    ask(page, "And where?")
    page.locator("article.turn").nth(1).wait_for()
    answer(page, "plain")
    assert [body["messages"][0]["content"] for body in sent[1:]] == [
        content("Which one?", 1, 3)
    ] * 2
    assert sent[2]["messages"][2] == {"role": "user", "content": "And where?"}


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_large_image_is_scaled_in_the_page(visit: Open, url: str) -> None:
    red, blue, clear = (220, 20, 60), (30, 60, 200), (0, 0, 0, 0)
    photo = Image.new("RGB", (2352, 1176), blue)
    photo.paste(red, (0, 0, 1176, 1176))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held sideways: what is left is above
    drawing = Image.new("RGBA", (3136, 784), (*blue, 255))
    drawing.paste(clear, (0, 0, 1568, 784))
    small = stored(Image.new("RGB", (1568, 20), red), "JPEG", exif=turned)
    wide = stored(Image.new("RGB", (40000, 1), red), "PNG")
    broken = png()[:60]
    page = visit(url)
    sent = posted(page)
    shorten(page)
    given = {
        "photo.jpg": stored(photo, "JPEG", exif=turned),
        "drawing.png": stored(drawing, "PNG"),
        "small.jpg": small,
        "wide.png": wide,
        "drawing.webp": stored(drawing, "WEBP"),
        "photo.bmp": stored(photo, "BMP"),
    }
    for name, file in given.items():
        choose(page, name, file)
        page.get_by_role("img", name=name).wait_for()
    choose(page, "broken.png", broken)
    page.get_by_role("img", name="broken.png").wait_for()
    page.get_by_role("button", name="Remove broken.png").click()
    ask(page, "Which tea?")
    answer(page, "plain")
    *images, _ = sent[0]["messages"][0]["content"]
    urls = [image["image_url"]["url"] for image in images]
    kinds = ["jpeg", "png", "jpeg", "png", "webp", "png"]
    assert [url.partition(";")[0] for url in urls] == [f"data:image/{kind}" for kind in kinds]
    files = [base64.b64decode(url.partition(",")[2]) for url in urls]
    assert files[2] == small
    shown = [Image.open(BytesIO(file)) for file in files]
    assert [image.size for image in shown] == [
        *((784, 1568), (1568, 392), (1568, 20), (1568, 1), (1568, 392), (1568, 784)),
    ]
    assert dict(shown[0].getexif()) == {}
    upright = shown[0].convert("RGB")
    for place, colour in (((400, 200), red), ((400, 1400), blue)):
        pixel: Any = upright.getpixel(place)
        assert all(abs(a - b) <= 8 for a, b in zip(pixel, colour, strict=True)), pixel
    for image in (shown[1], shown[4]):
        both = image.convert("RGBA")
        left, right = both.getpixel((300, 200)), both.getpixel((1300, 200))
        assert isinstance(left, tuple)
        assert isinstance(right, tuple)
        assert (left[3], right[3]) == (0, 255)


def test_what_cannot_be_attached_is_told(visit: Open, amulet: Amulet) -> None:
    limits = Limits(body_bytes=2**16 + 2 * len(data_url()) + 50)
    with serving(amulet, name="llava", limits=limits) as (url, _):
        page = visit(url)
        told = page.get_by_role("alert")
        page.get_by_role("button", name="Attach images").wait_for()
        give(page, "drop", "leaf.txt", b"Green.")
        expect(told).to_have_text("leaf.txt is not an image in PNG, JPEG, WebP, GIF or BMP.")
        choose(page, "one.png", png())
        page.get_by_role("img", name="one.png").wait_for()
        expect(told).to_have_count(0)
        choose(page, "one.png", png())
        page.get_by_role("img", name="one-2.png").wait_for()
        choose(page, "three.png", png())
        expect(told).to_contain_text("three.png has 0.0 MB: a conversation's images may have")
        expect(told).to_contain_text("together. Make it smaller, or save it as JPEG.")
        page.get_by_role("button", name="Remove one.png").click()
        choose(page, "three.png", png())
        page.get_by_role("img", name="three.png").wait_for()
        expect(told).to_have_count(0)
        title = page.get_by_role("button", name="Attach images").get_attribute("title")
        assert title == "PNG, JPEG, WebP, GIF or BMP, 0.0 MB in a conversation"


def test_a_model_that_reads_no_images_is_offered_none(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, "Fine.")) as (url, _):
        page = visit(url)
        page.locator(".server.ready").wait_for()
        expect(page.get_by_role("button", name="Attach images")).to_have_count(0)
        for kind in ("paste", "drop"):
            assert give(page, kind, "leaf.png", png())
        ask(page, "Which tea?")
        assert answer(page, "plain") == "Fine."
        expect(page.locator("img")).to_have_count(0)


def test_the_code_reads_the_images_from_files(
    visit: Open, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "it's a $leaf.png"
    (tmp_path / name).write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    page = visit(url, permissions=["clipboard-read", "clipboard-write"])
    shorten(page)
    prefer(page, "Be brief.")
    choose(page, name, png(1))
    page.get_by_label("Attached images").locator("img").wait_for()
    ask(page, 'Which `tea` for $5?\nOr \\ "none"?')
    for column in ("plain", "prompted", "steered"):
        answer(page, column)
    page.get_by_role("button", name="Regenerate").wait_for()
    expect(page.locator(".thumbs button")).to_have_count(0)  # no strength is fitted to these
    said = copied(page, "steered")
    for language in ("Python", "LangChain", "LlamaIndex"):
        code = shown_code(page, "steered", language)
        assert code.startswith("# The images are read from the current folder.\nfrom pathlib")
        assert run(code) == said, language
    shell = shown_code(page, "steered", "curl").replace("curl ", "curl --silent ", 1)
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == said


@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_serious(visit: Open, url: str, width: int) -> None:
    # axe itself is put into the page as a script: the policy is off for this visit alone.
    size = {"width": width, "height": 800}
    page = visit(url, viewport=size, bypass_csp=True, reduced_motion="reduce")
    for name in ("leaf.png", "stem.png"):
        choose(page, name, png())
        page.get_by_role("img", name=name).wait_for()
    give(page, "drop", "leaf.txt", b"Green.")
    page.get_by_role("alert").wait_for()
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") == width
        found = Axe().run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        if page.locator("article.turn").count() == 0:
            ask(page, "Which tea?")
            page.locator("section.plain[data-state=done]").wait_for()


# What is written to the browser's store: whether it has an image.
WATCH = """() => {
    const { put } = IDBObjectStore.prototype;
    window.written = [];
    IDBObjectStore.prototype.put = function (value, key) {
        window.written.push(JSON.stringify(value).includes("base64"));
        return put.call(this, value, key);
    };
}"""
KEPT = """() => new Promise((done) => {
    indexedDB.open("keyval-store").onsuccess = ({ target }) => {
        const store = target.result.transaction("keyval").objectStore("keyval");
        store.getAllKeys().onsuccess = ({ target }) => done(target.result.length);
    };
})"""


def test_an_image_is_written_once_and_erased_with_what_it_belongs_to(visit: Open, url: str) -> None:
    page = visit(url, viewport={"width": 1700, "height": 900})

    def kept(count: int) -> None:
        page.wait_for_function(f"async () => await ({KEPT})() === {count}")

    page.evaluate(WATCH)
    shorten(page)
    choose(page, "leaf.png", png(1))
    page.get_by_role("img", name="leaf.png").wait_for()
    ask(page, "Which tea?")
    page.get_by_role("button", name="Regenerate").wait_for()
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_role("button", name="Regenerate").wait_for()
    kept(2)  # the conversation and its image
    choose(page, "stem.png", png(2))
    page.get_by_role("img", name="stem.png").wait_for()
    ask(page, "And this?")
    page.locator("article.turn").nth(1).wait_for()
    page.get_by_role("button", name="Regenerate").wait_for()
    kept(3)
    written = page.evaluate("window.written")
    assert written.count(True) == 2
    assert written.count(False) > 2
    page.reload()
    page.locator("article.turn").nth(1).wait_for()
    assert names(page, "Images of the question") == ["leaf.png", "stem.png"]
    page.get_by_role("button", name="Edit the question").first.click()
    page.get_by_role("button", name="Ask again").click()  # the second question goes
    page.get_by_role("button", name="Regenerate").wait_for()
    kept(2)
    page.get_by_role("button", name="Delete: Which tea?").click()
    page.get_by_role("button", name="Really delete: Which tea?").click()
    kept(0)


def test_images_that_come_together_have_names_of_their_own(visit: Open, url: str) -> None:
    page = visit(url)
    page.get_by_role("button", name="Attach images").wait_for()
    drop = ["drop", "image/png", "image.png", list(png(1)), ""]
    page.get_by_label("Your question").fill("Which tea?")
    page.evaluate(
        f"""(drop) => {{
            ({GIVE})(drop);
            ({GIVE})(drop);
            document.querySelector("form.composer").requestSubmit();  // before they are read
        }}""",
        drop,
    )
    page.get_by_role("img", name="image-2.png").wait_for()
    assert names(page) == ["image.png", "image-2.png"]
    expect(page.locator("article.turn")).to_have_count(0)


def test_images_attached_before_another_conversation_is_opened(visit: Open, url: str) -> None:
    """The code would name two images by one file."""
    page = visit(url, viewport={"width": 1700, "height": 900})
    shorten(page)
    choose(page, "leaf.png", png(1))
    page.get_by_role("img", name="leaf.png").wait_for()
    ask(page, "Which tea?")
    page.get_by_role("button", name="Regenerate").wait_for()
    page.get_by_role("button", name="New conversation").click()
    choose(page, "leaf.png", png(2))
    page.get_by_role("img", name="leaf.png").wait_for()
    page.locator(".conversations .open").click()
    ask(page, "And this?")
    page.locator("article.turn").nth(1).wait_for()
    answer(page, "plain")
    assert names(page, "Images of the question") == ["leaf.png", "leaf-2.png"]
