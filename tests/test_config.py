"""Options: what is wrong is refused with the option's name and a remedy; nothing is ignored; defaults are TRL's."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from planted import SECRETS
from trainer_helpers import id_pairs, lora, ours
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    HfArgumentParser,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
)

from dpo_peft import DataError, DPOConfig, DPOTrainer, OptionError
from dpo_peft.artifacts.recipe import public
from dpo_peft.config_checks import NOT_AVAILABLE, NOT_OFFERED, SUCCESSORS, check_option_names
from dpo_peft.model.loading import load_base


def config(**options: Any) -> DPOConfig:
    return DPOConfig(output_dir="out", use_cpu=True, report_to="none", **options)


# Each: options, then what the message must say (a regular expression: the option, what is wrong, the remedy).
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "misspelled": ({"betta": 0.1}, r"'betta' is not an option.*'beta'"),
    "misspelled trainer option": ({"learning_rat": 1.0}, r"'learning_rat'.*'learning_rate'"),
    "unknown": ({"zzz_qqq": 1}, r"'zzz_qqq' is not an option.*lists them all"),
    "TRL's only, changed": (
        {"padding_free": True},
        r"padding_free=True.*trl\.DPOConfig.*packed|padding_free.*leave it",
    ),
    "TRL's reference batch": ({"precompute_ref_batch_size": 4}, r"precompute_ref_batch_size=4.*precompute_ref_tokens"),
    "sync interval without sync": ({"ref_model_sync_steps": 8}, r"ref_model_sync_steps=8 has no effect without sync_"),
    "mix-up above one": ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha=1\.5"),
    "sync of the base": ({"sync_ref_model": True, "reference": "base"}, r"reference='base' .*sync_ref_model"),
    "cache folder without cache": ({"ref_cache_dir": "x"}, r"ref_cache_dir='x' has no effect without precompute_"),
    "cache of nothing": ({"cache_ref_log_probs": True, "ref_cache_gb": 0}, r"ref_cache_gb=0"),
    "two caches": (
        {"cache_ref_log_probs": True, "precompute_ref_log_probs": True},
        r"cache_ref_log_probs has no effect with precompute_ref_log_probs",
    ),
    "cache of a moving reference": ({"cache_ref_log_probs": True, "sync_ref_model": True}, r"sync_ref_model changes"),
    "sums where tokens are read": (
        {"cache_ref_log_probs": True, "ref_cache_tokens": False, "ld_alpha": 0.5},
        r"ref_cache_tokens=False: ld_alpha",
    ),
    "reference without need": ({"reference": "base", "loss_type": "simpo"}, r"reference: no effect, loss_type simpo"),
    "HF's own halving": ({"auto_find_batch_size": True}, r"auto_find_batch_size=True.*halved by itself"),
    "TRL's pad token": ({"pad_token": "<x>"}, r"pad_token.*tokenizer\.pad_token"),
    "a default of another type": ({"label_smoothing": 0, "beta": -1}, r"beta=-1"),
    "unknown loss": ({"loss_type": "sigmoidal"}, r"loss_type=\['sigmoidal'\].*one or several of sigmoid"),
    "number as loss": ({"loss_type": 1}, r"loss_type=1"),
    "beta zero": ({"beta": 0}, r"beta=0 must be a number above 0"),
    "beta negative": ({"beta": -0.1}, r"beta=-0\.1 must be a number above 0"),
    "beta as text": ({"beta": "0.1"}, r"beta='0\.1' must be a number"),
    "beta as boolean": ({"beta": True}, r"beta=True must be a number"),
    "beta not a number": ({"beta": float("nan")}, r"beta=nan must be a number above 0"),
    "beta infinite": ({"beta": float("inf")}, r"beta=inf"),
    "clip zero": ({"reward_clip": 0.0}, r"reward_clip=0\.0 must be a number above 0"),
    "clip as text": ({"reward_clip": "5"}, r"reward_clip='5' must be a number above 0"),
    "length one": ({"max_length": 1}, r"max_length=1 must be a whole number at least 2"),
    "length as float": ({"max_length": 512.0}, r"max_length=512\.0 must be a whole number or None"),
    "length as boolean": ({"max_length": True}, r"max_length=True"),
    "truncation": ({"truncation_mode": "keep_middle"}, r"truncation_mode='keep_middle'.*'keep_start'.*'trim_prompt'"),
    "unusable": ({"on_unusable": "ignore"}, r"on_unusable='ignore'.*'drop', 'error'"),
    "share above one": ({"max_unusable_share": 1.5}, r"max_unusable_share=1\.5.*at least 0 and at most 1"),
    "processes": ({"dataset_num_proc": 0}, r"dataset_num_proc=0.*at least 1"),
    "rate negative": ({"learning_rate": -1e-6}, r"learning_rate=-1e-06.*at least 0"),
    "rate as text": ({"learning_rate": "1e-6"}, r"learning_rate='1e-6' must be a number"),
    "text as switch": ({"disable_dropout": "no"}, r"disable_dropout='no' must be True or False"),
    "number as switch": ({"share_prompts": 1}, r"share_prompts=1 must be True or False"),
    "none as switch": ({"gradient_checkpointing": None}, r"gradient_checkpointing=None must be True or False"),
    "quantize as text": ({"quantize_base": "4bit"}, r"quantize_base='4bit' must be"),
    "half precision as text": ({"bf16": "yes"}, r"bf16='yes' must be"),
    "two precisions": ({"bf16": True, "fp16": True}, r"fp16 and bf16"),
    "init as text": ({"model_init_kwargs": "float32"}, r"model_init_kwargs='float32'.*dict"),
    "init as number": ({"model_init_kwargs": 3}, r"model_init_kwargs=3.*dict"),
    "token labels": ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0\.1.*token labels"),
    "compile": ({"torch_compile": True}, r"torch_compile=True is not available"),
    "neftune": ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=5\.0.*rewards"),
    "labels": ({"label_names": ["x"]}, r"label_names.*no labels"),
    "inputs for metrics": ({"include_for_metrics": ["inputs"]}, r"include_for_metrics.*rewards"),
    "grouping": ({"train_sampling_strategy": "group_by_length"}, r"train_sampling_strategy.*'random', 'sequential'"),
    "fsdp": ({"fsdp": "shard_grad_op"}, r"fsdp='shard_grad_op'.*'full_shard'"),
    "fsdp_config": ({"fsdp_config": {"version": 2}}, r"fsdp_config.*fsdp='full_shard'.*leave it out"),
    "streamed and sharded": ({"fsdp": True, "stream_layers": 2}, r"stream_layers=2 with fsdp=True.*Set one"),
    "fp8 alone": ({"fp8_products": True}, r"fp8_products=True has no effect without fused_layers: set it too"),
    "fp8 in float32": ({"fp8_products": True, "fused_layers": True, "bf16": False}, r"fp8_products=True.*bfloat16"),
    "fp8 in float16": ({"fp8_products": True, "fused_layers": True, "fp16": True}, r"fp8_products=True.*bfloat16"),
    "deepspeed": ({"deepspeed": "zero.json"}, r"deepspeed='zero\.json'.*fsdp='full_shard'.*recipes fsdp2"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_option(name: str) -> None:
    options, message = MALFORMED[name]
    with pytest.raises(OptionError, match=message) as caught:
        config(**options)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 400


def test_errors_are_value_errors() -> None:
    assert issubclass(OptionError, ValueError) and issubclass(DataError, ValueError)


# ---- Arguments of the trainer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tiny_llama, make_tokenizer, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def stream(rows: Dataset) -> IterableDataset:
    return rows.to_iterable_dataset()


# Each: what differs from a good call (a function of model, tokenizer, folder), and the message.
WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "reference model": (
        lambda m, t, f: {"ref_model": m},
        r"ref_model is not accepted.*adapter switched off.*Leave ref_model out",
    ),
    "config of TRL": (
        lambda m, t, f: {"args": trl.DPOConfig(f, use_cpu=True)},
        r"args is a DPOConfig.*dpo_peft\.DPOConfig",
    ),
    "plain arguments": (lambda m, t, f: {"args": TrainingArguments(f)}, r"args is a TrainingArguments.*dpo_peft\.DPO"),
    "config as dict": (lambda m, t, f: {"args": {"beta": 0.1}}, r"args is a dict"),
    "no rows": (lambda m, t, f: {"train_dataset": None}, r"`train_dataset` is required: pass a datasets\.Dataset"),
    "rows as list": (
        lambda m, t, f: {"train_dataset": list(id_pairs(4))},
        r"train_dataset is a list.*datasets\.Dataset",
    ),
    "rows as path": (lambda m, t, f: {"train_dataset": "rows.json"}, r"train_dataset is a str.*load_dataset"),
    "stream without length": (lambda m, t, f: {"train_dataset": stream(id_pairs(4))}, r"no length: set max_steps"),
    "evaluation without rows": (
        lambda m, t, f: {"args": config(eval_strategy="steps", eval_steps=1)},
        r"eval_strategy='steps' needs an eval_dataset",
    ),
    "dispatched batches": (
        lambda m, t, f: {"args": config(accelerator_config={"dispatch_batches": True})},
        r"dispatch_batches=True.*leave it out",
    ),
    "no model": (lambda m, t, f: {"model": None}, r"model is a NoneType; pass a Hub id or folder"),
    "path object": (lambda m, t, f: {"model": Path(f)}, r"model is a PosixPath.*as str"),
    "some module": (lambda m, t, f: {"model": torch.nn.Linear(2, 2)}, r"model is a Linear"),
    "no such model": (lambda m, t, f: {"model": f"{f}/nowhere"}, r"model='.*nowhere' can't be loaded"),
    "no such tokenizer": (
        lambda m, t, f: {"model": f"{f}/nowhere", "processing_class": None},
        r"No tokenizer can be loaded from '.*nowhere'.*processing_class",
    ),
    "no model in the folder": (lambda m, t, f: {"model": f + "/empty"}, r"model='.*empty' can't be loaded"),
    "nameless model without tokenizer": (lambda m, t, f: {"processing_class": None}, r"processing_class"),
    "tokenizer's name": (
        lambda m, t, f: {"processing_class": "llama"},
        r"processing_class is a str; pass a tokenizer",
    ),
    "adapter is no LoRA": (lambda m, t, f: {"peft_config": IA3Config()}, r"peft_config is a IA3Config.*LoraConfig"),
    "prompt tuning": (
        lambda m, t, f: {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
        r"peft_config is a PromptTuningConfig.*LoraConfig",
    ),
    "adapter as dict": (lambda m, t, f: {"peft_config": {"r": 8}}, r"peft_config is a dict.*LoraConfig"),
    "two adapters": (
        lambda m, t, f: {"model": get_peft_model(m, lora()), "peft_config": lora()},
        r"PeftModel and peft_config is given too",
    ),
    "quantization of a loaded model": (
        lambda m, t, f: {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        r"quantization_config has no effect on a model that is loaded",
    ),
    "loading options for a loaded model": (
        lambda m, t, f: {"args": config(model_init_kwargs={"dtype": "float32"})},
        r"model_init_kwargs has no effect on a model that is loaded",
    ),
    "quantize a loaded model": (
        lambda m, t, f: {"args": config(quantize_base=True)},
        r"quantize_base=True has no effect on a model that is loaded",
    ),
    "quantize and not": (
        lambda m, t, f: {
            "model": f,
            "args": config(quantize_base=False),
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
        },
        r"quantize_base=False contradicts quantization_config",
    ),
    "quantization twice": (
        lambda m, t, f: {
            "model": f,
            "args": config(model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}),
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
        },
        r"quantization_config is given to the trainer and in model_init_kwargs",
    ),
    "unknown dtype": (
        lambda m, t, f: {"model": f, "args": config(model_init_kwargs={"dtype": "float8"})},
        r"model_init_kwargs\['dtype'\]='float8'.*'bfloat16'",
    ),
    "optimizer without the adapter": (
        lambda m, t, f: {"optimizers": (torch.optim.SGD(m.parameters(), 0.1), None)},
        r"optimizers: the optimizer lacks .*lora_",
    ),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_argument(tiny_llama, make_tokenizer, base_folder, name) -> None:
    change, message = WRONG_ARGUMENTS[name]
    empty = Path(base_folder) / "empty"
    empty.mkdir(exist_ok=True)
    (empty / "config.json").write_text(json.dumps({"hidden_size": 8}))
    model, tokenizer = tiny_llama(num_hidden_layers=1), make_tokenizer()
    good = {"model": model, "args": config(), "train_dataset": id_pairs(4), "processing_class": tokenizer}
    with pytest.raises(OptionError, match=message):
        DPOTrainer(**{**good, **change(model, tokenizer, base_folder)})


def test_tokenizer_larger_than_the_embeddings(tiny_llama, make_tokenizer, tmp_path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(100)])

    def beyond(row, index):
        return {"chosen_ids": [*row["chosen_ids"], len(tokenizer) - 1]} if index == 2 else {}

    with pytest.raises(
        OptionError, match=r"Row 2 of train has the token 'extra\d+' \(\d+\) and the model embeds 320: resize it by"
    ):
        ours(tiny_llama(), id_pairs(4).map(beyond, with_indices=True), tokenizer, tmp_path)
    with pytest.raises(
        OptionError, match=rf"{len(tokenizer)} tokens and the model embeds 320: .*resize_token_embeddings"
    ):  # a stream can't be looked through
        ours(tiny_llama(), id_pairs(4).to_iterable_dataset(), tokenizer, tmp_path, max_steps=1)
    later = ours(tiny_llama(), id_pairs(4), tokenizer, tmp_path)  # no row has one of these tokens
    with pytest.raises(OptionError, match="Row 2 of eval has the token"):
        later.evaluate(id_pairs(4).map(beyond, with_indices=True))
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    ours(model, id_pairs(4), tokenizer, tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=20)),
        OPTForCausalLM(
            OPTConfig(
                vocab_size=320,
                hidden_size=16,
                num_hidden_layers=1,
                ffn_dim=32,
                num_attention_heads=2,
                word_embed_proj_dim=16,
                max_position_embeddings=20,
            )
        ),
        GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=320,
                max_position_embeddings=20,
                hidden_size=16,
                num_layers=1,
                attention_types=[[["global"], 1]],
                num_heads=2,
                intermediate_size=32,
            )
        ),
        GPTJForCausalLM(GPTJConfig(vocab_size=320, n_positions=20, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)),
    ],
    ids=["gpt2", "opt", "gpt_neo", "gptj"],
)
def test_rows_beyond_the_learned_positions(model, make_tokenizer, tmp_path) -> None:
    row = {"prompt_ids": [7] * 12, "chosen_ids": [8] * 9, "rejected_ids": [9] * 3}
    rows, tokenizer = Dataset.from_list([row] * 4), make_tokenizer()
    with pytest.raises(OptionError, match="train have up to 21 tokens, .* learned 20 positions: set max_length=20"):
        ours(model, rows, tokenizer, tmp_path)
    with pytest.raises(OptionError, match="any number of tokens"):
        ours(model, rows.to_iterable_dataset(), tokenizer, tmp_path, max_length=None, max_steps=1)
    trainer = ours(model, rows, tokenizer, tmp_path, max_length=20, max_steps=1)
    trainer.train()
    assert trainer.data_reports["train"].longest == 20


def test_rows_beyond_rotary_positions_are_said(tiny_llama, make_tokenizer, tmp_path, caplog) -> None:
    model = tiny_llama(max_position_embeddings=20)
    row = {"prompt_ids": [7] * 12, "chosen_ids": [8] * 9, "rejected_ids": [9] * 3}
    ours(model, Dataset.from_list([row] * 4), make_tokenizer(), tmp_path)
    assert "up to 21 tokens, and the model was made for 20" in caplog.text


def test_evaluation_rows_of_the_wrong_type(tiny_llama, make_tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match="eval: expected a datasets.Dataset"):
        ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path, eval_dataset=list(id_pairs(4)))


def test_target_modules_that_match_nothing(tiny_llama, make_tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="query_proj"):
        ours(
            tiny_llama(),
            id_pairs(4),
            make_tokenizer(),
            tmp_path,
            peft_config=LoraConfig(target_modules=["query_proj"]),
        )


# ---- Against TRL's config -------------------------------------------------------------------------------------------

TRL_FIELDS = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}
OUR_FIELDS = {field.name: field for field in dataclasses.fields(DPOConfig)}


def test_every_option_of_trl_is_offered_or_refused() -> None:
    assert set(TRL_FIELDS) - set(OUR_FIELDS) == set(NOT_OFFERED)


def test_refused_options_are_accepted_at_their_default() -> None:
    for name, (harmless, _) in NOT_OFFERED.items():
        assert TRL_FIELDS[name].default in harmless, name
        for value in harmless:
            assert check_option_names({name: value, "beta": 0.3}, set(OUR_FIELDS)) == {"beta": 0.3}
            assert check_option_names({name: str(value)}, set(OUR_FIELDS)) == {}  # from a shell


def test_every_default_of_trl_is_accepted() -> None:
    """`DPOConfig(**values_of_a_trl_config)`, one by one."""
    for name, field in TRL_FIELDS.items():
        made = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if name != "use_cpu":
            DPOConfig(**{"output_dir": "out", "use_cpu": True, name: made})


@pytest.mark.parametrize("name", SUCCESSORS)
def test_options_of_older_versions_name_their_successor(name: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}' is an option of TRL that isn't offered here. .+[.]$") as caught:
        config(**{name: 1})
    assert name not in OUR_FIELDS
    for named in re.findall(r"(\w+)=", str(caught.value)):  # what the remedy says to set is an option
        assert named in OUR_FIELDS, named


@pytest.mark.parametrize(
    "options",
    [
        {"bf16_full_eval": True},
        {"fp16_full_eval": True},
        {"torch_compile": True},
        {"torch_compile_mode": "default"},
        {"torch_compile_backend": "inductor"},
        {"use_liger_kernel": True},
        {"ddp_find_unused_parameters": False},
        {"ddp_bucket_cap_mb": 25},
        {"ddp_broadcast_buffers": True},
        {"ddp_static_graph": True},
        {"optim_target_modules": ["attn"]},
        {"max_steps": 0},
    ],
    ids=str,
)
def test_options_of_transformers_without_effect_or_with_harm_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        config(**options)


def test_shared_defaults_are_trls() -> None:
    # A non-finite loss stops the run instead of being filtered out; beta is the objective's own, for DPO TRL's 0.1.
    deliberate = {"logging_nan_inf_filter", "beta", "learning_rate"}
    different = {
        name
        for name in set(TRL_FIELDS) & set(OUR_FIELDS)
        if TRL_FIELDS[name].default != OUR_FIELDS[name].default
        or TRL_FIELDS[name].default_factory is not OUR_FIELDS[name].default_factory
        and TRL_FIELDS[name].default_factory() != OUR_FIELDS[name].default_factory()
    }
    assert different == deliberate
    mine, theirs = config(), trl.DPOConfig(output_dir="out", use_cpu=True, report_to="none")
    for name in ("bf16", "logging_steps", "gradient_checkpointing", "max_length", "beta"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.loss_type == theirs.loss_type


def test_every_option_has_a_description() -> None:
    own = set(OUR_FIELDS) - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert all(OUR_FIELDS[name].metadata.get("help") for name in own)


def test_unavailable_options_exist_and_are_harmless_by_default() -> None:
    for name, (harmless, _) in NOT_AVAILABLE.items():
        assert name in OUR_FIELDS
        assert getattr(config(), name) in (harmless, None, [], {}), name


def test_half_precision_defaults() -> None:
    assert config().bf16 and not config().fp16
    assert not config(bf16=False).bf16
    assert not config(gradient_checkpointing=False).gradient_checkpointing


def test_a_loss_by_its_name_alone() -> None:
    assert config(loss_type="sigmoid").loss_type == config(loss_type=["sigmoid"]).loss_type == ["sigmoid"]


def test_command_line(tmp_path) -> None:
    (parsed,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(
        [
            *("--output_dir", str(tmp_path), "--use_cpu", "--beta", "0.3", "--loss_type", "sigmoid"),
            *("--quantize_base", "false", "--max_length", "64", "--gradient_checkpointing", "false"),
            *("--model_init_kwargs", '{"dtype": "float32"}', "--reward_clip", "4"),
        ]
    )
    assert (parsed.beta, parsed.loss_type, parsed.quantize_base, parsed.max_length) == (0.3, ["sigmoid"], False, 64)
    assert parsed.model_init_kwargs == {"dtype": "float32"} and parsed.reward_clip == 4.0
    assert not parsed.gradient_checkpointing


def test_round_trip_of_the_saved_arguments() -> None:
    """As the trainer saves them, and as reports get them."""
    given = {key: value for key, value in config(beta=0.3, max_length=None).to_dict().items() if key in OUR_FIELDS}
    assert json.loads(json.dumps(given))["max_length"] is None


@pytest.mark.attack("planted secrets")
@pytest.mark.parametrize("kind", SECRETS)
def test_no_secret_is_in_what_trackers_and_files_get(kind: str) -> None:
    """By the name of what holds it, or by its form, however deep it stands; the config itself keeps all of it."""
    secret = SECRETS[kind]
    named = ("token", "use_auth_token", "api_key", "password", "Authorization", "aws_secret_access_key", "account_key")
    nested = {"kwargs": [dict.fromkeys(named, f"any {kind} text"), {"proxies": {"https": f"x {secret}"}}]}
    options = config(hub_token=f"any {kind} text", run_name=f"run {secret} 1", model_init_kwargs=nested)
    for text in (json.dumps(options.to_dict(), default=str), options.to_json_string()):
        assert secret not in text and f"any {kind}" not in text and '"run ' in text
    assert options.model_init_kwargs == nested and secret in options.run_name
    assert secret not in json.dumps(public(nested)) and f"any {kind}" not in json.dumps(public(nested))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, math.nan)
            for name in ("learning_rate", "weight_decay", "adam_beta1", "adam_epsilon", "max_grad_norm")
        ),
        *(("adam_epsilon", value) for value in (0, 0.0, -1e-8, math.inf)),
        *(("adam_beta2", value) for value in (1.0, -0.1)),
        *(("learning_rate", value) for value in (math.inf, -1e-5, "nan")),
        ("weight_decay", -0.1),
    ],
)
def test_what_would_make_the_weights_nan(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name}={re.escape(repr(value))}.* must be a number (above|at least) 0"):
        config(**{name: value})


def test_the_edges_of_what_an_optimizer_takes() -> None:
    options = {"weight_decay": 0, "adam_beta1": 0, "adam_beta2": 0.9999, "adam_epsilon": 1e-30, "max_grad_norm": 0}
    assert config(learning_rate=0, **options).adam_epsilon == 1e-30


def test_what_only_looks_like_a_secret_is_kept() -> None:
    given = {"eos_token_id": 3, "key": "value", "tokens": 4, "monkey": "sk-learn", "url": "https://a/b@c"}
    assert config(model_init_kwargs=given).to_dict()["model_init_kwargs"] == given == public(given)


def test_base_folder_without_weights(base_folder) -> None:
    with pytest.raises(OptionError, match="can't be loaded"):
        load_base(base_folder + "/missing")
