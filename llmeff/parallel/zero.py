"""DeepSpeed's ZeRO: optimizer state, gradients and parameters are split over the ranks, or offloaded to the CPU."""

import contextlib
import importlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import ModelWrapValidatorHandler, PrivateAttr, model_validator
from torch import Tensor, nn

from llmeff.core.config import ConfigError, Count, CountOrZero, Flag, Text
from llmeff.core.dist import ExternalSetting, in_a_world, keep_deepspeed_on_cpu, local_rank_stated, world
from llmeff.core.parameters import Sharding
from llmeff.core.precision import PrecisionName
from llmeff.core.registry import nearest
from llmeff.core.shard import Shard, Slice, split_each, split_group
from llmeff.core.tensors import stored_tensors
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Weight
from llmeff.cost.workload import Workload
from llmeff.parallel.group_state import group_entries
from llmeff.parallel.sharded_checkpoint import ShardedCheckpoint, ShardOwner, check_fit, load_buffers, load_whole, whole
from llmeff.parallel.single import check_joined
from llmeff.parallel.strategy import Strategy, StrategyConfig, StrategyInputs
from llmeff.parallel.zero_law import ALIGNMENT, FlatLaw, GatheredLaw, SumLaw, ZeroLaw, ZeroSettings

Stage = Literal[0, 1, 2, 3]

_FIELDS = {
    "stage": "stage",
    "offload_optimizer": "offload_optimizer",
    "offload_param": "offload_parameters",
    "overlap_comm": "overlap_comm",
    "reduce_bucket_size": "reduce_bucket_size",
    "allgather_bucket_size": "allgather_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "stage3_param_persistence_threshold": "persistence_threshold",
}
"""Keys of `zero_optimization` in a DeepSpeed file, and the fields of `DeepSpeed` that they set."""
_OURS = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "train.clip_norm",
    "bf16": "precision",
    "fp16": "precision",
}
"""Keys that a DeepSpeed file may have if the run's config agrees, and the config's fields."""
_ELSEWHERE = {"optimizer": "optim", "scheduler": "schedule"}
"""Keys that a DeepSpeed file may have only as "auto", and the fields of the run's config that decide them."""


