"""Which models fit on which GPU: writes docs/cards.md by the planner, from the shapes in dev/cards.yaml.

    python dev/cards.py [MODEL ...]

With names it prints their rows alone. A model whose weights are not, within 1 %, those that are published is an error.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_peft.planning import plan

REPO = Path(__file__).resolve().parents[1]
MODELS: dict[str, dict[str, Any]] = yaml.safe_load((REPO / "dev" / "cards.yaml").read_text("utf-8"))
PAGE = REPO / "docs" / "cards.md"
GPUS = ("RTX3060", "RTX4080", "RTX4090", "RTX5090", "L40S", "A100-80GB", "H100", "H200")
SIZE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
HEAD = f"""# Models and cards

Which model trains on which GPU, as `dpo-peft plan` predicts it: NF4, LoRA of rank 16 on all linear layers,
`adamw_torch_fused`, bfloat16, optimizer steps of 8 pairs of 200 + 2 x 300 tokens, `max_tokens_per_microbatch: auto`.
Each cell is the **longest row** (prompt + completion, in tokens) that fits when all layers are checkpointed; the
model's own limit may be lower. *no* means that such a step does not fit: fewer or shorter rows may, `adamw_8bit` and a
lower rank save memory. Predictions were compared with measurements of two shapes on an H100 ([planning](planning.md)),
within 15 %; other GPUs and models were not measured. `dpo-peft plan --model_name_or_path MODEL --gpu GPU` says it for
your options, with what the memory goes to.

`dev/cards.py` writes this page. The shapes were typed in from the models' configs, and each is checked by the
published number of weights.

**Time.** Llama's 8B shape was measured on one H100: 12.6 pairs of 800 tokens a second ([speed](performance.md)), so
10,000 pairs take 13 minutes. A dense model of twice the weights takes about twice as long.

| model | weights, billions | {" | ".join(GPUS)} |
|---|---:|{"---:|" * len(GPUS)}
"""


def config_of(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of an entry of cards.yaml."""
    *size, vocabulary = model["size"]
    more = {name: value for name, value in model.items() if name not in ("weights", "type", "size", "tied")}
    return {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model["type"]]],
        **CONFIG_MAPPING[model["type"]](**dict(zip(SIZE, size, strict=True))).to_dict(),
        **dict(zip(SIZE, size, strict=True)),
        "model_type": model["type"],
        "vocab_size": vocabulary,
        "tie_word_embeddings": model.get("tied", False),
        "pad_token_id": None,
        **more,
    }


def row(name: str) -> str:
    """Returns a line of the table.

    Raises:
        SystemExit: the number of weights is not the published one.
    """
    model, cells = MODELS[name], []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of(model)), "utf-8")
        for gpu in GPUS:
            figures = plan(
                model_name_or_path=folder,
                gpu=gpu,
                max_tokens_per_microbatch="auto",
                per_device_train_batch_size=8,
                prompt_tokens=200,
                answer_tokens=300,
            ).figures
            longest = figures["fits"][-1]["longest_row"]
            cells.append(f"{longest:,}" if figures["step"]["fits"] else "no")
    counted = figures["weights"] / 1e9
    if abs(counted / model["weights"] - 1) > 0.01:
        raise SystemExit(f"{name}: {counted:.3f} billion weights are counted, {model['weights']} published.")
    return f"| {name} | {counted:.2f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    if names := sys.argv[1:]:
        print("\n".join(map(row, names)))
    else:
        PAGE.write_text(HEAD + "".join(f"{row(name)}\n" for name in MODELS), "utf-8")
