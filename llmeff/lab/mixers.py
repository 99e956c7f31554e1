"""Benchmarks single mixers: time and memory by sequence length.

Also finds the length from which each mixer is faster than the first mixer. Each mixer runs in the one-layer model of
`llmeff.models.single_layer`.
"""

import math
import random
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor

from llmeff.compare.intervals import Estimate, mean_interval
from llmeff.compare.plots import Curves, curves
from llmeff.compare.text_table import TextTable
from llmeff.core import meters
from llmeff.core.components import load_components
from llmeff.core.config import ConfigError
from llmeff.core.cpu import instruction_set
from llmeff.core.layout import Layout
from llmeff.core.memory import keep_freed_memory
from llmeff.core.precision import PrecisionName, precision
from llmeff.core.units import show_bytes
from llmeff.cost.workload import Workload
from llmeff.lab.race import Generation, ratio, run_generations, take_turns
from llmeff.models import DecoderConfig
from llmeff.models.single_layer import VOCABULARY, chunk_products, mixer_names, single_layer
from llmeff.models.transformer import Decoder
from llmeff.record.environment import environment

Kind = Literal["forward", "step", "decode"]
Times = dict[Kind, dict[int, list[float]]]
"""Seconds of a mixer by kind and length, with one value per process."""
KINDS: dict[Kind, str] = {"forward": "forward", "step": "forward and backward", "decode": "decoding a token"}
"""The kinds of calls that are timed, with their names in tables."""
TURN_S = 0.05
"""Minimum duration of a timing, in seconds. The timed call is repeated until then."""
DECODED = 16
"""Maximum number of tokens that are decoded for one timing."""
LAST = 3
"""The exponent of time is fitted to this many of the largest lengths."""


