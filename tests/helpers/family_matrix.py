"""Tries one tiny family as a user would: by name from disk, in 4 bits, for four steps; against TRL; and served.

python tests/helpers/family_matrix.py [NAME …]     # tries families, and writes their rows of docs/models.md anew
"""

import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl
import zoo
from datasets import Dataset
from paths import REPO
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from trainer_helpers import IdsTrainer, options, step_logs
from transformers import PreTrainedTokenizerFast

from dpo_peft import DPOConfig, DPOTrainer, OptionError

STEPS = 4
PAGE = REPO / "docs" / "models.md"
OPEN, CLOSE = "<!-- families: begin -->", "<!-- families: end -->"
HEAD = "| family | class | prompts | layers | 4 bits | notes |\n|---|---|---|---|---:|---|"
# TRL 1.16's own auxiliary loss raises an error on these.
NO_AUXILIARY_LOSS_IN_TRL = "granitemoe granitemoeshared granitemoehybrid granite4_dense phimoe deepseek_v4".split()
# TRL 1.16's own head multiplies the first one's logits by `logit_scale` of its text, which the model doesn't; leaves
# out a factor of the second one's; and fails on the others, whose declared backbone is the model itself.
NOT_IN_TRL = ("cohere2_vision-vl", "inkling_text", "llama4_text", "llama4-vl")


class Tried(NamedTuple):
    """What became of a family."""

    class_name: str
    refused: str = ""  # the reason, where it does not train
    start: float = 0.0  # loss of the first step, without the routers'
    shared: bool = False
    fused: bool = False
    why: str = ""  # it is not shared, or not fused
    four_bits: float = 0.0  # share of the weights but embeddings and head
    dead: tuple[str, ...] = ()  # LoRA matrices that are zero after the run
    off_trl: float = 0.0  # largest difference of a step's loss
    off_served: float = 0.0  # of a logit between the trained model and the adapter loaded by PEFT; of the largest one
    effect: float = 0.0  # of that adapter on the logits


def words() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of as many words as there are ids of text."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, zoo.PICTURE)}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def pairs(number: int = 4 * STEPS) -> Dataset:
    """Pairs of random ids; prompts and completions cross the windows."""
    draw = random.Random(0)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(5, zoo.PICTURE) for _ in range(draw.randint(shortest, longest))]

    return Dataset.from_list(
        [{"prompt_ids": ids(3, 40), "chosen_ids": ids(1, 25), "rejected_ids": ids(1, 25)} for _ in range(number)]
    )


def run_options(folder: Path, **changed: Any) -> dict[str, Any]:
    """The defaults but for a higher learning rate, float32 and short logs."""
    steps = {"learning_rate": 5e-3, "adam_epsilon": 1e-4, "lr_scheduler_type": "constant", "max_steps": STEPS}
    return options(folder, **{**steps, "gradient_checkpointing": True, "seed": 7, **changed})


def try_family(name: str, folder: Path) -> Tried:
    """Saves a family's tiny model and does with it what the table of docs/models.md reports."""
    model = zoo.build(name)
    class_name, base, tokenizer = type(model).__name__, folder / "base", words()
    model.save_pretrained(base)
    del model
    try:
        trainer = DPOTrainer(
            str(base),
            args=DPOConfig(**run_options(folder / "run")),
            train_dataset=pairs(),
            processing_class=tokenizer,
        )
    except OptionError as error:
        return Tried(class_name, refused=str(error))
    share = four_bit_share(trainer.model)
    trainer.train()
    plan = trainer.forward_plan
    first = step_logs(trainer)[0]
    start = first["loss"] - trainer.router_aux_loss_coef * first.get("aux_loss", 0.0)
    dead = tuple(sorted({star(n) for n, p in trainer.model.named_parameters() if "lora_B" in n and not p.any()}))
    why = plan.unfused if plan.shared else plan.reason
    found = Tried(class_name, "", start, plan.shared, plan.fused is not None, why, share, dead)
    return found._replace(**exactly(name, class_name, base, tokenizer, folder))


