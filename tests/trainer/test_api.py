"""The constructor and the run as TRL users know them: every form of every argument, on real runs."""

import importlib.util
import json
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from trainer_helpers import (
    adapter_weights,
    id_pairs,
    largest_difference,
    lora,
    ours,
    step_logs,
    text_pairs,
)
from transformers import BitsAndBytesConfig, TrainerCallback, set_seed
from trl import LogCompletionsCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_peft import DPOConfig, DPOTrainer, OptionError
from dpo_peft.data.collator import PreferenceCollator
from dpo_peft.model.loading import load_base

# ---- Forms of the model ---------------------------------------------------------------------------------------------


def test_name_model_and_peft_model_train_alike(tiny_llama, make_tokenizer, tmp_path, base_folder):
    rows, tokenizer = text_pairs(16), make_tokenizer()
    by_name = ours(base_folder, rows, None, tmp_path, quantize_base=False, model_init_kwargs={"dtype": "float32"})
    by_model = ours(tiny_llama(), rows, tokenizer, tmp_path)
    set_seed(3)  # the seed of the options, which the trainer sets before it makes an adapter
    by_peft_model = ours(get_peft_model(tiny_llama(), lora()), rows, tokenizer, tmp_path)
    for trainer in (by_name, by_model, by_peft_model):
        trainer.train()
    assert largest_difference(by_name, by_model) == largest_difference(by_name, by_peft_model) == 0.0


