"""Training mode against the reference: loss, every gradient, and four steps of AdamW."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Golden
from torch import Tensor, nn

import qwenvl
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.keymap import entries

RELATIVE = 1e-4


@pytest.fixture(scope="module")
def facts(tiny_112: Golden) -> dict[str, Any]:
    """The reference's numbers."""
    facts: dict[str, Any] = json.loads((tiny_112.folder / "train.json").read_text())
    return facts


@pytest.fixture(scope="module")
def tensors(tiny_112: Golden) -> dict[str, Tensor]:
    """The batch, and six of the gradients."""
    return load_file(tiny_112.folder / "train.safetensors")


@pytest.fixture
def model(tiny_112: Golden) -> QwenVL:
    """A model to train: no one else's."""
    return qwenvl.load(tiny_112.folder, dtype="float32", device="cpu", quiet=True).model.train()


def loss_of(model: QwenVL, tiny_112: Golden, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy of the shifted labels."""
    logits = model(tensors["input_ids"].long(), tiny_112.case(facts["case"]).pixels)
    labels = tensors["labels"].long()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_loss_and_gradients(
    model: QwenVL, tiny_112: Golden, facts: dict[str, Any], tensors: dict[str, Tensor], differences: dict[str, Any]
) -> None:
    """Loss and all gradient norms, and six gradients element by element, through the table of names."""
    loss = loss_of(model, tiny_112, facts, tensors)
    loss.backward()
    assert loss.item() == pytest.approx(facts["loss"], rel=RELATIVE)
    assert loss.item() == pytest.approx(tensors["loss"].item(), rel=RELATIVE)
    parameters = dict(model.named_parameters())
    table = {entry.reference: entry for entry in entries(model.config)}
    assert facts["grad_norms"].keys() == table.keys()
    worst = 0.0
    for name, norm in facts["grad_norms"].items():
        ours = parameters.pop(table[name].ours).grad
        if norm is None:
            assert ours is None, name
        else:
            worst = max(worst, abs(ours.norm().item() / norm - 1))
            assert ours.norm().item() == pytest.approx(norm, rel=RELATIVE), name
    assert not parameters
    differences["tiny-112"]["gradient norms (relative)"] = worst

    whole = [name.removeprefix("grad.") for name in tensors if name.startswith("grad.")]
    assert len(whole) == 6
    ours_by_name = dict(model.named_parameters())
    for name in whole:
        expected = tensors[f"grad.{name}"]
        grad = ours_by_name[table[name].ours].grad
        assert grad is not None
        ours = table[name].translate(grad, "qwenvl", "reference", model.config)
        assert ours.shape == expected.shape
        assert (ours - expected).norm() <= RELATIVE * expected.norm(), name


def test_four_steps_of_adamw(
    model: QwenVL, tiny_112: Golden, facts: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Losses of four clipped AdamW steps on one batch are the reference's; `pos_embed` stays as it was."""
    settings = facts["adamw"]
    positions = model.resampler.pos_embed.clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    losses = []
    for _ in settings["losses"]:
        optimizer.zero_grad()
        loss = loss_of(model, tiny_112, facts, tensors)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings["clip"])
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(settings["losses"], rel=RELATIVE)
    assert torch.equal(model.resampler.pos_embed, positions)


def test_only_the_position_table_is_frozen(model: QwenVL) -> None:
    """Loading puts tensors into the place of parameters and must not lose which are trained."""
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["resampler.pos_embed"]


def test_padding_gets_and_gives_no_gradient(model: QwenVL, tiny_112: Golden) -> None:
    """In a padded batch, the gradient of the real tokens' loss is the sum of the rows' own."""
    rows = [tiny_112.prompt(n, seed=n) for n in (40, 25)]
    ids = torch.zeros(2, 40, dtype=torch.long)
    ids[0], ids[1, 15:] = rows[0], rows[1]
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :15] = False

    def gradient(logits: list[Tensor]) -> Tensor:
        model.zero_grad()
        losses = [
            nn.functional.cross_entropy(out[:-1], row[1:], reduction="sum")
            for out, row in zip(logits, rows, strict=True)
        ]
        torch.stack(losses).sum().backward()
        grad = model.decoder.wte.weight.grad
        assert grad is not None
        return grad.clone()

    together = model(ids, attention_mask=mask)
    batch = gradient([together[0], together[1][mask[1]]])
    alone = gradient([model(row[None])[0] for row in rows])
    torch.testing.assert_close(batch, alone, atol=1e-4, rtol=1e-4)


def test_initial_weights(tiny_112: Golden) -> None:
    """A new model has what training from scratch begins with: spread, scaled output projections, norms, positions."""
    torch.manual_seed(0)
    model = QwenVL(tiny_112.model.config)
    spread = model.config.initializer_range
    deep = spread / (2 * model.config.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        elif name == "resampler.pos_embed":  # the published table, to the digits of bfloat16
            stored = tiny_112.model.resampler.pos_embed
            torch.testing.assert_close(parameter, stored, atol=4e-3, rtol=0)
        else:
            expected = deep if name.startswith("decoder.") and name.endswith("c_proj.weight") else spread
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
