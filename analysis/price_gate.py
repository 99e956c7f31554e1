"""Compares prices with measurements of random models and steps: `python analysis/price_gate.py`.

Writes results/price_gate.json.
"""

import itertools
import json
import random
import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from llmeff.attention import MixerConfig, Softmax
from llmeff.config.run import RunConfig
from llmeff.core.cpu import instruction_set
from llmeff.core.files import write_text
from llmeff.core.layout import Layout
from llmeff.core.meters import count_flops, peak_bytes, saved_bytes
from llmeff.core.parameters import parameter_infos
from llmeff.cost.price import Kind, Price
from llmeff.cost.workload import Workload
from llmeff.models import DecoderConfig, ModelConfig, SegNetBasic, SegNetVGG
from llmeff.models.transformer import LayerConfig
from llmeff.optim import AdamW
from llmeff.plan.price import price_step

NUM_CASES, NUM_IMAGE_CASES = 40, 12
MIXER_WORKLOADS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {}),
    (4, {"packed": True}),
    (1, {"precision_name": "bf16"}),
    (2, {"recompute": True, "num_micro_batches": 3}),
    (1, {"recompute": True, "packed": True}),
)
"""Workloads of each mixer: key-value heads (of four heads), and fixed fields of the `Workload`."""
KINDS = ("parameters", "optimizer_bytes", "executed_flops", "saved_bytes", "logits_bytes", "peak_bytes")


@dataclass(frozen=True)
class Case:
    """A model and the workload of its step."""

    model: ModelConfig
    workload: Workload


def random_case(seed: int, **workload: Any) -> Case:
    """Draws a small decoder of random shape, and a workload. `workload` fixes fields of the `Workload`."""
    pick = random.Random(seed)

    def heads() -> dict[str, int]:
        kv_heads = pick.choice((1, 1, 2, 3))
        return {"num_kv_heads": kv_heads, "num_heads": kv_heads * pick.choice((1, 1, 2, 4))}

    def layer() -> LayerConfig:
        present = {"has_mixer": pick.random() < 0.75, "has_mlp": pick.random() < 0.75}
        return LayerConfig(**heads(), mlp_width=pick.randint(8, 200), **present)

    num_layers = pick.randint(1, 4)
    model = DecoderConfig(
        vocab_size=pick.choice((17, 60, 300, 1000, 4000)),
        width=pick.choice((16, 24, 40, 64, 96)),
        num_layers=num_layers,
        head_dim=pick.choice((8, 12, 16, 32)),
        mlp_width=pick.choice(("auto", 24, 100, 256)),
        mixer=Softmax(qk_norm=pick.random() < 0.4),
        tied_embeddings=pick.random() < 0.5,
        layers=tuple(layer() for _ in range(num_layers)) if pick.random() < 0.4 else None,
        **heads(),
    )
    num_sequences, num_tokens = pick.randint(1, 6), pick.randint(16, 96)
    drawn = Workload(
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        num_micro_batches=pick.choice((1, 1, 3)),
        recompute=pick.random() < 0.4,
        loss_chunk=pick.choice((None, pick.randint(8, num_sequences * num_tokens))),
        packed=pick.random() < 0.4,
    )
    return Case(model, replace(drawn, **workload))


def random_image_case(seed: int, **workload: Any) -> Case:
    """Draws a small SegNet and a workload. Images are so large that kernels make only copies that the law covers."""
    pick = random.Random(seed)
    model = pick.choice((SegNetVGG, SegNetBasic))(
        num_classes=pick.randint(2, 19),
        width=pick.choice((16, 24)),
        connection=pick.choice(("none", "add", "concat", "concat1x1")),
        residual_blocks=pick.random() < 0.5,
        norm=pick.choice(("batch", "batch_sync", "group", "frozen")),
    )
    height, width = pick.randint(48, 72), pick.randint(48, 80)
    drawn = Workload(
        num_sequences=pick.randint(1, 3),
        num_tokens=height * width,
        image_size=(height, width),
        num_micro_batches=pick.choice((1, 1, 3)),
        recompute=pick.random() < 0.4,
    )
    return Case(model, replace(drawn, **workload))


