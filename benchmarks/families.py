"""How fast families other than Llama train beside TRL: a Gemma 3, a Qwen3.5 and a Qwen3-MoE of random weights.

    python benchmarks/families.py                                    # small ones, on the CPU
    python benchmarks/families.py --device cuda --only gemma3        # those of 8B, 9B and 30B-A3B, in NF4

Each model is saved and loaded by name by both trainers, which take turns on the same rows with the same LoRA; long
prompts (`longprompt` of speed_models.py, on the CPU a fourth as long). On the CPU in float32 or bfloat16; on a GPU in
NF4 with peak memory, where TRL's experts stay in bfloat16. Losses of the steps are compared.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in speed.py, before torch is imported

import torch
from datasets import Dataset
from gpu_queue import write
from peft import LoraConfig
from speed import clean, compare, describe
from speed_models import lengths, make_rows, make_tokenizer, same_start
from speed_peers import Clock, keep_losses, train_options
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = {"cpu": 8000, "cuda": 151936}
ATTENTION = "q_proj k_proj v_proj o_proj".split()
MLP = "gate_proj up_proj down_proj".split()
STATES = "in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj".split()
NAMES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
# Model type, what LoRA is on, shape on the CPU and on a GPU, and the rest.
FAMILIES: dict[str, tuple[str, list[str], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", ATTENTION + MLP, (256, 768, 6, 4, 2, 64), (4096, 14336, 32, 16, 8, 256), {}),
    "qwen3_5": ("qwen3_5_text", ATTENTION + MLP + STATES, (256, 704, 4, 4, 2, 64), (4096, 12288, 32, 16, 4, 256), {}),
    "qwen3_moe": ("qwen3_moe", ATTENTION, (256, 704, 4, 4, 2, 64), (2048, 6144, 48, 32, 4, 128), {}),
}
SMALLER = {
    "gemma3": {"sliding_window": 256},
    "qwen3_5": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
}  # fmt: skip
LARGER = {"qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}}


@contextmanager
def saved(name: str, args: argparse.Namespace) -> Iterator[str]:
    """A folder with the model and its tokenizer."""
    model_type, _, small, large, rest = FAMILIES[name]
    on_cpu = args.device == "cpu"
    shape = dict(zip(NAMES, small if on_cpu else large, strict=True)) | rest
    shape |= {"num_hidden_layers": args.layers} if args.layers else {}
    more = (SMALLER if on_cpu else LARGER).get(name, {})
    ids = {"vocab_size": VOCAB[args.device], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = CONFIG_MAPPING[model_type](**shape, **more, **ids)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if on_cpu else torch.bfloat16)
        model.save_pretrained(folder)
        make_tokenizer(VOCAB[args.device]).save_pretrained(folder)
        yield folder


def trainer_of(engine: str, folder: str, config: dict[str, Any], args: argparse.Namespace, **more: Any) -> Any:
    dtype = args.dtype if args.device == "cpu" else "bfloat16"
    if engine == "ours":
        from dpo_peft import DPOConfig, DPOTrainer

        whole = {} if args.device == "cuda" else {"quantize_base": False, "model_init_kwargs": {"dtype": dtype}}
        return DPOTrainer(folder, args=DPOConfig(**config, **whole), **more)
    from trl import DPOConfig, DPOTrainer

    class IdsTrainer(DPOTrainer):
        """Takes rows that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    loading: dict[str, Any] = {"dtype": dtype}
    if args.device == "cuda":
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return IdsTrainer(folder, args=DPOConfig(**config, model_init_kwargs=loading), **more)


def turn(engine: str, name: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a few steps and returns the figures."""
    total = args.warm + args.steps
    shorter = 4 if args.device == "cpu" else 1
    sizes = [tuple(n // shorter for n in row) for row in lengths("longprompt", args.samples * total)]
    case = {"dtype": args.dtype, "options": {"optim": "sgd", "learning_rate": 0.05}}
    clock = Clock(args.warm, args.steps, args.device, profile=False)
    with tempfile.TemporaryDirectory() as out:
        set_seed(0)
        config = train_options(case, args.device, out, args.samples, total)
        trainer = trainer_of(
            engine,
            folder,
            config,
            args,
            train_dataset=Dataset.from_list(make_rows(sizes, VOCAB[args.device])),
            processing_class=make_tokenizer(VOCAB[args.device]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=FAMILIES[name][1], task_type="CAUSAL_LM"),
        )
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        same_start(trainer.model, torch.float32)
        losses = keep_losses(trainer)
        trainer.train()
    plan = {"plan": str(trainer.forward_plan)} if engine == "ours" else {}
    seconds, timed = clock.figures["seconds_per_step"], sizes[args.samples * args.warm :]
    found = {
        **clock.figures,
        **plan,
        "samples_per_s": args.samples / seconds,
        "tokens_per_s": sum(map(sum, timed)) / args.steps / seconds,
        "bound_flops_per_step": 0.0,
        "losses": [float(loss) for _, loss in sorted(losses.items())],
    }
    del trainer
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--layers", type=int, help="fewer, where the disk holds no more")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""))
    for option, default in {"--samples": 2, "--warm": 1, "--steps": 3, "--turns": 3}.items():
        parser.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    result = {**describe(args.device, args.commit), "results": []}
    for name in args.only:
        turns: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        with saved(name, args) as folder:
            for _ in range(args.turns):
                for engine, found in turns.items():
                    clean(args.device)
                    found.append(turn(engine, name, folder, args))
        compared = compare(turns)
        found = {"dtype": args.dtype, "samples": args.samples, **compared}
        print("RESULT " + json.dumps({"family": name, **found}), flush=True)
        result["results"].append({"name": name, **found})
        if args.device == "cpu":
            write(result, Path(__file__).parent / "results" / "families_cpu.json")


if __name__ == "__main__":
    main()
