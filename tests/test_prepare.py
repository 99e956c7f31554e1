"""What keeps a run from beginning is said before its folder is made; what does not gets the model that the config asks for."""

from functools import partialmethod

import pytest
import torch
import transformers

from llmeff.core.config import ConfigError, override, read, validate
from llmeff.data import Bpe
from llmeff.loop import train
from llmeff.prepare import begun_config, prepare, prepare_model
from llmeff.runconfig import RunConfig

SIZES = {"vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
MODELS = {
    "learned": transformers.GPT2Config(**SIZES, n_positions=32),
    "old": transformers.OpenAIGPTConfig(**SIZES, n_positions=64),
    "capped": transformers.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=30.0),
    "recurrent": transformers.MambaConfig(vocab_size=2000, hidden_size=16, num_hidden_layers=1, state_size=4),
    "rotary": transformers.LlamaConfig(**LLAMA, max_position_embeddings=32),
}


@pytest.fixture
def config(tmp_path):
    def make(kind, *settings):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(MODELS[kind]).save_pretrained(tmp_path / "model")
        data = {
            "model": {"name": "hf", "path": str(tmp_path / "model"), "vocab_size": 2000},
            "data": {"source": {"name": "builtin", "max_bytes": 300_000}, "sequence_length": 40},
            "schedule": {"name": "constant"},
            "train": {"steps": 4, "batch": 2},
            "evaluation": {"every": 0, "sample_tokens": 0},
            "runtime": {"device": "cpu", "threads": 1},
        }
        return validate(RunConfig, override(data, ["data.splits.by=span", *settings]))

    return make


@pytest.mark.parametrize("micro_batch", ["auto", 1])
@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("learned", [], "data.sequence_length is 40, but .* 32 positions"),
        ("old", ["runtime.recompute=true"], "runtime.recompute is true, but OpenAIGPTLMHeadModel"),
        ("capped", ["task.loss_chunk=8"], "task.loss_chunk is 8, but Gemma2ForCausalLM"),
        (
            "recurrent",
            ["data.packing=documents", "data.sequence_length=8"],
            "would see one another in MambaForCausalLM",
        ),
    ],
)
def test_what_a_model_cannot_is_an_error_before_the_folder_is_made(config, tmp_path, kind, settings, said, micro_batch):
    asked = config(kind, f"train.micro_batch={micro_batch}", *settings)
    with pytest.raises(ConfigError, match=said) as raised:
        train(asked, tmp_path / "run")
    assert len(raised.value.problems) == 1
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_with_a_tokenizer_of_others_are_an_error_before_the_folder_is_made(config, tmp_path):
    asked = config("rotary")
    Bpe(vocab_size=300).build(lambda: ["the cat and the hat " * 9]).save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"data.tokenizer: id 0 is .*, but .* to the weights in"):
        train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["capped", "rotary"])
def test_what_a_model_can_is_done_at_the_price_that_was_named(config, tmp_path, kind):
    result = train(config(kind), tmp_path / "run")
    assert result.prediction == "traced"
    assert result.error["executed_flops"] == result.error["saved_bytes"] == 0
    assert abs(result.error["peak_bytes"]) < 0.03


def test_every_stage_of_a_segnet_is_compiled_for_its_own_shapes(monkeypatch):
    """They share one forward, of which torch.compile keeps eight forms unless it is told of more."""
    from torch._dynamo import config as dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    segnet = {"name": "segnet", "width": 2, "num_classes": 3, "connection": "add"}
    data = {"task": "segmentation", "model": segnet, "data": {"name": "images"}, "runtime": {"compile": "layers"}}
    # its own way back: pytest's would take the setting away
    with dynamo.patch(
        recompile_limit=dynamo.recompile_limit, fail_on_recompile_limit_hit=True, error_on_recompile=False
    ):
        model = prepare_model(validate(RunConfig, data), torch.device("cpu"))
        torch._dynamo.reset()
        counters.clear()
        for _ in range(2):
            model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert counters["stats"]["unique_graphs"] == len(model.layers) == 10
    assert not counters["graph_break"]


