"""Every option of `trl.DPOConfig` is tried: with a value that is not its default a run does what the table says.

    python tests/trainer/test_trl_options.py        # writes the table of docs/from-trl.md anew

"as TRL": the run's losses are those of TRL's trainer with that value. "no other step": the trained adapter is, bit for
bit, that of the run without. "refused": an error names the option. "own": what differs stands beside it, and in a test
of its own. "given": every run of these tests gives it.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import trl
from paths import REPO
from trainer_helpers import adapter_weights, largest_difference, options, ours, step_logs, text_pairs, theirs

from dpo_peft import DPOConfig, OptionError

FIELDS = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}
OPEN, CLOSE = "<!-- options: begin -->", "<!-- options: end -->"
STEPS = 3


class Tried(NamedTuple):
    """What becomes of an option."""

    verdict: str
    values: tuple[Any, ...] = ()  # that are tried
    also: dict[str, Any] = {}  # options that it needs
    why: str = ""


def as_trl(*values: Any, **also: Any) -> Tried:
    return Tried("as TRL", values, also)


def same(*values: Any, **also: Any) -> Tried:
    return Tried("no other step", values, also)


def refused(why: str, *values: Any, **also: Any) -> Tried:
    return Tried("refused", values, also, why)


def own(why: str) -> Tried:
    return Tried("own", why=why)


EVAL = {"eval_strategy": "steps", "eval_steps": 1}
SAVE = {"save_strategy": "steps", "save_steps": 1}
WORKERS = {"dataloader_num_workers": 1}
FSDP = "`fsdp: full_shard` shards the frozen base (docs/several-cards.md)"
DDP = "several processes train without DDP's wrapper; `recipes/accelerate/ddp.yaml`"
FUSED = "`fused_layers` take its place"
COMPILE = "the trainer calls the backbone itself, which is not compiled"
SCHEDULES = ("constant", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt")

OPTIONS: dict[str, Tried] = {
    "output_dir": Tried("given"),
    "use_cpu": Tried("given"),
    "max_steps": Tried("given"),
    # The optimizer and its schedule
    "learning_rate": as_trl(5e-4),
    "lr_scheduler_type": as_trl(*SCHEDULES),
    "lr_scheduler_kwargs": as_trl({"num_cycles": 2}, lr_scheduler_type="cosine_with_restarts"),
    "warmup_steps": as_trl(2, 0.5),
    "optim": as_trl("adamw_torch", "adafactor", "sgd", "adagrad"),
    "optim_args": as_trl("eps=1e-6", optim="adamw_torch"),
    "weight_decay": as_trl(0.1),
    "adam_beta1": as_trl(0.5),
    "adam_beta2": as_trl(0.9),
    "adam_epsilon": as_trl(1e-4),
    "optim_target_modules": refused("only GaLore, LOMO and APOLLO read it", ["attn"]),
    "max_grad_norm": as_trl(0.001, 0.0),
    # Batches, order, precision
    "per_device_train_batch_size": as_trl(2),
    "gradient_accumulation_steps": as_trl(2, per_device_train_batch_size=2),
    "num_train_epochs": as_trl(1, max_steps=-1, per_device_train_batch_size=8),
    "average_tokens_across_devices": same(False),
    "seed": as_trl(11),
    "data_seed": as_trl(11),
    "full_determinism": as_trl(True),
    "train_sampling_strategy": as_trl("sequential"),
    "length_column_name": same("size"),
    "bf16": as_trl(False),
    "fp16": own("a base given by name is loaded in float16 then; a quantized one has to be in the dtype of the run"),
    "bf16_full_eval": refused("it would round the adapter for good; evaluation computes as training does", True),
    "fp16_full_eval": refused("it would round the adapter for good; evaluation computes as training does", True),
    "tf32": own("of GPUs only"),
    "gradient_checkpointing": same(False, True),
    "gradient_checkpointing_kwargs": same({"use_reentrant": False}, gradient_checkpointing=True),
    "activation_checkpointing": same(True),
    "activation_checkpointing_kwargs": same({"use_reentrant": False}, gradient_checkpointing=True),
    "activation_offloading": own("of fused layers on a GPU, one layer at a time"),
    "torch_empty_cache_steps": same(1),
    "use_cache": same(True),
    "torch_compile": refused(COMPILE, True),
    "torch_compile_backend": refused(COMPILE, "inductor"),
    "torch_compile_mode": refused(COMPILE, "default"),
    "use_liger_kernel": refused(FUSED, True),
    "liger_kernel_config": refused(FUSED, {"rope": True}),
    "neftune_noise_alpha": refused("noise on the policy alone would enter the implicit rewards", 5.0),
    "auto_find_batch_size": refused("micro-batches that run out of memory are halved as it is", True),
    "label_smoothing_factor": refused("it smooths labels of tokens; `label_smoothing` is the loss's", 0.1),
    "label_names": refused("pairs have no labels", ["labels"]),
    "include_for_metrics": refused("`compute_metrics` gets the implicit rewards", ["inputs"]),
    # Logging, evaluation, saving
    "logging_strategy": same("no"),
    "logging_steps": same(2),
    "logging_first_step": same(True, logging_steps=2),
    "log_on_each_node": same(False),
    "logging_nan_inf_filter": same(True),
    "include_num_input_tokens_seen": same("all"),
    "log_level": same("error"),
    "log_level_replica": same("error"),
    "disable_tqdm": same(False),
    "report_to": Tried("given"),
    "run_name": same("a name"),
    "project": same("a name"),
    "trackio_space_id": same("a/name"),
    "trackio_bucket_id": same("a/name"),
    "trackio_static_space_id": same("a/name"),
    "skip_memory_metrics": same(False),
    "debug": own("its hooks on the layers turn the fused layers off, which moves last bits"),
    "eval_strategy": same("steps", eval_steps=1),
    "eval_steps": same(2, eval_strategy="steps"),
    "eval_delay": same(1, **EVAL),
    "per_device_eval_batch_size": same(3, **EVAL),
    "prediction_loss_only": same(True, **EVAL),
    "eval_on_start": same(True, **EVAL),
    "eval_do_concat_batches": same(False, **EVAL),
    "eval_use_gather_object": same(True, **EVAL),
    "eval_accumulation_steps": same(1, **EVAL),
    "batch_eval_metrics": same(True),
    "save_strategy": same("steps", save_steps=1),
    "save_steps": same(2, save_strategy="steps"),
    "save_total_limit": same(1, **SAVE),
    "save_only_model": same(True, **SAVE),
    "save_on_each_node": same(True, **SAVE),
    "load_best_model_at_end": own("chosen by `eval_rewards/margins` unless `metric_for_best_model` says otherwise"),
    "metric_for_best_model": own("one that no evaluation has is refused"),
    "greater_is_better": own("follows from the metric where it is left out"),
    "enable_jit_checkpoint": refused("SIGTERM always ends in a checkpoint", True),
    "resume_from_checkpoint": own("also 'latest'; [resuming.md](resuming.md)"),
    "ignore_data_skip": own("a resumed run begins its rows anew, and says so"),
    "restore_callback_states_from_checkpoint": same(True),
    # The Hub
    "push_to_hub": own("checked first, one commit; [publishing.md](publishing.md)"),
    "hub_model_id": same("a/name"),
    "hub_strategy": own("`end` and `every_save`; the others are refused, as they publish pickles"),
    "hub_token": same("hf_" + "x" * 34),
    "hub_private_repo": same(True),
    "hub_always_push": own("refused with `push_to_hub`: one push at a time, and the last one is awaited"),
    "hub_revision": same("a-branch"),
    # Loading and processes
    "dataloader_drop_last": as_trl(True, per_device_train_batch_size=5, max_steps=4),
    "dataloader_num_workers": same(1),
    "dataloader_pin_memory": same(False),
    "dataloader_persistent_workers": same(True, **WORKERS),
    "dataloader_prefetch_factor": same(2, **WORKERS),
    "dataloader_multiprocessing_context": same("fork", **WORKERS),
    "dataloader_in_order": same(False),
    "remove_unused_columns": own("prepared rows have no unused columns"),
    "accelerator_config": same({"even_batches": False}),
    "parallelism_config": own("of several processes; sharded data (see `fsdp`) and tensor parallelism are refused"),
    "ddp_find_unused_parameters": refused(DDP, False),
    "ddp_bucket_cap_mb": refused(DDP, 25),
    "ddp_broadcast_buffers": refused(DDP, True),
    "ddp_static_graph": refused(DDP, True),
    "ddp_backend": own("of several processes, as in TRL"),
    "ddp_timeout": same(60),
    "local_rank": own("set by the launcher"),
    "fsdp": own("of several processes: the frozen base alone is sharded, by FSDP2"),
    "fsdp_config": refused(FSDP, {"min_num_params": 1}),
    "deepspeed": refused(FSDP, {"zero_optimization": {"stage": 2}}),
    "do_train": same(True),
    "do_eval": same(True),
    "do_predict": same(True),
    # DPO's own
    "model_init_kwargs": own("of a model given by name; beside a loaded model it is refused"),
    "trust_remote_code": same(True),
    "router_aux_loss_coef": own("same losses on mixtures of experts; refused for other models, but for 0"),
    "disable_dropout": same(False),
    "dataset_num_proc": same(2),
    "max_length": as_trl(40),
    "truncation_mode": own("'keep_end' cuts the prompt once for both completions; 'trim_prompt' too"),
    "padding_free": refused("batches never hold padding", True),
    "pad_to_multiple_of": refused("batches never hold padding", 8),
    "pad_token": refused("set it on the tokenizer", "<pad>"),
    "precompute_ref_log_probs": as_trl(True),
    "precompute_ref_batch_size": refused("`precompute_ref_tokens`, the tokens of a forward pass", 2),
    "loss_type": as_trl("hinge", "robust", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "aot"),
    "loss_weights": as_trl([1.0, 0.5], loss_type=["sigmoid", "bco_pair"]),
    "ld_alpha": as_trl(0.5),
    "f_divergence_type": as_trl("js_divergence", "forward_kl"),
    "f_alpha_divergence_coef": as_trl(0.7, f_divergence_type="alpha_divergence"),
    "label_smoothing": as_trl(0.1, loss_type="robust"),
    "beta": as_trl(0.3),
    "use_weighting": as_trl(True),
    "discopop_tau": as_trl(0.2, loss_type="discopop"),
    "sync_ref_model": own("with LoRA too, where TRL has an error"),
    "ref_model_mixup_alpha": own("of `sync_ref_model`"),
    "ref_model_sync_steps": own("of `sync_ref_model`"),
}
RUNS = [
    pytest.param(name, value, id=f"{name}={value}")
    for name, tried in OPTIONS.items()
    if tried.verdict in ("as TRL", "no other step")
    for value in tried.values
]
REFUSED = [(name, value) for name, tried in OPTIONS.items() if tried.verdict == "refused" for value in tried.values]


def test_the_table_has_every_option_of_trl() -> None:
    assert set(OPTIONS) == set(FIELDS)


@pytest.fixture(scope="module")
def reached() -> dict[str, dict[str, torch.Tensor]]:
    """The adapters that runs without the option end with, by their other options; each is trained once."""
    return {}


def trained(make: Any, model: Any, tokenizer: Any, folder: Path, **changed: Any) -> Any:
    if changed.get("eval_strategy"):
        changed["eval_dataset"] = text_pairs(6, seed=1)
    trainer = make(model(), text_pairs(12), tokenizer(), folder, **{"max_steps": STEPS, **changed})
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.sampled(99, slow=5)
@pytest.mark.parametrize(("name", "value"), RUNS)
def test_an_option_does_what_the_table_says(
    name: str, value: Any, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, reached: Any
) -> None:
    verdict, _, also, _ = OPTIONS[name]
    if name == "loss_type":
        also = {"discopop_tau": 0.1} if value == "discopop" else {}
    mine = trained(ours, tiny_llama, make_tokenizer, tmp_path / "a", **{**also, name: value})
    if verdict == "as TRL":
        other = trained(theirs, tiny_llama, make_tokenizer, tmp_path / "b", **{**also, name: value})
        assert len(step_logs(mine)) == len(step_logs(other)) > 0
        assert largest_difference(mine, other, ["loss", "rewards/margins"], relative=True) < 2e-5
        return
    key = str(sorted(also.items()))
    if key not in reached:
        reached[key] = adapter_weights(trained(ours, tiny_llama, make_tokenizer, tmp_path / "c", **also))
    for weight, values in adapter_weights(mine).items():
        assert torch.equal(values, reached[key][weight]), weight


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_refused_option_is_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=name):
        DPOConfig(**options(tmp_path, **{**OPTIONS[name].also, name: value}))


# ---- The table of docs/from-trl.md ----------------------------------------------------------------------------------


def table() -> str:
    """The table: options with one fate share a line."""
    lines = {}
    for name, tried in OPTIONS.items():
        lines.setdefault((tried.verdict, tried.why), []).append(f"`{name}`")
    words = {
        "as TRL": "same losses as TRL's trainer",
        "no other step": "works, and changes no step",
        "given": "works",
        "own": "works, differs",
    }
    order = ["given", "as TRL", "no other step", "own", "refused"]
    ordered = sorted(lines.items(), key=lambda line: order.index(line[0][0]))
    rows = [f"| {', '.join(names)} | {words.get(fate, fate)} | {why} |" for (fate, why), names in ordered]
    return "\n".join(["| options | here | |", "|---|---|---|", *rows])


def test_the_table_of_the_docs_is_this_one() -> None:
    text = (REPO / "docs" / "from-trl.md").read_text("utf-8")
    assert f"{OPEN}\n{table()}\n{CLOSE}" in text, f"run: python {Path(__file__).relative_to(REPO)}"


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "from-trl.md"
    old = path.read_text("utf-8")
    path.write_text(re.sub(f"{OPEN}.*{CLOSE}", lambda _: f"{OPEN}\n{table()}\n{CLOSE}", old, flags=re.S), "utf-8")
    print(inspect.cleandoc(f"{len(OPTIONS)} options written to {path.name}"))
