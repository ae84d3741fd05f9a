"""The training loop.

    fit         train a model on a dataset, from the newest checkpoint in a folder on, to the end or until stopped
    FitResult   how far it came

One update, from above:

    for each piece of the batch:  loss.backward()       gradients of a SUM of losses add up in the parameters
    add up losses and counts of all pieces and ranks    so that the mean is over the whole batch, however it was cut
    gradients x 1 / count, clipped
    optimizer.step()

What comes next (which samples, which learning rate, which random numbers) is a function of the step or stands in the
checkpoint. So a run that was killed and resumed is the run that was never killed: to the bit on a CPU, on a GPU as far
as its kernels are reproducible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, QwenVLError
from ..files import held, whole_file
from . import randomness
from .batches import BatchOrder, collate
from .checkpoints import Checkpoints, Progress
from .devices import Devices, fingerprint, joined, shard, whole
from .errors import TrainingError
from .loader import Collate, Dataset, batches
from .log import TrainingLog
from .objective import Objective, next_token_loss
from .options import TrainingOptions, learning_rate_at
from .parameters import Rates, optimizer_for, recomputed_activations, selected
from .stopping import StopRequests

CHECKPOINT_FOLDER = "checkpoints"
FAILED_BATCH_FILE = "failed-batch.json"
LOCK_FILE = ".lock"
# What a resumed run must share with the run it resumes; other options change no weight, rounding aside.
COURSE = ("batch_size", "learning_rate", "final_ratio", "warmup_steps", "weight_decay", "betas", "clip", "seed")

Evaluate: TypeAlias = Callable[[Any], Mapping[str, float]]
Stop: TypeAlias = Literal["max_minutes", "signal"]


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended.

    steps: updates made in all, those of earlier calls included. stopped: what ended it. loss: of the last update, None
    if this call made none. evaluation: what the last evaluation of this call found, by name.
    """

    steps: int
    stopped: Literal["finished"] | Stop
    loss: float | None
    evaluation: Mapping[str, float]

    @property
    def finished(self) -> bool:
        """Whether the run is complete; if not, the same call goes on with it."""
        return self.stopped == "finished"


@dataclass(frozen=True)
class Update:
    """What one update saw, over all its pieces and ranks.

    loss is the mean over `terms`, gradient_norm what it was before clipping, stop what was asked for meanwhile.
    """

    loss: float
    terms: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    stop: Stop | None


def fit(
    model: nn.Module,
    dataset: Dataset,
    options: TrainingOptions,
    folder: str | Path,
    *,
    objective: Objective = next_token_loss,
    collate: Collate = collate,
    evaluate: Evaluate | None = None,
    evaluation_dataset: Dataset | None = None,
    parameters: Rates | None = None,
    quiet: bool = False,
) -> FitResult:
    """Train `model` in place, on the device where it is; under torchrun, spread over the ranks' devices.

    Args:
        dataset: samples; see `loader.Dataset`.
        folder: receives checkpoints/, log.jsonl and TensorBoard's files. If it has a checkpoint, the run goes on there.
        objective: (model, batch) to a summed loss and the number of its terms.
        collate: a list of samples to a batch. A batch has `to(device)` and `sources` (a list of str), and `tokens` (a
            number) if the log is to tell tokens per second.
        evaluate: called with the model in eval mode; what it returns is logged. Under torchrun every rank calls it.
        evaluation_dataset: samples whose mean loss is logged as evaluation too.
        parameters: a factor on the learning rate by parameter name, 0 to leave a parameter alone; by default all that
            require gradients are trained alike. What the objective never reaches is left alone as well.
        quiet: no progress bar.

    Sets the global random generators. SIGINT, SIGTERM and `max_minutes` end it after the update at hand, with a
    checkpoint. Raises TrainingError on a loss or gradient that is not finite, before it reaches the weights, with the
    batch's sources in failed-batch.json, and while another process trains in `folder`; CheckpointError if the folder's
    checkpoint is of another model, another run or other data; ConfigError for options that fit neither each other nor
    the number of devices.
    """
    folder = Path(folder)
    if evaluation_dataset is not None and not len(evaluation_dataset):
        raise ConfigError("evaluation_dataset is empty: give it samples, or leave it out")
    with (
        StopRequests(options.max_minutes) as requests,
        joined() as devices,
        selected(model, parameters) as rates,
        recomputed_activations(model, options.activation_checkpointing),
        _mode(model, training=True),
        _Run(model, dataset, options, folder, objective, collate, devices, rates, requests).claimed() as run,
    ):
        progress = run.checkpoints.resume() or Progress()
        run.saved = progress.step
        update: Update | None = None
        evaluation: Mapping[str, float] = {}
        evaluated = evaluate is not None or evaluation_dataset is not None
        with (
            TrainingLog(folder, progress.step, run.steps, active=devices.first, quiet=quiet) as log,
            closing(run.batches(progress.step)) as ahead,
        ):
            while progress.step < run.steps and (update is None or update.stop is None):
                with run.rescued(progress):
                    update = run.update(progress.step, ahead)
                progress.add(update.loss * update.terms, update.terms, update.gradient_norm)
                log.step(update.loss, update.tokens)
                last = progress.step == run.steps
                with run.rescued(progress):
                    if last or _due(progress.step, options.log_every):
                        log.progress(progress.step, **progress.means(), learning_rate=update.learning_rate)
                    if evaluated and (last or _due(progress.step, options.evaluate_every)):
                        evaluation = run.evaluate(evaluate, evaluation_dataset)
                        log.write(progress.step, evaluation=evaluation)
                if last or update.stop or _due(progress.step, options.save_every):
                    run.save(progress)
    stopped = update.stop if update is not None and progress.step < run.steps else None
    return FitResult(progress.step, stopped or "finished", update.loss if update is not None else None, evaluation)


