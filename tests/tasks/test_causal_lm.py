"""What readers see of language modelling, on two documents whose every probability is known."""

import gzip
import math
import re

import pytest
import tokenizers
import torch
from torch import nn

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.dist import world
from llmeff.core.seed import derive
from llmeff.data import TextData
from llmeff.data.builtin import Builtin
from llmeff.data.splits import Document
from llmeff.data.tokenizer import END, Tokenizer
from llmeff.models import DecoderConfig
from llmeff.record.reader import read_run
from llmeff.run.loop import train
from llmeff.tasks import CausalLM, causal_lm
from llmeff.tasks.task import UnitResult
from tests.run.test_loop import TINY

CPU = torch.device("cpu")
FIRST, SECOND = "aé漢🙂漢", "é"
"""13 bytes (1 + 2 + 3 + 4 + 3) in three tokens, and 2 bytes in one."""
VOCABULARY = ["a", "é", "漢", "🙂", "aé", "漢🙂"]
HALVINGS = {
    (END, "aé"): 1, ("aé", "漢🙂"): 2, ("漢🙂", "漢"): 3, ("漢", END): 4,
    (END, "é"): 2, ("é", END): 1,
}  # fmt: skip
"""Bits that each token of the documents costs after the one before: 10 of the first, 3 of the second."""


class Bigrams(nn.Module):
    """Gives a token the probability 2^-bits after the one before, and shares out the rest among the others.

    Each row of logits is moved by a number of its own, which changes no probability.
    """

    def __init__(self, ids):
        super().__init__()
        probabilities = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        for (before, after), bits in HALVINGS.items():
            probabilities[ids[before], ids[after]] = 2.0**-bits
        free = probabilities == 0
        probabilities += free * (1 - probabilities.sum(1, keepdim=True)) / free.sum(1, keepdim=True)
        self.logits = nn.Parameter((probabilities.log() + torch.arange(len(ids))[:, None]).float())
        self.tokens_seen = 0

    def forward(self, tokens, layout=None, targets=None, loss_chunk=None):
        self.tokens_seen += tokens.numel()
        return self.logits[tokens]


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """Opens the task over the two documents, and the model whose bits are known."""
    monkeypatch.setenv("LLMEFF_CACHE", str(tmp_path / "cache"))
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[("a", "é"), ("漢", "🙂")]))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([END])
    (tmp_path / "tokenizer").mkdir()
    Tokenizer(backend).save(tmp_path / "tokenizer")
    documents = [Document(unit="train", text="aé" * 20, split="train")]
    documents += [Document(unit=unit, text=unit, split="validation") for unit in (FIRST, SECOND)]
    monkeypatch.setattr(Builtin, "documents", lambda source: iter(documents))
    monkeypatch.setattr(Builtin, "fingerprint", lambda source: "by hand")

    def make(**settings):
        data = {"tokenizer": {"name": "hf", "path": str(tmp_path / "tokenizer")}, "sequence_length": 3, **settings}
        task = CausalLM().open(validate(TextData, data), 0, 2, is_main=True, wait=lambda: None)
        task.resolve(DecoderConfig(width=8, num_heads=1, vocab_size="auto"))
        return task, Bigrams(ids | {END: len(ids)})

    return make


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("packing", ["plain", "documents"])
def test_bits_per_byte_of_a_document_by_hand(by_hand, packing, length):
    task, model = by_hand(packing=packing, sequence_length=length)
    first, second = task.evaluate(model, "validation", None, CPU, world())
    assert (first.unit, first.count, first.metrics) == (FIRST, 4, {"bytes": 13})
    assert (second.unit, second.count, second.metrics) == (SECOND, 2, {"bytes": 2})
    nats_a_bit = 0.6931471805599453
    assert first.loss_sum == pytest.approx(10 * nats_a_bit, rel=1e-6)
    assert second.loss_sum == pytest.approx(3 * nats_a_bit, rel=1e-6)
    found = task.summary([first, second])
    assert set(found) == {"loss", "bits_per_byte"}
    assert found["bits_per_byte"] == pytest.approx(13 / 15, rel=1e-6)
    assert found["loss"] == pytest.approx(13 * nats_a_bit / 6, rel=1e-6)
    assert task.summary([second])["bits_per_byte"] == pytest.approx(3 / 2, rel=1e-6)


