"""One case of the speed benchmark, on any engine: our trainer, TRL's, TRL's with Liger layers, Unsloth's.

All get the same model, the same rows in the same order, LoRA of rank 16 on all linear layers, and the same clock. What
an engine imports is imported when it runs, since Unsloth has to come before the others.
"""

import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from speed_models import (
    SAMPLES,
    SHAPES,
    as_pairs,
    as_text,
    bound_flops,
    lengths,
    make_config,
    make_model,
    make_rows,
    make_tokenizer,
    same_start,
    synchronize,
)
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, set_seed

GIB = 2**30
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
LONGEST = 65536  # longer than any row: nothing is cut
INVOCATION = 3  # the token that starts an answer-only adapter, of those that no row holds
# What makes the CPU wait for the GPU, by the profiler's names.
WAITS = (
    "aten::item aten::_local_scalar_dense aten::nonzero cudaStreamSynchronize cudaDeviceSynchronize "
    "cudaEventSynchronize cudaMemcpy"
).split()


class Clock(TrainerCallback):
    """Waits for the device at the start and at the end of the timed steps only; may then profile one more."""

    def __init__(self, warm: int, steps: int, device: str, profile: bool):
        self.first, self.last, self.device = warm, warm + steps, device
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
        self.profiler = torch.profiler.profile(activities=activities) if profile else None
        self.figures: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.first:
            synchronize(self.device)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter(), time.process_time()
        elif state.global_step == self.last:
            synchronize(self.device)
            steps = self.last - self.first
            self.figures["seconds_per_step"] = (time.perf_counter() - self.start[0]) / steps
            self.figures["cpu_seconds_per_step"] = (time.process_time() - self.start[1]) / steps
            if self.device == "cuda":
                self.figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
                self.figures["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            if self.profiler:
                self.profiler.start()
        elif self.profiler and state.global_step == self.last + 1:
            synchronize(self.device)
            self.profiler.stop()


def describe_profile(clock: Clock) -> dict[str, Any]:
    """Of the profiled step: what made it wait for the device (the profiler itself waits once, at the end), and the
    kernels that took longest."""
    assert clock.profiler is not None
    events, on_gpu = clock.profiler.key_averages(), clock.device == "cuda"
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # The operators that launch kernels, and annotations around them, bear the kernels' time too.
    kernels = [e for e in events if not on_gpu or ("CUDA" in str(e.device_type) and not e.is_user_annotation)]
    ranked = sorted(kernels, key=lambda e: -getattr(e, attribute))
    return {
        "waits": {e.key: e.count for e in events if e.key in WAITS or "DtoH" in e.key},
        "launches": sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))),
        "busy_ms": round(sum(getattr(e, attribute) for e in ranked) / 1000, 2),
        "top": [[e.key[:100], e.count, round(getattr(e, attribute) / 1000, 3)] for e in ranked[:30]],
    }


