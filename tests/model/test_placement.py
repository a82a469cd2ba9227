"""Layers that are streamed from the CPU's memory train as layers that are there: bit for bit, whatever the run is."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_models as vm
import vision_processors as vp
import zoo
from family_matrix import pairs as long_pairs
from family_matrix import words
from objective_rows import NEEDED, rows_for
from peft import PeftModel, get_peft_model
from reference_helpers import perturb
from run_figures import TIMED
from torch import Tensor
from trainer_helpers import StopAt, adapter_weights, history, id_pairs, lora, options, ours
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from dpo_peft import DPOConfig, DPOTrainer, OptionError, distributed
from dpo_peft.forward.modules import decoder_layers, unwrap
from dpo_peft.model import placement
from dpo_peft.model.loading import storage_report
from dpo_peft.model.placement import Streamed, placement_of
from dpo_peft.reference.adapter_off import is_identity

LAYERS = 3
ALL = 0
JUNK = 61  # as a byte of floats: small numbers, so that what is computed from them is finite


class Poisoned(Streamed):
    """Bytes whose place is filled with junk when they leave: what reads them then computes other numbers."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.close()

    def close(self) -> None:
        self._arrived = None
        self.flat.untyped_storage().resize_(self.home.nbytes)
        self.flat.fill_(JUNK)


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Callable[[str], str]:
    """`bases(name)`: the folder of a tiny model."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> str:
        if not (root / name).exists():
            if name in ("llama", "tied"):
                model = tiny_llama(num_hidden_layers=LAYERS, tie_word_embeddings=name == "tied")
            else:
                model = vm.build(name.removesuffix("-vl")) if name.endswith("-vl") else zoo.build(name)
            model.save_pretrained(root / name)
        return str(root / name)

    return folder


def adapted(folder: str) -> PeftModel:
    """A model whose adapter has been trained before, so that it is a reference other than the base."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora())
    perturb(model, 0.05)
    return model


def trainer_of(folder: Path, base: Any, tokenizer: Any, **changed: Any) -> DPOTrainer:
    """A run of two steps, which is also evaluated."""
    name, loss = Path(base).name if isinstance(base, str) else "", changed.get("loss_type", "sigmoid")
    given: dict[str, Any] = {"learning_rate": 0.05, "optim": "sgd", "max_steps": 2, "lr_scheduler_type": "constant"}
    given |= NEEDED.get(loss, {})
    if isinstance(base, str):
        given["model_init_kwargs"] = {"dtype": "float32"}
    if name.endswith("-vl"):
        changed = {**given, "eval_dataset": vp.picture_pairs(2, seed=1), **changed}
        evaluated = changed.pop("eval_dataset")
        args = DPOConfig(**options(folder, **changed))
        processor = vp.build_processor(name.removesuffix("-vl"))
        return DPOTrainer(
            base, args=args, train_dataset=vp.picture_pairs(8), eval_dataset=evaluated, processing_class=processor
        )
    if name in ("", "llama", "tied"):
        rows, evaluated = rows_for(loss, 8), rows_for(loss, 3, seed=1)
    else:
        rows, evaluated, tokenizer = long_pairs(8), long_pairs(3), words()
    return ours(base, rows, tokenizer, folder, **{**given, "eval_dataset": evaluated, **changed})