class DeepSpeed(StrategyConfig):
    """ZeRO (Rajbhandari et al. 2020; offload: Ren et al. 2021) by the DeepSpeed library, through Accelerate."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16", "bf16_master")
    launch_flags: ClassVar[tuple[str, ...]] = ("--use_deepspeed", "--multi_gpu")

    name: Literal["deepspeed"] = "deepspeed"
    file: Text | None = None
    """A DeepSpeed JSON file; its stage, offload and buckets set the fields below."""
    stage: Stage = 2
    """What is split over the ranks. 0: nothing. 1: optimizer state. 2: gradients too. 3: parameters too."""
    offload_optimizer: Flag = False
    """Keep the optimizer's state in CPU memory and update there, with the optimizer of the config."""
    offload_parameters: Flag = False
    """Keep parameters that are not in use in CPU memory (stage 3)."""
    overlap_comm: Flag = False
    """Reduce gradients while backward runs, on a separate stream."""
    reduce_bucket_size: Count = 50_000_000
    """Gradients that are reduced at a time, in numbers; never more than the model has."""
    allgather_bucket_size: Count = 50_000_000
    """Updated parameters that are gathered at a time, in numbers (stages 1 and 2), if the backend cannot gather them
    all at once; gloo and NCCL can."""
    prefetch_bucket_size: CountOrZero = 50_000_000
    """Parameters that are gathered ahead of their use, in numbers (stage 3)."""
    max_live_parameters: CountOrZero = 1_000_000_000
    """Parameters that may be gathered at the same time, in numbers (stage 3)."""
    max_reuse_distance: CountOrZero = 1_000_000_000
    """A parameter stays gathered if fewer numbers than this are used before its next use (stage 3)."""
    persistence_threshold: CountOrZero = 0
    """Parameters of this many numbers or fewer are never split (stage 3)."""

    _external_settings: list[ExternalSetting] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _read_file(cls, data: Any, handler: ModelWrapValidatorHandler["DeepSpeed"]) -> "DeepSpeed":
        if not isinstance(data, Mapping) or not isinstance(data.get("file"), str):
            return handler(data)
        stated, elsewhere = read_file(Path(data["file"]))
        given = {name: value for name, value in data.items() if name != "file"}
        problems = [
            f"{name} is {given[name]!r} in the config, but {value!r} in {data['file']}"
            for name, value in stated.items()
            if given.get(name, value) != value
        ]
        if problems:
            raise ValueError("\n".join(problems))
        config = handler({**given, **stated})
        config._external_settings = elsewhere
        return config

    @model_validator(mode="after")
    def _fits(self) -> "DeepSpeed":
        assert self.file is None, "_read_file replaces the file by the fields that it sets"
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs a stage from 1 on: at stage 0 nothing is split or moved")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, given is stage {self.stage}")
        return self

    def external_settings(self) -> list[ExternalSetting]:
        """What the file states about batch, precision and clipping."""
        return self._external_settings

    def refusal(self, sharding: Sharding) -> str | None:
        """From stage 1 on, DeepSpeed gives the optimizer a flat slice of many parameters."""
        if self.stage == 0 or sharding == "elementwise":
            return None
        return (
            f"it must see whole parameters, and at stage {self.stage} it would silently be given flat slices of many; "
            'use stage 0, or parallel = "ddp" with shard_optimizer'
        )

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """Stage 0 cannot keep a master copy that other stages can load; stage 3 cannot be compiled."""
        if precision == "bf16_master" and self.stage == 0:
            yield (
                "precision 'bf16_master' is not for parallel.stage 0: use stage 1, which splits the master copy, or 'bf16'. At "
                "stage 0 DeepSpeed uses another engine, whose state cannot be resumed at other stages or ranks"
            )
        if compiled != "off" and self.stage == 3:
            yield f"runtime.compile {compiled!r} is not for parallel.stage 3: gathering parameters breaks the graph"

    def settings(self, inputs: StrategyInputs) -> dict[str, Any]:
        """DeepSpeed's own config for this run."""
        size = sum(row.parameter.numel() for row in inputs.parameter_infos(inputs.model))
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": self.overlap_comm,
            "reduce_bucket_size": self.bucket_size(size),
            "allgather_bucket_size": _even(self.allgather_bucket_size),
            "stage3_prefetch_bucket_size": self.prefetch_bucket_size,
            "stage3_max_live_parameters": self.max_live_parameters,
            "stage3_max_reuse_distance": self.max_reuse_distance,
            "stage3_param_persistence_threshold": self.persistence_threshold,
        }
        pin = inputs.device.type == "cuda"
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": inputs.micro_batch,
            "gradient_accumulation_steps": inputs.num_micro_batches,
            "gradient_clipping": 0.0 if self.stage == 0 else inputs.clip_norm or 0.0,
            "zero_optimization": zero,
            # otherwise DeepSpeed replaces any offloaded optimizer by its own Adam
            "zero_force_ds_cpu_optimizer": False,
        }
        if inputs.precision.master is not None:
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
            settings["data_types"] = {"grad_accum_dtype": "bf16"}
        elif inputs.precision.autocast:
            # gradients of modules that are named here would be sent in autocast's format
            named: list[str] = []
            settings["torch_autocast"] = {
                "enabled": True,
                "dtype": inputs.precision.compute,
                "lower_precision_safe_modules": named,
            }
        return settings

    @property
    def miscounts(self) -> str | None:
        """At stage 3 DeepSpeed steps the optimizer once a group, with all others empty, so counts grow too fast."""
        if self.stage < 3:
            return None
        return (
            f"at stage 3 parallel {self.name!r} steps it once for each group, and it would count too far; use stage 2"
        )

    def bucket_size(self, size: int) -> int:
        """Gradients in a bucket, in numbers.

        Args:
            size: how many numbers of the model are trained.
        """
        # DeepSpeed allocates the whole bucket, and one as large as the model is never full
        return min(self.reduce_bucket_size, max(1, size))

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> ZeroLaw:
        """What a rank keeps and sends at this stage.

        Offloaded bytes are always counted under their kind. `peak_bytes` includes them only if the model is on a CPU:
        on a GPU it is the peak of the device's memory.
        """
        grouped = [[weight for name in names for weight in weights if weight.name == name] for names in groups]
        settings = ZeroSettings(
            ranks=self.ranks,
            stage=self.stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            overlap_comm=self.overlap_comm,
            bucket_size=self.bucket_size(sum(weight.size for weight in weights if weight.is_trained)),
            prefetch_bucket_size=self.prefetch_bucket_size,
            max_live_parameters=self.max_live_parameters,
            max_reuse_distance=self.max_reuse_distance,
            persistence_threshold=self.persistence_threshold,
        )
        laws: dict[int, type[ZeroLaw]] = {0: SumLaw, 1: FlatLaw, 2: FlatLaw, 3: GatheredLaw}
        return laws[self.stage](weights, grouped, work, settings, rank)

    def build(self, inputs: StrategyInputs) -> "Engine":
        """Gives the model and the optimizer to DeepSpeed."""
        engines = {0: Engine, 1: FlatEngine, 2: FlatEngine, 3: GatheredEngine}
        return engines[self.stage](inputs, self)


