"""An answer-only adapter after training: it writes as PEFT lets it, and is never where it would act on the prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from reference_helpers import perturb
from trainer_helpers import lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import OptionError, answer_only
from dpo_peft.artifacts.card import adapter_facts
from dpo_peft.artifacts.recipe import lora_options
from dpo_peft.chat import Session, Settings
from dpo_peft.forward import plan_forward
from dpo_peft.merge import merge_adapter
from dpo_peft.model.adapter_source import AdapterSource, load_trained
from dpo_peft.model.generation import sample_completions
from dpo_peft.pairs.engines import _served_rank
from dpo_peft.serving import gguf_problems, serving_problems
from dpo_peft.serving.exporting import export_adapter

TEXTS = ["Hello there.", "What of the sea, and of this one?", "An"]


@pytest.fixture(scope="module")
def folder(base_folder: str, tmp_path_factory: Any) -> str:
    """An adapter as if it had been trained, saved by PEFT."""
    tokenizer, place = AutoTokenizer.from_pretrained(base_folder), tmp_path_factory.mktemp("answer-only")
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, lora(alora_invocation_tokens=answer_only(tokenizer)))
    perturb(model, 0.2)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def prompts(tokenizer: Any) -> list[list[int]]:
    how = {"add_generation_prompt": True, "return_dict": True}
    return [tokenizer.apply_chat_template([{"role": "user", "content": t}], **how)["input_ids"] for t in TEXTS]


@torch.no_grad()
def by_peft(model: Any, ids: list[int], new: int) -> list[int]:
    """Greedy tokens by PEFT's forward of the whole row each time, without a cache or padding."""
    row = [*ids]
    while len(row) < len(ids) + new and (row == ids or row[-1] != 2):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(ids) :]


@pytest.mark.parametrize("planned", [False, True])
def test_greedy_completions_are_those_of_peft(folder: str, planned: bool) -> None:
    """Of prompts of unequal lengths at once; `planned`: on a model that was looked at for fused layers."""
    plain = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trained = load_trained(folder, with_reference=False, quantize=False, dtype="float32")
    if planned:
        plan_forward(trained.model)
    ids = prompts(trained.tokenizer)
    found = sample_completions(trained.model, trained.tokenizer, ids, max_new_tokens=12, temperature=0)
    assert found == [by_peft(plain, one, 12) for one in ids]
    for one, completion in zip(ids, found, strict=True):
        row, whole = torch.tensor([one]), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        own = plain.generate(input_ids=row, attention_mask=torch.ones_like(row), **whole)
        assert own[0, len(one) :].tolist() == completion
    with plain.disable_adapter():  # controls: without it, and with it on the prompt too
        assert found != [by_peft(plain, one, 12) for one in ids]
    plain.peft_config["default"].alora_invocation_tokens = None
    for layer in plain.modules():
        vars(layer).get("lora_variant", {}).clear()
    assert found != [by_peft(plain, one, 12) for one in ids]


def test_a_conversation_is_that_of_peft_turn_by_turn(folder: str) -> None:
    """In the second turn the first reply is the base's again: the adapter acts from the last place on."""
    plain = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trained = load_trained(folder, with_reference=False, quantize=False, dtype="float32")
    session, messages = Session(trained, Settings(max_new_tokens=12, temperature=0)), []
    for text in TEXTS[:2]:
        (reply,) = session.say(text)
        messages.append({"role": "user", "content": text})
        ids = trained.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert reply.ids == by_peft(plain, ids["input_ids"], 12)
        messages.append({"role": "assistant", "content": reply.text})


def test_a_prompt_where_it_would_stay_off_is_refused(folder: str) -> None:
    trained = load_trained(folder, with_reference=False, quantize=False, dtype="float32")
    ids = [*prompts(trained.tokenizer)[:1], [5, 6, 7]]
    with pytest.raises(OptionError, match="Prompt 1 does not hold the tokens .* it would stay off"):
        sample_completions(trained.model, trained.tokenizer, ids)
    trained.tokenizer.chat_template = None
    with pytest.raises(OptionError, match="The message does not hold the tokens"):
        Session(trained).say("Hello.")


def test_a_merge_is_refused_with_the_reason(folder: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="merged weights would act on the prompt too. Serve the adapter"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


CONVERTER = """
import json, pathlib, sys
tokens = json.loads(pathlib.Path(sys.argv[1], "adapter_config.json").read_text())["alora_invocation_tokens"]
pathlib.Path(sys.argv[-1]).write_text(f"GGUF KEY {tokens}")
"""


def test_a_gguf_file_keeps_the_tokens_or_is_refused(folder: str, tmp_path: Path, base_folder: str) -> None:
    source, converter = AdapterSource(folder), tmp_path / "convert_lora_to_gguf.py"
    converter.write_text(CONVERTER.replace("KEY", "adapter.alora.invocation_tokens"))
    tokens = answer_only(AutoTokenizer.from_pretrained(base_folder))
    made = export_adapter(source, str(tmp_path / "new"), llama_cpp=str(tmp_path))
    assert made.files == ["adapter.gguf"] and made.commands[0].startswith("llama-server")
    # llama-server has it act from the token before those that it is told.
    assert f"invocation_tokens {tokens[1:]}" in (tmp_path / "new" / "adapter.gguf").read_text()
    with pytest.raises(OptionError, match="Ollama would overlook. Give --to gguf"):
        export_adapter(source, str(tmp_path / "ollama"), "ollama", llama_cpp=str(tmp_path))
    converter.write_text(CONVERTER)
    with pytest.raises(OptionError, match="does not know answer-only adapters .*Get a newer llama.cpp"):
        export_adapter(source, str(tmp_path / "old"), llama_cpp=str(tmp_path))
    assert not (tmp_path / "old").exists()
    source.config.alora_invocation_tokens = tokens[:1]
    with pytest.raises(OptionError, match="one token alone .*one token early"):
        export_adapter(source, str(tmp_path / "short"), llama_cpp=str(tmp_path))


def test_servers_are_told_apart() -> None:
    config = lora(alora_invocation_tokens=[5, 6])
    (said,) = serving_problems(config)
    assert "vLLM refuses an answer-only adapter" in said and "llama-server" in said
    assert gguf_problems(config, tied_head=True) == []
    assert serving_problems(lora(target_modules=["q_proj"], layers_to_transform=[1])) == []  # any server takes these
    with pytest.raises(OptionError, match="alora_invocation_tokens: use engine 'transformers'"):
        _served_rank("a", config)
    assert _served_rank("a", lora()) == 8


def test_card_and_recipe_say_scope_and_layers(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[2, 3], task_type="CAUSAL_LM")
    assert adapter_facts(vars(config))["layers"] == [2, 3] and "acts on" not in adapter_facts(vars(config))
    assert lora_options(config, tokenizer)["lora_layers_to_transform"] == [2, 3]
    assert "adapter_scope" not in lora_options(config, tokenizer)
    config.alora_invocation_tokens = answer_only(tokenizer)
    assert adapter_facts(vars(config))["acts on"].startswith("completions alone, from the tokens [3, ")
    given = lora_options(config, tokenizer)
    assert given["adapter_scope"] == "completions" and "adapter_invocation" not in given
    config.alora_invocation_tokens = answer_only(tokenizer, "\nAnswer:")
    assert lora_options(config, tokenizer)["adapter_invocation"] == "\nAnswer:"
