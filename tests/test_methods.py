"""What holds of one prompt method alone: its special cases, and how it starts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ept_fast import EPTConfig, FusedEPTPrompt, reconstruct_prompt
from ept_fast.prompts.accept import ACCEPTConfig, ACCEPTPrompt
from ept_fast.prompts.lamp import LAMPConfig, LAMPPrompt
from ept_fast.prompts.mixture import MixtureConfig, MixturePrompt
from ept_fast.prompts.residual import ResidualConfig, ResidualPrompt
from ept_fast.prompts.ulpt import ULPTConfig, ULPTPrompt
from tests.methods import make

pytestmark = pytest.mark.usefixtures("one_thread")

D = 8
BASIS = [[0.069845, -0.602394, 0.318423, 0.313781], [-0.534477, -0.149877, -0.585828, 0.259473]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int) -> Tensor:
    return torch.randn(count, D, generator=seeded(1))


def table() -> nn.Embedding:
    return nn.Embedding(20, D)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


# LAMP


def test_lamp_of_full_rank_and_without_pooling_is_a_plain_prompt() -> None:
    start = rows(6)
    config = LAMPConfig(D, num_virtual_tokens=6, prompt_rank=6, window=1)
    prompt = LAMPPrompt(config, table(), init=start)
    plain = FusedEPTPrompt(EPTConfig(D, 6, rank=0, num_spaces=0), table(), init=start)
    torch.testing.assert_close(prompt.reconstruct(), plain.reconstruct())


@pytest.mark.parametrize("product", ["gram", "sketch"])
def test_lamp_starts_at_the_pooled_rows_of_the_truncated_svd(product: str) -> None:
    config = LAMPConfig(D, num_virtual_tokens=2, prompt_rank=3, window=4, product=product)
    start = rows(8)
    left, singular, right = torch.linalg.svd(start.double())
    near = (left[:, :3] * singular[:3]) @ right[:3]
    got = LAMPPrompt(config, table(), init=start).reconstruct()
    torch.testing.assert_close(got, near.view(2, 4, D).mean(1).float())


def test_the_signs_of_lamps_singular_vectors_do_not_matter() -> None:
    config = LAMPConfig(D, num_virtual_tokens=2, prompt_rank=3, window=4)
    prompt = make(config, dtype=torch.float64)
    before = prompt.reconstruct().detach()
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        prompt.left *= signs  # type: ignore[operator]
        prompt.right *= signs.unsqueeze(1)  # type: ignore[operator]
    torch.testing.assert_close(prompt.reconstruct(), before)


@pytest.mark.parametrize("product", ["gram", "sketch"])
def test_lamp_forms_nothing_of_the_long_prompts_size(product: str) -> None:
    length, r, d = 256, 2, 64
    config = LAMPConfig(d, 2, prompt_rank=r, window=128, product=product, sketch_size=3)
    prompt = make(config)
    with _Largest() as seen:
        prompt.reconstruct().square().sum().backward()
    # Of the sketch: two of them, in complex numbers, for each of the long prompt's rows.
    assert seen.elements <= length * (r if product == "gram" else 4 * 3)
    with _Largest() as seen:
        _ = prompt.left @ prompt.right
    assert seen.elements == length * d


def test_lamps_sketch_is_of_the_outer_product() -> None:
    """<sketch(x), sketch(y)> is <x, y>² in the mean over hashes."""
    x, y = rows(2).double()
    found = []
    for seed in range(2000):
        config = LAMPConfig(D, 1, prompt_rank=1, window=1, product="sketch", seed=seed)
        config = dataclasses.replace(config, prompt_rank=1)
        size = {"prompt_rank": D, "window": D, "sketch_size": 16}
        hashes = LAMPPrompt.constants(dataclasses.replace(config, **size))["hashes"].double()
        a, b = (torch.fft.irfft(torch.fft.rfft(v @ hashes).prod(0), n=16) for v in (x, y))
        found.append(float(a @ b))
    mean, wanted = sum(found) / len(found), float(x @ y) ** 2
    deviation = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(mean - wanted) < 4 * float(deviation)


# Residual


def test_an_mlp_that_gives_zero_leaves_the_prompt() -> None:
    prompt = make(ResidualConfig(D, 3, bottleneck=4, layer_norm=False))
    with torch.no_grad():
        prompt.up_weight.zero_()  # type: ignore[union-attr, operator]
        prompt.up_bias.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(prompt.reconstruct(), prompt.short_prompt)  # type: ignore[arg-type]


def test_an_mlp_is_one_subspace_of_ept() -> None:
    prompt = make(ResidualConfig(D, 3, bottleneck=4, layer_norm=False), dtype=torch.float64)
    t = dict(prompt.named_parameters())
    with torch.no_grad():
        t["down_bias"].zero_()
        t["up_bias"].zero_()
    kind: dict[str, Any] = {"dtype": torch.float64}
    wanted = reconstruct_prompt(
        t["short_prompt"],
        space_down=t["down_weight"].unsqueeze(0),
        space_up=t["up_weight"].unsqueeze(0),
        gate_weight=torch.randn(D, 1, **kind),
        gate_bias=torch.randn(1, **kind),
        activation="relu",
    )
    torch.testing.assert_close(prompt.reconstruct(), wanted)


@pytest.mark.parametrize("num_tasks", [None, 2])
def test_an_mlp_goes_through_the_fused_operation(num_tasks: int | None) -> None:
    prompt = make(ResidualConfig(D, 3, bottleneck=4, layer_norm=False), num_tasks)
    wanted = prompt.computed(prompt.formula)
    for backend in ("eager", "reference"):
        prompt.backend = backend
        torch.testing.assert_close(prompt.reconstruct(), wanted)
    prompt.backend = "nowhere"
    with pytest.raises(ValueError, match="backend: expected one of"):
        prompt.reconstruct()


def test_the_lstm_is_torchs() -> None:
    prompt = make(ResidualConfig(D, 5, encoder="lstm"), dtype=torch.float64)
    layer = nn.LSTM(D, D // 2, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for theirs, mine in zip(
            ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
            ("input_weight", "hidden_weight", "input_bias", "hidden_bias"),
            strict=True,
        ):
            for direction, end in enumerate(("", "_reverse")):
                source = getattr(prompt, f"lstm_{mine}")[direction]
                getattr(layer, f"{theirs}_l0{end}").copy_(source)
    start = prompt.short_prompt
    wanted = start + layer(start)[0]  # type: ignore[operator]
    torch.testing.assert_close(prompt.reconstruct(), wanted)


# Mixtures


def test_one_module_is_the_prompt() -> None:
    prompt = make(MixtureConfig(D, 3, num_modules=1), dtype=torch.float64)
    torch.testing.assert_close(prompt.reconstruct(), prompt.module_prompts[0])  # type: ignore[index]


def test_factored_modules_are_their_product() -> None:
    config = MixtureConfig(D, 3, num_modules=4, num_factors=2)
    prompt = make(config, dtype=torch.float64)
    t = dict(prompt.named_parameters())
    dense = make(dataclasses.replace(config, num_factors=0), dtype=torch.float64)
    with torch.no_grad():
        product = t["module_weights"] @ t["module_basis"].flatten(1)
        dense.module_prompts.copy_(product.view(4, 3, D))  # type: ignore[operator]
        dense.gate_logits.copy_(t["gate_logits"])  # type: ignore[operator]
    torch.testing.assert_close(prompt.reconstruct(), dense.reconstruct())


def test_factored_modules_start_at_the_rows_if_the_factors_allow_it() -> None:
    start = rows(6)
    config = MixtureConfig(D, 3, num_modules=2, num_factors=2)
    t = dict(MixturePrompt(config, table(), init=start).named_parameters())
    product = t["module_weights"] @ t["module_basis"].flatten(1)
    torch.testing.assert_close(product.view(6, D), start)


def test_noise_of_one_half_is_no_noise_and_little_temperature_makes_gates_hard() -> None:
    config = MixtureConfig(D, 3, num_modules=3)
    prompt: Any = make(config, dtype=torch.float64)
    torch.testing.assert_close(prompt.mixed(torch.full((3,), 0.5)), prompt.reconstruct())
    cold: Any = make(dataclasses.replace(config, temperature=1e-3), dtype=torch.float64)
    u = torch.tensor([0.9, 0.01, 0.99])
    with torch.no_grad():
        cold.gate_logits.zero_()
    wanted = (cold.module_prompts[0] + cold.module_prompts[2]) / 2
    torch.testing.assert_close(cold.mixed(u), wanted)


def test_noise_is_an_input_seeded_and_only_of_training() -> None:
    prompt: Any = make(MixtureConfig(D, 3, num_modules=3), num_tasks=2)
    text, tasks = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 1])

    def out() -> Tensor:
        torch.manual_seed(5)
        found: Tensor = prompt(text, task_ids=tasks).inputs_embeds
        return found

    noisy = out()
    assert torch.equal(out(), noisy)
    torch.manual_seed(5)
    mixed = prompt.mixed(torch.rand(2, 3))
    assert torch.equal(noisy[:, :3], mixed)
    assert not torch.equal(prompt(text, task_ids=tasks).inputs_embeds, noisy)
    mixed.square().sum().backward()
    assert bool(prompt.gate_logits.grad.any())
    prompt.eval()
    state = torch.get_rng_state()
    assert torch.equal(prompt(text, task_ids=tasks).inputs_embeds[:, :3], prompt.reconstruct())
    assert torch.equal(torch.get_rng_state(), state)
    for end in (0.0, 1.0):
        assert bool(torch.isfinite(prompt.mixed(torch.full((2, 3), end))).all())
    with pytest.raises(ValueError, match=re.escape("noise: expected shape [2, 3], got [3]")):
        prompt.mixed(torch.rand(3))
    reader: Any = make(MixtureConfig(D, 3, gates="attention"))
    with pytest.raises(ValueError, match="gates: expected bernoulli for noise, got attention"):
        reader.mixed(torch.rand(4))


def test_the_tasks_of_a_bank_share_the_modules() -> None:
    shapes = {n: p.shape for n, p in make(MixtureConfig(D, 3), num_tasks=5).named_parameters()}
    assert shapes == {"module_prompts": (4, 3, D), "gate_logits": (5, 4)}
    config = MixtureConfig(D, 3, gates="attention")
    shapes = {n: p.shape for n, p in make(config, num_tasks=5).named_parameters()}
    assert shapes["target_prompt"] == (5, 3, D)
    assert shapes["query_down"] == (D, 16)


def test_gates_of_a_task_can_be_seen() -> None:
    prompt: Any = make(MixtureConfig(D, 3), num_tasks=2)
    gates = prompt.gate_weights()
    assert gates.shape == (2, 3, 4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3))
    assert prompt.has_gate
    assert not make(MixtureConfig(D, 3, gates="attention")).has_gate


def test_one_source_without_a_target_is_the_source() -> None:
    config = MixtureConfig(D, 3, num_modules=1, gates="attention", attend_to_target=False)
    prompt: Any = make(config)
    with torch.no_grad():
        prompt.target_prompt.zero_()
    out = prompt(torch.tensor([[4, 9], [3, 1]])).inputs_embeds
    assert torch.equal(out[:, :3], prompt.module_prompts.expand(2, -1, -1))


def test_attention_reads_the_text_but_not_its_padding() -> None:
    prompt: Any = make(MixtureConfig(D, 3, gates="attention"))
    out = prompt(torch.tensor([[4, 9], [3, 1]])).inputs_embeds[:, :3]
    assert not torch.allclose(out[0], out[1])
    for text in (torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[4, 9], [3, 1]])):
        mask = torch.zeros_like(text)
        empty = prompt(text, attention_mask=mask).inputs_embeds[:, :3]
        assert torch.equal(empty[0], empty[1])
        assert bool(torch.isfinite(empty).all())
    frozen = prompt.eval().fold()
    assert frozen.embedding is prompt.embedding
    assert frozen.target_prompt is not prompt.target_prompt


# ULPT


def test_ulpt_with_the_unit_matrix_is_a_plain_prompt() -> None:
    prompt: Any = ULPTPrompt(ULPTConfig(D, 3, prompt_rank=D), table())
    with torch.no_grad():
        prompt.basis.copy_(torch.eye(D))
        prompt.shift.zero_()
    assert torch.equal(prompt.reconstruct(), prompt.codes)


def test_ulpts_basis_comes_from_its_seed_and_is_not_saved(tmp_path: Path) -> None:
    config = ULPTConfig(4, 3, prompt_rank=2, seed=7)
    prompt: Any = ULPTPrompt(config, nn.Embedding(20, 4))
    assert set(prompt.state_dict()) == {"codes", "scale", "shift"}
    # As long as these are the same, saved prompts are.
    wanted = torch.tensor(BASIS)
    torch.testing.assert_close(prompt.basis, wanted, rtol=0, atol=1e-6)
    assert float(prompt.basis.abs().max()) <= 1.0  # sqrt(6 / (2 + 4))
    prompt.save_pretrained(tmp_path)
    loaded: Any = ULPTPrompt.from_pretrained(tmp_path)
    assert torch.equal(loaded.basis, prompt.basis)
    half = prompt.bfloat16()
    half.save_pretrained(tmp_path / "half")
    again: Any = ULPTPrompt.from_pretrained(tmp_path / "half")
    assert torch.equal(again.reconstruct(), half.reconstruct())
    assert torch.equal(again.basis, loaded.basis)
    empty = loaded.to("meta").to_empty(device="cpu")
    assert torch.equal(empty.basis, again.basis)
    other: Any = ULPTPrompt(dataclasses.replace(config, seed=8), nn.Embedding(20, 4))
    assert not torch.equal(other.basis, loaded.basis)


def test_ulpt_starts_with_the_mean_and_the_deviation_of_the_rows() -> None:
    start = 3 + 0.1 * rows(40)
    got = ULPTPrompt(ULPTConfig(D, 40, prompt_rank=2), table(), init=start).reconstruct()
    spread = (got - start.mean(0)).std(correction=0)
    torch.testing.assert_close(spread, (start - start.mean(0)).std(correction=0))


# ACCEPT


def test_one_block_is_a_low_rank_prompt() -> None:
    prompt: Any = make(ACCEPTConfig(D, 3, num_blocks=1, codebook_size=2, offset_size=0))
    wanted = prompt.prompt_weights[0] @ prompt.prompt_codes[0]
    torch.testing.assert_close(prompt.reconstruct(), wanted)


@pytest.mark.parametrize("num_tasks", [None, 2])
def test_accepts_offset_is_depts_with_a_block_diagonal_matrix(num_tasks: int | None) -> None:
    prompt: Any = make(ACCEPTConfig(D, 3, num_blocks=4, max_length=9), num_tasks)
    codes = prompt.offset_codes
    if num_tasks is None:
        wanted = torch.block_diag(*codes)
    else:
        wanted = torch.stack([torch.block_diag(*task) for task in codes])
    assert torch.equal(prompt.offset_b, wanted)
    assert prompt.config.rank == 8
    assert prompt.config.scaling == 1.0


def test_accept_starts_at_the_rows_if_the_codebooks_allow_it() -> None:
    start = rows(20)
    config = ACCEPTConfig(D, 3, max_length=16, num_blocks=2, codebook_size=7, offset_size=2)
    prompt: Any = ACCEPTPrompt(config, table(), init=start)
    torch.testing.assert_close(prompt.reconstruct(), start[:3])
    assert not bool(prompt.offset_a.any())
    assert bool((prompt.prompt_codes != 0).any(-1).all())
    text = torch.tensor([[1, 2, 3]])
    assert torch.equal(prompt(text).inputs_embeds[:, 3:], prompt.embedding(text))


def test_the_first_step_moves_every_part_that_can_move() -> None:
    """No tensor starts where no gradient can ever reach it."""
    configs = (
        LAMPConfig(D, 2, prompt_rank=2, window=2),
        LAMPConfig(D, 2, prompt_rank=2, window=2, product="sketch", sketch_size=3),
        ResidualConfig(D, 2, bottleneck=3),
        ResidualConfig(D, 2, encoder="lstm"),
        MixtureConfig(D, 2, num_factors=2),
        MixtureConfig(D, 2, gates="attention"),
        ULPTConfig(D, 2),
        ACCEPTConfig(D, 2, max_length=16, num_blocks=2, codebook_size=5, offset_size=1),
    )
    kinds = {
        LAMPConfig: LAMPPrompt, ResidualConfig: ResidualPrompt, MixtureConfig: MixturePrompt,
        ULPTConfig: ULPTPrompt, ACCEPTConfig: ACCEPTPrompt,
    }  # fmt: skip
    for config in configs:
        prompt = kinds[type(config)](config, table(), generator=seeded())
        optimizer = torch.optim.SGD(prompt.parameters(), 0.01)
        start = [p.detach().clone() for p in prompt.parameters()]
        for _ in range(2):
            optimizer.zero_grad()
            prompt(torch.tensor([[4, 9], [3, 1]])).inputs_embeds.pow(3).sum().backward()
            optimizer.step()
        for (name, p), before in zip(prompt.named_parameters(), start, strict=True):
            assert not torch.equal(p, before), (config, name)
