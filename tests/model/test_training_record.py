"""A record of the training that is damaged, or made by somebody else, is refused in one sentence where it is read."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from dpo_peft.errors import OptionError, ReferenceMismatchError
from dpo_peft.model.adapters import named_place
from dpo_peft.model.training_record import RECORD, TrainedWith, read_training

GOOD = TrainedWith(
    beta=0.1,
    max_length=64,
    quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    base_class="LlamaForCausalLM",
)


def read(record: Any) -> TrainedWith | None:
    return read_training(LoraConfig(auto_mapping={RECORD: record}))


@pytest.mark.attack("hostile adapter")
@pytest.mark.parametrize(
    "changed",
    [
        *({"beta": value} for value in ("0.1", True, -1, 0, math.nan, [0.1])),
        *({"loss_type": value} for value in ("sigmoid", [], [1], None)),
        *({"precision": value} for value in ("fp8", None, 16)),
        *(
            {"quantization": value}
            for value in ([1], {"load_in_4bit": "yes"}, {"bnb_4bit_compute_dtype": "os.system"})
        ),
        *({"max_length": value} for value in ("64", 64.5)),
        *({"base_class": value} for value in ("os", "pipeline", 7)),
        {"reward": "gold"},
        {"truncation_mode": ["keep_start"]},
        {"dtype": "int8"},
        {"discount_gamma": None},
        {"vocabulary": "all"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind(changed: dict[str, Any]) -> None:
    with pytest.raises(ReferenceMismatchError, match=r"record of the training .* is damaged: [^\n]*Restore it"):
        read({**asdict(GOOD), **changed})


@pytest.mark.attack("hostile adapter")
@pytest.mark.parametrize("record", [3, "x", [1], {}, {"beta": 0.1}], ids=str)
def test_what_is_no_record(record: Any) -> None:
    with pytest.raises(ReferenceMismatchError, match="damaged"):
        read(record)


def test_a_good_record_passes() -> None:
    assert read(asdict(GOOD)) == GOOD and read({**asdict(GOOD), "beta": None, "unknown": 1}).beta is None
    older = {name: value for name, value in asdict(GOOD).items() if name not in ("base_class", "vocabulary")}
    assert read(older).base_class is None and read(None) is None


@pytest.mark.attack("hostile adapter")
@pytest.mark.parametrize(
    "name", ["/etc", "../base", "./base", "~/base", "a/b/c", "C:\\base", "\\\\there\\share", "a/.."]
)
def test_an_adapter_of_the_hub_names_no_folder_here(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="of the Hub names a folder as its base .*give the base yourself"):
        named_place("some/adapter", "base", name)
    assert named_place(str(tmp_path), "base", name) == name  # a run of this machine may well


@pytest.mark.parametrize("name", ["gpt2", "some/base-1.0_x", None])
def test_an_adapter_of_the_hub_names_its_base(name: str | None) -> None:
    assert named_place("some/adapter", "base", name) == (name or "")
