"""FP8 products against float64 ones of numbers that a table of e4m3 has rounded, and what they must leave alone."""

from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from forward_models import add_lora, build
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trainer_helpers import id_pairs, ours, step_logs

from dpo_peft import DPOConfig
from dpo_peft.errors import OptionError
from dpo_peft.forward import Sample, completion_logps, pack, plan_forward
from dpo_peft.fused import fp8
from dpo_peft.fused.elementwise import quantize_rows
from dpo_peft.fused.lora import Projection, ProjectionPass, prepare
from dpo_peft.fused.products import ProjectAdd

# Every positive number of e4m3 by its exponent and mantissa; the last mantissa of the last exponent is no number.
TABLE = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)

SAMPLES = [Sample([5, 9, 12, 40, 7, 33, 21], [[8, 30, 51], [60, 17]]), Sample([3, 99], [[14, 15], [35, 89, 79, 32]])]


def rounded(x: Tensor, scale: Any) -> np.ndarray:
    """The nearest number of e4m3 to x / scale (in float32, as the package divides), the even one of two as near."""
    wide = (x.float().numpy() / np.asarray(scale, np.float32)).astype(np.float64)
    above = np.searchsorted(TABLE, np.abs(wide)).clip(1, len(TABLE) - 1)
    low, high = np.abs(wide) - TABLE[above - 1], TABLE[above] - np.abs(wide)
    taken = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return np.sign(wide) * TABLE[taken]


def row_scales(x: Tensor) -> np.ndarray:
    return (x.float().abs().amax(1, keepdim=True) / 448).numpy()


