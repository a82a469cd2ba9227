"""How fast pairs with pictures train, beside TRL's trainer: seconds per step, encodings of pictures, peak memory.

    python benchmarks/images.py                                    # on the CPU; writes results/images_cpu.json
    python benchmarks/images.py --shape 8b --device cuda           # prints them, for gpu_queue.py

Both trainers get the same model (the shape of Qwen2.5-VL with random weights, its linear layers in NF4), the same
pairs (a picture of 1,000 tokens, a question of 50, answers of 150) and the same adapter, in turn, `--turns` times;
then the same with pictures of unequal sizes. The losses of their steps are compared. The calls of the vision tower are
counted: how often a picture is encoded for each step.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in recipes/quickstart.py, before torch is imported

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the checkout's package, where it isn't installed
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import bitsandbytes as bnb
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from gpu_queue import write
from peft import LoraConfig
from PIL import Image
from speed import describe
from speed_models import make_tokenizer, same_start, synchronize
from speed_peers import Clock, keep_losses
from torch import nn
from transformers import PrinterCallback, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, set_seed
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vision_processors import TEMPLATE, NoVideos

HERE = Path(__file__).resolve().parent
# The language model's and the tower's sizes; of "8b" those of Qwen2.5-VL-7B. The small one keeps their proportion: the
# tower has about a tenth of the parameters and sees four patches for each token.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8b": (
        dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, vocab_size=152064
        )
        | dict(num_key_value_heads=4),
        dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31]),
    ),
    "small": (
        dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, vocab_size=8000)
        | dict(num_attention_heads=4, num_key_value_heads=2),
        dict(depth=4, hidden_size=96, intermediate_size=256, num_heads=4, fullatt_block_indexes=[3]),
    ),
    "tiny": (
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=1000)
        | dict(num_attention_heads=2, num_key_value_heads=2),
        dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[1]),
    ),
}
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
SIDE = 28  # pixels of a token
GRIDS = [(25, 40), (20, 25), (25, 60), (40, 25)]  # tokens of pictures: 1,000 in the mean
QUESTION, ANSWERS = 50, (150, 150)
SAMPLES = {"8b": 8, "small": 2, "tiny": 2}  # pairs of a step


def make_processor(vocab: int) -> Qwen2_5_VLProcessor:
    tokenizer = make_tokenizer(vocab - len(SPECIAL))
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL)})
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": SIDE**2, "longest_edge": 4000 * SIDE**2})
    template = TEMPLATE % "<|vision_start|><|image_pad|><|vision_end|>"
    template = template.replace("\n", " ").replace("<|im_end|>", " <|im_end|>")  # words are split at blanks
    return Qwen2_5_VLProcessor(pictures, tokenizer, NoVideos(), chat_template=template)


def make_model(shape: str, processor: Any, device: str, dtype: torch.dtype) -> Any:
    """Returns a random model whose linear layers but the head are in NF4, tower and projector too, as bitsandbytes
    loads one."""
    text, vision = SHAPES[shape]
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL[:4]))
    third = text["hidden_size"] // text["num_attention_heads"] // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * third, third, third]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "max_position_embeddings": 32768, "use_sliding_window": False},
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "window_size": 112},
        **dict(zip(names, ids, strict=True)),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            model.set_submodule(name, _four_bit(linear, device))
    model.is_loaded_in_4bit = True
    model.config._name_or_path = model.name_or_path = "random"
    return model


def _four_bit(linear: nn.Linear, device: str) -> bnb.nn.Linear4bit:
    bias = linear.bias is not None
    options = dict(compute_dtype=linear.weight.dtype, quant_type="nf4", compress_statistics=True)
    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=bias, device="meta", **options)
    weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new)
    new.weight = weight._quantize(torch.device(device))
    new.bias = linear.bias
    return new


def make_rows(number: int, same_size: bool) -> Dataset:
    """Returns conversational pairs with pictures of random pixels, 1,000 tokens each or in the mean."""
    draw = random.Random(0)

    def said(role: str, words: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(f"t{draw.randrange(4, 900)}" for _ in range(words))}]

    rows = []
    for i in range(number):
        height, width = GRIDS[0 if same_size else i % len(GRIDS)]
        pixels = np.random.default_rng(i).integers(0, 256, (height * SIDE, width * SIDE, 3), dtype=np.uint8)
        answers = {name: said("assistant", n) for name, n in zip(("chosen", "rejected"), ANSWERS, strict=True)}
        rows.append({"prompt": said("user", QUESTION), **answers, "images": [Image.fromarray(pixels)]})
    return Dataset.from_list(rows)


def count_encodings(trainer: Any, after: int) -> list[int]:
    """Returns a list that gets the number of pictures of each call of the tower after so many steps: before the first
    one, ours compares its layout with the model's own rows."""
    calls: list[int] = []
    tower = next(module for name, module in trainer.model.named_modules() if name.endswith("visual"))

    def count(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if trainer.state.global_step >= after:
            calls.append(len(given["grid_thw"] if "grid_thw" in given else args[1]))

    tower.register_forward_pre_hook(count, with_kwargs=True)
    return calls


def run(engine: str, args: argparse.Namespace, same_size: bool) -> dict[str, Any]:
    """Returns the figures of a short training."""
    module: Any = __import__("dpo_peft" if engine == "ours" else "trl")
    set_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    processor = make_processor(SHAPES[args.shape][0]["vocab_size"])
    model = make_model(args.shape, processor, args.device, dtype)
    samples, total = args.samples or SAMPLES[args.shape], args.warm + args.steps
    clock = Clock(args.warm, args.steps, args.device, profile=False)
    own: dict[str, Any] = {"max_length": None}
    if engine == "ours":
        own = {"max_length": 8192, **({"max_tokens_per_microbatch": "auto"} if args.device == "cuda" else {})}
    with tempfile.TemporaryDirectory() as folder:
        config = module.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=samples,
            max_steps=total,
            optim="sgd",  # Adam turns the rounding noise of tiny gradients into whole steps
            learning_rate=0.05,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=dtype != torch.float32,
            use_cpu=args.device == "cpu",
            train_sampling_strategy="sequential",
            **own,
        )
        lora = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=".*visual.*", task_type="CAUSAL_LM"
        )
        rows = make_rows(samples * total, same_size)
        given: Any = dict(train_dataset=rows, processing_class=processor, peft_config=lora)
        trainer = module.DPOTrainer(model, args=config, **given)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        same_start(trainer.model, torch.float32 if dtype == torch.float32 else None)
        losses, calls = keep_losses(trainer), count_encodings(trainer, args.warm)
        trainer.train()
    synchronize(args.device)
    return {
        **clock.figures,
        "samples": samples,
        "encodings_per_picture_and_step": sum(calls) / (samples * args.steps),
        "losses": [float(loss) for loss in losses.values()],
    }


