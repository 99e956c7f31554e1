"""Mixers alone: what each takes and keeps as sequences grow, and from which length on it overtakes the first.

What is timed is the model of `llmeff.models.single_layer`.
"""

import math
import multiprocessing
import random
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmeff.compare.intervals import Estimate, mean_interval, ratio_interval
from llmeff.compare.plots import Curves, curves
from llmeff.compare.text_table import TextTable
from llmeff.core import meters
from llmeff.core.components import load_components
from llmeff.core.config import ConfigError
from llmeff.core.dist import folder_off_paths
from llmeff.core.layout import Layout
from llmeff.core.memory import keep_freed_memory
from llmeff.core.precision import PrecisionName, precision
from llmeff.core.units import show_bytes
from llmeff.models import DecoderConfig
from llmeff.models.single_layer import VOCABULARY, LayerStep, chunk_products, mixer_names, single_layer
from llmeff.models.transformer import Decoder
from llmeff.record.environment import environment

Kind = Literal["forward", "step", "decode"]
KINDS: dict[Kind, str] = {"forward": "forward", "step": "forward and backward", "decode": "decoding a token"}
"""What is timed."""
TURN_S = 0.05
"""A turn is repeated until it has lasted so long."""
DECODED = 16
"""Tokens that a turn of decoding decodes at most."""
LAST = 3
"""Of how many of the largest lengths exponents are taken."""