def test_an_evaluation_of_a_few_documents_is_of_the_first(by_hand):
    task, model = by_hand()
    (only,) = task.evaluate(model, "validation", 1, CPU, world())
    assert (only.unit, only.count, only.metrics) == (FIRST, 4, {"bytes": 13})
    assert task.summary([only])["bits_per_byte"] == pytest.approx(10 / 13, rel=1e-6)
    for more in (2, 3):
        assert len(list(task.evaluate(model, "validation", more, CPU, world()))) == 2


def test_documents_without_bytes_cost_what_their_tokens_do(by_hand):
    """A document of ends alone: a division by nothing would cost the result of the run."""
    task, _ = by_hand()
    found = task.summary([UnitResult(unit="it", loss_sum=math.log(8), count=3, metrics={"bytes": 0.0})])
    assert (found["loss"], found["bits_per_byte"]) == (pytest.approx(math.log(2)), pytest.approx(3))


def test_no_more_logits_live_at_once_than_may(by_hand, monkeypatch):
    task, model = by_hand(sequence_length=1)
    seen = []
    model.register_forward_pre_hook(lambda model, given: seen.append(len(given[0])))
    whole = list(task.evaluate(model, "validation", None, CPU, world()))
    assert seen == [6]
    seen.clear()
    monkeypatch.setattr(causal_lm, "_EVAL_LOGITS", 2 * 2048)
    assert list(task.evaluate(model, "validation", None, CPU, world())) == whole
    assert seen == [2, 2, 2]
    seen.clear()
    monkeypatch.setattr(causal_lm, "_EVAL_LOGITS", 1)
    assert list(task.evaluate(model, "validation", None, CPU, world())) == whole
    assert seen == [1] * 6


@pytest.mark.parametrize(("vocabulary", "length", "batches"), [
    (2**22, 1, [4, 2]),
    (2**23, 1, [2, 2, 2]),
    (2**21, 3, [2]),
    (2**23, 3, [1, 1]),
])  # fmt: skip
def test_sixteen_million_logits_live_at_once(by_hand, monkeypatch, vocabulary, length, batches):
    task, model = by_hand(sequence_length=length)
    monkeypatch.setattr(task.corpus, "vocab_size", vocabulary)
    seen = []
    model.register_forward_pre_hook(lambda model, given: seen.append(len(given[0])))
    list(task.evaluate(model, "validation", None, CPU, world()))
    assert seen == batches


def test_nothing_is_kept_for_a_backward_pass_that_never_comes(by_hand):
    task, model = by_hand()
    kept = []
    model.register_forward_hook(lambda model, given, logits: kept.append(logits.requires_grad))
    list(task.evaluate(model, "validation", None, CPU, world()))
    task.sample(model, "validation", 2, CPU)
    assert kept == [False] * len(kept)
    assert len(kept) == 3


def test_documents_of_a_window_are_told_apart_where_they_are_packed(by_hand):
    """A window of seven tokens: the end that begins the first document, its three, the end that begins the second, its one,
    and one that is no document's."""
    seen = []
    for packing in ("documents", "plain"):
        task, model = by_hand(packing=packing, sequence_length=7)
        model.register_forward_pre_hook(lambda model, given: seen.append(given[1]))
        list(task.evaluate(model, "validation", None, CPU, world()))
    (layout, none) = seen
    assert none is None
    assert layout.documents.tolist() == [[0, 0, 0, 0, 1, 1, -1]]
    assert layout.positions.tolist()[0][:6] == [0, 1, 2, 3, 0, 1]
    trained = task.batch(0, range(1), CPU).inputs
    assert (trained["layout"], trained["loss_chunk"]) == (None, None)