def test_defaults(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpo_peft.training.arguments.DPOConfig", partial(DPOConfig, use_cpu=True))
    trainer = DPOTrainer(base_folder, train_dataset=text_pairs(8))
    assert trainer.args.output_dir == Path(base_folder).name + "-DPO"
    assert trainer.args.learning_rate == 2e-5
    assert trainer.model.peft_config["default"].r == 16
    assert trainer.processing_class.eos_token == "</s>"


def test_quantization_config_replaces_the_default(base_folder, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    trainer = ours(base_folder, text_pairs(8), None, tmp_path, quantization_config=config, max_steps=2)
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.quant_type == "fp4" and layer.weight.quant_state.nested is False
    assert layer.compute_dtype == torch.float32
    trainer.train()
    assert step_logs(trainer)[0]["loss"] == pytest.approx(0.693147, abs=1e-3)


# ---- Datasets -------------------------------------------------------------------------------------------------------


def test_streams_train_as_datasets_do(tiny_llama, make_tokenizer, tmp_path):
    rows, held_out, tokenizer = text_pairs(12), text_pairs(7, seed=5), make_tokenizer()
    changed = {"train_sampling_strategy": "sequential", "max_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    stored = ours(tiny_llama(), rows, tokenizer, tmp_path, eval_dataset=held_out, **changed)
    streams = {"eval_dataset": held_out.to_iterable_dataset()}
    streamed = ours(tiny_llama(), rows.to_iterable_dataset(), tokenizer, tmp_path, **streams, **changed)
    for trainer in (stored, streamed):
        trainer.train()
    assert largest_difference(stored, streamed) == 0.0
    a, b = ([log for log in t.state.log_history if "eval_loss" in log][0] for t in (stored, streamed))
    metrics = [name for name in a if not name.endswith(("per_second", "runtime", "epoch"))]
    assert len(metrics) > 10 and {name: a[name] for name in metrics} == {name: b[name] for name in metrics}


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_evaluation_datasets(tiny_llama, make_tokenizer, tmp_path, kind):
    parts = {"near": text_pairs(6, seed=1), "far": text_pairs(5, seed=2)}
    changed = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = ours(tiny_llama(), text_pairs(8), make_tokenizer(), tmp_path, eval_dataset=kind(parts), **changed)
    trainer.train()
    logged = {key: value for log in trainer.state.log_history for key, value in log.items()}
    for name, part in parts.items():
        single = trainer.evaluate(part)
        for metric in ("loss", "rewards/margins", "rewards/accuracies", "kl"):
            assert logged[f"eval_{name}_{metric}"] == single[f"eval_{metric}"]
        assert trainer.data_reports[f"eval_{name}"].kept_rows == len(part)
    assert logged["eval_near_loss"] != logged["eval_far_loss"]


def test_evaluation_metrics_do_not_depend_on_the_batch_size(tiny_llama, make_tokenizer, tmp_path):
    """7 rows in batches of 7, of 3 (3 + 3 + 1) and of 1: means over pairs, not means of means."""
    rows, tokenizer, results = text_pairs(8), make_tokenizer(), []
    held_out = text_pairs(7, seed=4)
    for size in (7, 3, 1):
        trainer = ours(
            tiny_llama(),
            rows,
            tokenizer,
            tmp_path,
            eval_dataset=held_out,
            per_device_eval_batch_size=size,
            max_steps=3,
        )
        trainer.train()
        results.append(trainer.evaluate())
    names = [name for name in results[0] if "per_second" not in name and "runtime" not in name]
    assert "eval_loss" in names and "eval_rewards/margins" in names and "eval_kl" in names
    for other in results[1:]:
        assert {n: other[n] for n in names} == pytest.approx({n: results[0][n] for n in names}, rel=1e-5, abs=1e-6)
    # By hand from the implicit rewards of every pair.
    rewards = torch.as_tensor(trainer.predict(held_out).predictions)
    margins = rewards[:, 0] - rewards[:, 1]
    assert results[2]["eval_loss"] == pytest.approx(float(torch.nn.functional.softplus(-margins).mean()), rel=1e-6)
    assert results[2]["eval_rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-6)
    assert results[2]["eval_rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))


def test_rows_given_to_evaluate_and_predict_are_prepared(tiny_llama, make_tokenizer, tmp_path):
    held_out = text_pairs(6, seed=4)
    trainer = ours(tiny_llama(), text_pairs(8), make_tokenizer(), tmp_path, eval_dataset=held_out, max_steps=2)
    trainer.train()
    prepared, raw = trainer.evaluate(), trainer.evaluate(held_out)
    assert raw["eval_loss"] == prepared["eval_loss"] and raw["eval_kl"] == prepared["eval_kl"]
    named = trainer.evaluate({"a": held_out, "b": text_pairs(3, seed=6)}, metric_key_prefix="test")
    assert named["test_a_loss"] == prepared["eval_loss"] != named["test_b_loss"]
    predicted = trainer.predict(held_out)
    assert predicted.predictions.shape == (6, 2) and predicted.metrics["test_loss"] == prepared["eval_loss"]
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == prepared["eval_loss"]


# ---- Callbacks, optimizers, metrics, collator -----------------------------------------------------------------------


def test_callbacks_are_called(tiny_llama, make_tokenizer, tmp_path):
    class Record(TrainerCallback):
        def __init__(self):
            self.steps: list[int] = []
            self.logs: list[dict[str, float]] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.steps.append(state.global_step)
            control.should_training_stop = state.global_step == 3

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    record = Record()
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, callbacks=[record])
    trainer.train()
    assert record.steps == [1, 2, 3]
    names = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected"
    extra = "sample_weight kl accuracies/length_only"
    assert all(set(names.split() + extra.split()) <= set(log) for log in record.logs[:3])


def test_given_optimizer_and_schedule_are_used(tiny_llama, make_tokenizer, tmp_path):
    """The same AdamW and constant rate, once by options and once by hand."""
    expected = ours(
        tiny_llama(),
        id_pairs(8),
        make_tokenizer(),
        tmp_path,
        lr_scheduler_type="constant",
        max_steps=4,
        optim="adamw_torch",
    )
    set_seed(3)
    model = get_peft_model(tiny_llama(), lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    given = ours(model, id_pairs(8), make_tokenizer(), tmp_path, optimizers=(optimizer, schedule), max_steps=4)
    for trainer in (expected, given):
        trainer.train()
    assert largest_difference(expected, given) < 1e-6
    assert step_logs(given)[-1]["learning_rate"] == 1e-3


def test_compute_metrics_gets_the_implicit_rewards(tiny_llama, make_tokenizer, tmp_path):
    def metrics(prediction: Any) -> dict[str, float]:
        assert not prediction.label_ids.any() and prediction.predictions.shape == (7, 2)
        best = prediction.predictions.argmax(1)
        margins = prediction.predictions[:, 0] - prediction.predictions[:, 1]
        return {"right": float((best == prediction.label_ids).mean()), "margin": float(margins.mean())}

    trainer = ours(
        tiny_llama(),
        text_pairs(8),
        make_tokenizer(),
        tmp_path,
        eval_dataset=text_pairs(7, seed=3),
        compute_metrics=metrics,
        per_device_eval_batch_size=3,
        max_steps=3,
    )
    trainer.train()
    result = trainer.evaluate()
    assert result["eval_right"] == pytest.approx(result["eval_rewards/accuracies"])
    assert result["eval_margin"] == pytest.approx(result["eval_rewards/margins"], rel=1e-5)


def test_custom_collator(tiny_llama, make_tokenizer, tmp_path):
    """One that cuts every completion to its first two tokens, and one that pads rows where the model could share."""

    def short(rows: list[dict[str, Any]]) -> dict[str, Any]:
        cut = [{**row, "completion_ids": [ids[:2] for ids in row["completion_ids"]]} for row in rows]
        return PreferenceCollator()(cut)

    rows = id_pairs(8)
    cut_rows = Dataset.from_list(
        [{k: ids[:2] if k != "prompt_ids" else ids for k, ids in row.items()} for row in rows]
    )
    expected = ours(tiny_llama(), cut_rows, make_tokenizer(), tmp_path, max_steps=4)
    collated = ours(tiny_llama(), rows, make_tokenizer(), tmp_path, max_steps=4, data_collator=short)
    padded = ours(tiny_llama(), rows, make_tokenizer(), tmp_path, max_steps=4, data_collator=PreferenceCollator(False))
    packed = ours(tiny_llama(), rows, make_tokenizer(), tmp_path, max_steps=4)
    for trainer in (expected, collated, padded, packed):
        trainer.train()
    assert largest_difference(expected, collated) == 0.0
    assert largest_difference(packed, padded) < 1e-5
    assert largest_difference(packed, collated) > 1e-3


def test_a_collator_that_is_not_made_for_prepared_rows_is_refused(tiny_llama, make_tokenizer, tmp_path):
    wrong = {
        "KeyError: 'chosen_ids'": DataCollatorForPreference(pad_token_id=0),
        "unexpected keyword argument 'labels'": lambda rows: {"labels": torch.zeros(len(rows))},
        "missing .* required": lambda rows: {},
    }
    for reason, collate in wrong.items():
        with pytest.raises(OptionError, match=rf"data_collator=.*{reason}.*Leave it out"):
            ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, data_collator=collate)


def test_trls_callback_for_completions_is_refused(tiny_llama, make_tokenizer, tmp_path):
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, eval_dataset=id_pairs(4))
    trainer.add_callback(LogCompletionsCallback(trainer, num_prompts=1, freq=1))
    with pytest.raises(OptionError, match="LogCompletionsCallback reads prompts as text.*set sample_prompts"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_steps_after_the_last_log_are_in_the_log_at_the_end(tiny_llama, make_tokenizer, tmp_path):
    """5 steps, logged after 3: the log at the end has the means of steps 4 and 5, and the loss of all."""
    runs = []
    for every in (1, 3, 5):
        trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, max_steps=5, logging_steps=every)
        trainer.train()
        runs.append(trainer.state.log_history)
    single, threes, fives = runs
    for name in ("rewards/margins", "logps/chosen", "kl", "rewards/accuracies"):
        assert threes[-1][name] == pytest.approx(sum(log[name] for log in single[3:5]) / 2, rel=1e-6)
        assert name not in single[-1] and name not in fives[-1]
    for log in runs:
        assert log[-1]["train_loss"] == pytest.approx(sum(log["loss"] for log in single[:5]) / 5, rel=1e-6)
        assert "loss" not in log[-1]


@pytest.mark.parametrize(("loss_type", "tags"), [("orpo", {"orpo"}), (["cpo", "sft"], {"cpo"}), ("ipo", set())])
def test_tags_name_the_trainers_of_trl_that_this_one_stands_for(tiny_llama, make_tokenizer, tmp_path, loss_type, tags):
    trainer = ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path, loss_type=loss_type)
    assert set(trainer.model.model_tags) == {"dpo", "lora", "dpo-peft", "trl"} | tags


def test_sharing_off_trains_alike(tiny_llama, make_tokenizer, tmp_path):
    shared = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path)
    plain = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, share_prompts=False)
    assert shared.forward_plan.shared and not plain.forward_plan.shared
    for trainer in (shared, plain):
        trainer.train()
    assert largest_difference(shared, plain) < 1e-5


