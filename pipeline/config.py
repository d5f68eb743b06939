"""Configuration of a run: frozen dataclasses, what every run has and what pre-training adds.

Surprising: the global batch is the contract. Workers and micro-batches only decide how it is
computed, never what it holds. Fine-tuning adds its own in `finetune_config.py`; dotted overrides
and plain dicts are in `config_values.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from pipeline.credentials import require_no_password
from pipeline.placement import require_labels

PATCH_SIZE = 16
SCRATCH = "scratch"
"""What `--init` says for random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and how often it writes."""

    name: str
    """Name of the run and of its folder under storage_path."""
    storage_path: str = "runs"
    """Folder of all runs; on a cluster a path every node can write to."""
    seed: int = 0
    """Seed of weights, order, crops and masks."""
    log_every_steps: int = 10
    """Steps between log lines."""
    checkpoint_every_steps: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    checkpoint_every_minutes: float = 30.0
    """Longest time without a checkpoint, looked at at log steps; 0: only steps count."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_every_steps: int = 0
    """Checkpoints of multiples of this step are kept for good; 0: none."""
    checkpoint_path: str = ""
    """Where checkpoints go instead of the run's folder: <checkpoint_path>/<run.name>, an absolute
    path or a URI such as s3://bucket/folder."""
    on_checkpoint_error: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written, say on a full disk: train on (the last good
    one is kept, the next one is tried), or stop."""
    evaluate_every_steps: int = 1000
    """Steps between evaluations on held-out crops; the last step always evaluates."""
    picture_every_steps: int = 1000
    """Steps between reconstruction pictures; the last step always draws one."""
    pause_at_step: int = 0
    """Save and leave after this step, as after Ctrl-C; the same command with a later one, or with
    0, which is never, goes on."""
    profile_steps: str = ""
    """Steps to profile, FIRST:LAST as the log counts them; empty: none. The trace of worker 0 goes
    to profiles/ in the run's folder and to its artifacts."""
    max_failures: int = 3
    """Restarts in a row after worker failures that reach no new checkpoint; one more ends the run.
    Preempted nodes and a change of the number of workers do not count."""
    allow_config_change: bool = False
    """Resume although the configuration differs from the one the run was started with."""
    dry_run: Annotated[bool, tyro.conf.arg(name="dry-run", prefix_name=False)] = False
    """Print config, data probe, parameters, memory and time estimate, then exit."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise ValueError(
                f"run.name='{self.name}' must be a plain folder name; use e.g. 'run-1'"
            )
        if self.seed < 0:
            raise ValueError(f"run.seed={self.seed} must be 0 or more")
        for key in ("log", "checkpoint", "evaluate", "picture"):
            require_positive(f"run.{key}_every_steps", getattr(self, f"{key}_every_steps"))
        require_positive("run.keep_checkpoints", self.keep_checkpoints)
        for key in (
            "checkpoint_every_minutes",
            "keep_every_steps",
            "max_failures",
            "pause_at_step",
        ):
            require_not_negative(f"run.{key}", getattr(self, key))
        require_choice("run.on_checkpoint_error", self.on_checkpoint_error, ("continue", "stop"))
        parse_profile_steps(self.profile_steps)
        if "://" in self.storage_path:
            raise ValueError(
                f"run.storage_path='{self.storage_path}' must be a folder on a disk, or one that "
                "nodes share: files there are appended to and locked. Give one, and put what is "
                "large on object storage with --run.checkpoint-path and --tracking.artifact-root"
            )
        path = self.checkpoint_path
        if path and not path.startswith("/") and "://" not in path:
            raise ValueError(
                f"run.checkpoint_path='{path}' would be another folder on every worker; give an "
                "absolute path or a URI such as s3://bucket/folder"
            )
        require_no_password("run.checkpoint_path", path)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Images and how a sample is made of them, in any run."""

    path: str
    """Prepared data set, folder of images (searched recursively) or Parquet of encoded images;
    local, or a URI such as s3://bucket/folder."""
    val_path: str = ""
    """Same, for held-out evaluation crops; empty: crops of the training images never trained on."""
    image_size: int = 224
    """Side of a crop in pixels, a multiple of 16."""
    global_batch_size: int = 4096
    """Images per optimiser step, over all workers."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop as a share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of a random crop."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means in [0, 1] for normalising on the device."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations in [0, 1] for normalising on the device."""
    num_cpus: int = 2
    """Logical CPUs kept for decoding, over all workers; at least one per training worker. 0 decodes
    in a thread of each training worker: a run of a minute does not wait for processes to start."""
    worker_resource: str = ""
    """Custom Ray resource of the nodes that decode, to keep decoding off others; each task takes a
    thousandth of one."""
    worker_labels: tuple[str, ...] = ()
    """Labels of the nodes that decode: KEY=VALUE, or KEY=!VALUE for all others."""
    prefetch_batches: int = 4
    """Micro-batches decoded ahead of a training worker."""
    shuffle_window: int = 1024
    """Samples permuted together when the source is Parquet (row groups are always shuffled); what a
    decoding process holds in memory of them, encoded."""
    max_bad_fraction: float = 0.01
    """Share of bad samples above which the run stops."""

    def __post_init__(self) -> None:
        if self.image_size % PATCH_SIZE or self.image_size <= 0:
            near = max(PATCH_SIZE, round(self.image_size / PATCH_SIZE) * PATCH_SIZE)
            raise ValueError(
                f"data.image_size={self.image_size} is not a multiple of {PATCH_SIZE}; use {near}"
            )
        lo, hi = self.crop_scale
        if not 0 < lo <= hi <= 1:
            raise ValueError(f"data.crop_scale={self.crop_scale} must satisfy 0 < min <= max <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio={self.crop_ratio} must satisfy 0 < min <= max")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"data.max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]; use 0.01"
            )
        for key in ("global_batch_size", "prefetch_batches", "shuffle_window"):
            require_positive(f"data.{key}", getattr(self, key))
        if self.num_cpus < 0:
            raise ValueError(
                f"data.num_cpus={self.num_cpus} must be >= 0; 0 decodes in the training workers"
            )
        require_labels("data.worker_labels", self.worker_labels)
        require_no_password("data.path", self.path)
        require_no_password("data.val_path", self.val_path)

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return (self.image_size // PATCH_SIZE) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    base_lr: float = 1.5e-4
    """Learning rate per 256 images; lr = base_lr * global_batch_size / 256."""
    lr: float | None = None
    """Learning rate itself; overrules base_lr."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    num_epochs: float | None = None
    """Passes over the data. Give this or num_steps."""
    num_steps: int | None = None
    """Optimiser steps. Give this or num_epochs."""
    warmup_ratio: float = 0.025
    """Share of the steps with linearly rising learning rate (the paper: 40 of 1600 epochs)."""
    weight_decay: float = 0.05
    """Decay of matrices; biases and other 1-D parameters have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    clip_grad_norm: float = 0.0
    """Largest gradient norm; 0 does not clip (the norm is logged either way)."""
    max_skipped_steps: int = 2
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more
    stops the run."""

    def __post_init__(self) -> None:
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError(
                f"optim.num_epochs={self.num_epochs} and optim.num_steps={self.num_steps}: give "
                "exactly one of them and set the other to None"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"optim.warmup_ratio={self.warmup_ratio} must lie in [0, 1)")
        for key in ("lr", "base_lr", "num_epochs", "num_steps"):
            if (value := getattr(self, key)) is not None:
                require_positive(f"optim.{key}", value)
        for key in ("clip_grad_norm", "max_skipped_steps"):
            require_not_negative(f"optim.{key}", getattr(self, key))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """Training workers. Changes the speed of a run, not its batches."""

    num_workers: int | tuple[int, int] = 1
    """Training workers (processes), on GPUs when use_gpu; two numbers: as many as the cluster has
    room for, from the first to the second."""
    resize_check_s: float = 60.0
    """Seconds between looks at whether the cluster has room for more workers."""
    use_gpu: bool = False
    """Train on GPUs, in bfloat16 autocast with float32 losses."""
    cpus_per_worker: float = 1.0
    """Logical CPUs a training worker reserves."""
    gpus_per_worker: float = 1.0
    """GPUs a training worker reserves when use_gpu; a share of one lets as many runs of one worker
    use the same GPU, as trials of a sweep do."""
    worker_resource: str = ""
    """Custom Ray resource a training worker takes one of, to keep it to the nodes that offer it."""
    worker_labels: tuple[str, ...] = ()
    """Labels of the nodes that train: KEY=VALUE, or KEY=!VALUE for all others."""
    wait_for_nodes_s: float = 0.0
    """Ask the cluster's autoscaler for nodes that are missing, and wait so long for them before the
    run is refused; 0: there is no autoscaler."""
    max_batch_size_per_worker: int = 64
    """Largest micro-batch; gradients accumulate until the global batch is complete."""

    def __post_init__(self) -> None:
        given = self.num_workers
        numbers = given if isinstance(given, tuple) and len(given) == 2 else (given,)
        if any(type(number) is not int for number in numbers):
            raise ValueError(
                f"scaling.num_workers={given} must be a whole number, or two: the fewest and the "
                "most workers"
            )
        require_positive("scaling.num_workers", self.min_workers)
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"scaling.num_workers={self.num_workers}: the first number, the fewest workers, "
                "must not exceed the second, the most"
            )
        require_positive("scaling.resize_check_s", self.resize_check_s)
        require_not_negative("scaling.wait_for_nodes_s", self.wait_for_nodes_s)
        require_labels("scaling.worker_labels", self.worker_labels)
        require_positive("scaling.cpus_per_worker", self.cpus_per_worker)
        if self.gpus_per_worker != 1 and not (0 < self.gpus_per_worker < 1 and given == 1):
            raise ValueError(
                f"scaling.gpus_per_worker={self.gpus_per_worker} must be 1, or a share of one GPU "
                "with scaling.num_workers=1: workers of one run cannot share a GPU"
            )
        require_positive("scaling.max_batch_size_per_worker", self.max_batch_size_per_worker)

    @property
    def min_workers(self) -> int:
        """Fewest workers the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers the run takes; decides the size of a micro-batch."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """MLflow."""

    uri: str = ""
    """MLflow tracking URI; empty: that of MLFLOW_TRACKING_URI, or SQLite under run.storage_path."""
    experiment: str = "itpn-pretrain"
    """MLflow experiment."""
    artifact_root: str = ""
    """Where the experiment keeps artifacts, if this run creates it: a folder or a URI such as
    s3://bucket/mlflow; empty: mlartifacts under run.storage_path, or what a server decides."""
    parent_run_id: str = ""
    """MLflow run this one is shown under; sweeps set it."""
    varied: tuple[str, ...] = ()
    """Settings in which the run differs from its siblings, logged once more as params `varied.KEY`;
    sweeps set it."""
    checkpoint_artifact: bool = True
    """Copy the newest checkpoint to the run's artifacts when the run ends."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use of the host of worker 0."""

    def __post_init__(self) -> None:
        require_no_password("tracking.uri", self.uri)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Trunk and neck: in what they differ from their variant."""

    drop_path_rate: float = 0.0
    """Stochastic depth of the last block."""
    fpn_dim: int = 0
    """Channels of the neck; 0: those of the weights a fine-tuning run starts from, or the
    variant's."""
    fpn_depth: int = 0
    """Blocks per step of the neck; 0: likewise."""
    migrate_after_block: int = -1
    """Token migration, our reading of Fast-iTPN (docs/models.md): block of stage 3, counted from 0,
    after which redundant tokens skip the rest of the trunk; -1: none do."""
    migrate_keep_ratio: float = 0.5
    """Share of the tokens that stay in the trunk."""
    gather_window: int = 0
    """Token gathering, likewise: side in tokens of the windows attention stays in; 0: none."""
    gather_tokens: int = 4
    """Learned tokens that see every window and are seen by it."""
    gather_global_every: int = 4
    """Every how many blocks attention is global all the same; 0: never."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"model.drop_path_rate={self.drop_path_rate} must lie in [0, 1)")
        for key in ("fpn_dim", "fpn_depth", "gather_window", "gather_tokens"):
            require_not_negative(f"model.{key}", getattr(self, key))
        require_not_negative("model.gather_global_every", self.gather_global_every)
        if not 0 < self.migrate_keep_ratio <= 1:
            raise ValueError(
                f"model.migrate_keep_ratio={self.migrate_keep_ratio} must lie in (0, 1]"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Where the weights come from."""

    path: Annotated[str, tyro.conf.arg(name="init", prefix_name=False)] = ""
    """Folder of a pre-training run, one of its checkpoints, or a weights file (.safetensors, .pth),
    local or a URI; 'scratch' for random weights."""
    neck: bool = True
    """Load the pre-trained neck too, not only the backbone."""

    def __post_init__(self) -> None:
        require_no_password("init", self.path)

    @property
    def is_scratch(self) -> bool:
        """Whether all weights are random."""
        return self.path == SCRATCH


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What every run has, and the arithmetic of its batches."""

    run: RunConfig
    data: SampleConfig
    optim: OptimConfig
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        batch, workers = self.data.global_batch_size, self.scaling.max_workers
        if batch % workers:
            lower = batch // workers * workers
            options = [str(b) for b in (lower, lower + workers) if b]
            raise ValueError(
                f"data.global_batch_size={batch} is not divisible by "
                f"scaling.num_workers={workers}; use {' or '.join(options)}"
            )
        data, scaling = self.data, self.scaling
        if not (data.worker_resource or data.worker_labels):
            return
        if data.num_cpus == 0:
            raise ValueError(
                "data.num_cpus=0 decodes in the training workers, wherever data.worker_resource or "
                "data.worker_labels want it; drop one of them"
            )
        if not (scaling.use_gpu or scaling.worker_resource or scaling.worker_labels):
            raise ValueError(
                "data.worker_resource and data.worker_labels keep decoding to some nodes, but "
                "training workers could take all their CPUs; say where those go, with "
                "scaling.worker_resource or scaling.worker_labels"
            )

    @property
    def model_name(self) -> str:
        """The variant that is trained."""
        raise NotImplementedError

    @property
    def sample_bytes(self) -> int:
        """About what a decoded sample takes, in bytes."""
        return 3 * self.data.image_size**2

    @property
    def batch_size_per_worker(self) -> int:
        """Images of a micro-batch: the largest that fits and divides the share of each of the most
        workers. Fewer workers take more micro-batches of the same size."""
        share = self.data.global_batch_size // self.scaling.max_workers
        largest = self.scaling.max_batch_size_per_worker
        parts = (a for a in range(1, share + 1) if share % a == 0)
        return next(share // a for a in parts if share // a <= largest)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, over all workers."""
        return self.data.global_batch_size // self.batch_size_per_worker

    def micro_batches_of(self, rank: int, world_size: int) -> range:
        """Which micro-batches of a step a worker takes: neighbours, as evenly as they divide."""
        first, last = (self.num_micro_batches * r // world_size for r in (rank, rank + 1))
        return range(first, last)

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        if self.optim.lr is not None:
            return self.optim.lr
        return self.optim.base_lr * self.data.global_batch_size / 256

    def num_used(self, num_samples: int) -> int:
        """Training samples of a data set that the run uses."""
        return num_samples

    def num_steps(self, num_samples: int) -> int:
        """Optimiser steps of the run for a data set of this size, at least 1."""
        if self.optim.num_steps is not None:
            return self.optim.num_steps
        assert self.optim.num_epochs is not None
        return max(1, math.floor(self.optim.num_epochs * num_samples / self.data.global_batch_size))


def require_positive(key: str, value: float) -> None:
    """A ValueError unless the value of a setting is above 0."""
    if not value > 0:
        raise ValueError(f"{key}={value} must be greater than 0")


def require_not_negative(key: str, value: float) -> None:
    """A ValueError if the value of a setting is below 0."""
    if not value >= 0:
        raise ValueError(f"{key}={value} must be 0 or more")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """A ValueError unless the value of a setting is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key}='{value}' must be one of {', '.join(choices)}")


def parse_profile_steps(text: str) -> range:
    """`10:15` -> steps 10 to 15, as the log counts them (the first one is 1); empty: none.

    Raises:
        ValueError: it is no such pair.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"run.profile_steps='{text}' must be FIRST:LAST with 1 <= FIRST <= LAST, the steps to "
            "profile as the log counts them; use e.g. 10:15"
        )
    return range(first, last + 1)