@dataclass(frozen=True, kw_only=True)
class MixerRace:
    """The settings of `llmeff bench mixers`."""

    lengths: tuple[int, ...]
    """Sequence lengths (T) in tokens, ascending."""
    mixers: tuple[str, ...] = ()
    """Mixers by name, each optionally with settings, as in "sliding window=64". The first is the baseline. If
    empty, all mixers race."""
    width: int = 64
    """Width of the residual stream (D)."""
    num_heads: int = 2
    """Number of heads (N). The width of a head is D / N."""
    precision: PrecisionName = "fp32"
    """Number formats."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    threads: int = 1
    """Number of threads of a process, if it runs on a CPU."""
    processes: int = 3
    """Number of fresh processes, which run one after another. Intervals are over processes."""
    rounds: int = 3
    """Number of turns of every mixer at every length in a process. Their median is the value of the process."""
    seed: int = 0
    """Seed for the order of turns, the weights and the tokens."""
    modules: tuple[str, ...] = ()
    """Names of modules that every process imports, for the mixers that they register."""

    def configs(self) -> dict[str, DecoderConfig]:
        """Returns the config of each mixer's model, by the mixer's name with its settings.

        Raises:
            ConfigError: a field has an invalid value, or a mixer is unknown.
        """
        problems = [*self._too_small(), *self._other_problems()]
        if problems:
            raise ConfigError(problems)
        configs = {mixer: self._config(mixer) for mixer in self.mixers or mixer_names()}
        longest = self.workload(self.lengths[-1])
        lacking = [
            f"--mixer {mixer!r}: {lack}" for mixer, config in configs.items() for lack in config.problems(longest)
        ]
        if lacking:
            raise ConfigError(lacking)
        return configs

    def _too_small(self) -> list[str]:
        """Returns an error message for each number that is below its minimum."""
        minima = (
            ("width", self.width, 1), ("heads", self.num_heads, 1), ("processes", self.processes, 2),
            ("rounds", self.rounds, 1), ("threads", self.threads, 1),
        )  # fmt: skip
        return [f"--{name} {value}: must be at least {least}" for name, value, least in minima if value < least]

    def _other_problems(self) -> list[str]:
        """Returns an error message for each problem with the mixers' names, the lengths or the device."""
        problems = []
        if len(set(self.mixers)) < len(self.mixers):
            problems.append(f"--mixer: give different mixers. Given: {', '.join(self.mixers)}")
        if len(self.lengths) < LAST or list(self.lengths) != sorted({*self.lengths}) or self.lengths[0] < 2:
            problems.append(
                f"--length: give at least {LAST} ascending numbers of tokens, each at least 2. Given: "
                f"{', '.join(map(str, self.lengths))}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("--device cuda: torch sees no CUDA device; allowed here: cpu")
        return problems

    def workload(self, length: int) -> Workload:
        """Returns the workload of a forward and backward pass over `length` tokens."""
        return Workload(
            num_sequences=1,
            num_tokens=length,
            precision_name=self.precision,
            num_threads=self.threads,
            instruction_set=instruction_set(),
            on_cpu=self.device == "cpu",
        )

    def _config(self, mixer: str) -> DecoderConfig:
        try:
            name, *settings = shlex.split(mixer) or [""]
        except ValueError as error:
            raise ConfigError(f"--mixer {mixer!r}: cannot be read ({error})") from None
        try:
            return single_layer(name, settings, width=self.width, num_heads=self.num_heads)
        except ConfigError as error:
            raise ConfigError([f"--mixer {mixer!r}: {problem}" for problem in error.problems]) from None


class _Cache:
    """The decoding cache of one layer. Keys and values have one buffer each, allocated at full size.

    Args:
        room: number of tokens for which the buffers have room.
    """

    def __init__(self, room: int):
        self._room = room
        self.states: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._append("key", key), self._append("value", value)

    def _append(self, name: str, new: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = new.new_empty((*new.shape[:2], self._room, new.shape[3]))
        before = self.states[name].shape[2] if name in self.states else 0
        self._buffers[name][:, :, before : before + new.shape[2]] = new
        self.states[name] = self._buffers[name][:, :, : before + new.shape[2]]
        return self.states[name]

    def recall(self, name: str) -> Tensor | None:
        return self.states.get(name)

    def keep(self, name: str, state: Tensor) -> None:
        self.states[name] = state

    def num_bytes(self) -> int:
        return sum(state.numel() * state.element_size() for state in self.states.values())


class _Subject:
    """A mixer at one length, with the calls that are timed: `forward`, `step` and `decode`.

    Args:
        race: settings of the race.
        model: the mixer's one-layer model.
        length: number of tokens (T).
    """

    def __init__(self, race: MixerRace, model: Decoder, length: int):
        self.model, self._length = model, length
        self._device = torch.device(race.device)
        generator = torch.Generator().manual_seed(race.seed)
        self.tokens = torch.randint(VOCABULARY, (1, length), generator=generator).to(self._device)
        self._precision = precision(race.precision)
        self._cache: _Cache | None = None
        self._num_decoded = 0

    def _cast(self) -> torch.autocast:
        compute = getattr(torch, self._precision.compute)
        return torch.autocast(self._device.type, compute, enabled=self._precision.autocast)

    def loss(self) -> Tensor:
        with self._cast():
            loss: Tensor = self.model(self.tokens, targets=self.tokens)
        return loss

    def forward(self) -> None:
        with torch.inference_mode():
            self.loss()

    def step(self) -> None:
        self.loss().backward()

    def free_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def prefill(self, room: int) -> int:
        """Runs all tokens through the layer, to fill a new cache. Returns the cache's bytes.

        Args:
            room: number of further tokens for which the cache has space.
        """
        self._cache, self._num_decoded = _Cache(self._length + room), 0
        with self._cast():
            self.model.hidden(self.tokens, caches=[self._cache])
        return self._cache.num_bytes()

    @torch.inference_mode()
    def decode(self) -> None:
        """Decodes one more token after `prefill`."""
        assert self._cache is not None
        layout = Layout.plain(1, self._device, self._length + self._num_decoded)
        self._num_decoded += 1
        with self._cast():
            self.model.lm_head(self.model.hidden(self.tokens[:, :1], layout, [self._cache]))

    def free_cache(self) -> None:
        self._cache = None


def _timed(run: Callable[[], object], device: torch.device, at_most: int = 1_000_000) -> float:
    """Calls `run` for at least `TURN_S` seconds, but at most `at_most` times. Returns the mean seconds of a call."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start, count = now(), 0
    while True:
        run()
        count += 1
        passed = now() - start
        if passed >= TURN_S or count == at_most:
            return passed / count


def _turn(subject: _Subject, device: torch.device) -> dict[Kind, float]:
    """Times each kind of call. Returns the seconds of a call by kind."""
    forward_s, step_s = _timed(subject.forward, device), _timed(subject.step, device)
    subject.free_gradients()
    subject.prefill(DECODED + 1)
    subject.decode()  # warms up
    decode_s = _timed(subject.decode, device, DECODED)
    subject.free_cache()
    return {"forward": forward_s, "step": step_s, "decode": decode_s}


def _medians(
    subjects: Mapping[str, _Subject], rounds: int, order: random.Random, device: torch.device
) -> dict[str, dict[Kind, float]]:
    """Times the subjects in turns. Returns the median seconds of a call over rounds, by subject and by kind of call."""
    found = take_turns(list(subjects), rounds, order, lambda name: _turn(subjects[name], device))
    return {
        name: {kind: statistics.median(turns[name][kind] for turns in found) for kind in KINDS} for name in subjects
    }


def _in_process(race: MixerRace, order_seed: int, *, measures: bool) -> dict[str, Any]:
    """Takes all measurements of one process.

    Args:
        race: settings of the race.
        order_seed: seed for the order of turns.
        measures: whether to measure bytes and FLOPs too.

    Returns:
        The FLOP/s of matrix products and, by mixer and length, the median seconds of each kind of call. If
        `measures`, also the bytes and FLOPs, and the kernels that ran.
    """
    load_components(race.modules)
    keep_freed_memory()  # as in a training run
    torch.set_num_threads(race.threads)
    torch.manual_seed(race.seed)
    device, order = torch.device(race.device), random.Random(order_seed)
    models = {name: config.build().to(device) for name, config in race.configs().items()}
    found: dict[str, Any] = {
        "seconds": {name: {} for name in models},
        "measured": {name: {} for name in models},
        "kernels": {name: {} for name in models},
        "matmul_flops_per_s": matmul_rate(race, device),
    }
    for length in race.lengths:
        subjects = {name: _Subject(race, model, length) for name, model in models.items()}
        for name, subject in subjects.items():
            subject.step()  # warms up
            subject.free_gradients()
            if measures:
                found["measured"][name][length], found["kernels"][name][length] = _measured(subject, device)
        for name, medians in _medians(subjects, race.rounds, order, device).items():
            found["seconds"][name][length] = medians
    return found


def _measured(subject: _Subject, device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Measures bytes and FLOPs of a forward and backward pass, and bytes of the cache. Also returns the kernels that ran."""
    model = subject.model
    held = [*model.parameters(), *model.buffers(), subject.tokens]
    found: dict[str, float] = {
        "saved_bytes": meters.saved_bytes(subject.loss, held),
        "peak_bytes": meters.peak_bytes(subject.step, held, device),
    }
    subject.free_gradients()
    counted, ran = meters.count_step(subject.step)
    subject.free_gradients()
    found["state_bytes"] = subject.prefill(0)
    subject.free_cache()
    return found | counted, list(ran)


def matmul_rate(race: MixerRace, device: torch.device) -> float:
    """Returns the highest FLOP/s in 5 measurements of matrix products like those in a scan.

    They are batched products of (64, H) and (H, 64) matrices, where H is the width of a head, in the race's dtype.
    """
    dtype = getattr(torch, precision(race.precision).compute)
    left, right, flops = chunk_products(race.width // race.num_heads, device, dtype)
    return flops / min(_timed(lambda: left @ right, device) for _ in range(5))


def _predicted(race: MixerRace, config: DecoderConfig, length: int) -> dict[str, float]:
    price = config.price(race.workload(length))
    number_bytes = torch.finfo(getattr(torch, precision(race.precision).compute)).bits // 8
    peak_bytes = price.known("peak_bytes")
    return {
        **({} if peak_bytes is None else {"peak_bytes": peak_bytes}),
        "saved_bytes": price.total("saved_bytes"),
        "executed_flops": price.total("executed_flops"),
        "state_bytes": config.cache_bytes(length, number_bytes),
    }


def _work(race: MixerRace, pipe: Connection) -> None:
    """The main function of a process of the race.

    Receives `order_seed` and `measures` through the pipe, and sends back the result of `_in_process`.
    """
    order_seed, measures = pipe.recv()
    pipe.send(_in_process(race, order_seed, measures=measures))


def bench_mixers(race: MixerRace) -> dict[str, Any]:
    """Races mixers against the first one, and measures their memory and FLOPs.

    Returns:
        A dict for JSON. For each mixer, it has the number of parameters, the exponents of time over the `LAST` largest
        lengths, and the length from which the mixer is faster than the first. For each of its lengths, it has the seconds
        in every process, the ratio to the first mixer with a 95 % interval over processes, and the measured and predicted
        bytes and FLOPs.

    Raises:
        ConfigError: a field of the race has an invalid value, or a process ended early.
    """
    load_components(race.modules)
    configs = race.configs()
    race = replace(race, mixers=tuple(configs))

    def run(generation: Generation, number: int) -> dict[str, Any]:
        racer = generation.start(_work, race, early_end="a process of the race ended before its turns were over")
        answer: dict[str, Any] = racer.ask((race.seed + number, number == 0))
        return answer

    processes = run_generations(race.processes, run)
    times = {name: _times(race, name, processes) for name in configs}
    firsts = times[race.mixers[0]]
    mixers = {}
    for name, config in configs.items():
        cells = {
            str(length): _cell(times[name], firsts, length)
            | {key: processes[0][key][name][length] for key in ("measured", "kernels")}
            | {"predicted": _predicted(race, config, length)}
            for length in race.lengths
        }
        mixers[name] = {
            "parameters": sum(math.prod(weight.shape) for weight in config.weights()),
            "lengths": cells,
            "exponent": {kind: asdict(_exponent(seconds)) for kind, seconds in times[name].items()},
            "overtakes": {kind: overtakes(seconds, firsts[kind]) for kind, seconds in times[name].items()},
        }
    return {
        "race": asdict(race),
        "environment": environment(torch.device(race.device)).model_dump(mode="json"),
        "matmul_flops_per_s": [found["matmul_flops_per_s"] for found in processes],
        "mixers": mixers,
    }


def _times(race: MixerRace, name: str, processes: Sequence[Mapping[str, Any]]) -> Times:
    return {
        kind: {length: [found["seconds"][name][length][kind] for found in processes] for length in race.lengths}
        for kind in KINDS
    }


def _cell(times: Times, firsts: Times, length: int) -> dict[str, Any]:
    """Returns the seconds of a mixer at a length, and their ratios to the first mixer's seconds."""
    return {
        "seconds": {kind: seconds[length] for kind, seconds in times.items()},
        "ratio": {kind: asdict(_ratio(times[kind][length], firsts[kind][length])) for kind in KINDS},
    }


def _ratio(seconds: Sequence[float], firsts: Sequence[float]) -> Estimate:
    """Returns the ratio of `seconds` to `firsts`, with an interval. Each argument has one value per process."""
    return ratio([[value] for value in seconds], [[value] for value in firsts])


def _exponent(seconds: Mapping[int, Sequence[float]]) -> Estimate:
    """Returns the exponent with which time grows with length, with an interval over processes.

    It is the slope of log time over log length, fitted by least squares to the `LAST` largest lengths.

    Args:
        seconds: seconds by length, with one value per process.
    """
    lengths = sorted(seconds)[-LAST:]
    logs = [math.log(length) for length in lengths]
    processes = zip(*(seconds[length] for length in lengths), strict=True)
    return mean_interval(
        [statistics.linear_regression(logs, list(map(math.log, process_s))).slope for process_s in processes]
    )


def overtakes(seconds: Mapping[int, Sequence[float]], firsts: Mapping[int, Sequence[float]]) -> float | None:
    """Returns the length from which a mixer takes less time than the first mixer, by geometric means over processes.

    Between the largest length at which the mixer is slower and the next length, the log ratio of times is interpolated
    linearly over log length.

    Args:
        seconds: the mixer's seconds by length, with one value per process.
        firsts: the first mixer's seconds, in the same form.

    Returns:
        A number of tokens. It is the smallest length if the mixer is faster at all lengths, and None if the mixer is slower
        at the largest length.
    """
    lengths = sorted(seconds)
    logs = {length: math.log(_ratio(seconds[length], firsts[length]).value) for length in lengths}
    slower = [length for length in lengths if logs[length] >= 0]
    if not slower:
        return float(lengths[0])
    before = slower[-1]
    if before == lengths[-1]:
        return None
    after = lengths[lengths.index(before) + 1]
    share = logs[before] / (logs[before] - logs[after])
    return float(before * (after / before) ** share)


def tables(result: Mapping[str, Any]) -> list[TextTable]:
    """Returns a table of times by length for each kind of call, and a table of all other results of `bench_mixers`."""
    mixers = result["mixers"]
    first = next(iter(mixers))
    lengths = list(mixers[first]["lengths"])
    times = [
        TextTable(
            title=f"{words[0].upper()}{words[1:]} (ms) by length",
            headers=["mixer", *lengths],
            rows=[[name, *(_time(cell, kind) for cell in mixer["lengths"].values())] for name, mixer in mixers.items()],
        )
        for kind, words in KINDS.items()
    ]
    rate = statistics.median(result["matmul_flops_per_s"])
    rows = [_row(name, mixer, rate, is_first=name == first) for name, mixer in mixers.items()]
    headers = [
        "mixer", "parameters", f"state at {lengths[-1]}", "saved", "peak", "worst price error",
        "share of matmul rate", "exponent, step", "exponent, decoding", f"step beats {first} from", "decoding beats it from",
    ]  # fmt: skip
    return [*times, TextTable(title=f"At {lengths[-1]} tokens, and over all lengths", headers=headers, rows=rows)]


def _row(name: str, mixer: Mapping[str, Any], flops_per_s: float, *, is_first: bool) -> list[str]:
    """Returns a mixer's row in the table of all results except times. `flops_per_s` is the rate of matrix products."""
    *_, last = mixer["lengths"].values()
    measured = last["measured"]
    most_flops = statistics.median(last["seconds"]["step"]) * flops_per_s
    return [
        name,
        f"{mixer['parameters']:,}",
        show_bytes(measured["state_bytes"]),
        show_bytes(measured["saved_bytes"]),
        show_bytes(measured["peak_bytes"]),
        f"{100 * _worst_error(mixer):.2f} %",
        _share(measured.get("executed_flops"), most_flops),
        *(_spread(mixer["exponent"][kind]) for kind in ("step", "decode")),
        *("-" if is_first else _from(mixer["overtakes"][kind]) for kind in ("step", "decode")),
    ]


def _worst_error(mixer: Mapping[str, Any]) -> float:
    """Returns the largest relative error of a prediction, over all lengths. Ignores values that are 0 or not measured."""
    errors: list[float] = [
        abs(cell["predicted"][kind] / cell["measured"][kind] - 1)
        for cell in mixer["lengths"].values()
        for kind in cell["predicted"]
        if cell["measured"].get(kind)
    ]
    return max(errors)


def _share(flops: float | None, most: float) -> str:
    return "-" if flops is None else f"{flops / most:.2f}"


def _time(cell: Mapping[str, Any], kind: Kind) -> str:
    milliseconds = 1e3 * statistics.median(cell["seconds"][kind])
    return f"{milliseconds:.3g} (x {cell['ratio'][kind]['value']:.2f})"


def _spread(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.2f} ({estimate['lower']:.2f} to {estimate['upper']:.2f})"


def _from(length: float | None) -> str:
    return "not yet" if length is None else f"{length:,.0f}"


def picture(result: Mapping[str, Any]) -> bytes:
    """Plots seconds of a step, seconds of decoding a token, and bytes of state over length. Returns a PNG."""
    lengths = [int(length) for length in next(iter(result["mixers"].values()))["lengths"]]

    def of(value: Callable[[Mapping[str, Any]], float]) -> dict[str, list[float]]:
        return {name: [value(cell) for cell in mixer["lengths"].values()] for name, mixer in result["mixers"].items()}

    panels = [
        Curves(
            label="seconds, forward and backward", values=of(lambda cell: statistics.median(cell["seconds"]["step"]))
        ),
        Curves(label="seconds, decoding a token", values=of(lambda cell: statistics.median(cell["seconds"]["decode"]))),
        Curves(label="bytes kept for decoding", values=of(lambda cell: cell["measured"]["state_bytes"])),
    ]
    where = result["environment"]["device"]
    return curves(lengths, panels, "tokens", f"Mixers of width {result['race']['width']}, one layer, {where}")