def in_turn(args: argparse.Namespace, same_size: bool) -> dict[str, Any]:
    """Returns both trainers' medians, and the ratios within the turns."""
    turns: list[dict[str, dict[str, Any]]] = []
    for _ in range(args.turns):
        turns.append({})
        for engine in ("ours", "trl"):
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            turns[-1][engine] = run(engine, args, same_size)
    names = [name for name in ("seconds_per_step", "cpu_seconds_per_step", "peak_gib") if name in turns[0]["ours"]]
    ratios = {name: [turn["trl"][name] / turn["ours"][name] for turn in turns] for name in names}
    apart = [abs(a - b) for t in turns for a, b in zip(t["ours"]["losses"], t["trl"]["losses"], strict=True)]
    losses = turns[0]["ours"]["losses"]
    return {
        "pictures": "1,000 tokens each" if same_size else "500 to 1,500 tokens, 1,000 in the mean",
        "medians": {e: {n: statistics.median(t[e][n] for t in turns) for n in names} for e in ("ours", "trl")},
        "trl_by_ours": {name: dict(median=statistics.median(found), all=found) for name, found in ratios.items()},
        "encodings_per_picture_and_step": {e: turns[0][e]["encodings_per_picture_and_step"] for e in ("ours", "trl")},
        "losses_apart": max(apart),
        "losses_move_by": max(losses) - min(losses),
        "turns": turns,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--samples", type=int, help="pairs of a step")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--commit", help="of this checkout, where there is no git")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    disable_progress_bars()
    fixed = {"shape": args.shape, "question": QUESTION, "answers": ANSWERS}
    result: dict[str, Any] = {**describe(args.device, args.commit), **fixed, "results": []}
    for same_size in (True, False):
        found = in_turn(args, same_size)
        result["results"].append(found)
        if args.device == "cpu":
            write(result, args.out or HERE / "results" / "images_cpu.json")
    faster = {
        f"times TRL, {one['pictures']}": one["trl_by_ours"]["seconds_per_step"]["median"] for one in result["results"]
    }
    print("RESULT " + json.dumps({**fixed, **faster, "found": result["results"]}), flush=True)


if __name__ == "__main__":
    main()