def read_file(path: Path) -> tuple[dict[str, Any], list[ExternalSetting]]:
    """Reads a DeepSpeed JSON file: fields of `DeepSpeed`, and what it states about other fields of the config.

    Raises:
        ValueError: the file is absent or no JSON, or it has keys that are not read or that the run's config decides.
    """
    content, zero = _content(path)
    problems = list(_key_problems(path, content, zero))
    if problems:
        raise ValueError("\n".join(problems))
    external_settings = [
        ExternalSetting(key=_OURS[key], value=meant, source=f"{path} ({key})")
        for key, value in content.items()
        if key in _OURS and (meant := _meant(key, value)) != "auto"
    ]
    return {_FIELDS[key]: _plain(value) for key, value in zero.items()}, external_settings


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's table, and its table `zero_optimization`.

    Raises:
        ValueError: the file is absent, no JSON, or of another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        there = sorted(file.name for file in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f" There are: {', '.join(there)}." if there else ""
        raise ValueError(f"file: {path} cannot be read ({error.strerror}).{hint}") from None
    except ValueError as error:
        raise ValueError(f"file: {path} does not parse ({error})") from None
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    if not isinstance(zero, dict):
        raise ValueError(f"file: {path} is no table with a table zero_optimization")
    return content, zero


def _key_problems(path: Path, content: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    """Keys that only the run's config decides, and keys that are not read."""
    for key, owner in _ELSEWHERE.items():
        if content.get(key, "auto") != "auto":
            yield (
                f"file: {path} states {key} = {json.dumps(content[key])}, which {owner} decides: "
                'leave it out or write "auto"'
            )
    known = {"zero_optimization", *_OURS, *_ELSEWHERE}
    for key in content:
        if key not in known:
            yield f"file: {path}: {key} is not read.{nearest(key, known)}"
    for key in zero:
        if key not in _FIELDS:
            yield f"file: {path}: zero_optimization.{key} is not read.{nearest(key, _FIELDS)}"


def _meant(key: str, value: Any) -> Any:
    """A value in the run config's terms: the name of a number format that is on, None for no clipping, else itself.

    Returns:
        "auto" if the file does not decide.
    """
    if _OURS[key] == "precision":
        return key if isinstance(value, Mapping) and value.get("enabled") is True else "auto"
    return None if key == "gradient_clipping" and value == 0 else value


def _plain(value: Any) -> Any:
    """Offload as a flag, and sizes as integers (DeepSpeed's files write 5e7)."""
    if isinstance(value, Mapping):
        return value.get("device", "none") != "none"
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _even(count: int) -> int:
    """The next multiple of two, which DeepSpeed requires."""
    return count + count % 2


class Engine(Strategy):
    """Stage 0: DeepSpeed sums the gradients; all else is plain PyTorch."""

    def __init__(self, inputs: StrategyInputs, config: DeepSpeed):
        super().__init__(inputs)
        self._config = config
        rows = inputs.parameter_infos(inputs.model)
        self._rows = rows
        self._sizes = {row.name: row.parameter.numel() for row in rows}
        self._names = {id(row.parameter): row.name for row in rows}
        self.optimizer = inputs.optimizer(rows)
        self._groups = [[self._names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]
        self._engine = _engine(inputs, self.optimizer, config.settings(inputs))
        self.begun = group_entries(self.optimizer)
        self.model = self._engine

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which wraps ours."""
        return self._engine.optimizer

    @contextlib.contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """Tells DeepSpeed whether the step ends with this micro-batch."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Multiplies by the ranks, since DeepSpeed takes their mean; it is told not to average over micro-batches."""
        self._engine.backward(loss * self.world.ranks, scale_wrt_gas=False)

    def clip(self, max_norm: float | None) -> Tensor:
        """Clips here, since DeepSpeed reports no norm at this stage."""
        parameters = [row.parameter for row in self._rows]
        return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    def step(self) -> bool:
        """DeepSpeed updates the parameters and clears the gradients."""
        self._engine.step()
        return True

    def skip(self) -> None:
        """Clears the gradients. Only for the end of a run: at stages 1 to 3 DeepSpeed keeps its reduced gradients."""
        self._engine.zero_grad()

    def owners(self) -> list[ShardOwner]:
        """What this rank updates; at stage 0, where all ranks update the same, everything on the main rank."""
        return self.owned() if self._config.stage > 0 or self.world.is_main else []

    def owned(self) -> list[ShardOwner]:
        """Every parameter, whole."""
        return [whole(row) for row in self._rows]

    def load_weights(self, saved: ShardedCheckpoint) -> None:
        """Reads every parameter and buffer."""
        load_whole(self._plain, self._rows, saved)

    def close(self) -> None:
        """Takes DeepSpeed's hooks away."""
        self._engine.destroy()


class FlatEngine(Engine):
    """Stages 1 and 2: each group of parameters is one flat tensor, and a rank updates a slice of it."""

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm, asked for once and handed back to the step, which clips by it."""
        norm = cast(Tensor, self._zero.scaled_global_norm())
        self._zero.scaled_global_norm = lambda norm_type=2: norm
        return _finite_or_nan(norm)

    def step(self) -> bool:
        """DeepSpeed clips, updates, gathers and clears."""
        super().step()
        del self._zero.scaled_global_norm  # restores the method of the class
        return True

    def _flats(self) -> list[tuple[Tensor, Shard]]:
        shards = []
        for flat, names in zip(self._zero.single_partition_of_fp32_groups, self._groups, strict=True):
            sizes = {name: self._sizes[name] for name in names}
            shards.append((flat, split_group(sizes, self.world.ranks, ALIGNMENT * self.world.ranks)[self.world.rank]))
        return shards

    def owned(self) -> list[ShardOwner]:
        """This rank's slice of every group."""
        return [ShardOwner(key=flat, parts=_in_row(shard)) for flat, shard in self._flats()]

    def resident(self) -> Iterable[Tensor]:
        """The flat groups, this rank's slices and optimizer state, and the buffers of offloading."""
        yield from super().resident()
        yield from self._zero.bit16_groups_flat
        yield from self._zero.single_partition_of_fp32_groups
        if self._config.offload_optimizer:
            yield from (flat.grad for flat in self._zero.single_partition_of_fp32_groups)
            yield from self._zero.param_buffer_of_bit16_for_cpu_offload_groups
            yield from self._zero.accumulated_grads_in_cpu.values()
            yield self._zero.temp_grad_buffer_for_cpu_offload
            yield self._zero.temp_grad_buffer_for_gpu_offload


class GatheredEngine(Engine):
    """Stage 3: a rank has a part of every parameter, and a module gathers its parameters when it runs."""

    def __init__(self, inputs: StrategyInputs, config: DeepSpeed):
        self._linear = nn.functional.linear
        super().__init__(inputs, config)
        self._environment = contextlib.ExitStack()
        self._environment.enter_context(local_rank_stated())

    def close(self) -> None:
        """Restores `torch.nn.functional.linear` too, which DeepSpeed replaces and leaves replaced."""
        super().close()
        self._environment.close()
        nn.functional.linear = self._linear

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm, asked for once and handed back to the step, which clips by it."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms = self._zero._get_norm_groups()
        self._zero._get_norm_groups = lambda: norms
        return _finite_or_nan(combine_grad_norm_groups(norms))

    def step(self) -> bool:
        """DeepSpeed clips, updates the parameters and clears the gradients."""
        super().step()
        del self._zero._get_norm_groups  # restores the method of the class
        return True

    def owned(self) -> list[ShardOwner]:
        """This rank's part of every parameter; a group is one flat tensor of parts, which are padded to equal sizes."""
        found = []
        for flat, parameters in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True):
            parts, at = [], 0
            for parameter in parameters:
                name = self._names[id(parameter)]
                (part,) = split_each({name: self._sizes[name]}, self.world.ranks)[self.world.rank]
                if part.size:
                    parts.append((part, at))
                at += parameter.partition_numel()
            found.append(ShardOwner(key=flat, parts=tuple(parts)))
        return found

    def resident(self) -> Iterable[Tensor]:
        """This rank's parts of parameters, master copies, optimizer state and gradients, and the bucket."""
        yield from self._plain.buffers()
        for parameter in self._plain.parameters():
            yield parameter.data
            yield parameter.ds_tensor  # type: ignore[attr-defined]
        for flat in self._zero.fp32_partitioned_groups_flat:
            yield flat
            yield from () if flat.grad is None else (flat.grad,)
        yield self._zero.grad_partitions_flat_buffer
        yield from (bucket.buffer for bucket in self._zero.ipg_buckets.values())
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model on the main rank; all ranks gather it, a parameter at a time."""
        from deepspeed.runtime.zero import GatheredParameters

        whole = {}
        for name, tensor in stored_tensors(self._plain).items():
            with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                if self.world.is_main:
                    whole[name] = tensor.detach().cpu().clone()
        return whole

    @torch.no_grad()
    def load_weights(self, saved: ShardedCheckpoint) -> None:
        """Reads this rank's part of every parameter, in the format that forward reads."""
        check_fit(self._rows, saved, self._sizes)
        load_buffers(self._plain, saved)
        for row in self._rows:
            (part,) = split_each({row.name: self._sizes[row.name]}, self.world.ranks)[self.world.rank]
            row.parameter.ds_tensor.data[: part.size].copy_(saved.read(part))  # type: ignore[attr-defined]
        persistent = self._zero.persistent_parameters
        if persistent:
            for parameter in persistent:
                parameter.partition()
            persistent[0].all_gather(persistent)


def _in_row(shard: Shard) -> tuple[tuple[Slice, int], ...]:
    places, at = [], 0
    for part in shard:
        places.append((part, at))
        at += part.size
    return tuple(places)


def _finite_or_nan(norm: Tensor) -> Tensor:
    """The norm; NaN for -1, which is what DeepSpeed returns if the norm is not finite."""
    return torch.where(norm < 0, torch.nan, norm)


def _engine(inputs: StrategyInputs, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Builds DeepSpeed's engine through Accelerate.

    Raises:
        ConfigError: DeepSpeed is not installed, or Accelerate sees another number of processes.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers.integrations import unset_hf_deepspeed_config

    check_tested("accelerate")
    check_tested("deepspeed")
    if inputs.device.type == "cpu":
        keep_deepspeed_on_cpu()
    try:
        backend = importlib.import_module("deepspeed.comm.torch")
    except ImportError:
        raise ConfigError('parallel "deepspeed" needs DeepSpeed: pip install "llmeff[deepspeed]"') from None
    # Compiling it takes two minutes at the first start, and gloo computes the same sums.
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed still calls collectives by names that torch deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with in_a_world():
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False),
            gradient_accumulation_steps=settings["gradient_accumulation_steps"],
            mixed_precision="no" if inputs.precision.master is None else "bf16",
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if inputs.device.type == "cuda" else "gloo")],
        )
        check_joined(accelerator, world().ranks, engine="DEEPSPEED")
        engine, _ = accelerator.prepare(inputs.model, optimizer)
    # otherwise transformers would split every model that it builds from now on, in prices and exports too
    unset_hf_deepspeed_config()
    return engine
