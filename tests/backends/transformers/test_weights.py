"""Weights that change under a loaded model: nothing of the old ones is used again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from amulet import Amulet, ModelError
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.backends.transformers.cuda.graphs import _fingerprint as recordable
from amulet.backends.transformers.weights import weights_state
from amulet.fingerprint import fingerprint
from tests.models import IM_END, VOCAB_SIZE, random_model

CHAT = [{"role": "user", "content": "A question that is long enough to be kept afterwards."}]
LONGER = [
    *CHAT,
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And then? Tell me more, please."},
]

WISH = {"preference": "Be brief.", "max_new_tokens": 8}


def tied_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny Llama whose head shares the embedding's weight."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IM_END,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def literal(model: Any, prompt: list[int], count: int) -> list[int]:
    """Decode greedily by whole passes, without any cache."""
    got: list[int] = []
    while len(got) < count and got[-1:] != [IM_END]:
        with torch.no_grad():
            got.append(int(model(torch.tensor([prompt + got])).logits[0, -1].argmax()))
    return got


def check(amulet: Amulet, count: int = 10) -> list[int]:
    """Continue the chat; the tokens must be those of whole passes with the weights of now."""
    reply = amulet.chat(LONGER, max_new_tokens=count)
    assert list(reply.token_ids) == literal(amulet.model, amulet.encode_chat(LONGER), count)
    return list(reply.token_ids)


def layer(model: Any) -> Any:
    return model.model.layers[1]


def load(model: Any) -> None:
    model.load_state_dict(random_model("llama", seed=9).state_dict())


def load_assigned(model: Any) -> None:
    model.load_state_dict(random_model("llama", seed=9).state_dict(), assign=True)


def edit_in_place(model: Any) -> None:
    with torch.no_grad():
        layer(model).self_attn.v_proj.weight[3, 5] += 40.0


def edit_data(model: Any) -> None:
    layer(model).self_attn.v_proj.weight.data.mul_(-3.0)


def add_to_data(model: Any) -> None:
    layer(model).mlp.up_proj.weight.data += 1.0


def swap_data(model: Any) -> None:
    weight = layer(model).self_attn.k_proj.weight
    weight.data = weight.data.flip(0)


def replace_parameter(model: Any) -> None:
    linear = layer(model).self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.detach() * -2)


def replace_module(model: Any) -> None:
    layer(model).self_attn.o_proj = nn.Linear(64, 64, bias=False)


def edit_norm(model: Any) -> None:
    with torch.no_grad():
        layer(model).input_layernorm.weight.mul_(-4.0)


def swap_norm(model: Any) -> None:
    norm = layer(model).input_layernorm
    norm.weight.data = norm.weight.data * -4.0


def replace_norm(model: Any) -> None:
    norm = layer(model).post_attention_layernorm
    norm.weight = nn.Parameter(torch.linspace(-3, 3, 64))


def edit_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.25)


def edit_embedding(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(0))


def swap_embedding(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    weight.data = weight.data.flip(0)


def hook(model: Any) -> None:
    layer(model).mlp.register_forward_hook(lambda module, args, output: -output)


def train(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(40)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = [
    load,
    load_assigned,
    edit_in_place,
    edit_data,
    add_to_data,
    swap_data,
    replace_parameter,
    replace_module,
    edit_norm,
    swap_norm,
    replace_norm,
    edit_buffer,
    edit_embedding,
    swap_embedding,
    hook,
    train,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("running", [False, True])
def test_no_prefix_outlives_its_weights(
    change: Callable[[Any], None], running: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Neither a kept row's, nor one that is still being decoded."""
    model = random_model("llama", seed=3)
    amulet = Amulet(model, tokenizer)
    stream = amulet.stream(CHAT, max_new_tokens=40)
    next(stream)
    if not running:
        stream.read()
    before, known = literal(model, amulet.encode_chat(LONGER), 10), fingerprint(amulet)
    change(model)
    assert check(amulet) != before
    stream.read()  # computed with both: must not be kept either
    check(amulet)
    continued = [*CHAT, {"role": "assistant", "content": stream.text}, *LONGER[2:]]
    reply = amulet.chat(continued, max_new_tokens=8)
    assert list(reply.token_ids) == literal(model, amulet.encode_chat(continued), 8)
    if change is not hook:  # code that runs beside the weights is nobody's fingerprint
        assert fingerprint(amulet) != known


