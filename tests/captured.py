"""A GPU's captured steps, pretended: what is captured and replayed there is run here as it would be, on the CPU."""

from collections.abc import Callable

import pytest
from torch import Tensor

import qwenvl.generation.decode
import qwenvl.generation.schedule
import qwenvl.generation.session
from qwenvl.adapt import capture
from qwenvl.adapt.capture import Stepper
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL


class PretendedStepper(Stepper):
    """A replay runs the step anew, and writes over what the last one of its bucket gave, as a graph does."""

    def __init__(self, model: QwenVL, cache: KVCache, *, beside: Stepper | None = None) -> None:
        super().__init__(model, cache, beside=beside)
        self.captures = not model.training and not capture.GRAPHS.failed

    def _capture(self, bucket: int) -> Callable[[], Tensor]:
        view = self.cache.bucket(bucket)
        logits: list[Tensor] = []

        def replay() -> Tensor:
            new = self.model.decoder.step(self._ids, view)
            logits[:] = [logits[0].copy_(new)] if logits else [new]
            return logits[0]

        return replay


def pretend(patch: pytest.MonkeyPatch, bucket: int = 16) -> None:
    """Every loop takes captured steps, and reads its ids late, as on a GPU; buckets are small."""
    patch.setattr(capture, "BUCKET", bucket)
    for module in (qwenvl.generation.decode, qwenvl.generation.session, qwenvl.generation.schedule):
        patch.setattr(module, "Stepper", PretendedStepper)
