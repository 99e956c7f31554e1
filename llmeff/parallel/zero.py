"""DeepSpeed's ZeRO: splits optimizer state, gradients and parameters over the ranks, or offloads them to the CPU."""

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
"""Keys of `zero_optimization` in a DeepSpeed file, with the field of `DeepSpeed` that each key sets."""
_OURS = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "train.clip_norm",
    "bf16": "precision",
    "fp16": "precision",
}
"""Keys of a DeepSpeed file that must agree with the run's config, with the field that each key must agree with."""
_ELSEWHERE = {"optimizer": "optim", "scheduler": "schedule"}
"""Keys that must be "auto" in a DeepSpeed file, with the field of the run's config that sets each of them."""


class DeepSpeed(StrategyConfig):
    """ZeRO (Rajbhandari et al. 2020; offload: Ren et al. 2021) from the DeepSpeed library, through Accelerate."""

    precisions: ClassVar[tuple[PrecisionName, ...]] = ("fp32", "bf16", "bf16_master")
    launch_flags: ClassVar[tuple[str, ...]] = ("--use_deepspeed", "--multi_gpu")

    name: Literal["deepspeed"] = "deepspeed"
    file: Text | None = None
    """Path of a DeepSpeed JSON file. Its stage, offload and bucket settings set the fields below."""
    stage: Stage = 2
    """ZeRO stage. It splits over the ranks: 0 nothing, 1 the optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: Flag = False
    """Keep the optimizer state in CPU memory and update the parameters there, with the optimizer of the config."""
    offload_parameters: Flag = False
    """Keep parameters in CPU memory while they are not in use (stage 3)."""
    overlap_comm: Flag = False
    """Reduce gradients on a separate stream while backward runs."""
    reduce_bucket_size: Count = 50_000_000
    """Gradients that are reduced at a time, in numbers; never more than the model has."""
    allgather_bucket_size: Count = 50_000_000
    """Elements of updated parameters that are gathered at a time (stages 1 and 2). It has no effect with gloo and NCCL,
    which gather all updated parameters at once."""
    prefetch_bucket_size: CountOrZero = 50_000_000
    """Elements of parameters that are gathered ahead of their use (stage 3)."""
    max_live_parameters: CountOrZero = 1_000_000_000
    """Largest number of parameter elements that may be gathered at the same time (stage 3)."""
    max_reuse_distance: CountOrZero = 1_000_000_000
    """A parameter stays gathered if fewer parameter elements than this are used before its next use (stage 3)."""
    persistence_threshold: CountOrZero = 0
    """Parameters with at most this many elements are never split (stage 3)."""

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
        assert self.file is None, "_read_file replaces the file with the fields that it sets"
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "offload_optimizer is true, but stage is 0. Offloading the optimizer needs stage 1, 2 or 3"
            )
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters is true, but stage is {self.stage}. Offloading parameters needs stage 3"
            )
        return self

    def external_settings(self) -> list[ExternalSetting]:
        """Returns the file's batch, precision and clipping settings, which the config must agree with."""
        return self._external_settings

    def refusal(self, sharding: Sharding) -> str | None:
        """Refuses an optimizer that needs whole parameters if DeepSpeed would pass it flat slices (stages 1 to 3)."""
        if self.stage == 0 or sharding == "elementwise":
            return None
        return (
            f"it must see whole parameters, but at stage {self.stage} DeepSpeed would silently give it flat slices of "
            'many parameters. Use stage 0, or parallel = "ddp" with shard_optimizer'
        )

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """Refuses `bf16_master` at stage 0, whose state other stages cannot load, and torch.compile at stage 3."""
        if precision == "bf16_master" and self.stage == 0:
            yield (
                "precision 'bf16_master' does not work with parallel.stage 0, where DeepSpeed uses another engine. The "
                "state of that engine cannot be resumed at other stages or with another number of ranks. Use stage 1, "
                "which splits the master copy, or precision 'bf16'"
            )
        if compiled != "off" and self.stage == 3:
            yield (
                f"runtime.compile {compiled!r} does not work with parallel.stage 3: gathering parameters breaks the "
                "graph. Use 'off'"
            )

    def settings(self, inputs: StrategyInputs) -> dict[str, Any]:
        """Returns DeepSpeed's own config for this run."""
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
            # otherwise Accelerate replaces an offloaded optimizer with one of DeepSpeed's own
            "zero_force_ds_cpu_optimizer": False,
        }
        if inputs.precision.master is not None:
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
            settings["data_types"] = {"grad_accum_dtype": "bf16"}
        elif inputs.precision.autocast:
            # none: DeepSpeed would communicate the gradients of modules listed here in autocast's dtype
            named: list[str] = []
            settings["torch_autocast"] = {
                "enabled": True,
                "dtype": inputs.precision.compute,
                "lower_precision_safe_modules": named,
            }
        return settings

    @property
    def miscounts(self) -> str | None:
        """At stage 3, the reason why step counts in groups go wrong. None at other stages."""
        if self.stage < 3:
            return None
        return (
            f"at stage 3, parallel {self.name!r} steps the optimizer once per group, so the counts would grow too "
            "fast. Use stage 2"
        )

    def bucket_size(self, size: int) -> int:
        """Returns the size of the gradient bucket, in elements.

        Args:
            size: number of trained elements of the model.
        """
        # DeepSpeed allocates the whole bucket, and a bucket larger than the model would never be full
        return min(self.reduce_bucket_size, max(1, size))

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> ZeroLaw:
        """Returns the law of a rank's memory and communication at this stage.

        Offloaded bytes always count in their own quantity, such as `optimizer_bytes`. They count in `peak_bytes` only
        if the model is on a CPU. If the model is on a GPU, `peak_bytes` is the peak of the GPU's memory.
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
        """Wraps the model and the optimizer in DeepSpeed's engine."""
        engines = {0: Engine, 1: FlatEngine, 2: FlatEngine, 3: GatheredEngine}
        return engines[self.stage](inputs, self)