def exactly(name: str, class_name: str, base: Path, tokenizer: Any, folder: Path) -> dict[str, float]:
    """Trains in float32 here and with TRL from the same adapter, then loads the adapter with PEFT alone."""
    whole = {"dtype": "float32"}
    changed = {"router_aux_loss_coef": 0.0} if name in NO_AUXILIARY_LOSS_IN_TRL else {}
    args = DPOConfig(**run_options(folder / "exact", quantize_base=False, model_init_kwargs=whole, **changed))
    ours = DPOTrainer(str(base), args=args, train_dataset=pairs(), processing_class=tokenizer)
    ours.model.save_pretrained(folder / "start")
    ours.train()
    served: Any = getattr(transformers, class_name)
    off_trl = 0.0
    if name not in NOT_IN_TRL:
        plain = served.from_pretrained(base, dtype=torch.float32)
        start = PeftModel.from_pretrained(plain, folder / "start", is_trainable=True)
        args = trl.DPOConfig(**run_options(folder / "trl", **changed))
        theirs = IdsTrainer(start, args=args, train_dataset=pairs(), processing_class=tokenizer)
        theirs.train()
        losses = zip(step_logs(ours), step_logs(theirs), strict=True)
        off_trl = max(abs(a["loss"] - b["loss"]) for a, b in losses)
    ours.save_model(str(folder / "adapter"))
    plain = served.from_pretrained(base, dtype=torch.float32).eval()
    without = logits(plain)
    with_adapter = logits(PeftModel.from_pretrained(plain, folder / "adapter").eval())
    trained = logits(ours.model.eval())
    return {
        "off_trl": off_trl,
        "off_served": float((with_adapter - trained).abs().max() / trained.abs().max()),
        "effect": float((with_adapter - without).abs().max()),
    }


def logits(model: nn.Module) -> Tensor:
    """Returns a model's logits of 40 random tokens, (1, 40, V)."""
    ids = torch.randint(5, zoo.PICTURE, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def four_bit_share(model: Any) -> float:
    """Returns which share of the base's matrices but embeddings and head is in 4 bits."""
    base = model.get_base_model()
    outside = {id(part.weight) for part in (base.get_input_embeddings(), base.get_output_embeddings())}
    quantized = whole = 0
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        if "lora_" in name or id(parameter) in outside or (state is None and parameter.ndim < 2):
            continue
        whole += size
        quantized += size if state is not None else 0
    return quantized / whole


def star(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def row(name: str, tried: Tried) -> str:
    """Returns a family's row of docs/models.md."""
    shown = f"{name.removesuffix('-vl')} (composite)" if name.endswith("-vl") else name
    if tried.refused:
        return f"| {shown} | {tried.class_name} | refused | | | {tried.refused.splitlines()[0][:200]} |"
    prompts, layers = "shared" if tried.shared else "rows", "fused" if tried.fused else "own"
    return f"| {shown} | {tried.class_name} | {prompts} | {layers} | {tried.four_bits:.0%} | {tried.why} |"


def written() -> dict[str, str]:
    """Returns the rows of docs/models.md by the family that they show."""
    table = PAGE.read_text("utf-8").partition(OPEN)[2].partition(CLOSE)[0] if PAGE.exists() else ""
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| family ")]
    return {re.sub(r" \(composite\)$", "-vl", line.split("|")[1].strip()): line for line in rows}


def main(names: list[str]) -> None:
    rows = written()
    for name in names or zoo.ALL:
        with tempfile.TemporaryDirectory() as folder:
            try:
                tried = try_family(name, Path(folder))
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
        rows[name] = row(name, tried)
        print(name, tried, flush=True)
    table = "\n".join([HEAD, *(rows[name] for name in zoo.ALL if name in rows)])
    old = PAGE.read_text("utf-8") if PAGE.exists() else f"{OPEN}\n{CLOSE}\n"
    PAGE.write_text(re.sub(f"{OPEN}.*{CLOSE}", lambda _: f"{OPEN}\n{table}\n{CLOSE}", old, flags=re.S), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
