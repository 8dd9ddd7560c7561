"""The C code is compiled once, trusted only if it is one's own, and never required."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from amulet import doctor
from amulet.backends.transformers.attention import grouped_attention, steps_are_native
from amulet.backends.transformers.cpu import native, products
from amulet.backends.transformers.cpu.packed_layers import PackedLinear
from amulet.backends.transformers.cpu.packing import pack_linears
from tests.engines import engine_over
from tests.marks import needs_code
from tests.models import random_model


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMULET_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_libraries", [])


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for these tests alone, with what was compiled for all."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "native").mkdir(mode=0o755)
    if native.library() is not None:
        shutil.copy2(native._built(), folder / "native")
    return folder


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, builds: Path) -> None:
    monkeypatch.setenv("AMULET_CACHE", str(builds))
    monkeypatch.setattr(native, "_libraries", [])


@pytest.mark.usefixtures("uncached")
def test_without_a_compiler_pytorch_s_kernels_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    caplog.set_level(logging.INFO, "amulet")
    dense = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    packed = PackedLinear(dense)
    assert not packed.native_rows
    hidden = torch.randn(2, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(packed(hidden), dense(hidden))
    PackedLinear(dense)
    assert len(caplog.messages) == 1
    assert "run without Amulet's C code" in caplog.messages[0]


@needs_code
@pytest.mark.usefixtures("uncached")
def test_what_was_compiled_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library() is not None
    native._libraries.clear()

    def compile_again(command: tuple[str, ...]) -> None:
        raise AssertionError(f"compiled again: {command}")

    monkeypatch.setattr(native, "_run", compile_again)
    assert native.library() is not None


@pytest.mark.usefixtures("uncached")
def test_a_compiler_that_fails_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "processor", lambda: "flags : avx512f")
    monkeypatch.setattr(native, "_run", Mock(side_effect=FAILED))
    caplog.set_level(logging.INFO, "amulet")
    assert native.library() is None
    assert "cc: no such instruction" in caplog.text


FAILED = subprocess.CalledProcessError(1, "cc", stderr="cc: no such\n  instruction")


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a compiler")
@pytest.mark.usefixtures("uncached")
def test_a_compiler_that_failed_is_not_asked_at_every_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "processor", lambda: "flags : avx512f")
    run = Mock(side_effect=FAILED)
    monkeypatch.setattr(native, "_run", run)

    def reason_at_a_start() -> str:
        native._libraries.clear()
        return native.reason()

    assert reason_at_a_start() == "cc: no such instruction"
    asked = run.call_count
    (failed,) = (tmp_path / "native").glob("*.failed")
    assert reason_at_a_start() == f"cc: no such instruction (to retry at once, delete {failed})"
    assert run.call_count == asked
    monkeypatch.setenv("CC", "cc -O2")  # another compiler's failure is another
    assert reason_at_a_start() == "cc: no such instruction"
    monkeypatch.delenv("CC")
    asked = run.call_count
    yesterday = time.time() - native.FORGOTTEN_AFTER - 1
    os.utime(failed, (yesterday, yesterday))
    assert reason_at_a_start() == "cc: no such instruction"
    assert run.call_count > asked


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a compiler")
@pytest.mark.usefixtures("uncached")
def test_a_compiler_that_was_killed_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "processor", lambda: "flags : avx512f")
    killed = subprocess.CalledProcessError(-9, "cc", stderr="")
    monkeypatch.setattr(native, "_run", Mock(side_effect=killed))
    assert native.library() is None
    assert not list((tmp_path / "native").glob("*.failed"))


@pytest.mark.usefixtures("uncached")
def test_without_avx_512_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processor", lambda: "flags : fpu avx2 avx512fp16x")
    monkeypatch.setattr(native, "_run", Mock(side_effect=AssertionError("compiles")))
    assert native.library() is None
    if sys.platform == "linux":
        assert native.reason() == "it requires a processor with AVX-512"


@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float16), ("cpu", torch.float64)]
)
@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.usefixtures("uncached")
def test_for_a_model_that_it_does_not_serve_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, compile: bool
) -> None:
    """Such as one on a GPU, for which another device stands here."""
    monkeypatch.setattr(native, "library", Mock(side_effect=AssertionError("compiles")))
    model = random_model("llama", head_dim=64, dtype=dtype).to(device)
    assert pack_linears(model) == 0
    assert not steps_are_native(model)
    if device == "cpu":
        engine_over(model, compile=compile)
    query, key = (torch.empty(1, 1, n, 64, dtype=dtype, device=device) for n in (1, 9))
    grouped_attention(nn.Module(), query, key, key, None)


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)
def test_with_a_compiler_the_code_compiles() -> None:
    if "avx512f" not in native.processor():
        pytest.skip("needs AVX-512")
    assert native.library() is not None, native.reason()


@needs_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("built")
def test_avx_512_without_bfloat16_gives_the_same_results(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(96, 200, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(7, 96, dtype=dtype)
    query, states = torch.randn(2, 6, 1, 64, dtype=dtype), torch.randn(2, 2, 50, 64, dtype=dtype)

    def outputs() -> list[torch.Tensor]:
        packed = PackedLinear(dense)
        assert packed.native_rows
        attended = grouped_attention(nn.Module(), query, states, states, None)[0]
        return [packed(hidden), attended]

    here = outputs()
    products.most_rows.cache_clear()
    monkeypatch.setenv("CC", "cc -mno-avx512bf16")
    native._libraries.clear()
    for there, expected in zip(outputs(), here, strict=True):
        torch.testing.assert_close(there, expected)
    assert not products.serves(products.INT8)
    assert products.most_rows(products.BFLOAT16) == products.MOST_ROWS_WITHOUT_BFLOAT16
    products.most_rows.cache_clear()


@needs_code
@pytest.mark.usefixtures("uncached")
def test_processors_without_avx_512_keep_pytorch_s_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the compiler doesn't know what the processor has."""
    monkeypatch.setenv("CC", "cc -mno-avx512f")
    assert native.library() is None
    assert "requires a processor with AVX-512" in native.reason()