def read_file(path: Path) -> tuple[dict[str, Any], list[ExternalSetting]]:
    """Reads a DeepSpeed JSON file.

    Returns:
        The values of fields of `DeepSpeed`, and the values that the file sets for other fields of the run's config.

    Raises:
        ValueError: the file cannot be read or is not JSON, has an unsupported key, or sets a key that must be "auto".
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
    """Returns the file's JSON object, and the object `zero_optimization` in it (empty if the key is missing).

    Raises:
        ValueError: the file cannot be read, is not JSON, or does not have this form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        there = sorted(file.name for file in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f" JSON files in that folder: {', '.join(there)}." if there else ""
        raise ValueError(f"file: {path} cannot be read ({error.strerror}).{hint}") from None
    except ValueError as error:
        raise ValueError(f"file: {path} is not valid JSON ({error})") from None
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    if not isinstance(zero, dict):
        raise ValueError(f"file: {path} must be a JSON object, and its zero_optimization must be an object too")
    return content, zero


def _key_problems(path: Path, content: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    """Yields an error message for each unsupported key, and for each key that only the run's config may set."""
    for key, owner in _ELSEWHERE.items():
        if content.get(key, "auto") != "auto":
            yield (
                f"file: {path} sets {key} = {json.dumps(content[key])}, but {owner} in the run's config determines it. "
                'Remove the key or write "auto"'
            )
    known = {"zero_optimization", *_OURS, *_ELSEWHERE}
    for key in content:
        if key not in known:
            yield f"file: {path}: the key {key} is not supported.{nearest(key, known)}"
    for key in zero:
        if key not in _FIELDS:
            yield f"file: {path}: the key zero_optimization.{key} is not supported.{nearest(key, _FIELDS)}"


def _meant(key: str, value: Any) -> Any:
    """Converts a value of a DeepSpeed file to the form that the run's config uses.

    Returns:
        For `bf16` and `fp16`, the precision's name if it is enabled, else "auto" (not set by the file). For a
        `gradient_clipping` of 0, None. For anything else, the value itself.
    """
    if _OURS[key] == "precision":
        return key if isinstance(value, Mapping) and value.get("enabled") is True else "auto"
    return None if key == "gradient_clipping" and value == 0 else value


def _plain(value: Any) -> Any:
    """Converts an offload table to a flag, and a size such as 5e7 to an integer. Returns other values unchanged."""
    if isinstance(value, Mapping):
        return value.get("device", "none") != "none"
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _even(count: int) -> int:
    """Rounds up to a multiple of two, as DeepSpeed requires."""
    return count + count % 2


class Engine(Strategy):
    """Stage 0: DeepSpeed sums the gradients over the ranks. The rest of the step is plain PyTorch."""

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
        """DeepSpeed's optimizer, which wraps `self.optimizer`."""
        return self._engine.optimizer

    @contextlib.contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """Tells DeepSpeed whether this is the last micro-batch of the step."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Runs backward of the loss times the number of ranks, because DeepSpeed averages gradients over the ranks."""
        # scale_wrt_gas=False: DeepSpeed must not average over micro-batches too
        self._engine.backward(loss * self.world.ranks, scale_wrt_gas=False)

    def clip(self, max_norm: float | None) -> Tensor:
        """Clips with torch, because DeepSpeed reports no norm at stage 0. Returns the norm before clipping."""
        parameters = [row.parameter for row in self._rows]
        return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    def step(self) -> bool:
        """Lets DeepSpeed update the parameters and clear the gradients."""
        self._engine.step()
        return True

    def skip(self) -> None:
        """Clears the gradients. Use it only at the end of a run: at stages 1 to 3 DeepSpeed keeps reduced gradients."""
        self._engine.zero_grad()

    def owners(self) -> list[ShardOwner]:
        """Returns what this rank saves: the share that it updates. At stage 0 the main rank saves everything."""
        return self.owned() if self._config.stage > 0 or self.world.is_main else []

    def owned(self) -> list[ShardOwner]:
        """Returns every parameter, whole."""
        return [whole(row) for row in self._rows]

    def load_weights(self, saved: ShardedCheckpoint) -> None:
        """Reads every parameter and buffer."""
        load_whole(self._plain, self._rows, saved)

    def close(self) -> None:
        """Removes DeepSpeed's hooks."""
        self._engine.destroy()


class FlatEngine(Engine):
    """Stages 1 and 2: DeepSpeed joins each parameter group into a flat tensor, and each rank updates a slice of it."""

    def clip(self, max_norm: float | None) -> Tensor:
        """Returns the norm before clipping. DeepSpeed itself clips in `step`, where it reuses this norm."""
        norm = cast(Tensor, self._zero.scaled_global_norm())
        self._zero.scaled_global_norm = lambda norm_type=2: norm
        return _finite_or_nan(norm)

    def step(self) -> bool:
        """Lets DeepSpeed clip, update and gather the parameters, and clear the gradients."""
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
        """Returns this rank's slice of every group."""
        return [ShardOwner(key=flat, parts=_in_row(shard)) for flat, shard in self._flats()]

    def resident(self) -> Iterable[Tensor]:
        """Yields the model, the optimizer state, the flat groups, this rank's slices and the buffers for offloading."""
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
    """Stage 3: each rank keeps a part of every parameter, and a module's parameters are gathered when it runs."""

    def __init__(self, inputs: StrategyInputs, config: DeepSpeed):
        self._linear = nn.functional.linear
        super().__init__(inputs, config)
        self._environment = contextlib.ExitStack()
        self._environment.enter_context(local_rank_stated())

    def close(self) -> None:
        """Removes DeepSpeed's hooks, and restores `torch.nn.functional.linear`, which DeepSpeed leaves replaced."""
        super().close()
        self._environment.close()
        nn.functional.linear = self._linear

    def clip(self, max_norm: float | None) -> Tensor:
        """Returns the norm before clipping. DeepSpeed itself clips in `step`, where it reuses this norm."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms = self._zero._get_norm_groups()
        self._zero._get_norm_groups = lambda: norms
        return _finite_or_nan(combine_grad_norm_groups(norms))

    def step(self) -> bool:
        """Lets DeepSpeed clip and clear the gradients, and update the parameters."""
        super().step()
        del self._zero._get_norm_groups  # restores the method of the class
        return True

    def owned(self) -> list[ShardOwner]:
        """Returns this rank's part of every parameter. DeepSpeed joins the padded parts of a group in a flat tensor."""
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
        """Yields the model's buffers, this rank's parts of all state, the reduction buckets and gathered weights."""
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
        """Gathers one parameter at a time. Returns the whole model on the main rank, and an empty dict on others."""
        from deepspeed.runtime.zero import GatheredParameters

        whole = {}
        for name, tensor in stored_tensors(self._plain).items():
            with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                if self.world.is_main:
                    whole[name] = tensor.detach().cpu().clone()
        return whole

    @torch.no_grad()
    def load_weights(self, saved: ShardedCheckpoint) -> None:
        """Reads the buffers, and this rank's part of every parameter in the dtype that the forward pass reads."""
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
    """Returns the norm, or NaN if it is negative: DeepSpeed returns -1 if the norm is not finite."""
    return torch.where(norm < 0, torch.nan, norm)


def _engine(inputs: StrategyInputs, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Builds DeepSpeed's engine through Accelerate.

    Raises:
        ConfigError: DeepSpeed is not installed, or Accelerate did not join all ranks.
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
    # Compiling DeepSpeed's shared-memory operation takes two minutes at the first start. Gloo computes the same sums.
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed still calls collectives by names that torch has deprecated.
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
    # Otherwise transformers would split every model that it builds from now on, in prices and exports too.
    unset_hf_deepspeed_config()
    return engine