class _Run:
    """What stays the same from update to update."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        options: TrainingOptions,
        folder: Path,
        objective: Objective,
        collate: Collate,
        devices: Devices,
        rates: Mapping[str, float],
        requests: StopRequests,
    ) -> None:
        self.model, self.dataset, self.options, self.folder = model, dataset, options, folder
        self.objective, self.collate, self.devices, self.requests = objective, collate, devices, requests
        self.piece_size = options.piece_size(devices.ranks)
        self.steps = options.total_steps(len(dataset))
        self.device = devices.device or next(model.parameters()).device
        self.precision = options.dtype_on(self.device)
        course = self._course(rates)
        shard(model, devices)
        self.optimizer = optimizer_for(model, rates, options)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.checkpoints = Checkpoints(
            folder / CHECKPOINT_FOLDER, devices, model, self.optimizer, frozenset(rates), course, options.keep
        )
        self.saved = 0  # the step of the last checkpoint
        self.together = devices.ranks == 1  # whether an error has met all ranks, so that they can save
        randomness.seed(options.seed, devices.rank)

    @contextmanager
    def claimed(self) -> Iterator[_Run]:
        """This run, with its folder made and no other run's. Raises TrainingError if that cannot be had."""
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                ours = not self.devices.first or stack.enter_context(held(self.folder / LOCK_FILE))
            except OSError as error:
                raise TrainingError(f"the folder {self.folder} cannot be made: {error.strerror}") from None
            if not all(self.devices.gathered(ours)):
                raise TrainingError(f"another run is going on in {self.folder}: wait for it, or name another folder")
            yield self

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        self.checkpoints.save(progress)
        self.saved = progress.step

    @contextmanager
    def rescued(self, progress: Progress) -> Iterator[None]:
        """If the block ends in a user's error, save the updates made before it, as if it had drawn no random number."""
        before = randomness.state()
        try:
            yield
        except QwenVLError as error:
            if self.together and progress.step > self.saved:
                randomness.set_state(before)
                try:
                    self.save(progress)
                except CheckpointError as second:
                    raise TrainingError(f"{error}; and {second}", getattr(error, "updates", 0)) from None
            raise

    def _course(self, rates: Mapping[str, float]) -> dict[str, Any]:
        """What makes this run this run and no other."""
        state = self.model.state_dict()
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        options = {name: value for name, value in asdict(self.options).items() if name in COURSE}
        lengths, content = getattr(self.dataset, "lengths", None), getattr(self.dataset, "fingerprint", None)
        data = [f"{len(self.dataset)} samples"]
        data += [] if lengths is None else [f"{sum(lengths)} tokens"]
        data += [] if content is None else [f"fingerprint {content}"]
        return {
            **options,
            "steps": self.steps,
            "data": ", ".join(data),
            "precision": str(self.precision).removeprefix("torch."),
            "architecture": fingerprint(shapes, getattr(self.model, "config", None), sorted(rates.items())),
            "frozen": fingerprint({name: tensor for name, tensor in state.items() if name not in rates}),
        }

    def batches(self, step: int) -> Generator[Any, None, None]:
        """This rank's pieces of the batches of update `step`, from 0, and of all after it."""
        options, dataset = self.options, self.dataset
        lengths, in_order = getattr(dataset, "lengths", None), getattr(dataset, "in_order", False)
        order = BatchOrder(len(dataset), options.batch_size, options.seed, lengths, in_order=in_order)
        place = {"rank": self.devices.rank, "ranks": self.devices.ranks, "accumulation": options.accumulation}
        indices = (piece for number in range(step, self.steps) for piece in order.pieces(number, **place))
        return batches(self.dataset, self.collate, indices, options.workers)

    def update(self, step: int, ahead: Iterator[Any]) -> Update:
        """Take one batch from `ahead`, piece by piece, and move the weights. Raises TrainingError as `fit` says."""
        options, devices = self.options, self.devices
        losses: list[Tensor] = []  # read at the end: to read a number waits for the device
        counts: list[Tensor | int] = []
        sources: list[str] = []
        own_tokens = 0
        for _ in range(options.accumulation):
            batch = next(ahead)
            sources += batch.sources
            own_tokens += getattr(batch, "tokens", 0)
            loss, count = self._forward(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            counts.append(count)
        loss_sum, terms, tokens, signalled, late = devices.sum(
            [sum(map(float, losses)), sum(map(float, counts)), own_tokens, self.requests.signalled, self.requests.late]
        )
        mean = loss_sum / terms if terms else math.nan

        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        # Of a sum to that of the mean; FSDP has divided by the ranks already.
        torch._foreach_mul_(gradients, devices.ranks / (terms or 1))
        norm = float(whole(nn.utils.clip_grad_norm_(self.trained, options.clip or math.inf)))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self._fail(step, mean, norm, sources)

        rate = learning_rate_at(step, self.steps, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        stop: Stop | None = "signal" if signalled else "max_minutes" if late else None
        return Update(mean, terms, norm, rate, int(tokens), stop)

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | int]:  # noqa: ANN401 - whatever `collate` makes
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.objective(self.model, batch.to(self.device))

    def _fail(self, step: int, loss: float, norm: float, sources: list[str]) -> NoReturn:
        """Say which samples were in the batch, in a file, and stop. The weights are those of before."""
        self.together = True
        self.optimizer.zero_grad()
        everyones = [source for own in self.devices.gathered(sources) for source in own]
        path, where = self.folder / FAILED_BATCH_FILE, "the batch's samples"
        if self.devices.first:
            facts = {"step": step + 1, "loss": str(loss), "gradient_norm": str(norm), "sources": everyones}
            with suppress(OSError):  # a full disk must not hide what happened
                with whole_file(path) as file:
                    file.write(json.dumps(facts, indent=2, ensure_ascii=False).encode())
                where += f", in {path},"
        raise TrainingError(
            f"update {step + 1} has loss {loss:g} and gradient norm {norm:g}, so it was not made: look at {where} or "
            "begin anew in another folder with a lower learning rate",
            updates=step,
        )

    def evaluate(self, function: Evaluate | None, dataset: Dataset | None) -> dict[str, float]:
        """What `function` finds, and the mean loss on `dataset`; leaves no trace in model or random generators."""
        found: dict[str, float] = {}
        with randomness.undisturbed(), _mode(self.model, training=False), torch.no_grad():
            if dataset is not None:
                found["loss"] = self._mean_loss(dataset)
            if function is not None:
                found |= {name: float(value) for name, value in function(self.model).items()}
        return found

    def _mean_loss(self, dataset: Dataset) -> float:
        """Mean loss over a dataset. Ranks that have run out of it look at sample 0, uncounted, for the others' sake."""
        rank, ranks, size = self.devices.rank, self.devices.ranks, self.piece_size
        starts = range(rank * size, -(-len(dataset) // (ranks * size)) * ranks * size, ranks * size)
        pieces = [range(start, min(start + size, len(dataset))) for start in starts]
        loss_sum = terms = 0.0
        indices = [list(piece) or [0] for piece in pieces]
        with closing(batches(dataset, self.collate, indices, self.options.workers)) as ahead:
            for piece, batch in zip(pieces, ahead, strict=True):
                loss, count = self._forward(batch)
                if piece:
                    loss_sum, terms = loss_sum + float(loss), terms + float(count)
        loss_sum, terms = self.devices.sum([loss_sum, terms])
        return loss_sum / terms if terms else math.nan


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or eval mode, and back."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