@dataclass(frozen=True, kw_only=True)
class MixerRace:
    """What `llmeff bench mixers` races."""

    lengths: tuple[int, ...]
    """T, ascending."""
    mixers: tuple[str, ...] = ()
    """Names, with settings where they follow, as in "sliding window=64"; the first is the baseline. None: all that are known."""
    width: int = 64
    """D."""
    num_heads: int = 2
    """N; a head is D / N wide."""
    precision: PrecisionName = "fp32"
    """Number formats."""
    device: str = "cpu"
    """Where it computes."""
    threads: int = 1
    """Of a CPU."""
    processes: int = 3
    """Fresh processes, one after another; intervals are over them."""
    rounds: int = 3
    """Turns of every mixer at every length in a process; the median counts."""
    seed: int = 0
    """Of the order of turns, of weights and tokens."""
    modules: tuple[str, ...] = ()
    """Imported in every process, for the mixers that they register."""

    def configs(self) -> dict[str, DecoderConfig]:
        """The model of each mixer.

        Raises:
            ConfigError: something in the race cannot be.
        """
        problems = [
            f"--{name} {value}: at least {least}"
            for name, value, least in (
                ("width", self.width, 1), ("heads", self.num_heads, 1), ("processes", self.processes, 2),
                ("rounds", self.rounds, 1), ("threads", self.threads, 1),
            )
            if value < least
        ]  # fmt: skip
        if len(set(self.mixers)) < len(self.mixers):
            problems.append(f"--mixer: give different mixers, given: {', '.join(self.mixers)}")
        if len(self.lengths) < LAST or list(self.lengths) != sorted({*self.lengths}) or self.lengths[0] < 2:
            problems.append(
                f"--length: give at least {LAST} ascending numbers of tokens from 2 on, given: "
                f"{', '.join(map(str, self.lengths))}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("--device cuda: torch sees no CUDA device; allowed here: cpu")
        if problems:
            raise ConfigError(problems)
        found = {mixer: self._config(mixer) for mixer in self.mixers or mixer_names()}
        step = self.step(self.lengths[-1])
        lacking = [f"--mixer {mixer!r}: {lack}" for mixer, config in found.items() for lack in step.problems(config)]
        if lacking:
            raise ConfigError(lacking)
        return found

    def step(self, length: int) -> LayerStep:
        """A forward and backward pass over so many tokens."""
        return LayerStep(
            num_tokens=length,
            precision_name=self.precision,
            num_threads=self.threads,
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


class _Kept:
    """What a layer keeps while it decodes; keys and values lie in one place each, with room for what is to come."""

    def __init__(self, room: int):
        self._room = room
        self.states: dict[str, Tensor] = {}
        self._places: dict[str, Tensor] = {}

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._append("key", key), self._append("value", value)

    def _append(self, name: str, new: Tensor) -> Tensor:
        if name not in self._places:
            self._places[name] = new.new_empty((*new.shape[:2], self._room, new.shape[3]))
        before = self.states[name].shape[2] if name in self.states else 0
        self._places[name][:, :, before : before + new.shape[2]] = new
        self.states[name] = self._places[name][:, :, : before + new.shape[2]]
        return self.states[name]

    def recall(self, name: str) -> Tensor | None:
        return self.states.get(name)

    def keep(self, name: str, state: Tensor) -> None:
        self.states[name] = state

    def num_bytes(self) -> int:
        return sum(state.numel() * state.element_size() for state in self.states.values())


class _Subject:
    """A mixer at a length."""

    def __init__(self, race: MixerRace, model: Decoder, length: int):
        self.model, self._length = model, length
        self._device = torch.device(race.device)
        generator = torch.Generator().manual_seed(race.seed)
        self.tokens = torch.randint(VOCABULARY, (1, length), generator=generator).to(self._device)
        self._autocast = precision(race.precision)
        self._kept: _Kept | None = None
        self._num_decoded = 0

    def _cast(self) -> torch.autocast:
        own = self._autocast
        return torch.autocast(self._device.type, getattr(torch, own.compute), enabled=own.autocast)

    def loss(self) -> Tensor:
        with self._cast():
            loss: Tensor = self.model(self.tokens, targets=self.tokens)
        return loss

    def forward(self) -> None:
        with torch.inference_mode():
            self.loss()

    def step(self) -> None:
        self.loss().backward()

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def prefill(self, room: int) -> int:
        """Lets the layer see all tokens; returns the bytes that it keeps of them."""
        self._kept, self._num_decoded = _Kept(self._length + room), 0
        with self._cast():
            self.model.hidden(self.tokens, caches=[self._kept])
        return self._kept.num_bytes()

    @torch.inference_mode()
    def decode(self) -> None:
        """One more token."""
        assert self._kept is not None
        layout = Layout.plain(1, self._device, self._length + self._num_decoded)
        self._num_decoded += 1
        with self._cast():
            self.model.lm_head(self.model.hidden(self.tokens[:, :1], layout, [self._kept]))

    def end(self) -> None:
        """Lets go of what it decoded from."""
        self._kept = None


def _timed(run: Callable[[], object], device: torch.device, at_most: int = 1_000_000) -> float:
    """Seconds of a call, over as many as a turn lasts."""

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


def _generation(race: MixerRace, order_seed: int, *, measures: bool) -> dict[str, Any]:
    """All that one process finds: seconds by mixer, length and kind; with `measures`, bytes and FLOPs too."""
    load_components(race.modules)
    keep_freed_memory()  # as a run does
    torch.set_num_threads(race.threads)
    torch.manual_seed(race.seed)
    device, order = torch.device(race.device), random.Random(order_seed)
    models = {name: config.build().to(device) for name, config in race.configs().items()}
    found: dict[str, Any] = {
        "seconds": {},
        "measured": {},
        "kernels": {},
        "matmul_flops_per_s": matmul_rate(race, device),
    }
    for length in race.lengths:
        subjects = {name: _Subject(race, model, length) for name, model in models.items()}
        for name, subject in subjects.items():
            subject.step()  # warms up
            subject.forget()
            if measures:
                measured, ran = _measured(subject, device)
                found["measured"].setdefault(name, {})[length] = measured
                found["kernels"].setdefault(name, {})[length] = list(ran)
        seconds: dict[str, dict[Kind, list[float]]] = {name: {kind: [] for kind in KINDS} for name in subjects}
        for _ in range(race.rounds):
            for name in order.sample(list(subjects), len(subjects)):
                subject, own = subjects[name], seconds[name]
                own["forward"].append(_timed(subject.forward, device))
                own["step"].append(_timed(subject.step, device))
                subject.forget()
                subject.prefill(DECODED + 1)
                subject.decode()
                own["decode"].append(_timed(subject.decode, device, DECODED))
                subject.end()
        for name, own in seconds.items():
            medians = {kind: statistics.median(values) for kind, values in own.items()}
            found["seconds"].setdefault(name, {})[length] = medians
    return found


def _measured(subject: _Subject, device: torch.device) -> tuple[dict[str, float], tuple[str, ...]]:
    """Bytes and FLOPs of a forward and backward pass, and what is kept for decoding; the kernels that ran."""
    model = subject.model
    held = [*model.parameters(), *model.buffers(), subject.tokens]
    found: dict[str, float] = {
        "saved_bytes": meters.saved_bytes(subject.loss, held),
        "peak_bytes": meters.peak_bytes(subject.step, held, device),
    }
    subject.forget()
    counted, ran = meters.count_step(subject.step)
    subject.forget()
    found["state_bytes"] = subject.prefill(0)
    subject.end()
    return found | counted, ran


def matmul_rate(race: MixerRace, device: torch.device) -> float:
    """FLOP/s of products of a scan's chunks, 64 rows by as many columns over a head's width, batched, in the format of products."""
    dtype = getattr(torch, precision(race.precision).compute)
    left, right, flops = chunk_products(race.width // race.num_heads, device, dtype)
    return flops / min(_timed(lambda: left @ right, device) for _ in range(5))


def _predicted(race: MixerRace, config: DecoderConfig, length: int) -> dict[str, float]:
    price = race.step(length).price(config)
    number_bytes = torch.finfo(getattr(torch, precision(race.precision).compute)).bits // 8
    peak_bytes = price.known("peak_bytes")
    return {
        **({} if peak_bytes is None else {"peak_bytes": peak_bytes}),
        "saved_bytes": price.total("saved_bytes"),
        "executed_flops": price.total("executed_flops"),
        "state_bytes": config.cache_bytes(length, number_bytes),
    }


def _work(race: MixerRace, order_seed: int, measures: bool, end: Any) -> None:
    end.send(_generation(race, order_seed, measures=measures))


def bench_mixers(race: MixerRace) -> dict[str, Any]:
    """Races mixers.

    Returns:
        for JSON: by mixer its parameters and, at each length, seconds of every process, with a 95 % interval over the
        processes of the ratio to the first mixer, bytes and FLOPs measured and predicted; the exponents of time over the
        three largest lengths; from which length on it is faster than the first.

    Raises:
        ConfigError: something in the race cannot be, or a process ended.
    """
    load_components(race.modules)
    configs = race.configs()
    race = replace(race, mixers=tuple(configs))
    generations = [_apart(race, number) for number in range(race.processes)]
    times: dict[str, dict[Kind, dict[int, list[float]]]] = {
        name: {
            kind: {length: [each["seconds"][name][length][kind] for each in generations] for length in race.lengths}
            for kind in KINDS
        }
        for name in configs
    }
    firsts = times[next(iter(configs))]
    found = {}
    for name, config in configs.items():
        seconds = times[name]
        found[name] = {
            "parameters": sum(math.prod(weight.shape) for weight in config.weights()),
            "lengths": {
                str(length): {
                    "seconds": {kind: own[length] for kind, own in seconds.items()},
                    "ratio": {
                        kind: asdict(_ratio(seconds[kind][length], firsts[kind][length])) for kind in KINDS
                    },
                    "measured": generations[0]["measured"][name][length],
                    "kernels": generations[0]["kernels"][name][length],
                    "predicted": _predicted(race, config, length),
                }
                for length in race.lengths
            },
            "exponent": {kind: asdict(_exponent(own)) for kind, own in seconds.items()},
            "overtakes": {kind: overtakes(own, firsts[kind]) for kind, own in seconds.items()},
        }  # fmt: skip
    return {
        "race": asdict(race),
        "environment": environment(torch.device(race.device)).model_dump(mode="json"),
        "matmul_flops_per_s": [each["matmul_flops_per_s"] for each in generations],
        "mixers": found,
    }


def _apart(race: MixerRace, number: int) -> dict[str, Any]:
    """A generation, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    lane, end = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(race, race.seed + number, number == 0, end))
    with folder_off_paths():
        process.start()
    end.close()
    try:
        found: dict[str, Any] = lane.recv()
    except EOFError:
        raise ConfigError("a process of the race ended before its turns did: its error stands above") from None
    finally:
        lane.close()
        process.join()
    return found


def _ratio(own: Sequence[float], firsts: Sequence[float]) -> Estimate:
    return ratio_interval([math.log(value / other) for value, other in zip(own, firsts, strict=True)])


def _exponent(seconds: Mapping[int, Sequence[float]]) -> Estimate:
    """The slope of the logarithm of time over that of length, by least squares over the `LAST` largest lengths."""
    lengths = sorted(seconds)[-LAST:]
    logs = [math.log(length) for length in lengths]
    processes = zip(*(seconds[length] for length in lengths), strict=True)
    return mean_interval([statistics.linear_regression(logs, list(map(math.log, own))).slope for own in processes])


def overtakes(seconds: Mapping[int, Sequence[float]], firsts: Mapping[int, Sequence[float]]) -> float | None:
    """The length from which on all longer ones take less time than the first mixer's, by geometric means over processes.

    Between the last length that takes more and the next, the logarithm of the ratio is taken for a straight line over
    that of the length; the least length that was measured, where all take less; None where the largest takes more.
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
    """The result for people."""
    lengths = [*next(iter(result["mixers"].values()))["lengths"]]
    first = next(iter(result["mixers"]))
    shown = []
    for kind, words in KINDS.items():
        rows = [
            [name, *(_time(own["lengths"][length], kind) for length in lengths)]
            for name, own in result["mixers"].items()
        ]
        shown.append(
            TextTable(title=f"{words[0].upper()}{words[1:]}, ms, by length", headers=["mixer", *lengths], rows=rows)
        )
    rate = statistics.median(result["matmul_flops_per_s"])
    rows = []
    for name, own in result["mixers"].items():
        last = own["lengths"][lengths[-1]]
        step_s = statistics.median(last["seconds"]["step"])
        errors = [
            abs(each["predicted"][kind] / each["measured"][kind] - 1)
            for each in own["lengths"].values()
            for kind in each["predicted"]
            if each["measured"].get(kind)
        ]
        rows.append([
            name,
            f"{own['parameters']:,}",
            show_bytes(last["measured"]["state_bytes"]),
            show_bytes(last["measured"]["saved_bytes"]),
            show_bytes(last["measured"]["peak_bytes"]),
            f"{100 * max(errors):.2f} %",
            _share(last["measured"].get("executed_flops"), step_s * rate),
            *(_spread(own["exponent"][kind]) for kind in ("step", "decode")),
            *(_from(own["overtakes"][kind]) if name != first else "-" for kind in ("step", "decode")),
        ])  # fmt: skip
    headers = [
        "mixer", "parameters", f"state at {lengths[-1]}", "saved", "peak", "worst price error",
        "of the product's rate", "exponent, step", "exponent, decoding", f"step beats {first} from", "decoding from",
    ]  # fmt: skip
    return [*shown, TextTable(title=f"At {lengths[-1]} tokens, and over lengths", headers=headers, rows=rows)]


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
    """Time of a step, time of decoding a token and bytes of state over length, as a PNG."""
    lengths = [int(length) for length in next(iter(result["mixers"].values()))["lengths"]]

    def of(value: Callable[[Mapping[str, Any]], float]) -> dict[str, list[float]]:
        return {name: [value(cell) for cell in own["lengths"].values()] for name, own in result["mixers"].items()}

    panels = [
        Curves(label="s, forward and backward", values=of(lambda cell: statistics.median(cell["seconds"]["step"]))),
        Curves(label="s, decoding a token", values=of(lambda cell: statistics.median(cell["seconds"]["decode"]))),
        Curves(label="bytes kept for decoding", values=of(lambda cell: cell["measured"]["state_bytes"])),
    ]
    where = result["environment"]["device"]
    return curves(lengths, panels, "tokens", f"Mixers of width {result['race']['width']}, one layer, {where}")