def test_reward_clip_reaches_the_loss(tiny_llama, make_tokenizer, tmp_path):
    """With a clip far below the rewards no pair beyond it has a gradient: the run stops moving."""
    free = ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path, learning_rate=1e-2, max_steps=12)
    clipped = ours(
        tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path, learning_rate=1e-2, max_steps=12, reward_clip=0.05
    )
    for trainer in (free, clipped):
        trainer.train()
    assert step_logs(clipped)[-1]["loss"] >= 0.6443 - 1e-3  # log(1 + exp(-0.1)), the least a clipped pair can have
    assert step_logs(free)[-1]["loss"] < 0.6


# ---- What scripts for TRL's trainer read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"beta": 0.3}, {"loss_type": "simpo"}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}],
    ids=str,
)
def test_attributes_are_those_of_trl(tiny_llama, make_tokenizer, tmp_path, given):
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, **given)
    names = given.get("loss_type", ["sigmoid"])
    assert trainer.beta == (2.0 if names == "simpo" else given.get("beta", 0.1))
    assert trainer.loss_types == ([names] if isinstance(names, str) else names)
    assert trainer.loss_weights == given.get("loss_weights", [1.0])
    assert trainer.ref_model is None and trainer.aux_loss_enabled is False
    assert {"trl", "dpo"} <= set(trainer.model.model_tags)