def layers(bias: bool = True, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """Two NF4 layers on 96 inputs with adapters whose B is small, as at the beginning of a run."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (bnb.nn.Linear4bit(96, n, bias=bias, compute_dtype=dtype) for n in (64, 32))

    torch.manual_seed(0)
    pair = Pair()
    for linear in (pair.a, pair.b):
        options: dict[str, Any] = dict(quant_type="nf4", module=linear, requires_grad=False)
        weight = 0.05 * torch.randn(linear.weight.shape)
        weight[0, 0] = 3.0  # some weights have such outliers
        linear.weight = bnb.nn.Params4bit(weight, **options)._quantize("cpu")
        linear.requires_grad_(False)
    model = get_peft_model(pair, LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b"]))
    found = [model.base_model.model.a, model.base_model.model.b]
    for layer in found:
        nn.init.normal_(layer.lora_B["default"].weight, std=1e-5)
    return found


def passes(kind: type[ProjectionPass] = fp8.FP8Pass, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The pass with the adapters on, that with them off, and the float64 numbers: W, s A and B, block by block."""
    modules = layers(**options)
    projection = Projection(modules)
    projection.kind = kind
    (on,), (off,) = (prepare([projection], dtype, torch.device("cpu"), only) for only in (None, ()))
    dense = [bnb.functional.dequantize_4bit(m.get_base_layer().weight.data, m.get_base_layer().weight.quant_state)
             for m in modules]  # fmt: skip
    a = torch.cat([2 * m.lora_A["default"].weight for m in modules]).double()
    b = torch.block_diag(*(m.lora_B["default"].weight for m in modules)).double()
    return on, off, torch.cat(dense), a.detach(), b.detach()


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of the rounded numbers in float64."""
    scales, scale = row_scales(x), np.float32(weight.abs().max() / 448)
    return torch.from_numpy(rounded(x, scales) * scales @ (rounded(weight, scale) * scale).T)


def tokens(rows: int = 7, columns: int = 96) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x[2] *= 1e-4
    x[3, 5] = 300.0  # a row with an outlier, as hidden states have them
    return x


def test_rounding_is_to_the_nearest_of_the_table() -> None:
    for x in (tokens(64, 512), torch.from_numpy(np.concatenate([TABLE, (TABLE[1:] + TABLE[:-1]) / 2]))[None].float()):
        ours_8, scales = quantize_rows(x)
        assert np.array_equal(scales.numpy(), row_scales(x))
        assert np.array_equal(ours_8.double().numpy(), rounded(x, row_scales(x)))
    assert not quantize_rows(torch.zeros(2, 16))[0].float().any()
    assert quantize_rows(torch.tensor([[1.0, float("nan")]]))[0].float().isnan().any()


def test_products_are_those_of_the_rounded_numbers() -> None:
    on, _, weight, a, b = passes()
    x, bias = tokens(), on.projection.bias_N.double()
    exact = exact_product(x, weight) + bias + x.double() @ a.T @ b.T
    off = lambda y: float(((y.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())  # noqa: E731
    assert off(on.forward(on.extend(x))) < 1e-6
    residual = torch.randn(7, 96)
    assert torch.equal(on.add_to(residual, on.extend(x), times=0.5), residual + 0.5 * on.forward(on.extend(x)))
    # Without rounding, and with a scale that is not the one that W was divided by.
    assert off(x.double() @ weight.double().T + bias + x.double() @ a.T @ b.T) > 1e-3
    weight_8, scale = on.rounded(x)
    assert off(fp8.product(x, weight_8, scale * 1.001) + bias + x.double() @ a.T @ b.T) > 1e-4


def test_a_row_does_not_depend_on_its_neighbors() -> None:
    on, *_ = passes()
    x = tokens()
    alone = torch.cat([on.forward(on.extend(x[i : i + 1])) for i in range(len(x))])
    assert (alone - on.forward(on.extend(x))).abs().max() < 1e-5 * alone.abs().max()
    scaled = quantize_rows(x.reshape(1, -1))[0].reshape(x.shape)  # one scale: the small row is lost beside the outlier
    assert not scaled[2].float().any() and quantize_rows(x)[0][2].float().any()


def test_the_adapter_survives_beside_the_weight() -> None:
    """What it adds is exact, though so much smaller; under the scale of a W with an outlier it would be lost."""
    on, off, weight, a, b = passes()
    x = tokens()
    exact = x.double() @ a.T @ b.T

    def far(added: Tensor) -> float:
        return float((added.double() - exact).norm() / exact.norm())

    assert far(on.forward(on.extend(x)).double() - off.forward(off.extend(x)).double()) < 2e-2  # float32's rounding
    scale = weight.abs().max() / 448
    inside = (on.weight(on.extend(x)) / scale).to(fp8.E4M3)
    with_b, without = fp8.product(on.extend(x), inside, scale), fp8.product(off.extend(x), inside, scale)
    assert far(with_b.double() - without.double()) > 0.3


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients(dtype: torch.dtype, close: float) -> None:
    """The adapter's are those of float64 but for the rounding of dy W; dx is within e4m3's relative spacing, 2^-4."""
    on, _, weight, a, b = passes(dtype=dtype, bias=False)
    for module in on.projection.modules:
        nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    (on,) = prepare([on.projection], dtype, torch.device("cpu"))
    b = torch.block_diag(*(m.lora_B["default"].weight for m in on.projection.modules)).double().detach()
    x = tokens().to(dtype).requires_grad_()
    dy = torch.randn(7, 96).to(dtype)
    found = torch.autograd.grad(ProjectAdd.apply(None, x, on, 1.0, *on.parameters), [x, *on.parameters], dy)
    wide_x, wide_dy = x.detach().double(), dy.double()
    du = wide_dy @ b
    masters = [2 * du[:, :4].T @ wide_x, wide_dy[:, :64].T @ (wide_x @ a[:4].T)]
    masters += [2 * du[:, 4:].T @ wide_x, wide_dy[:, 64:].T @ (wide_x @ a[4:].T)]
    for mine, theirs in zip(found[1:], masters, strict=True):
        assert (mine.double() - theirs).norm() < close * theirs.norm()
    exact = wide_dy @ weight.double() + du @ a
    error = float((found[0].double() - exact).norm() / exact.norm())
    assert 1e-3 < error < 2**-4
    rounded_dx = exact_product(dy.detach(), weight.T) + du @ a
    assert (found[0].double() - rounded_dx).norm() < close * rounded_dx.norm()


def test_policy_and_reference_are_equal_while_the_adapter_adds_nothing() -> None:
    """Bit for bit, with layers checkpointed and not; and the option changes log-probs, by what e4m3 rounds."""
    model = add_lora(build("Llama", {})).to(torch.bfloat16)
    plan, batch = plan_forward(model), pack(SAMPLES)
    plain = completion_logps(model, batch, plan.scorer).token_logps_N
    layers = plan.fp8(True).fused
    assert layers is not None and "FP8" in str(layers)
    moved = completion_logps(model, batch, layers).token_logps_N
    assert 1e-3 < (moved - plain).abs().mean() < 0.3
    with torch.no_grad():
        apart = layers.with_reference(batch, None)
        assert not torch.equal(*apart)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    for checkpointed in (0, 2):
        layers.checkpointed = lambda batch, n=checkpointed: (n, 0)
        policy, reference = layers.with_reference(batch, None)
        assert torch.equal(policy, reference)


def test_a_run(tiny_llama: Any, make_tokenizer: Any, tmp_path: Any) -> None:
    """Margins begin at 0, and a cached reference of bfloat16 products is none of FP8's."""
    keys, logs = [], []
    for products in ({}, {"fp8_products": True}):
        options = {"bf16": True, "fused_layers": True, "cache_ref_log_probs": True, "ref_cache_dir": str(tmp_path)}
        model = tiny_llama().bfloat16()
        trainer = ours(model, id_pairs(16), make_tokenizer(), tmp_path / "run", max_steps=3, overwrite_output_dir=True,
                       **options, **products)  # fmt: skip
        trainer.train()
        keys.append(str(trainer.forward_plan.scorer))
        logs.append(step_logs(trainer))
    assert [log[0]["rewards/margins"] for log in logs] == [0.0, 0.0]
    assert logs[0][1]["loss"] != logs[1][1]["loss"]
    assert keys[0] + ", products in FP8" == keys[1]


def test_refusals(monkeypatch: Any) -> None:
    model = add_lora(build("Llama", dict(intermediate_size=100)))
    with pytest.raises(
        OptionError, match=r"fp8_products=True.*weight of \(200, 64\) is no multiple of 16; leave it out"
    ):
        plan_forward(model).fp8(True)
    with pytest.raises(OptionError, match="fp8_products=True, but sharing is turned off.*leave it out"):
        plan_forward(model, share_prompts=False).fp8(True)
    options = {"output_dir": "x", "fp8_products": True, "fused_layers": True, "use_cpu": False}
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(OptionError, match=r"fp8_products=True needs a GPU of compute capability 8\.9"):
        DPOConfig(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_computes_what_the_cpu_does() -> None:
    x, dy, found = tokens().bfloat16(), torch.randn(7, 96).bfloat16(), []
    for device in map(torch.device, ("cpu", "cuda")):
        projection = Projection([module.to(device) for module in layers(dtype=torch.bfloat16)])
        projection.kind = fp8.FP8Pass
        (on,) = prepare([projection], torch.bfloat16, device)
        grad = on.add_ranks(on.backward(dy.to(device)))
        found.append([on.forward(on.extend(x.to(device))).double().cpu(), grad.double().cpu()])
    for theirs, mine in zip(*found, strict=True):
        assert (mine - theirs).norm() < 5e-3 * theirs.norm()