def figures(trainer: DPOTrainer) -> dict[str, Any]:
    """All that a run computes: gradients, losses and metrics, weights, evaluation."""
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    evaluated = trainer.evaluate()
    logs = history(trainer)
    assert any(gradient.any() for gradient in kept.steps[-1].values())
    evaluated = {name: figure for name, figure in evaluated.items() if not name.endswith(TIMED)}
    return {"gradients": kept.steps, "logs": logs, "weights": adapter_weights(trainer), "evaluation": evaluated}


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
SINGLE = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
OWN = {"fused_layers": False}
# Base, number of layers, options. Each is 4 bits with double quantization unless it says otherwise.
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "fused": ("llama", ALL, {}),
    "own layers": ("llama", ALL, OWN),
    "own layers, checkpointed": ("llama", ALL, {**OWN, "gradient_checkpointing": True}),
    "own layers, checkpointed reentrant": ("llama", 3, {**OWN, **REENTRANT}),
    "fused, some checkpointed": ("llama", 2, {"gradient_checkpointing": True, "checkpoint_layers": 2}),
    "one layer": ("llama", 1, {"gradient_checkpointing": True}),
    "own layers, two": ("llama", 2, OWN),
    "single quantization": ("llama", 3, {"quantization_config": SINGLE}),
    "32 bits": ("llama", 3, {"quantize_base": False}),
    "bf16": ("llama", 3, {"bf16": True}),
    "bf16, own layers": ("llama", 3, {"bf16": True, **OWN}),
    "16 bits": ("llama", 3, {"bf16": True, "quantize_base": False, "model_init_kwargs": {"dtype": "bfloat16"}}),
    "dropout": ("llama", 3, {"disable_dropout": False, "peft_config": lora(lora_dropout=0.2)}),
    "dropout, own": ("llama", 3, {"disable_dropout": False, "peft_config": lora(lora_dropout=0.2), **OWN}),
    "DoRA": ("llama", 3, {"peft_config": lora(use_dora=True)}),
    "upper layers": ("llama", 3, {"peft_config": lora(target_modules=["q_proj"], layers_to_transform=[2])}),
    "head": ("llama", 3, {"peft_config": lora(modules_to_save=["lm_head"])}),
    "saved in a layer": (
        "llama",
        3,
        {"quantize_base": False, "peft_config": lora(target_modules=["v_proj"], modules_to_save=["q_proj"])},
    ),
    "frozen adapter": ("adapted", 3, {"reference": "initial"}),
    "frozen adapter, own layers": ("adapted", 3, {"reference": "initial", **OWN}),
    "reference follows": ("llama", 3, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "kto": ("llama", 3, {"loss_type": "kto"}),
    "lists": ("llama", 3, {"loss_type": "multi_negative"}),
    "trajectories": ("llama", 3, {"loss_type": "trajectory"}),
    "without a reference": ("llama", 3, {"loss_type": "orpo"}),
    "coupled": ("llama", 3, {"loss_type": "aot", "gradient_accumulation_steps": 2}),
    "packed": ("llama", 3, {"max_tokens_per_microbatch": 60}),
    "tied": ("tied", 3, {}),
    "mixture": ("qwen3_moe", ALL, {"router_aux_loss_coef": 0.01}),
    "mixture, own layers": ("qwen3_moe", ALL, {"router_aux_loss_coef": 0.01, **OWN}),
    "mixture, adapted experts": ("qwen3_moe", ALL, {"lora_experts": True, "router_aux_loss_coef": 0.01}),
    "Gemma 3": ("gemma3_text", ALL, {}),
    "Gemma 4": ("gemma4_text", ALL, {}),
    "states": ("qwen3_5_text", ALL, {"gradient_checkpointing": True}),
    "states, own layers": ("qwen3_5_text", ALL, OWN),
    "images": ("qwen2_5_vl-vl", ALL, {"lora_vision": True, "gradient_checkpointing": True}),
    "images, own layers": ("gemma3-vl", ALL, OWN),
    "stored reference": ("llama", 3, {"precompute_ref_log_probs": True}),
    "cached reference": ("llama", 3, {"cache_ref_log_probs": True, "num_train_epochs": 2, "max_steps": 4}),
    "samples": (
        "llama",
        3,
        {"sample_prompts": 2, "sample_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 1},
    ),
}


def run_of(case: str, folder: Path, bases: Any, tokenizer: Any, streamed: bool) -> DPOTrainer:
    base, number, changed = CASES[case]
    if streamed and not number:
        number = AutoConfig.from_pretrained(bases(base)).get_text_config().num_hidden_layers
    changed = {**changed, **({"stream_layers": number} if streamed else {})}
    given = adapted(bases("llama")) if base == "adapted" else bases(base)
    return trainer_of(folder / ("streamed" if streamed else "resident"), given, tokenizer, **changed)


@pytest.mark.sampled(34, slow=3)
@pytest.mark.parametrize("case", CASES)
def test_a_streamed_run_is_the_resident_one(
    case: str, bases: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    resident = run_of(case, tmp_path, bases, make_tokenizer(), False)
    at_start, expected = is_identity(resident.model, "default"), figures(resident)
    monkeypatch.setattr(placement, "Streamed", Poisoned)
    streamed = run_of(case, tmp_path, bases, make_tokenizer(), True)
    assert str(streamed.forward_plan) == str(resident.forward_plan)
    assert is_identity(streamed.model, "default") == at_start
    assert streamed.reference.base_fingerprint == resident.reference.base_fingerprint
    assert str(storage_report(streamed.model)) == str(storage_report(resident.model))
    assert same(figures(streamed), expected)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """The weights of the run that the controls break, once there are any."""
    return {}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("broken", ["leaving", "forward", "order"])
def test_the_comparison_sees_a_layer_that_is_not_there(
    broken: str, expected: dict[str, Tensor], bases: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Negative control: nothing brings layers in; nothing does before a backward pass; or in the wrong order."""
    if not expected:
        trainer = run_of("fused", tmp_path, bases, make_tokenizer(), False)
        trainer.train()
        expected.update(adapter_weights(trainer))
    monkeypatch.setattr(placement, "Streamed", Poisoned)
    trainer = run_of("fused", tmp_path, bases, make_tokenizer(), True)
    if broken == "forward":
        monkeypatch.setattr("dpo_peft.fused.model.bring_in", lambda module: None)
        trainer.reference.start_checked = True  # it would see it
    elif broken == "leaving":
        monkeypatch.setattr(placement.Leave, "backward", staticmethod(lambda ctx, gradient: (gradient, None, None)))
    else:
        monkeypatch.setattr(placement, "_FORWARD", placement._BACKWARD)
    trainer.train()
    assert not same(adapter_weights(trainer), expected)


# ---- What is there, and how often it comes --------------------------------------------------------------------------


class Watched(Streamed):
    """Counts what is copied, and how many bytes of all layers are there at a time."""

    copies: Counter[int] = Counter()
    there: dict[int, int] = {}
    most = 0

    def prefetch(self) -> None:
        Watched.copies[id(self)] += self._arrived is None
        super().prefetch()
        Watched.there[id(self)] = self.flat.untyped_storage().nbytes()
        Watched.most = max(Watched.most, sum(Watched.there.values()))

    def close(self) -> None:
        super().close()
        Watched.there[id(self)] = self.flat.untyped_storage().nbytes()


class Steps(TrainerCallback):
    """Notes the copies of each step."""

    def __init__(self) -> None:
        self.copies: list[Counter[int]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        Watched.copies = Counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.copies.append(Watched.copies)


# The last layer of a forward pass is the first one of the backward pass, and stays; so does the first layer.
@pytest.mark.parametrize(
    ("changed", "copies"),
    [({}, [1, 2, 2, 1]), ({"fused_layers": False}, [2, 3, 3, 2]), ({"loss_type": "orpo", **OWN}, [1, 2, 2, 1])],
    ids=["lockstep", "one after the other", "no reference"],
)
def test_two_layers_are_there_at_a_time(
    changed: dict[str, Any], copies: list[int], tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(placement, "Streamed", Watched)
    model, steps = tiny_llama(num_hidden_layers=4), Steps()
    placed = {"stream_layers": 4, "callbacks": [steps], "max_steps": 3}
    Watched.there, Watched.most = {}, 0
    trainer = ours(model, id_pairs(8), make_tokenizer(), tmp_path, **placed, **changed)
    layers = placement_of(trainer.model).layers  # type: ignore[union-attr]
    weights = sum(p.nbytes for p in decoder_layers(unwrap(trainer.model))[0].parameters() if p.ndim > 1)
    trained = sum(p.nbytes for p in decoder_layers(unwrap(trainer.model))[0].parameters() if p.requires_grad)
    assert [layer.home.nbytes for layer in layers] == [weights - trained] * 4
    trainer.train()
    assert [steps.copies[-1][id(layer)] for layer in layers] == copies
    assert Watched.most == 2 * (weights - trained)


def test_streamed_layers_are_spread_evenly(tiny_llama: Any) -> None:
    for number, expected in ((1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4])):
        model = tiny_llama(num_hidden_layers=5)
        placement.stream(model, torch.device("cpu"), number)
        found = [i for i, layer in enumerate(decoder_layers(model)) if "bring_in" in vars(layer)]
        assert found == expected


# ---- Before and after -----------------------------------------------------------------------------------------------


def test_what_is_left_of_a_streamed_run(bases: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """The same files, and a model that completes texts as the resident one."""
    files, completed = [], []
    for streamed in (False, True):
        trainer = run_of("fused", tmp_path, bases, make_tokenizer(), streamed)
        trainer.train()
        trainer.save_model()
        saved = Path(trainer.args.output_dir)
        files.append([(saved / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")])
        completed.append(
            trainer.model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
        )
    assert files[0][0] == files[1][0]
    assert torch.equal(*completed)
    with pytest.raises(OptionError, match="merge it by `dpo-peft merge`"):
        trainer.model.merge_and_unload()
    with pytest.raises(OptionError, match="merged or saved as a whole"):
        unwrap(trainer.model).save_pretrained(tmp_path)
    for base in (trainer.model, unwrap(trainer.model)):
        with pytest.raises(OptionError, match="earlier trainer shards or streams its layers.*Load it again"):
            ours(base, id_pairs(4), make_tokenizer(), tmp_path / "second")
    again = {"model_init_kwargs": {"dtype": "float32"}, "peft_config": None, "stream_layers": 2, "reference": "base"}
    ours(str(saved), id_pairs(4), make_tokenizer(), tmp_path / "third", **again)
    assert not distributed._serving  # of one process


def test_a_run_is_resumed_with_its_layers_elsewhere(
    bases: Any, make_tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    """From memory to streamed and back: the run that was not interrupted, without a word."""
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}

    def run(folder: str, until: int, resume: Any = None, **changed: Any) -> DPOTrainer:
        stop = [StopAt(until)]
        trainer = trainer_of(tmp_path / folder, bases("llama"), make_tokenizer(), callbacks=stop, **steps, **changed)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    expected = adapter_weights(run("straight", 4))
    run("moved", 1)
    caplog.clear()
    run("moved", 2, True, stream_layers=2)
    resumed = run("moved", 4, True)
    assert same(adapter_weights(resumed), expected)
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]


# ---- Refusals -------------------------------------------------------------------------------------------------------

EIGHT = BitsAndBytesConfig(load_in_8bit=True)
# What is refused, what the message says, and options as its remedy has them.
REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "8 bits": (
        {"stream_layers": 1, "quantization_config": EIGHT},
        "Int8Params.*load it in 4 bits",
        {"stream_layers": 1},
    ),
    "more layers": ({"stream_layers": 4}, "the model has 3 layers.*at most that, or 'auto'", {"stream_layers": 3}),
    "none": ({"stream_layers": 0}, "stream_layers", {"stream_layers": 1}),
    "a word": ({"stream_layers": "x"}, "stream_layers.*auto", {"stream_layers": "auto"}),
    "both": ({"stream_layers": 1, "fsdp": "full_shard"}, "Set one", {"stream_layers": 1}),
    "one process": ({"fsdp": "full_shard"}, "there is one.*stream_layers", {"stream_layers": 1}),
    "gradients": ({"fsdp": "shard_grad_op"}, "set stream_layers", {"stream_layers": 1}),
    "offload": ({"fsdp": "full_shard offload"}, "leave it out, and set stream_layers", {"stream_layers": 1}),
    "config": ({"fsdp_config": {"min_num_params": 1}}, "fsdp_config.*leave it out", {}),
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed.*leave it out", {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_remedies(case: str, bases: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    asked, said, remedied = REFUSED[case]
    with pytest.raises(OptionError, match=f"(?s){said}"):
        trainer_of(tmp_path, bases("llama"), make_tokenizer(), **asked)
    trainer_of(tmp_path, bases("llama"), make_tokenizer(), **remedied)


def test_accelerates_variables_are_taken_out_and_remembered() -> None:
    """It would wrap the model itself; the launcher's wish holds for each config of the process."""
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    assert [distributed.sharding(None, env) for _ in range(2)] == ["full_shard"] * 2
    assert env["ACCELERATE_USE_FSDP"] == "false"
    assert distributed.sharding("hybrid_shard", env) == "hybrid_shard"  # the option comes first
    assert distributed.sharding(None, {}) is None
    for changed in ({"FSDP_VERSION": "1"}, {"FSDP_OFFLOAD_PARAMS": "true"}):
        with pytest.raises(OptionError, match="fsdp_version: 2"):
            distributed.sharding(None, {**env, "ACCELERATE_USE_FSDP": "true", **changed})


@pytest.mark.parametrize("given", ["full_shard", "full_shard auto_wrap", True])
def test_a_config_keeps_how_the_base_is_sharded(given: Any, tmp_path: Path) -> None:
    args = DPOConfig(**options(tmp_path, fsdp=given))
    assert args.fsdp == args.to_dict()["fsdp"] == "full_shard"
    again = {name: args.to_dict()[name] for name in ("fsdp", "fsdp_config")}
    assert DPOConfig(**options(tmp_path, **again)).fsdp == "full_shard"
