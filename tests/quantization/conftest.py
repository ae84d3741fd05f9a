"""The embedded model in 4 bits, made once."""

from pathlib import Path

import pytest

from qwenvl import cli


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the command makes it by default, but for groups that divide the model's width."""
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    assert cli.main(["quantize", "tiny", str(folder), "--group-size", "64", "--quiet"]) == 0
    return folder