def run_case(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Train for the case's steps and return its figures.

    `case` is as in speed_cases, with one `engine` and its `options`.
    """
    warm, steps, profile = case.get("warm", 3), case.get("steps", 6), case.get("profile", False)
    samples, work, shape = case.get("samples", SAMPLES[case["work"]]), case["work"], case["shape"]
    total = warm + steps + profile
    sizes = lengths(work, samples * total)
    rows = make_rows(sizes, SHAPES[shape]["vocab_size"])
    if "answer-only" in case.get("adapter", ""):
        for row in rows:
            row["prompt_ids"][-1] = INVOCATION
    given = rows if case["engine"] == "ours" else as_pairs(rows)  # the same work, for trainers that know pairs only
    clock = Clock(warm, steps, device, profile)
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        config = train_options(case, device, folder, samples * len(given) // len(rows), total)
        build = {"ours": ours, "unsloth": unsloth}.get(case["engine"], trl)
        trainer, loaded = build(case, device, config, given)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        same_start(trainer.model, torch.float32 if case.get("dtype") == "float32" else None)
        losses = keep_losses(trainer)
        micro_batches = keep_micro_batches(trainer, warm, warm + steps) if case["engine"] == "ours" else []
        trainer.train()
    timed = sizes[samples * warm : samples * (warm + steps)]
    seconds = clock.figures["seconds_per_step"]
    found: dict[str, Any] = {
        **clock.figures,
        "samples_per_s": samples / seconds,
        "tokens_per_s": sum(map(sum, timed)) / steps / seconds,
        "bound_flops_per_step": bound_flops(shape, timed, case.get("adapter", "")) / steps,
        "loaded_gib": loaded,
        "samples": samples,
        "losses": [float(loss) for loss in losses.values()][: warm + steps],
        "adapter_dtype": str(next(p.dtype for p in trainer.model.parameters() if p.requires_grad)),
    }
    found["loss"] = found["losses"][-1]
    if config["logging_steps"] == 1:
        logs = trainer.state.log_history
        found["margins"] = [log["rewards/margins"] for log in logs if "rewards/margins" in log]
    if case["engine"] == "ours":
        found |= {"plan": str(trainer.forward_plan), "halvings": trainer.step.halvings}
        found |= {"micro_batches": len(micro_batches), "limit_gib": trainer.step.budget.limit / GIB}
        if micro_batches and trainer.step.budget.memory is not None:
            tokens, checkpointed, peaks = zip(*micro_batches, strict=True)
            found["predicted_gib"] = max(peaks) / GIB
            found["checkpointed"] = sorted(checkpointed)
            found["largest_tokens"] = max(tokens)
    return found | ({"profile": describe_profile(clock)} if profile else {})


def train_options(case: dict[str, Any], device: str, folder: str, batch: int, total: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "max_steps": total,
        "max_length": LONGEST,
        "learning_rate": 1e-5,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "bf16": case.get("dtype", "bfloat16") == "bfloat16",
        "use_cpu": device == "cpu",
        "train_sampling_strategy": "sequential",  # the timed rows are then known
        **case.get("options", {}),
    }


def keep_losses(trainer: Any) -> dict[int, torch.Tensor]:
    """The loss of every step, without waiting for the device; it fills as the trainer trains."""
    losses: dict[int, torch.Tensor] = {}
    take_step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = take_step(*args, **kwargs)
        step = trainer.state.global_step
        losses[step] = losses[step] + loss if step in losses else loss  # several micro-batches
        return loss

    trainer.training_step = training_step
    return losses


def keep_micro_batches(trainer: Any, first: int, last: int) -> list[tuple[int, tuple[int, int], float]]:
    """Tokens, how layers are checkpointed, and the predicted peak of the timed micro-batches; it fills as the trainer
    trains."""
    kept: list[tuple[int, tuple[int, int], float]] = []
    budget, fused = trainer.step.budget, trainer.forward_plan.fused

    def checkpointed(batch: Any) -> tuple[int, int]:
        layers = budget.checkpointed(batch)
        if first <= trainer.state.global_step < last:
            kept.append((batch.input_ids.numel(), layers, 0.0 if budget.memory is None else budget.peak(batch)))
        return layers

    if fused is not None:
        fused.checkpointed = checkpointed
    return kept


def loaded_gib(device: str) -> float:
    return torch.cuda.memory_allocated() / GIB if device == "cuda" else 0.0


def local_parts(case: dict[str, Any], device: str) -> tuple[dict[str, Any], float]:
    """Arguments of a trainer's constructor, and the memory that the model takes."""
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    away = {"stream_layers", "fsdp"} & case.get("options", {}).keys()  # made in the CPU's memory, where it is loaded
    model = make_model(case["shape"], "cpu" if away else device, dtype)
    adapter, layers = case.get("adapter", ""), SHAPES[case["shape"]]["num_hidden_layers"]
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        layers_to_transform=[*range(layers // 2, layers)] if "upper half" in adapter else None,
        alora_invocation_tokens=[INVOCATION] if "answer-only" in adapter else None,
    )
    tokenizer = make_tokenizer(SHAPES[case["shape"]]["vocab_size"])
    return {"model": model, "peft_config": lora, "processing_class": tokenizer}, loaded_gib(device)


def ours(case: dict[str, Any], device: str, config: dict[str, Any], rows: list[dict]) -> tuple[Any, float]:
    from datasets import Dataset

    from dpo_peft import DPOConfig, DPOTrainer

    asked = take_attention(case["attention"]) if "attention" in case else ""
    parts, loaded = local_parts(case, device)
    loss = {"loss_type": "multi_negative"} if case["work"] == "multi" else {}
    args = DPOConfig(**{**loss, **config})
    trainer = DPOTrainer(args=args, train_dataset=Dataset.from_list(rows), **parts)
    if asked and trainer.forward_plan.backend != asked:  # a kernel that the probe refused
        raise RuntimeError(str(trainer.forward_plan))
    return trainer, loaded


def take_attention(name: str) -> str:
    """Puts a candidate of attention.py first, under a name that no other rule knows, and returns that."""
    from attention import CANDIDATES

    from dpo_peft.forward.attention import BACKENDS

    chosen = f"{name}, by name"
    BACKENDS.insert(0, replace(CANDIDATES[name], name=chosen, supports=lambda *_: True))
    return chosen


def trl(case: dict[str, Any], device: str, config: dict[str, Any], rows: list[dict]) -> tuple[Any, float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class IdsTrainer(DPOTrainer):
        """Takes rows that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    parts, loaded = local_parts(case, device)
    args = DPOConfig(**config, use_liger_kernel=case["engine"] == "trl+liger")
    return IdsTrainer(args=args, train_dataset=Dataset.from_list(rows), **parts), loaded


def unsloth(case: dict[str, Any], device: str, config: dict[str, Any], rows: list[dict]) -> tuple[Any, float]:
    """It loads from disk only, and quantises there itself. `speed.py` has imported it before anything else."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from unsloth import FastLanguageModel

    folder = Path(tempfile.gettempdir(), f"speed_{case['shape']}")
    if not (folder / "config.json").exists():
        save_random(case["shape"], device, folder)
    most = max(itertools.chain.from_iterable(lengths(case["work"], 64))) * 2
    limits = {"max_seq_length": max(8192, most)}
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True, fix_tokenizer=False, **limits
    )
    loaded = loaded_gib(device)
    checkpointing = config.pop("gradient_checkpointing", "unsloth")
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
        random_state=0,
        **limits,
    )
    args = DPOConfig(**config, dataset_num_proc=1)
    text = Dataset.from_list(as_text(rows))
    return DPOTrainer(model=model, ref_model=None, args=args, train_dataset=text, processing_class=tokenizer), loaded


def save_random(shape: str, device: str, folder: Path) -> None:
    """A checkpoint of random bfloat16 weights and its tokenizer."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(make_config(shape), dtype=torch.bfloat16)
    make_tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
    model.save_pretrained(folder)