def test_hyperparameter_search_is_refused(tiny_llama, make_tokenizer, tmp_path):
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path)
    for arguments in ({}, {"n_trials": 2, "direction": "minimize"}):
        with pytest.raises(OptionError, match="make a DPOTrainer for each trial"):
            trainer.hyperparameter_search(**arguments)


# ---- TRL's own script -----------------------------------------------------------------------------------------------


def trl_script(folder: Path, ours_imported: bool) -> Path:
    """TRL's example script as it is installed, with the import of config and trainer changed or not."""
    source = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "scripts" / "dpo.py"
    code = source.read_text(encoding="utf-8")
    if ours_imported:
        for old, new in (
            ("from trl import DPOTrainer, ", "from dpo_peft import DPOTrainer\n    from trl import "),
            (
                "from trl import DatasetMixtureConfig, DPOConfig, ",
                "from dpo_peft import DPOConfig\n    from trl import DatasetMixtureConfig, ",
            ),
        ):
            if old not in code:
                pytest.skip("another release of TRL: its script imports differently")
            code = code.replace(old, new)
    script = folder / f"dpo_{ours_imported}.py"
    script.write_text(code, encoding="utf-8")
    return script


def run_script(monkeypatch: Any, script: Path, output: Path, arguments: list[str]) -> list[dict[str, float]]:
    monkeypatch.setattr(sys, "argv", [str(script), "--output_dir", str(output), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    assert (output / "adapter_model.safetensors").is_file() and (output / "tokenizer.json").is_file()
    return json.loads(state.read_text())["log_history"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("arguments", "our_arguments", "tolerance"),
    [
        (["--load_in_4bit", "--use_bnb_nested_quant"], [], 1e-3),  # NF4 in both; TRL's LoRA is bfloat16 there
        ([], ["--quantize_base", "false"], 1e-5),  # TRL does not quantize unless told to
    ],
)
def test_trl_script_runs_with_its_import_changed(
    base_folder, tmp_path, monkeypatch, arguments, our_arguments, tolerance
):
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", text_pairs(16)), ("test", text_pairs(8, seed=2))):
        rows.to_json(data / f"{split}.jsonl")
    arguments = [
        *("--dataset_name", str(data), "--model_name_or_path", base_folder, "--dtype", "float32", "--bf16", "false"),
        *("--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "all-linear"),
        *("--learning_rate", "2e-4", "--max_steps", "6", "--logging_steps", "1", "--save_steps", "6"),
        *("--eval_strategy", "steps", "--eval_steps", "6", "--per_device_train_batch_size", "4"),
        *("--per_device_eval_batch_size", "4", "--gradient_accumulation_steps", "1", "--use_cpu", "--beta", "0.2"),
        *("--no_remove_unused_columns", "--report_to", "none", "--disable_tqdm", "true"),
        *arguments,
    ]
    theirs = run_script(monkeypatch, trl_script(tmp_path, False), tmp_path / "trl", arguments)
    our_arguments = [*arguments, *our_arguments, "--as_chat", "false"]  # TRL trains text as it is
    mine = run_script(monkeypatch, trl_script(tmp_path, True), tmp_path / "ours", our_arguments)
    assert len(mine) == len(theirs) == 7
    # In NF4, evaluation lets bitsandbytes repack the weights under TRL (see `keep_weights`), so that is left out.
    compared = 6 if "--load_in_4bit" in arguments else 7
    for a, b in list(zip(mine, theirs, strict=True))[:compared]:
        names = [n for n in b if n.endswith(("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"))]
        assert len(names) == 4
        assert max(abs(a[name] - b[name]) for name in names) < tolerance
    assert mine[-1]["eval_rewards/margins"] != 0


# ---- Again ---------------------------------------------------------------------------------------------------------


def test_a_second_run_is_the_same_run(tiny_llama, make_tokenizer, tmp_path):
    runs = []
    for _ in range(2):
        trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path)
        trainer.train()
        runs.append(adapter_weights(trainer))
    assert all(torch.equal(runs[0][name], p) for name, p in runs[1].items())
    other = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, seed=4)
    other.train()
    assert any(not torch.equal(runs[0][name], p) for name, p in adapter_weights(other).items())


# ---- The dtype of the base and of the run ---------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({"fp16": True}, torch.float16),
        ({"fp16": True, "quantize_base": False}, torch.float16),
        ({"bf16": None, "model_init_kwargs": {"dtype": "float16"}}, torch.bfloat16),
        ({"fp16": True, "model_init_kwargs": {"torch_dtype": torch.bfloat16}}, torch.float16),
        ({"bf16": None, "model_init_kwargs": {"dtype": "float32"}}, torch.float32),
        ({"bf16": None, "quantize_base": False, "model_init_kwargs": {"dtype": "float16"}}, torch.float16),
    ],
    ids=str,
)
def test_a_base_given_by_name_is_in_a_dtype_that_the_run_can_compute_in(base_folder, tmp_path, given, dtype):
    trainer = ours(base_folder, text_pairs(8), None, tmp_path, max_steps=2, **given)
    assert trainer.model.get_input_embeddings().weight.dtype == dtype
    trainer.train()
    assert step_logs(trainer)[0]["loss"] == pytest.approx(0.693147, abs=2e-3)


@pytest.mark.parametrize(
    ("loaded", "given", "message"),
    [
        (
            torch.float16,
            {"bf16": True},
            r"in float16 and the run computes in bfloat16: set fp16=True.*'bfloat16'",
        ),
        (torch.bfloat16, {"fp16": True}, r"in bfloat16 and the run computes in float16: set bf16=True.*'float16'"),
    ],
)
def test_a_quantized_model_of_another_dtype_is_refused(base_folder, make_tokenizer, tmp_path, loaded, given, message):
    model = load_base(base_folder, init_kwargs={"dtype": loaded})
    with pytest.raises(OptionError, match=message):
        ours(model, text_pairs(8), make_tokenizer(), tmp_path, **given)
