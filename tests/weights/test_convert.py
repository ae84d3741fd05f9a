"""Conversion there and back, through kills, full disks and destinations that are in use."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qwenvl.config import QwenVLConfig
from qwenvl.errors import CheckpointError, ConfigError
from qwenvl.weights import write
from qwenvl.weights.checkpoint import Checkpoint
from qwenvl.weights.convert import convert
from qwenvl.weights.keymap import entries
from qwenvl.weights.write import save

ROOT = Path(__file__).parents[2]
Tensors = dict[str, torch.Tensor]
Writer = Callable[..., Path]
SHARD = 300_000  # bytes: several shards for the 2 MB golden model


def read_folder(folder: Path) -> tuple[Tensors, list[dict[str, str]]]:
    """Every tensor of a folder, by its index, and every shard's metadata; read by the safetensors library alone."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: Tensors = {}
    metadata = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata.append(opened.metadata())
        part = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in part)
        tensors |= part
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors, metadata


def same_bytes(one: Tensors, other: Tensors) -> bool:
    """Names, dtypes, shapes and every bit, NaN patterns included."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("bin", 3), ("old bin", 2)])
@pytest.mark.parametrize("weights", ["tiny", "int4"])
def test_there_and_back(
    request: pytest.FixtureRequest, write_reference: Writer, tmp_path: Path, kind: str, shards: int, weights: str
) -> None:
    """The reference's layout to ours and back keeps every name, dtype, shape and byte, and every file beside them."""
    tensors: Tensors = request.getfixturevalue(weights)
    config: QwenVLConfig = request.getfixturevalue(f"{weights}_config")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    source, ours, back = (
        write_reference(tensors, config, kind=kind, shards=shards),
        tmp_path / "ours",
        tmp_path / "back",
    )

    assert convert(source, ours, max_shard_bytes=SHARD)
    written, metadata = read_folder(ours)
    assert len(metadata) > 2
    assert all(header == {"format": "qwenvl", "version": "1"} for header in metadata)
    assert same_bytes(
        written, {e.ours: e.translate(tensors[e.reference], "reference", "qwenvl", config) for e in entries(config)}
    )
    assert Checkpoint(ours).layout == "qwenvl"

    assert convert(ours, back, max_shard_bytes=SHARD)
    restored, metadata = read_folder(back)
    assert all(header == {"format": "pt"} for header in metadata)
    assert same_bytes(restored, tensors)
    assert Checkpoint(back).layout == "reference"

    names = ["config.json", "generation_config.json", "tokenizer_config.json", "quantize_config.json"]
    for name in [*names, "qwen.tiktoken", "SimSun.ttf"]:
        assert (ours / name).read_bytes() == (back / name).read_bytes() == (source / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_shards_are_of_the_size_asked_for(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path
) -> None:
    """No shard is above the limit in tensor bytes; one huge limit makes one shard."""
    source = write_reference(tiny, tiny_config)
    convert(source, tmp_path / "many", max_shard_bytes=SHARD)
    for file in (tmp_path / "many").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= SHARD
    convert(source, tmp_path / "one")
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def test_tensors_lie_on_multiples_of_their_element(
    int4: Tensors, int4_config: QwenVLConfig, write_reference: Writer, tmp_path: Path
) -> None:
    """int32 words after an odd number of float16 values would not be readable as a view of the file."""
    convert(write_reference(int4, int4_config), tmp_path / "ours", max_shard_bytes=SHARD)
    for file in (tmp_path / "ours").glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert (8 + length) % 64 == 0
        for name, tensor in header.items():
            if name != "__metadata__":
                assert tensor["data_offsets"][0] % {"I32": 4, "F16": 2}[tensor["dtype"]] == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from qwenvl.weights import write
from qwenvl.weights.convert import convert
pieces, left = write._pieces, [int(sys.argv[3])]
def killing(*arguments):
    for piece in pieces(*arguments):
        yield piece
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
write._pieces = killing
convert(sys.argv[1], sys.argv[2], max_shard_bytes=300_000)
"""


def kill_while_converting(source: Path, destination: Path, after: int) -> None:
    """Convert in another process that is killed after it wrote so many pieces."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(destination), str(after)], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("changed", [False, True], ids=["same source", "source changed"])
def test_kill_minus_nine_then_run_again(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path, changed: bool
) -> None:
    """After kill -9 there is no destination; the next run keeps finished shards, and only those that are right."""
    source, ours, clean = write_reference(tiny, tiny_config), tmp_path / "ours", tmp_path / "clean"
    kill_while_converting(source, ours, after=50)
    assert not ours.exists()
    partial = tmp_path / "ours.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert finished
    assert list(partial.glob("*.tmp"))
    with pytest.raises(CheckpointError):
        Checkpoint(partial)
    if changed:  # the same sizes and the same time, other values: only the bytes can tell
        times = (source / "model.safetensors").stat()
        content = bytearray((source / "model.safetensors").read_bytes())
        content[-300_000:] = bytes(300_000)
        content[-1_700_000:-1_000_000] = bytes(700_000)
        (source / "model.safetensors").write_bytes(content)
        os.utime(source / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert convert(source, ours, max_shard_bytes=SHARD)
    kept = [name for name, time in finished.items() if (ours / name).stat().st_mtime_ns == time]
    assert (len(kept) < len(finished)) if changed else (len(kept) == len(finished))
    convert(source, clean, max_shard_bytes=SHARD)
    assert snapshot(ours) == snapshot(clean)


def test_run_again_with_other_shards(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path
) -> None:
    """What a killed run with another shard size left is not mixed into the result."""
    source, ours, clean = write_reference(tiny, tiny_config), tmp_path / "ours", tmp_path / "clean"
    kill_while_converting(source, ours, after=50)
    convert(source, ours, max_shard_bytes=2 * SHARD)
    convert(source, clean, max_shard_bytes=2 * SHARD)
    assert snapshot(ours) == snapshot(clean)


def test_finished_conversion_is_recognised(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path
) -> None:
    """The same conversion again writes nothing; any other content of the destination is refused and left alone."""
    source, ours = write_reference(tiny, tiny_config), tmp_path / "ours"
    assert convert(source, ours, max_shard_bytes=SHARD)
    before = snapshot(ours)
    assert not convert(source, ours, max_shard_bytes=SHARD)
    for change in ("an extra file", "another byte", "other shards"):
        if change == "an extra file":
            (ours / "notes.txt").write_text("mine")
        elif change == "another byte":
            (ours / "notes.txt").unlink()
            (ours / "qwen.tiktoken").write_bytes(b"")
        with pytest.raises(CheckpointError, match="exists and holds something else; remove it or name another folder"):
            convert(source, ours, max_shard_bytes=SHARD if change != "other shards" else 2 * SHARD)
    (ours / "qwen.tiktoken").write_bytes(before["qwen.tiktoken"])
    assert snapshot(ours) == before


def test_destinations(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path) -> None:
    """An empty folder is filled, parents are made; a file, the source, and a foreign .partial folder are refused."""
    source = write_reference(tiny, tiny_config)
    (tmp_path / "empty").mkdir()
    assert convert(source, tmp_path / "empty")
    assert convert(source, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("mine")
    before = snapshot(source)
    for destination in (tmp_path / "file", source):
        with pytest.raises(CheckpointError, match="exists and holds something else"):
            convert(source, destination)
    assert snapshot(source) == before
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds files that are not a conversion's \(thesis.tex\)"):
        convert(source, tmp_path / "c")
    assert (tmp_path / "c.partial" / "thesis.tex").read_text() == "mine"


def test_same_layout(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path) -> None:
    """`to` may name the layout that the source has: pickles become safetensors and nothing else changes."""
    source = write_reference(tiny, tiny_config, kind="bin", shards=2)
    convert(source, tmp_path / "safe", to="reference")
    assert same_bytes(read_folder(tmp_path / "safe")[0], tiny)


def test_pickles_with_strides_and_shared_storage(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path
) -> None:
    """A `.bin` tensor may be a transposed or partial view of its storage: what counts is its values."""
    expected = {name: tensor.clone() for name, tensor in tiny.items()}
    tiny["transformer.visual.proj"] = tiny["transformer.visual.proj"].T.contiguous().T
    both = torch.cat([tiny["transformer.wte.weight"], tiny["lm_head.weight"]])
    tiny["transformer.wte.weight"], tiny["lm_head.weight"] = both[:320], both[320:]
    convert(write_reference(tiny, tiny_config, kind="bin"), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert same_bytes(read_folder(tmp_path / "back")[0], expected)


def test_nothing_is_written_for_a_bad_source(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path
) -> None:
    """Weights that do not fit config.json, or no config.json, stop the conversion before its first byte."""
    del tiny["lm_head.weight"]
    source = write_reference(tiny, tiny_config)
    with pytest.raises(CheckpointError, match="1 tensor missing: lm_head.weight"):
        convert(source, tmp_path / "ours")
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        convert(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_too_little_room(
    tiny: Tensors,
    tiny_config: QwenVLConfig,
    write_reference: Writer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is looked at before the first byte, and the line says both numbers."""
    source = write_reference(tiny, tiny_config)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"has 0.001 GB free and 0.002 GB are needed") as raised:
        convert(source, tmp_path / "ours")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_disk_that_fills_up(
    tiny: Tensors,
    tiny_config: QwenVLConfig,
    write_reference: Writer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk in the middle is one line; the half-written file is gone, the finished ones serve the next run."""
    source, ours = write_reference(tiny, tiny_config), tmp_path / "ours"
    pieces, written = write._pieces, [0]

    def filling(shard: write._Shard, read: write.Reader, bar: object) -> Iterator[write.Piece]:
        for piece in pieces(shard, read, bar):
            written[0] += len(piece)
            if written[0] > 1_000_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(write, "_pieces", filling)
        with pytest.raises(CheckpointError, match="the disk is full, .*ours is not finished: free some room") as raised:
            convert(source, ours, max_shard_bytes=SHARD)
    assert "\n" not in str(raised.value)
    assert not ours.exists()
    left = list((tmp_path / "ours.partial").iterdir())
    assert len(left) > 1
    assert all(path.suffix == ".safetensors" for path in left)
    assert convert(source, ours, max_shard_bytes=SHARD)


def test_file_size_limit(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path) -> None:
    """A real refusal by the system (a file size limit) is one line and exit status 2, with no traceback."""
    source = write_reference(tiny, tiny_config)
    command = (
        f"ulimit -f 500; exec {sys.executable} {ROOT / 'tools' / 'convert_weights.py'} {source} {tmp_path / 'ours'}"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: cannot write .*ours: .*File too large\n", done.stderr)
    assert not (tmp_path / "ours").exists()


def test_command_line(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path) -> None:
    """The tool says what it wrote, recognises its own work, and tells a mistake in one line with exit status 2."""
    source, ours = write_reference(tiny, tiny_config), tmp_path / "ours"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "convert_weights.py"), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run(source, ours)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {ours}\n", "")  # no bars without a terminal
    done = run(source, ours)
    assert (done.returncode, done.stdout) == (0, f"{ours} already is this conversion, whole\n")
    done = run(tmp_path / "typo", ours)
    assert done.returncode == 2
    assert re.fullmatch(r"error: there is no folder .*typo.*\n", done.stderr)


def test_save(tiny: Tensors, tiny_config: QwenVLConfig, tmp_path: Path) -> None:
    """Tensors in memory become a folder in our layout that reads back to the same tensors and configuration."""
    state = {e.ours: e.translate(tiny[e.reference], "reference", "qwenvl", tiny_config) for e in entries(tiny_config)}
    save(state, tmp_path / "saved", tiny_config, {"qwen.tiktoken": b"IQ== 0\n"})
    checkpoint = Checkpoint(tmp_path / "saved")
    assert checkpoint.layout == "qwenvl"
    assert checkpoint.config == tiny_config
    assert same_bytes({entry.ours: tensor for entry, tensor in checkpoint.stream()}, state)
    assert (tmp_path / "saved" / "qwen.tiktoken").read_bytes() == b"IQ== 0\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which Linux has")
def test_peak_memory() -> None:
    """Converting takes at most one shard plus 1 GB of anonymous memory, loading the weights plus 1 GB, at 1.2 GB.

    At this size the allowance of 1 GB hides much, so it is tightened to 150 MB: torch's own buffers, no copies.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "memory.py"), "--gigabytes", "1.2"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for row in json.loads(done.stdout.splitlines()[-1])["results"]:
        assert row["peak_bytes"] < row["limit_bytes"] - 850_000_000, row


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which Linux has")
def test_converting_copies_no_weights(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path
) -> None:
    """Converting a checkpoint with 100 MB of tensors takes far less than one of its shards: they stay in their files."""
    from dataclasses import replace

    config = replace(tiny_config, vocab_size=200_000)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tiny[name] = torch.ones(200_000, 128, dtype=torch.bfloat16)
    source = write_reference(tiny, config, kind="bin")
    script = (
        "import re, sys, threading, time\n"
        "from qwenvl.weights.convert import convert\n"
        "def held(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "start, peak, running = held(), [0], [True]\n"
        "def watch():\n"
        "    while running[0]:\n"
        "        peak[0] = max(peak[0], held()); time.sleep(0.001)\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "convert(sys.argv[1], sys.argv[2]); running[0] = False; thread.join()\n"
        "print(peak[0] - start)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "ours")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 20_000  # kB
