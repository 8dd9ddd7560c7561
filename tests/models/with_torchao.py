"""Checkpoints quantised with torchao; `test_checkpoints.py` runs this where torchao is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amulet.fingerprint import fingerprint
from tests.models.test_checkpoints import QUIET, check, quantised


@QUIET
@pytest.mark.parametrize("saved", [True, False])
def test_torchao(saved: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    options: dict[str, Any] = {"quantization_config": config, "dtype": torch.float32}
    amulet, model = quantised(tmp_path, tokenizer, options, saved)
    kinds = {type(parameter.data) for parameter in amulet.model.parameters()}
    assert kinds != {torch.Tensor}
    check(amulet, model)
    known = fingerprint(amulet)
    layer = amulet.model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.dequantize() * 2, requires_grad=False)
    assert fingerprint(amulet) != known
