"""The embedded model in 4 bits, made once."""

from pathlib import Path

import pytest

from qwenvl import cli


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the command makes it, in groups that divide the model's width, and from fewer examples, which is quicker."""
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    assert cli.main(["quantize", "tiny", str(folder), "--group-size", "64", "--samples", "32", "--quiet"]) == 0
    return folder