def begun(tmp_path, norm, **changes):
    """A run of images in a folder, as it was resolved on two ranks, and the same asked for with changes."""
    segnet = {"name": "segnet-basic", "width": 8, "num_classes": 11, "norm": norm}
    config = {"task": "segmentation", "model": segnet, "data": {"name": "images"}}
    saved = {"train": {"batch": 8, "micro_batch": 2}, "parallel": {"name": "ddp", "ranks": 2}}
    (tmp_path / "config.json").write_text(validate(RunConfig, config | saved).model_dump_json())
    asked = {"train": {"batch": 8, "micro_batch": "auto"}, "parallel": saved["parallel"]} | changes
    return begun_config(validate(RunConfig, config | asked), tmp_path).train.micro_batch


MUON = {
    "model": {"name": "decoder", "width": 8, "num_layers": 1, "num_heads": 1, "mlp_width": 8},
    "data": {"source": {"name": "builtin", "max_bytes": 200_000}, "splits": {"by": "span"}, "sequence_length": 16},
    "optim": {"name": "muon"},
    "schedule": {"name": "constant"},
    "train": {"steps": 2, "batch": 2},
    "evaluation": {"every": 0, "sample_tokens": 0},
    "checkpoint": {"every": 1},
    "runtime": {"device": "cpu", "threads": 1},
}


@pytest.mark.parametrize(("has_amx", "decided"), [(False, "float32"), (True, "bfloat16")])
def test_what_muon_iterates_in_is_decided_once(has_amx, decided, tmp_path, monkeypatch):
    asked, folder = validate(RunConfig, MUON), tmp_path / "run"
    monkeypatch.setattr("llmeff.prepare.multiplies_bfloat16", lambda device: has_amx)
    train(asked, folder)
    assert read(folder / "config.json")["optim"]["ns_format"] == decided
    monkeypatch.setattr("llmeff.prepare.multiplies_bfloat16", lambda device: not has_amx)
    resumed = begun_config(asked, folder)
    assert prepare(resumed)[0].optim.ns_format == decided


@pytest.mark.parametrize(("device", "meant"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_an_older_run_goes_on_in_what_its_device_meant(device, meant, tmp_path):
    config = validate(RunConfig, MUON | {"runtime": {"device": device}})
    assert config.optim.ns_format == "auto"
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert begun_config(config, tmp_path).optim.ns_format == meant


def test_all_ranks_iterate_in_what_the_least_of_them_is_fast_at(monkeypatch):
    monkeypatch.setattr("llmeff.prepare.multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("llmeff.prepare.group.least", lambda value: min(value, 0))  # another rank's
    assert (
        prepare(validate(RunConfig, MUON | {"train": {"batch": 2, "micro_batch": 2}}))[0].optim.ns_format == "float32"
    )


ONE, FOUR = {"name": "single"}, {"name": "ddp", "ranks": 4}


@pytest.mark.parametrize(
    ("norm", "changes", "micro_batch"),
    [
        ("batch", {}, 2),
        ("batch_sync", {}, 2),
        ("batch_sync", {"parallel": ONE}, 4),
        ("batch_sync", {"parallel": FOUR}, 1),
        ("group", {"parallel": FOUR}, "auto"),
        ("group", {"train": {"batch": 8, "micro_batch": 1}}, 1),
    ],
)
def test_a_run_goes_on_with_statistics_of_as_many_images(tmp_path, norm, changes, micro_batch):
    assert begun(tmp_path, norm, **changes) == micro_batch


@pytest.mark.parametrize(
    ("norm", "changes", "words"),
    [
        (
            "batch",
            {"parallel": ONE},
            "over 2 images together, on 2 ranks, each by itself; with 1 ranks .* 'batch_sync'",
        ),
        ("batch", {"train": {"batch": 8, "micro_batch": 4}}, "with train.micro_batch 4 what it learns would be"),
        ("batch_sync", {"parallel": {"name": "ddp", "ranks": 8}}, "over 4 images together, on 2 ranks; with 8 ranks"),
        ("batch_sync", {"train": {"batch": 8, "micro_batch": 1}}, "with train.micro_batch 1 .* 'group'$"),
    ],
)
def test_a_run_does_not_go_on_with_statistics_of_other_images(tmp_path, norm, changes, words):
    with pytest.raises(ConfigError, match=words):
        begun(tmp_path, norm, **changes)