def test_rows_of_a_step_are_the_same_however_they_are_split_and_predict_the_token_after(by_hand):
    task, _ = by_hand(sequence_length=4)
    batch = task.batch(3, range(2), CPU)
    tokens, targets = batch.inputs["tokens"], batch.inputs["targets"]
    assert tokens.shape == targets.shape == (2, 4)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    rows = [task.batch(3, range(row, row + 1), CPU).inputs for row in range(2)]
    assert torch.equal(torch.cat([row["tokens"] for row in rows]), tokens)
    assert torch.equal(torch.cat([row["targets"] for row in rows]), targets)
    assert task.unit_ids(3, range(2)) == ["train"]


def test_a_batch_goes_to_the_device_without_a_wait_for_what_runs_there(by_hand, monkeypatch):
    task, _ = by_hand()
    copied, copy = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda own, *to, **how: copied.append(how) or copy(own, *to, **how))
    task.batch(0, range(2), CPU)
    assert copied == [{"non_blocking": True}] * 2


def test_only_the_main_process_makes_the_cache_and_the_others_wait_for_it(by_hand, tmp_path, monkeypatch):
    task, _ = by_hand()
    monkeypatch.setenv("LLMEFF_CACHE", str(tmp_path / "another"))

    def opened(is_main, wait):
        return CausalLM().open(task._data, 0, 2, is_main=is_main, wait=wait)

    with pytest.raises(ConfigError, match="see the error of the main process"):
        opened(False, lambda: None)
    assert opened(False, lambda: opened(True, lambda: None)).facts() == task.facts()


def test_facts_of_the_text_are_on_record(by_hand):
    task, _ = by_hand()
    facts = task.facts()
    assert (facts["name"], facts["sha256"]) == ("builtin", task.corpus.fingerprint)
    assert facts["vocab_size"] == len(VOCABULARY) + 1
    sizes = {split: (own["num_documents"], own["num_bytes"]) for split, own in facts["splits"].items()}
    assert sizes == {"train": (1, 60), "validation": (2, 15)}
    task.check_split("validation")
    with pytest.raises(ConfigError, match="the split 'search' is empty"):
        task.check_split("search")


def test_beside_it_stands_what_gzip_needs_for_the_same_text(by_hand):
    task, _ = by_hand()
    compressed = gzip.compress((FIRST + SECOND).encode(), 9)
    assert task.references("validation") == {"gzip_bits_per_byte": 8 * len(compressed) / 15}
    assert task.references("train") == task.references("test") == {}


def test_a_step_counts_its_targets(by_hand):
    task, _ = by_hand()
    assert (task.item, task.items_per_step) == ("token", 2 * 3)
    batch = task.batch(0, range(2), CPU)
    assert (batch.items, batch.counts) == (6, {"loss": 6})


@pytest.mark.parametrize(
    ("vocab_size", "asked", "chunk"),
    [(1024, "auto", None), (1025, "auto", 256), (2048, None, None), (7, 5, 5)],
)
def test_logits_of_a_large_vocabulary_live_in_chunks(vocab_size, asked, chunk):
    model = DecoderConfig(width=8, num_heads=1, vocab_size=vocab_size)
    assert CausalLM(loss_chunk=asked).resolve_chunk(model) == chunk


@pytest.mark.parametrize(("packing", "vocab_size", "chunk"), [("plain", 257, None), ("documents", 5000, 256)])
def test_a_steps_work_is_told_with_its_chunks_and_its_packing(packing, vocab_size, chunk):
    data = validate(TextData, {"packing": packing, "sequence_length": 40})
    work = CausalLM().workload(DecoderConfig(vocab_size=vocab_size), data)
    assert (work.num_sequences, work.num_tokens, work.loss_chunk) == (1, 40, chunk)
    assert work.packed == (packing == "documents")


def test_text_is_sampled_from_the_beginning_of_a_document_and_what_was_last_drawn(by_hand):
    """Of logits that are wider than the vocabulary, no more than it are drawn from."""
    task, model = by_hand(sequence_length=3)
    wide, seen = torch.nn.functional.pad(model.logits.detach(), (0, 9), value=1e9), []

    def logits(tokens):
        seen.append(tokens.tolist())
        return wide[tokens]

    text = task.sample(logits, "validation", 6, CPU).text
    end = task.corpus.end_id
    drawn = [context[0][-1] for context in seen]
    assert drawn[0] == end == len(VOCABULARY)
    assert seen == [[drawn[max(0, place - 3) : place]] for place in range(1, 7)]
    assert text.startswith(task.corpus.tokenizer.decode(drawn[1:]))


