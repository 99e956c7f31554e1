"""What keeps a run from beginning is said before its folder is made; what does not gets the model that the config asks for."""

from functools import partialmethod

import pytest
import torch
import transformers

from llmeff.config.run import RunConfig
from llmeff.core import group
from llmeff.core.config import ConfigError, override, read, validate
from llmeff.core.tensors import stored_tensors
from llmeff.data import Bpe
from llmeff.run.loop import train
from llmeff.run.prepare import (
    begun_config,
    build_strategy,
    micro_batches,
    prepare,
    prepare_device,
    prepare_model,
    sharing,
    whole_model,
)

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
        ("learned", [], "data.sequence_length is 40, but .* positions for only 32 tokens"),
        ("old", ["runtime.recompute=true"], "runtime.recompute is true, but OpenAIGPTLMHeadModel"),
        ("capped", ["task.loss_chunk=8"], "task.loss_chunk is 8, but Gemma2ForCausalLM"),
        (
            "recurrent",
            ["data.packing=documents", "data.sequence_length=8"],
            "MambaForCausalLM cannot separate the documents of a row",
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
    with pytest.raises(ConfigError, match=r"data.tokenizer: id 0 is .*, but it was .* when the weights in"):
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
    monkeypatch.setattr("llmeff.run.prepare.multiplies_bfloat16", lambda device: has_amx)
    train(asked, folder)
    assert read(folder / "config.json")["optim"]["ns_format"] == decided
    monkeypatch.setattr("llmeff.run.prepare.multiplies_bfloat16", lambda device: not has_amx)
    resumed = begun_config(asked, folder)
    assert prepare(resumed)[0].optim.ns_format == decided


@pytest.mark.parametrize(("device", "meant"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_an_older_run_goes_on_in_what_its_device_meant(device, meant, tmp_path):
    config = validate(RunConfig, MUON | {"runtime": {"device": device}})
    assert config.optim.ns_format == "auto"
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert begun_config(config, tmp_path).optim.ns_format == meant


def test_all_ranks_iterate_in_what_the_least_of_them_is_fast_at(monkeypatch):
    monkeypatch.setattr("llmeff.run.prepare.multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("llmeff.run.prepare.group.least", lambda value: min(value, 0))  # another rank's
    assert (
        prepare(validate(RunConfig, MUON | {"train": {"batch": 2, "micro_batch": 2}}))[0].optim.ns_format == "float32"
    )


# -- what is decided before anything is written


CPU = torch.device("cpu")


def small(**tables):
    """A run of a small decoder, with tables of other values."""
    return validate(RunConfig, {name: MUON.get(name, {}) | tables.get(name, {}) for name in (*MUON, *tables)})


def test_what_is_auto_is_decided_by_the_data_and_the_machine(monkeypatch):
    monkeypatch.setattr("llmeff.plan.price.usable_cores", lambda: 6)
    asked = small(runtime={"device": "auto", "threads": "auto"}, model={"vocab_size": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, task = prepare(asked)
    assert (config.runtime.device, config.runtime.threads) == ("cpu", 6)
    assert (config.model.vocab_size, config.train.micro_batch) == (257, 2)
    assert task.items_per_step == 2 * 16
    assert config.model_copy(update=dict.fromkeys(("runtime", "model", "train", "optim"))) == asked.model_copy(
        update=dict.fromkeys(("runtime", "model", "train", "optim"))
    )


@pytest.mark.parametrize(
    ("asked", "there", "found"), [("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")]
)
def test_a_gpu_is_used_where_there_is_one_and_nothing_else_is_asked_for(monkeypatch, asked, there, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr("llmeff.run.prepare.multiplies_bfloat16", lambda device: device == "cuda")
    config, _ = prepare(small(runtime={"device": asked}, train={"micro_batch": 1}))
    assert (config.runtime.device, config.train.micro_batch) == (found, 1)
    assert config.optim.ns_format == ("bfloat16" if found == "cuda" else "float32")


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"runtime\.device is 'cuda', but torch sees no CUDA device"):
        prepare(small(runtime={"device": "cuda"}))


def test_ranks_wait_for_one_another_longer_than_the_watchdog_does_and_one_process_alone_joins_nobody(monkeypatch):
    """A first tokenization may take ten times as long as a step may stand still."""
    joined = []
    monkeypatch.setattr(group, "connect", lambda device, timeout_s: joined.append((device, timeout_s)))
    prepare(small(parallel={"name": "single", "timeout_s": 60.0}))
    assert joined == []
    prepare(small(parallel={"name": "ddp", "timeout_s": 60.0}))
    assert joined == [(CPU, 600.0)]


def test_a_split_that_nothing_fell_in_cannot_be_evaluated():
    with pytest.raises(ConfigError, match="the split 'search' is empty"):
        prepare(small(data={"splits": {"by": "span", "search": 0.0}}, evaluation={"split": "search"}))


def test_the_data_are_opened_for_the_runs_seed_and_batch_by_its_main_process(monkeypatch):
    given = []
    config = validate(RunConfig, MUON | {"seed": 5})
    whole = type(config.task).open
    monkeypatch.setattr(
        type(config.task), "open", lambda own, *what, **how: given.append((what, how)) or whole(own, *what, **how)
    )
    prepare(config)
    assert given == [((config.data, 5, 2), {"is_main": True, "wait": group.barrier})]


@pytest.fixture
def threads():
    """As many as there were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_process_computes_on_its_cpu_by_its_threads():
    assert prepare_device(small(runtime={"threads": 2})) == CPU
    assert torch.get_num_threads() == 2
    for precision in ("fp32", "bf16"):
        assert prepare_device(validate(RunConfig, MUON | {"precision": precision})) == CPU
    assert torch.get_num_threads() == 1
    with pytest.raises(ConfigError, match="precision 'fp16' needs a GPU"):
        prepare_device(validate(RunConfig, MUON | {"precision": "fp16"}))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_rank_computes_on_the_gpu_of_its_number_and_repeatably_where_that_is_asked_for(monkeypatch, deterministic):
    done = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(device))
    monkeypatch.setattr("llmeff.run.prepare.make_cublas_repeatable", lambda: done.append("cublas"))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda flag: done.append(flag))
    config = small(runtime={"device": "cuda", "deterministic": deterministic})
    device = torch.device("cuda", 3)
    assert prepare_device(config.model_copy(update={"precision": "fp16"})) == device
    assert done == [device, "cublas", True] if deterministic else [device, False]


# -- the model


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_model_is_as_the_seed_makes_it():
    def made(seed):
        return weights_of(prepare_model(validate(RunConfig, MUON | {"seed": seed, "model": {"vocab_size": 9}}), CPU))

    first = made(0)
    torch.manual_seed(123)
    assert torch.equal(made(0), first)
    assert not torch.equal(made(1), first)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_is_told_whether_it_keeps_what_its_layers_make(recompute):
    model = prepare_model(small(model={"vocab_size": 9}, runtime={"recompute": recompute}), CPU)
    assert model.recompute is recompute


@pytest.mark.parametrize("compiled", ["off", "layers", "model"])
def test_what_is_compiled_is_what_the_config_says_and_for_shapes_that_are_known(monkeypatch, compiled):
    done = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: done.append((module, how)))
    model = prepare_model(small(model={"vocab_size": 9, "num_layers": 3}, runtime={"compile": compiled}), CPU)
    expected = {"off": [], "layers": [*model.layers], "model": [model]}[compiled]
    assert [module for module, _ in done] == expected
    assert all(how == {"dynamic": False} for _, how in done)


def test_a_model_without_layers_of_ours_is_not_compiled_by_layers(config):
    with pytest.raises(
        ConfigError, match=r"runtime\.compile is 'layers', but model 'hf' has no list of layers to compile: use 'model'"
    ):
        prepare_model(config("rotary", "runtime.compile=layers"), CPU)


def test_a_model_is_trained_as_its_transforms_make_it_and_kept_as_it_was_before():
    asked = validate(
        RunConfig, MUON | {"model": MUON["model"] | {"vocab_size": 9}, "transforms": [{"name": "lora", "rank": 2}]}
    )
    plain, model = (prepare_model(own, CPU) for own in (asked.model_copy(update={"transforms": ()}), asked))
    assert len(stored_tensors(model)) > len(stored_tensors(plain))
    assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < weights_of(plain).numel()
    kept = whole_model(asked, stored_tensors(model))
    assert stored_tensors(kept).keys() == stored_tensors(plain).keys()
    for name, weight in stored_tensors(plain).items():  # what was added is nothing before it has learned
        assert torch.equal(stored_tensors(kept)[name], weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.requires_grad
    tokens = torch.arange(8)[None]
    learned = whole_model(asked, stored_tensors(model))(tokens)
    assert torch.allclose(learned, model.eval()(tokens), atol=1e-5)
    assert not torch.allclose(learned, plain(tokens), atol=1e-2)


def test_a_strategy_is_built_for_the_runs_rows_and_norm(monkeypatch):
    config, task = prepare(small(train={"batch": 6, "micro_batch": 2, "clip_norm": 0.25}))
    given = []
    monkeypatch.setattr(type(config.parallel), "build", lambda own, parts: given.append(parts))
    build_strategy(config, task, CPU)
    (parts,) = given
    assert (parts.micro_batch, parts.num_micro_batches, parts.clip_norm, parts.device) == (2, 3, 0.25, CPU)
    assert [row.name for row in parts.parameter_infos(parts.model)] == [
        row.name for row in task.parameter_infos(parts.model)
    ]


# -- who reads which rows


@pytest.mark.parametrize(
    ("rank", "rows"),
    [(0, [range(3), range(3, 6)]), (1, [range(6, 9), range(9, 12)])],
)
def test_ranks_share_the_rows_of_a_step_in_micro_batches(rank, rows):
    config = small(train={"batch": 12, "micro_batch": 3}, parallel={"name": "ddp", "ranks": 2})
    assert micro_batches(config, rank) == rows


def test_what_ranks_share_differs_by_strategy_ranks_and_micro_batch():
    ddp = {"name": "ddp", "ranks": 2}
    ways = [
        small(optim={"name": "adamw"}, train={"batch": 12, "micro_batch": size}, parallel=parallel)
        for size in (1, 3)
        for parallel in (ddp, ddp | {"ranks": 4}, {"name": "fsdp", "ranks": 2})
    ]
    assert len({sharing(way) for way in ways}) == 6
    assert sharing(small(train={"steps": 3})) == sharing(small())


# -- a run that goes on


def resumed(folder, was, asked):
    """The config with which a run in a folder goes on."""
    (folder / "config.json").write_text(was.model_dump_json())
    return begun_config(asked, folder)


DECIDED = {"train": {"batch": 4, "micro_batch": 2}, "runtime": {"device": "cpu", "threads": 3}}
OPEN = {"train": {"batch": 4, "micro_batch": "auto"}, "runtime": {"device": "auto", "threads": "auto"}}


def test_what_was_decided_for_the_same_ranks_stays(tmp_path):
    found = resumed(tmp_path, small(**DECIDED), small(**OPEN))
    assert (found.train.micro_batch, found.runtime.threads, found.runtime.device) == (2, 3, "cpu")


def test_for_other_ranks_it_is_decided_anew(tmp_path):
    other = {"name": "ddp", "ranks": 2}
    found = resumed(tmp_path, small(**DECIDED), small(parallel=other, **OPEN))
    assert (found.train.micro_batch, found.runtime.threads, found.runtime.device) == ("auto", "auto", "auto")
    assert (found.parallel.name, found.parallel.ranks) == ("ddp", 2)


def test_what_changes_no_loss_may_be_asked_for_anew(tmp_path):
    asked = small(train={"batch": 4, "micro_batch": 1}, runtime={"threads": 2, "recompute": True, "compile": "layers"})
    found = resumed(tmp_path, small(**DECIDED), asked)
    assert found.train.micro_batch == 1
    assert (found.runtime.threads, found.runtime.recompute, found.runtime.compile) == (2, True, "layers")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"batch": 8}}, "train.batch: the run in {} has 4, but you asked for 8"),
        ({"optim": {"name": "muon", "lr": 0.5}}, "optim.lr: the run in {} has 0.001, but you asked for 0.5"),
        ({"model": {"width": 16}}, "model.width: the run in {} has 8, but you asked for 16"),
    ],
)
def test_what_a_run_was_begun_with_and_is_asked_for_now_are_said(tmp_path, changes, said):
    with pytest.raises(ConfigError) as raised:
        resumed(
            tmp_path,
            small(**DECIDED),
            small(**DECIDED | {name: DECIDED.get(name, {}) | own for name, own in changes.items()}),
        )
    first, *problems = raised.value.problems
    assert first == "--resume continues a run with its own config, but these values differ:"
    assert problems == [said.format(tmp_path)]


def test_a_folder_without_a_run_has_none_to_go_on_with(tmp_path):
    with pytest.raises(ConfigError, match="there is no run to resume; start it without --resume"):
        begun_config(small(), tmp_path)


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
            r"over 2 images, on 2 ranks \(each rank separately\)\. With 1 ranks .* 'batch_sync'",
        ),
        ("batch", {"train": {"batch": 8, "micro_batch": 4}}, "With train.micro_batch 4 it would train differently"),
        ("batch_sync", {"parallel": {"name": "ddp", "ranks": 8}}, r"over 4 images, on 2 ranks\. With 8 ranks"),
        ("batch_sync", {"train": {"batch": 8, "micro_batch": 1}}, "With train.micro_batch 1 .* 'group'$"),
    ],
)
def test_a_run_does_not_go_on_with_statistics_of_other_images(tmp_path, norm, changes, words):
    with pytest.raises(ConfigError, match=words):
        begun(tmp_path, norm, **changes)
