"""Answer-only adapters and those of some layers: what PEFT can't do, or would overlook, is refused with a remedy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from reference_helpers import perturb, tiny_moe
from trainer_helpers import lora

from dpo_peft.errors import OptionError
from dpo_peft.model.adapters import check_adapter, load_frozen
from dpo_peft.model.loading import attach_adapter
from dpo_peft.model.scope import layer_numbers

TOKENS = [5, 6]
ROWS = torch.tensor([[11, 12, 5, 6, 21, 22], [13, 5, 6, 23, 24, 25]])


def answer_only_lora(**options: Any) -> LoraConfig:
    return lora(**{"alora_invocation_tokens": TOKENS, **options})


# ---- Answer-only ----------------------------------------------------------------------------------------------------


def test_what_is_attached_leaves_the_prompt_to_the_base(tiny_llama: Callable[..., Any]) -> None:
    """PEFT's own forward: logits before the tokens are the base's, those from the first one on are not."""
    base = tiny_llama()(ROWS).logits
    model, reference = attach_adapter(tiny_llama(), answer_only_lora())
    perturb(model)
    logits = model.eval()(ROWS).logits
    assert torch.equal(logits[0, :2], base[0, :2]) and torch.equal(logits[1, :1], base[1, :1])
    assert not torch.isclose(logits[0, 2:], base[0, 2:]).all(1).any()
    assert not torch.isclose(logits[1, 1:], base[1, 1:]).all(1).any()
    assert reference.adapter is None
    everywhere, _ = attach_adapter(tiny_llama(), lora())  # control
    perturb(everywhere)
    assert not torch.isclose(everywhere.eval()(ROWS).logits[0, :2], base[0, :2]).all(1).any()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"alora_invocation_tokens": []}, r"at least one: dpo_peft.answer_only"),
        ({"alora_invocation_tokens": [-1]}, "at least one"),
        ({"task_type": None}, 'task_type="CAUSAL_LM" alone. Set it'),
        ({"modules_to_save": ["lm_head"]}, "goes without modules_to_save: it would act on the prompt too"),
        ({"trainable_token_indices": [11]}, "goes without trainable_token_indices"),
        ({"use_dora": True}, "goes without use_dora: .*PEFT has no aLoRA"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "goes without target_parameters"),
        ({"init_lora_weights": "pissa"}, "goes without init_lora_weights=.pissa."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_act_on_the_prompt_too_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.warns() if "task_type" in options else pytest.MonkeyPatch.context():
        config = answer_only_lora(**options)
    with pytest.raises(OptionError, match=f"alora_invocation_tokens.*{said}"):
        check_adapter(config)
    config.alora_invocation_tokens = None  # control
    check_adapter(config)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_modules_beside_the_decoders_layers_are_refused(tiny_llama: Callable[..., Any], targets: list[str]) -> None:
    with pytest.raises(OptionError, match="linear layers of the decoder alone|can't be attached"):
        attach_adapter(tiny_llama(), answer_only_lora(target_modules=targets))
    attach_adapter(tiny_llama(), lora(target_modules=targets))  # control


def test_a_layer_of_a_tower_is_refused() -> None:
    model = zoo.build("gemma3-vl", 0.1, zoo.config_of("gemma3-vl"))
    with pytest.raises(OptionError, match=r"this one is on model\.vision_tower.*adapter_scope: all"):
        attach_adapter(model, answer_only_lora(target_modules=["q_proj"]))
    model = zoo.build("gemma3-vl", 0.1, zoo.config_of("gemma3-vl"))
    attach_adapter(model, answer_only_lora())  # control: all-linear is the language model's


def test_layers_that_see_flattened_rows_are_refused() -> None:
    """The shared expert of Qwen 2's mixtures gets tokens without rows: PEFT would fail in the middle of a run."""
    model = zoo.build("qwen2_moe", 0.1, zoo.config_of("qwen2_moe"))
    with pytest.raises(OptionError, match="PEFT can't run an answer-only adapter.*Name other layers"):
        attach_adapter(model, answer_only_lora())
    attach_adapter(tiny_moe(), answer_only_lora())  # control: attention alone


def test_out_of_memory_does_not_blame_the_adapter(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    model.forward = full
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        attach_adapter(model, answer_only_lora())


def test_tokens_of_another_vocabulary_are_refused(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match=r"alora_invocation_tokens=\[5, 600\] are not of this model"):
        attach_adapter(tiny_llama(), answer_only_lora(alora_invocation_tokens=[5, 600]))


@pytest.mark.parametrize("ours, its", [(TOKENS, None), (None, TOKENS), (TOKENS, [5])])
def test_a_reference_of_another_scope_is_refused(
    tiny_llama: Callable[..., Any], tmp_path: Any, ours: Any, its: Any
) -> None:
    for tokens, folder in ((its, "other"), (ours, "same")):
        get_peft_model(tiny_llama(), answer_only_lora(alora_invocation_tokens=tokens)).save_pretrained(
            tmp_path / folder
        )
    model, _ = attach_adapter(tiny_llama(), answer_only_lora(alora_invocation_tokens=ours))
    with pytest.raises(OptionError, match="both must act on the same tokens"):
        load_frozen(model, str(tmp_path / "other"))
    load_frozen(model, str(tmp_path / "same"))  # control


# ---- Layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, found",
    [(None, None), ("16-31", [*range(16, 32)]), (0.5, [*range(16, 32)]), ("0.25", [*range(24, 32)]), (7, [7])]
    + [([30, "31"], [30, 31]), (["0-1", "1-2"], [0, 1, 2])],
)
def test_layers_are_numbers_ranges_or_a_share(given: Any, found: Any) -> None:
    assert layer_numbers(given, 32) == found


@pytest.mark.parametrize("given", [32, "16-32", "upper", [], "0.0", ["0.5", "3"], -1, "1.5", "5-3"])
def test_a_wrong_layer_is_named_with_the_number_of_layers(given: Any) -> None:
    with pytest.raises(OptionError, match=r"the model has 32 layers, 0 to 31.*16-31"):
        layer_numbers(given, 32)


def layers_of(model: PeftModel) -> set[int]:
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_is_on_the_layers_that_are_named(
    tiny_llama: Callable[..., Any], tmp_path: Any, targets: Any
) -> None:
    """Saved and loaded by PEFT alone, it is on the same layers, to the same effect."""
    config = lora(target_modules=targets)
    config.layers_to_transform = [1]
    model, _ = attach_adapter(tiny_llama(), config)
    perturb(model)
    assert layers_of(model) == {1} and model.config.num_hidden_layers == 2
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == (7 if targets == "all-linear" else 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert layers_of(again) == {1} and torch.equal(again.eval()(ROWS).logits, model.eval()(ROWS).logits)
    everywhere, _ = attach_adapter(tiny_llama(), lora(target_modules=targets))
    assert layers_of(everywhere) == {0, 1}  # control


def test_layers_that_a_model_lacks_or_a_pattern_would_overlook_are_refused(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match="the model has 2 layers, 0 to 1"):
        attach_adapter(tiny_llama(), lora(target_modules=["q_proj"], layers_to_transform=[1, 2]))
    config = lora(target_modules=".*q_proj")
    config.layers_to_transform = [1]
    with pytest.raises(OptionError, match="no effect beside a pattern"):
        attach_adapter(tiny_llama(), config)
    assert layers_of(get_peft_model(tiny_llama(), config)) == {0, 1}  # what PEFT would do