def test_unchanged_weights_are_still_reused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model("llama", seed=3)
    amulet = Amulet(model, tokenizer)
    amulet.chat(CHAT, max_new_tokens=8)
    widths: list[int] = []
    state = weights_state(model)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: widths.append(args[0].shape[1])
    )
    assert weights_state(model) != state, "a hook may change what a pass computes"
    amulet.chat(CHAT, max_new_tokens=8)
    first = max(widths)
    widths.clear()
    amulet.chat(LONGER, max_new_tokens=1)
    assert max(widths) < first, "the first question was computed again"


def test_hooks_that_capture_outputs_are_no_change() -> None:
    """Transformers leaves them on the layers for good once hidden states have been asked for."""
    model = random_model("llama", seed=3)
    state = weights_state(model)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert weights_state(model) == state
    assert recordable(model) is not None


PACKED_CHANGES = [
    edit_norm,
    swap_norm,
    replace_norm,
    edit_buffer,
    edit_embedding,
    swap_embedding,
    hook,
]


@pytest.mark.parametrize("change", PACKED_CHANGES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_takes_over_what_changed(
    change: Callable[[Any], None], tied: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tied_model(3) if tied else random_model("llama", seed=3, head_dim=32)
    dense = copy.deepcopy(model)
    assert pack_linears(model) > 0
    amulet = Amulet(model, tokenizer)
    amulet.chat(CHAT, max_new_tokens=8)
    prompt = amulet.encode_chat(LONGER)
    before = literal(dense, prompt, 16)
    change(model)
    change(dense)
    after = literal(dense, prompt, 16)
    assert after != before
    assert list(amulet.chat(LONGER, max_new_tokens=16).token_ids) == after


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("part", ["all", "model.norm", "head"])
def test_a_packed_model_refuses_other_weights(strict: bool, assign: bool, part: str) -> None:
    other = random_model("llama", seed=9).state_dict()
    model = random_model("llama")
    pack_linears(model)
    given = {name: weight for name, weight in other.items() if part in ("all", name[: len(part)])}
    with pytest.raises(ModelError, match="pack=False"):
        model.load_state_dict(given, strict=strict, assign=assign)


def test_a_packed_weight_is_not_edited_in_vain() -> None:
    model = random_model("llama")
    pack_linears(model)
    with pytest.raises(RuntimeError, match="nference tensor"), torch.no_grad():
        layer(model).self_attn.q_proj.weight.mul_(2)
    with pytest.raises(ModelError, match="pack=False"):
        layer(model).self_attn.q_proj.weight = nn.Parameter(torch.zeros(64, 64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_is_saved_with_all_of_its_weights(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tied_model(dtype=dtype) if tied else random_model("qwen2", dtype=dtype)
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    pack_linears(model)
    given = model.state_dict()
    assert given.keys() == dense.keys()
    assert all(torch.equal(given[name], weight) for name, weight in dense.items())
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert saved.keys() == dense.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in dense.items())


@pytest.mark.parametrize("pack", ["int8", "int4"])
def test_rounded_weights_are_not_saved_as_if_they_were_the_model_s(
    pack: Any, tmp_path: Path
) -> None:
    model = random_model("llama", dtype=torch.bfloat16)
    pack_linears(model, pack)
    for attempt in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ModelError, match="pack=False"):
            attempt()
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_is_not_copied_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tied_model(dtype=dtype)
    pack_linears(model)
    for attempt in (
        copy.deepcopy,
        pickle.dumps,
        lambda it: torch.save(it, tmp_path / "model.pt"),
        lambda it: copy.deepcopy(it.model.layers[0]),
        lambda it: pickle.dumps(it.model.layers[0]),
    ):
        with pytest.raises(ModelError, match="pack=False"):
            attempt(model)


def test_fingerprints_tell_weights_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    def make(pack: Any = False, seed: int = 0, edit: Any = None, dtype: Any = None) -> str:
        model = random_model("llama", seed=seed, dtype=dtype or torch.bfloat16)
        if edit is not None:
            with torch.no_grad():
                edit(model)
        pack_linears(model, pack)
        return fingerprint(Amulet(model, tokenizer))

    def one_value(model: Any) -> None:
        layer(model).mlp.down_proj.weight[7, 11] += 1

    def one_bit(model: Any) -> None:
        layer(model).mlp.down_proj.weight.view(torch.int16)[9, 3] ^= 1

    kinds = (False, True, "int8", "int4")
    made = [make(pack, seed) for pack in kinds for seed in (0, 1)]
    made += [make(pack, edit=one_value) for pack in kinds]
    made += [make(pack, edit=one_bit) for pack in (False, True)]
    made += [make(dtype=torch.float32), make(dtype=torch.float16)]
    assert len(set(made)) == len(made)
    assert make() == make(), "the same model has the same one, in another process as well"
    assert make("int8") == make("int8")


def test_a_template_that_changes_changes_the_fingerprint(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    own = copy.deepcopy(tokenizer)
    amulet = Amulet(random_model("llama"), own)
    before = fingerprint(amulet)
    assert fingerprint(amulet) == before
    own.chat_template = "{{ 'x' }}"
    assert fingerprint(amulet) != before


# Weights that Accelerate holds elsewhere


@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_weights_answer_as_loaded_ones(
    disk: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prints = set()
    for seed in (3, 4):
        model: Any = random_model("llama", seed=seed)
        wanted = Amulet(model, tokenizer).batch([{"messages": CHAT, **WISH}, {"messages": LONGER}])
        if disk:
            model = disk_offload(model, str(tmp_path / str(seed)), execution_device="cpu")
        else:
            model = cpu_offload(model, execution_device="cpu")
        assert model.device.type == "meta"
        amulet = Amulet(model, tokenizer)
        prints.add(fingerprint(amulet))
        got = amulet.batch([{"messages": CHAT, **WISH}, {"messages": LONGER}])
        assert [reply.token_ids for reply in got] == [reply.token_ids for reply in wanted]
        assert fingerprint(amulet) in prints, "passes change nothing"
    assert len(prints) == 2


def test_a_model_without_weights_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="meta device"):
        Amulet(random_model("llama").to("meta"), tokenizer)


# PEFT adapters

quiet = pytest.mark.filterwarnings("ignore")  # PEFT calls what Transformers has deprecated


@pytest.fixture
def adapted() -> Any:
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(random_model("llama", seed=3), config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


@quiet
def test_adapters_are_switched_under_an_amulet(
    adapted: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    amulet = Amulet(adapted, tokenizer)
    found = [(check(amulet), fingerprint(amulet))]

    def note() -> None:
        found.append((check(amulet), fingerprint(amulet)))

    adapted.set_adapter("two")
    note()
    with adapted.disable_adapter():
        note()
    assert (check(amulet), fingerprint(amulet)) == found[1]
    adapted.add_weighted_adapter(["one", "two"], [0.7, 0.9], "both", combination_type="linear")
    adapted.set_adapter("both")
    note()
    adapted.merge_adapter()
    check(amulet)
    adapted.unmerge_adapter()
    adapted.set_adapter("one")
    assert check(amulet) == found[0][0]
    for module in adapted.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 3.0)
    note()
    answers, prints = zip(*found, strict=True)
    assert len({tuple(answer) for answer in answers}) == len(found)
    assert len(set(prints)) == len(found)


@quiet
def test_a_training_step_on_an_adapter(adapted: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(adapted, tokenizer)
    before, known = check(amulet), fingerprint(amulet)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    ids = torch.arange(40)[None]
    adapted(ids, labels=ids).loss.backward()
    optimizer.step()
    assert check(amulet) != before
    assert fingerprint(amulet) != known


@quiet
def test_merged_and_unloaded(adapted: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(adapted, tokenizer)
    before = check(amulet)
    merged = adapted.merge_and_unload()
    assert check(Amulet(merged, tokenizer)) == before


@quiet
@pytest.mark.parametrize("kind", ["prompt", "mixed"])
def test_other_kinds_of_adapters(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    import peft

    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        with pytest.raises(ModelError, match="PROMPT_TUNING"):
            Amulet(peft.get_peft_model(random_model("llama"), config), tokenizer)
        return
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    mixed = peft.get_peft_model(random_model("llama"), config, adapter_name="one", mixed=True)
    check(Amulet(mixed.eval(), tokenizer))


@quiet
def test_an_adapter_that_transformers_added(tokenizer: PreTrainedTokenizerFast) -> None:
    import peft

    model: Any = random_model("llama", seed=3)
    amulet = Amulet(model, tokenizer)
    before = check(amulet)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="one")
    assert check(amulet) != before
    model.disable_adapters()
    assert check(amulet) == before
