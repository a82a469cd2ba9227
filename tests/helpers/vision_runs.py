"""Short runs of tiny models of text and images, saved, and what people serve of them: plain transformers and PEFT."""

from pathlib import Path
from typing import Any

import torch
import vision_models as vm
import vision_processors as vp
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from trainer_helpers import options
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpo_peft import DPOConfig, DPOTrainer


def train(folder: Path, name: str, rows: Dataset, evaluated: Dataset | None = None, **changed: Any) -> DPOTrainer:
    """A tiny model of a family on pairs with images, for a few large steps; base and adapter are saved."""
    base = folder / "base"
    vm.build(name).save_pretrained(base)
    vp.build_processor(name).save_pretrained(base)
    chosen = {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4, "quantize_base": False}
    args = DPOConfig(**options(folder / "run", **{**chosen, **changed}), model_init_kwargs={"dtype": "float32"})
    trainer = DPOTrainer(str(base), args=args, train_dataset=rows, eval_dataset=evaluated)
    trainer.train()
    trainer.save_model()
    return trainer


class Served:
    """What people serve: the base in its class, the adapter by PEFT, and the processor that was saved beside it."""

    def __init__(self, folder: Path, adapter: bool = True):
        self.processor = AutoProcessor.from_pretrained(folder)
        if not adapter:
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
            return
        base = AutoModelForImageTextToText.from_pretrained(folder.parent / "base", dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, folder).eval()

    def inputs(self, row: Any, completion: str = "") -> Any:
        """Of the model, for a row's prompt and images, laid out by the processor itself, and the text behind them."""
        images = [image if isinstance(image, Image.Image) else Image.open(image["path"]) for image in row["images"]]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": row["prompt"][0]["content"]}]
        turns = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        return self.processor(images=[images] if images else None, text=[prompt + completion], return_tensors="pt")

    def logp(self, row: Any, completion: str | list[int]) -> float:
        """Of one completion, summed in float64; a text gets its end."""
        given = self.inputs(row)
        first = given["input_ids"].shape[1]
        if isinstance(completion, str):
            given = self.inputs(row, completion + "<|im_end|>\n")
        else:
            for name, value in {"input_ids": completion, "attention_mask": 1, "token_type_ids": 0}.items():
                if name in given:
                    more = torch.zeros(1, len(completion), dtype=torch.int64) + torch.tensor(value)
                    given[name] = torch.cat([given[name], more], 1)
        with torch.no_grad():
            logps = self.model(**given).logits[0].double().log_softmax(-1)
        ids = given["input_ids"][0]
        return float(sum(logps[at - 1, ids[at]] for at in range(first, len(ids))))

    def reward(self, row: Any, completion: str | list[int], beta: float = 0.1) -> float:
        policy = self.logp(row, completion)
        with self.model.disable_adapter():
            return beta * (policy - self.logp(row, completion))