def mixer_case(name: str, num_kv_heads: int, **workload: Any) -> Case:
    """Builds a decoder with one mixer, on rows longer than one chunk of a scan.

    If the mixer cannot share key-value heads, the number of heads replaces `num_kv_heads`.
    """
    num_tokens = random.Random(name).randint(65, 127)
    plain = DecoderConfig(
        vocab_size=60, width=64, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads, head_dim=16, mlp_width=96
    )
    mixer = MixerConfig.registry[name]()
    shared = {"num_kv_heads": "auto"} if mixer.problems(plain.mixer_shape(0)) else {}
    model = plain.model_copy(update={"mixer": mixer, **shared})
    return Case(model, replace(Workload(num_sequences=2, num_tokens=num_tokens), **workload))


class Step:
    """A training step of a case in plain PyTorch."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.model: Any = case.model.build()
        self.model.recompute = case.workload.recompute
        self.optimizer = AdamW().build(parameter_infos(self.model, self.model.roles()))

    def forward(self, tokens: Tensor, targets: Tensor, layout: Layout) -> Tensor:
        """Computes the loss summed over all tokens of a micro-batch."""
        precision = self.case.workload.precision
        with torch.autocast("cpu", getattr(torch, precision.compute), enabled=precision.autocast):
            loss: Tensor = self.model(tokens, layout, targets, self.case.workload.loss_chunk)
        return loss

    def batch(self) -> tuple[Tensor, Tensor, Layout]:
        """Returns random tokens, targets and the layout of a micro-batch."""
        work, model = self.case.workload, self.case.model
        assert isinstance(model, DecoderConfig)
        shape = (work.num_sequences, work.num_tokens)
        tokens, targets = (torch.randint(model.vocabulary(), shape) for _ in range(2))
        if not work.packed:
            return tokens, targets, Layout.plain(work.num_tokens, tokens.device)
        places = torch.arange(work.num_tokens).repeat(work.num_sequences, 1)
        half = work.num_tokens // 2
        return tokens, targets, Layout(positions=places % half, documents=places // half)

    def saved(self) -> Counter[str]:
        """Measures the bytes that are kept for backward, by part."""
        return ShardedCheckpoint(self).num_bytes

    def run(self) -> None:
        """Runs one optimizer step."""
        work = self.case.workload
        for _ in range(work.num_micro_batches):
            batch: Any = self.batch()
            loss = self.forward(*batch)
            (loss / (work.num_sequences * work.num_tokens * work.num_micro_batches)).backward()
            del loss
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class ImageStep(Step):
    """A training step of a model of images. Its saved bytes are measured in total, not by part."""

    def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
        """Computes the loss summed over all pixels of a micro-batch."""
        precision = self.case.workload.precision
        with torch.autocast("cpu", getattr(torch, precision.compute), enabled=precision.autocast):
            return self.case.model.loss(self.model, batch)

    def batch(self) -> tuple[dict[str, Any]]:  # type: ignore[override]
        """Returns a micro-batch of the right shape, without real images."""
        return (self.case.model.example(self.case.workload),)

    def saved(self) -> Counter[str]:
        """Measures the bytes that are kept for backward."""
        (batch,) = self.batch()
        held = [*self.model.parameters(), *self.model.buffers(), *batch.values()]
        return Counter({"model": saved_bytes(lambda: self.forward(batch), held)})


class ShardedCheckpoint:
    """Measures the bytes that autograd keeps for backward, by the part of the model that first saves them."""

    def __init__(self, step: Step):
        self._parts: list[str] = ["layer inputs"]
        self._held: dict[int, tuple[torch.UntypedStorage, str]] = {}
        for name, module in step.model.named_modules():
            if part := _part(name):
                module.register_forward_pre_hook(lambda *_, part=part: self._parts.append(part))
                module.register_forward_hook(lambda *_: self._parts.pop() and None)
        step.model.norm.register_forward_hook(lambda *_: self._parts.__setitem__(0, "head"))
        tokens, targets, layout = step.batch()
        places = [x for x in (layout.positions, layout.documents) if x is not None]
        held = (*step.model.parameters(), *step.model.buffers(), tokens, targets, *places)
        known = {x.untyped_storage()._cdata for x in held}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._held.setdefault(storage._cdata, (storage, self._parts[-1]))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            step.forward(tokens, targets, layout)
        self.num_bytes: Counter[str] = Counter()
        for storage, part in self._held.values():
            self.num_bytes[part] += storage.nbytes()


class Logits(TorchDispatchMode):
    """Measures the bytes of the largest output of a log-softmax, which is that of the loss."""

    num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._log_softmax:
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


def _part(name: str) -> str | None:
    last = name.rpartition(".")[2]
    known = {"self_attn": "attention", "mlp": "mlp", "embed_tokens": "embedding", "norm": "norms"}
    if last == "norm" and last != name:  # a norm inside a mixer
        return None
    return "norms" if last.endswith("_layernorm") else known.get(last)


def measure(case: Case) -> Price:
    """Measures what the step of a case takes."""
    flash, before = case.workload.kernel == "flash", torch.get_num_threads()
    torch.set_num_threads(case.workload.num_threads)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if flash else SDPBackend.MATH):
            return _measure(Step(case) if case.workload.image_size is None else ImageStep(case))
    finally:
        torch.set_num_threads(before)


def _measure(step: Step) -> Price:
    step.run()  # the first step creates the optimizer's state
    state = [x for own in step.optimizer.state.values() for x in own.values()]
    held = [*step.model.parameters(), *step.model.buffers(), *state]
    entries: Counter[tuple[Kind, str]] = Counter(
        {
            ("parameters", "model"): sum(p.numel() for p in step.model.parameters()),
            ("optimizer_bytes", "model"): sum(x.nbytes for x in state),
            ("executed_flops", "step"): count_flops(step.run),
            ("peak_bytes", "step"): peak_bytes(step.run, held, torch.device("cpu")),
        }
    )
    with Logits() as logits:
        saved = step.saved()
    entries["logits_bytes", "loss"] = logits.num_bytes
    entries.update({("saved_bytes", part): num_bytes for part, num_bytes in saved.items()})
    return Price(entries, "traced")


def predict(case: Case) -> Price:
    """Predicts what the step of a case takes on this machine."""
    run = RunConfig.model_construct(model=case.model)  # unvalidated, because no task fits both kinds of models
    return price_step(run, replace(case.workload, instruction_set=instruction_set()))


def errors(predicted: Price, measured: Price) -> dict[str, float]:
    """Returns the relative errors of the known kinds, and of saved bytes by part if they were measured by part."""
    known = [kind for kind in KINDS if kind not in predicted.unknown and measured.total(kind)]
    pairs = {kind: (predicted.total(kind), measured.total(kind)) for kind in known}
    parts = measured.parts("saved_bytes")
    parts.pop("model", None)
    pairs |= {f"saved_bytes: {part}": (predicted.parts("saved_bytes").get(part, 0), parts[part]) for part in parts}
    return {name: given / real - 1 for name, (given, real) in pairs.items()}


def main(path: Path) -> None:
    """Measures all cases, prints a table of errors, and writes all values."""
    rows = []
    cases = [(seed, random_case(seed)) for seed in range(NUM_CASES)]
    for seed, name in itertools.product(range(NUM_IMAGE_CASES), ("fp32", "bf16")):
        cases.append((seed, random_image_case(seed, precision_name=name)))
    for name, (seed, (heads, workload)) in itertools.product(MixerConfig.registry.names(), enumerate(MIXER_WORKLOADS)):
        cases.append((seed, mixer_case(name, heads, **workload)))
    for seed, case in cases:
        predicted, measured = predict(case), measure(case)
        rows.append(
            {
                "seed": seed,
                "model": case.model.model_dump(mode="json"),
                "workload": asdict(case.workload),
                "predicted": predicted.as_dict(),
                "measured": measured.as_dict(),
                "error": errors(predicted, measured),
            }
        )
    names = sorted({name for row in rows for name in row["error"]})
    print(f"{'relative error':<28}{'cases':>6}{'median':>12}{'worst':>12}")
    for name in names:
        sizes = [abs(row["error"][name]) for row in rows if name in row["error"]]
        print(f"{name:<28}{len(sizes):>6}{statistics.median(sizes):>12.5%}{max(sizes):>12.5%}")
    write_text(path, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "price_gate.json")