@needs_code
@pytest.mark.usefixtures("uncached")
def test_a_folder_that_anybody_may_write_is_not_built_in(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    os.chmod(tmp_path / "native", 0o777)
    assert native.library() is None
    assert "set AMULET_CACHE to a folder of your own" in native.reason()
    assert not list((tmp_path / "native").iterdir())


@pytest.mark.parametrize("compiler", ["  ", "cc '"])
@pytest.mark.usefixtures("built")
def test_a_strange_cc_is_no_error(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    assert native.library() is None or native.reason() == ""


@needs_code
@pytest.mark.usefixtures("uncached")
def test_code_that_anybody_may_have_written_is_not_loaded(builds: Path, tmp_path: Path) -> None:
    shutil.copytree(builds / "native", tmp_path / "native")
    path = native._built()
    os.chmod(path.parent, 0o777)
    native._libraries.clear()
    assert native.library() is None
    assert "set AMULET_CACHE to a folder of your own" in native.reason()
    os.chmod(path.parent, 0o755)
    native._libraries.clear()
    assert native.library() is not None
    assert native.reason() == ""
    os.chmod(path, 0o666)
    native._libraries.clear()
    assert native.library() is None


@needs_code
@pytest.mark.usefixtures("uncached")
def test_the_compiler_is_the_one_that_cc_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -O2")
    assert native.library() is not None
    native._libraries.clear()
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert native.library() is None
    assert "no C compiler `no-such-compiler`" in native.reason()
    finding = next(f for f in doctor.examine() if f.topic == "C code")
    assert finding.state == "note"
    assert "no-such-compiler" in finding.text


@needs_code
@pytest.mark.skipif(shutil.which("ldd") is None, reason="asks ldd")
@pytest.mark.usefixtures("built")
def test_it_brings_no_second_openmp() -> None:
    """Two of them would keep threads that compete for the cores."""
    needed = subprocess.run(["ldd", native._built()], capture_output=True, text=True, check=True)
    assert "omp" not in needed.stdout


def products_and_attention(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    results = []
    for out_features, dtype in ((576, torch.bfloat16), (200, torch.float32)):
        layer = PackedLinear(nn.Linear(128, out_features, dtype=dtype).requires_grad_(False))
        results += [layer(torch.randn(rows, 128, dtype=dtype)) for rows in (1, 2, 7)]
    query, key, value = (torch.randn(2, heads, n, 64) for heads, n in ((6, 1), (3, 90), (3, 90)))
    results.append(grouped_attention(torch.nn.Module(), query, key, value, None)[0])
    return results


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of which three are asked for."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@needs_code
@pytest.mark.usefixtures("four_cores")
def test_the_team_computes_what_openmp_s_threads_do() -> None:
    expected = products_and_attention(0)
    with native.team():
        assert torch.get_num_threads() == 1
        found = products_and_attention(0)
    assert torch.get_num_threads() == 3
    assert all(map(torch.equal, found, expected))


@needs_code
@pytest.mark.usefixtures("four_cores")
def test_no_team_where_a_core_for_each_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    for asked in (1, 3, native.MOST_THREADS + 1):
        torch.set_num_threads(asked)
        with native.team():
            assert torch.get_num_threads() == asked
    torch.set_num_threads(2)
    with native.team():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@needs_code
@pytest.mark.usefixtures("four_cores")
def test_a_team_that_nobody_left_is_left_later() -> None:
    native.library().amulet_enter_team()  # and an interrupt comes
    with native.team():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@needs_code
@pytest.mark.usefixtures("four_cores")
def test_teams_of_changing_size() -> None:
    expected = products_and_attention(0)
    for asked in (4, 2, 3, 2, 4):
        torch.set_num_threads(asked)
        for _ in range(5):
            with native.team():
                found = products_and_attention(0)
            assert all(map(torch.equal, found, expected))


@needs_code
@pytest.mark.usefixtures("four_cores")
def test_a_team_asked_by_many_threads_at_once() -> None:
    """One at a time has the helpers, the others compute alone; all get their own results."""
    torch.manual_seed(0)
    wrong: list[int] = []

    def compute(number: int) -> None:
        layer = PackedLinear(nn.Linear(64, 640, dtype=torch.bfloat16).requires_grad_(False))
        hidden = torch.randn(3, 64, dtype=torch.bfloat16)
        alone = layer(hidden)
        for _ in range(300):
            with native.team():
                if not torch.equal(layer(hidden), alone):
                    wrong.append(number)

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKING = """
import os, torch
from torch import nn
from amulet.backends.transformers.cpu import native
from amulet.backends.transformers.cpu.packed_layers import PackedLinear

os.sched_getaffinity = lambda _: range(4)
torch.set_num_threads(3)
layer = PackedLinear(nn.Linear(64, 640, dtype=torch.bfloat16).requires_grad_(False))
hidden = torch.randn(3, 64, dtype=torch.bfloat16)

def compute():
    with native.team():
        return layer(hidden)

expected = compute()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(compute(), expected) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, torch.equal(compute(), expected))
"""


@needs_code
def test_a_forked_child_has_a_team_of_its_own() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.split() == ["0", "True"]