@pytest.mark.parametrize("seed", [0, 3])
def test_order_and_sample_are_of_the_runs_seed(by_hand, seed):
    """A run that goes on reads what it would have read, whatever the version that began it."""
    opened, model = by_hand(sequence_length=4)
    task = CausalLM().open(opened._data, seed, 2, is_main=True, wait=lambda: None)
    rows = task.corpus.train.batch(derive(seed, "data"), 5, range(2), 2)
    task.resolve(DecoderConfig(vocab_size=7))
    assert task.batch(5, range(2), CPU).inputs["tokens"].tolist() == rows.tokens.tolist()
    generator = torch.Generator().manual_seed(derive(seed, "sample"))
    with torch.no_grad():
        model.logits.zero_()  # all seven tokens are as likely
    drawn = [int(torch.multinomial(torch.full((7,), 1 / 7), 1, generator=generator)) for _ in range(9)]
    assert task.sample(model, "validation", 9, CPU).text == task.corpus.tokenizer.decode(drawn)


def test_sampled_text_is_drawn_at_four_fifths_of_the_temperature(by_hand):
    """Of two tokens with odds of 2 to 1, the likelier is drawn with odds of 2^(5/4) to 1; the same seed draws the same."""
    task, model = by_hand()
    with torch.no_grad():
        model.logits.fill_(-1e9)
        model.logits[:, 0], model.logits[:, 1] = math.log(2), 0.0
    text = task.sample(model, "validation", 2000, CPU).text
    assert set(text) == {"a", "é"}
    assert len(text) == 2000
    expected = 2**1.25 / (1 + 2**1.25)
    assert text.count("a") / 2000 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))
    assert task.sample(model, "validation", 5, CPU).text == text[:5]


def test_a_run_reports_the_bits_of_its_documents(tmp_path):
    """Of bytes, a byte's bits are its token's and its part of the ends': each document is closed by one more token."""
    result = train(validate(RunConfig, override(TINY, ["train.steps=1", "evaluation.every=0"])), tmp_path / "run")
    found, evals = result.metrics["validation"], read_run(tmp_path / "run").evals
    documents = result.data["splits"]["validation"]
    tokens, num_bytes = documents["num_bytes"] + documents["num_documents"], documents["num_bytes"]
    assert evals["count"].to_pylist() == [int(size) + 1 for size in evals["bytes"].to_pylist()]
    assert sum(evals["count"].to_pylist()) == tokens
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * tokens / num_bytes * 1.4426950408889634, rel=1e-12)
    assert 7 < found["bits_per_byte"] < 9  # of a model that has learned nothing


def test_what_it_cannot_read_is_said():
    from llmeff.models import SegNetBasic

    said = list(CausalLM().problems(SegNetBasic(), validate(TextData, {})))
    assert len(said) == 1
    assert re.fullmatch(r"task 'causal_lm' needs a language model, but model 'segnet-basic' is not one", said[0])


def test_the_vocabulary_is_filled_in_where_the_tokenizers_config_tells_it():
    data = validate(TextData, {})  # bytes, and a mark for ends
    trained = validate(TextData, {"tokenizer": {"name": "bpe", "vocab_size": 300}})
    model = DecoderConfig()
    assert CausalLM().infer_model(model, data) == model.model_copy(update={"vocab_size": 257})
    for given, found in ((257, 257), (300, 300), (256, None)):
        sized = model.model_copy(update={"vocab_size": given})
        foreseen = CausalLM().infer_model(sized, data)
        assert (foreseen and foreseen.vocab_size) == found
    unknown = validate(TextData, {"tokenizer": {"name": "characters"}})
    assert CausalLM().infer_model(model, unknown) is None
    sized = model.model_copy(update={"vocab_size": 300})
    assert CausalLM().infer_model(sized, unknown) == sized
    assert CausalLM().infer_model(sized, trained) == sized
