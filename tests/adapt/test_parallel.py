"""Tensor parallelism: ranks that torchrun starts compute what one process does, and each holds its part.

One launch of two ranks makes all comparisons (`parallel_ranks.py`); the tests read what the ranks found.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT
from packed_layers import packed_tensors
from safetensors.torch import save_file
from support import one_line_error, random_model, small_config, write_checkpoint

import qwenvl
from qwenvl.adapt.parallel import TensorParallel, check_ranks
from qwenvl.adapt.ranks import Ranks
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.errors import ConfigError
from qwenvl.quantization.checkpoint import quantize
from qwenvl.training.memory import QWEN_VL
from qwenvl.weights.keymap import entries

TESTS = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
CLOSE = 1e-5  # absolute, on logits in float32
CHECKPOINTS = ("plain", "uneven", "int4", "act-order", "int8")


def torchrun(count: int, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in so many processes."""
    words = [*TORCHRUN, str(count), *command]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join((ENVIRONMENT["PYTHONPATH"], str(TESTS)))}
    return subprocess.run(words, capture_output=True, text=True, timeout=400, env=environment, **options)


def write_packed(folder: Path, config: QwenVLConfig, *, shuffled: bool) -> None:
    """A packed checkpoint of random words, zero points and biases."""
    folder.mkdir()
    save_file(packed_tensors(config, shuffled=shuffled), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.fixture(scope="module")
def ranks(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[dict[str, Any]]:
    """What each of two ranks found: the golden model, packed ones, the embedded one."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "plain").symlink_to(goldens / "tiny-112")
    # An odd width, a vocabulary and a vision tower that two ranks cannot halve.
    uneven = small_config(vocab_size=71, intermediate_size=2 * 77, heads=1)
    write_checkpoint(folder / "uneven", random_model(uneven), None, None)
    four = dataclasses.replace(
        small_config(intermediate_size=2 * 176), quantization_config=QuantizationConfig(group_size=32)
    )
    write_packed(folder / "int4", four, shuffled=False)
    shuffled = dataclasses.replace(four, quantization_config=QuantizationConfig(group_size=32, desc_act=True))
    write_packed(folder / "act-order", shuffled, shuffled=True)
    eight = QuantizationConfig(bits=8, group_size=-1, sym=False, lm_head=True)
    quantize(goldens / "tiny-112", folder / "int8", eight, method="rtn", quiet=True)
    done = torchrun(2, str(TESTS / "parallel_ranks.py"), str(folder))
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no warning of torch's either
    found: list[dict[str, Any]] = json.loads((folder / "ranks.json").read_text())
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_two_ranks_compute_what_one_does(ranks: Sequence[dict[str, Any]], name: str) -> None:
    """Logits, hidden states, attention maps of all heads; with a picture, padding, a cache, chunks and steps.

    `int4` has groups that the cut goes through, asymmetric zero points and biases, which are added once; `int8` a
    packed head; `uneven` widths and a vocabulary that two ranks cannot halve.
    """
    for rank in ranks:
        found = rank[name]
        assert max(found["far"].values()) < CLOSE
        assert found["same on all"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_two_ranks_choose_what_one_does(ranks: Sequence[dict[str, Any]], name: str) -> None:
    """Greedy, sampled with a seed, and beams, and on an engine. Without a seed, ranks once could draw different ids."""
    first, second = (rank[name] for rank in ranks)
    assert first["ids"] == second["ids"] == [True, True, True]
    assert first["engine"] == second["engine"]
    assert first["engine"]["as whole"]
    assert first["fresh"] == second["fresh"]
    assert first["fresh again"] == second["fresh again"]
    assert first["fresh"] != first["fresh again"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_rank_holds_its_part(ranks: Sequence[dict[str, Any]], name: str) -> None:
    """Half of the cache, half of each block's linears, little more than half of all; packed ones arranged for a CPU."""
    for rank in ranks:
        found = rank[name]
        assert found["cache"] == 0.5
        assert found["decoder bytes"] == pytest.approx(0.5, abs=0.02 if name in ("plain", "int8") else 0.06)
        assert found["bytes"] < 1
        layers = {"int4": 10, "act-order": 10, "int8": 0}
        assert found["arranged"] == layers.get(name, 0)
    if name == "plain":
        assert ranks[0]["tiny"]["vision"] == 2


def test_golden_packed_layers(ranks: Sequence[dict[str, Any]]) -> None:
    """Shared by outputs and by inputs, they give the reference's products: symmetric, asymmetric, act-order."""
    for rank in ranks:
        assert len(rank["goldens"]) == 12
        assert max(rank["goldens"].values()) < 1e-4  # what the goldens' README says of a whole layer


def test_chat_ground_and_score(ranks: Sequence[dict[str, Any]]) -> None:
    """Two rounds about a picture, boxes and scores are those of one process, on every rank."""
    for rank in ranks:
        assert rank["tiny"]["shared"] == rank["tiny"]["whole"] == ranks[0]["tiny"]["whole"]
        assert rank["bfloat16"] == ranks[0]["bfloat16"]


def test_what_one_rank_lacks_is_told_by_all(ranks: Sequence[dict[str, Any]]) -> None:
    """Memory for a cache that one rank has not is an error of all, which would else wait for it without end.

    Ranks that saw different free memory once could choose different dtypes.
    """
    for rank in ranks:
        found = rank["disagreements"]
        assert found["dtype"] == "torch.float32"
        assert found["memory"].startswith("CacheError: out of memory")


def test_refused_in_one_line(ranks: Sequence[dict[str, Any]]) -> None:
    """Adapters, a device that all would share, fewer GPUs than processes, and gradients."""
    for rank in ranks:
        found = rank["disagreements"]
        assert "qwenvl convert" in found["adapter"]
        assert "cuda:1" in found["device"]
        assert "2 processes" in found["GPUs"]
        assert "inference" in found["gradient"]
        assert all(len(line.splitlines()) == 1 for line in found.values())


@pytest.mark.parametrize(("count", "fits"), [(4, False), (5, False), (7, False), (1, True), (3, True), (6, True)])
def test_uneven_heads(count: int, fits: bool) -> None:
    """Numbers of processes that cannot have equally many of 6 heads are refused with those that can."""
    config = small_config(num_attention_heads=6, hidden_size=192, output_dim=192)
    if fits:
        check_ranks(config, count)
        return
    with one_line_error(ConfigError, f"{count} processes", "6 attention heads", "1, 2, 3 or 6"):
        check_ranks(config, count)


def test_heads_narrower_than_a_word() -> None:
    """A cut through a packed word of zero points is refused: two heads of 4 channels fill one of 4 bits."""
    sizes: dict[str, Any] = {"num_attention_heads": 32, "kv_channels": 4, "output_dim": 128}
    config = dataclasses.replace(small_config(**sizes), quantization_config=QuantizationConfig(group_size=32))
    check_ranks(config, 16)
    with one_line_error(ConfigError, "32 processes", "4 channels", "8 to a packed word", "8 or 16 of them"):
        check_ranks(config, 32)


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says which command to use."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with one_line_error(ConfigError, "torchrun --nproc-per-node", "--parallel tensor"):
        qwenvl.load("tiny", "cpu", parallel="tensor", quiet=True)
    with one_line_error(ConfigError, "'both'", "'tensor'", "'layers'"):
        qwenvl.load("tiny", "cpu", parallel="both", quiet=True)


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_RANK's; no more processes than GPUs, which the error counts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(3, 4, 1, 2).device("auto") == torch.device("cuda:1")
    assert Ranks(3, 4, 1, 2).device("cpu") == torch.device("cpu")
    with one_line_error(ConfigError, "4 processes", "2 GPUs", "--nproc-per-node 2", "cpu"):
        Ranks(0, 4, 0, 4).device("auto")


@dataclasses.dataclass
class Mesh:
    """As much of a mesh as says what a rank has."""

    rank: int
    ranks: int

    def get_local_rank(self) -> int:
        """The place in it."""
        return self.rank

    def size(self) -> int:
        """How many there are."""
        return self.ranks

    def get_group(self) -> None:
        """None: nothing is sent."""


@pytest.mark.parametrize(
    "packed", [pytest.param(False, id="bfloat16"), pytest.param(True, id="int4", marks=pytest.mark.slow)]
)
def test_what_the_published_models_take(packed: bool) -> None:
    """The parts of all ranks make up the whole, and docs/parallel.md says how many GB each has."""
    config = dataclasses.replace(QWEN_VL, quantization_config=QuantizationConfig() if packed else None)
    told = []
    for count in (1, 2, 4, 8):
        held = 0
        for rank in (0, count - 1):
            sizes, shared = [], TensorParallel(config, Mesh(rank, count))  # type: ignore[arg-type]
            for entry in entries(config):
                part = shared.part(entry.ours, torch.empty(entry.our_shape, device="meta"))
                sizes.append(part.numel() * (4 if entry.kind == "packed" else 2))
            assert held in (0, sum(sizes))
            held = sum(sizes)
        told.append(f"{held / 1e9:.2f}")
    row = "int4, groups of 128" if packed else "bfloat16"
    assert f"| tensor, {row} | {' | '.join(told)} |" in (TESTS.parent / "docs" / "parallel.md").read_text()


@pytest.mark.slow
def test_three_ranks(tmp_path: Path) -> None:
    """The embedded model has 6 heads, an MLP of 512 and a vision tower of 4 heads, which stays whole on three ranks."""
    done = torchrun(3, str(TESTS / "parallel_ranks.py"), str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    for rank in json.loads((tmp_path / "ranks.json").read_text()):
        assert rank["tiny"]["shared"] == rank["tiny"]["whole"]
        assert rank["tiny"]["vision"] == 4


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    """The first process alone prints and writes; a mistake is told; a chat's lines reach all; nothing hangs."""
    cli, picture = ("-m", "qwenvl.cli"), str(TESTS.parent / "docs" / "patches.png")
    words = ("--parallel", "tensor", "--device", "cpu", "--quiet")
    done = torchrun(
        2, *cli, "ground", *words, "--image", picture, "the blue square", "--json", "--save", "b.png", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    whole = qwenvl.load("tiny", "cpu", quiet=True).ground(picture, "the blue square")
    found = json.loads(done.stdout)
    assert found["boxes"] == [dataclasses.asdict(box) for box in whole]
    assert (tmp_path / "b.png").is_file()
    lines = f"/image {picture}\nWhat can you see?\n/box the blue square\n/quit\n"
    done = torchrun(2, *cli, "chat", *words, cwd=tmp_path, input=lines)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("qwenvl chat with tiny") == 1
    assert sorted(path.name for path in (tmp_path / "qwenvl-out").iterdir()) == ["boxes-1.png", "boxes-2.png"]
    done = torchrun(4, *cli, "chat", *words, "hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: 4 processes" in done.stderr
    done = torchrun(2, *cli, "chat", "--device", "cpu", "hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--parallel tensor" in done.stderr
