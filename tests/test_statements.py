"""What states a run's values beside its config: DeepSpeed files, launchers and their flags."""

import json
from pathlib import Path

import pytest

from llmeff.core.config import ConfigError, override, validate
from llmeff.prepare import check_world
from llmeff.runconfig import RunConfig

FILES = Path(__file__).resolve().parent.parent / "ds_configs"
UNSAID = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_CONFIG_DS_FIELDS": "",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_VERSION": "1",
}
"""What `accelerate launch` sets although its user said nothing."""


def config(*settings):
    return validate(RunConfig, override({}, ["train.batch=8", *settings]))


def problems(monkeypatch, settings, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        check_world(config(*settings))
    return raised.value.problems


ZERO = ["parallel=deepspeed", "parallel.ranks=2", "train.micro_batch=2"]


@pytest.mark.parametrize(
    ("settings", "environment", "words"),
    [
        (ZERO, {"WORLD_SIZE": "4"}, ["parallel.ranks is 2", "WORLD_SIZE", "says 4", "--set parallel.ranks=4"]),
        ([], {"WORLD_SIZE": "2"}, ["parallel.ranks is 1", "says 2", "--set parallel to one of ddp, deepspeed, fsdp"]),
        (ZERO, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ["'fp32'", "--mixed_precision says 'bf16'"]),
        (ZERO, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["parallel.stage is 2", "--zero_stage says 3"]),
        (
            ZERO,
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            ["train.batch 8", "parallel.ranks 2", "train.micro_batch 2", "is 2 micro", "_accumulation_steps says 4"],
        ),
        (ZERO, {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, ["train.clip_norm is 1.0", "--gradient_clipping says 0.5"]),
        (
            ZERO,
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            ["parallel.offload_optimizer is False", "--offload_optimizer_device says True"],
        ),
        (ZERO, {"ACCELERATE_GRADIENT_CLIPPING": "some"}, ["train.clip_norm is 1.0", "says 'some'"]),
        (
            [*ZERO, "runtime.device=cuda"],
            {"ACCELERATE_USE_CPU": "True"},
            ["runtime.device is 'cuda'", "--cpu says 'cpu'", "--set runtime.device=cpu"],
        ),
        (ZERO, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["runtime.compile is 'off'", "--dynamo_backend"]),
        (["parallel=ddp", "parallel.ranks=2"], {"ACCELERATE_USE_DEEPSPEED": "true"}, ["'ddp'", "--use_deepspeed"]),
        (["parallel=ddp", "parallel.ranks=2"], {"ACCELERATE_USE_FSDP": "true"}, ["'ddp'", "--use_fsdp"]),
    ],
)
def test_what_disagrees_is_named_with_both_values(monkeypatch, settings, environment, words):
    ranks = "2" if settings else "1"
    (problem,) = problems(monkeypatch, settings, {"WORLD_SIZE": ranks} | UNSAID | environment)
    for word in words:
        assert word in problem


def test_all_that_disagrees_comes_in_one_error(monkeypatch):
    environment = {
        "WORLD_SIZE": "4",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "2.0",
        "ACCELERATE_USE_FSDP": "true",
    }
    assert len(problems(monkeypatch, ZERO, environment)) == 4


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        (ZERO, UNSAID),
        ([*ZERO, "precision=bf16"], {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"}),
        ([*ZERO, "precision=bf16_master"], {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ([*ZERO, "train.clip_norm=null"], {"ACCELERATE_GRADIENT_CLIPPING": "0.0"}),
        (ZERO, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        (["parallel=fsdp", "parallel.ranks=2"], UNSAID | {"ACCELERATE_USE_FSDP": "true"}),
    ],
)
def test_what_agrees_and_what_nobody_said_is_no_error(monkeypatch, settings, environment):
    for name, value in ({"WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    check_world(config(*settings))


def test_a_launcher_that_was_asked_for_several_and_started_one_is_an_error(monkeypatch):
    environment = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", "MASTER_ADDR": "127.0.0.1"}
    (problem,) = problems(monkeypatch, [], environment)
    assert "--num_processes" in problem
    assert "parallel.ranks is 1" in problem
    assert "--multi_gpu" in problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train_batch_size": 16}, ["train.batch is 8", "(train_batch_size) says 16", "--set train.batch=16"]),
        ({"train_micro_batch_size_per_gpu": 1}, ["train.micro_batch is 2", "says 1"]),
        ({"gradient_accumulation_steps": 4}, ["is 2 micro-batches a step", "(gradient_accumulation_steps) says 4"]),
        ({"gradient_clipping": 0.3}, ["train.clip_norm is 1.0", "says 0.3"]),
        ({"bf16": {"enabled": True}}, ["precision is 'fp32'", "says 'bf16'"]),
    ],
)
def test_a_deepspeed_file_must_say_what_the_config_says(monkeypatch, tmp_path, content, words):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
    (problem,) = problems(monkeypatch, [*ZERO, f"parallel.file={path}"], {"WORLD_SIZE": "2"})
    for word in [*words, "mine.json"]:
        assert word in problem


def test_a_deepspeed_file_that_says_the_same_is_taken(monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    same = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e5},
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto"},
    }
    path.write_text(json.dumps(same))
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = config(*ZERO, f"parallel.file={path}")
    check_world(run)
    assert (run.parallel.stage, run.parallel.reduce_bucket_size, run.parallel.file) == (3, 500_000, None)


STAGES = {
    "zero0": (0, False, False),
    "zero1": (1, False, False),
    "zero2": (2, False, False),
    "zero2_offload": (2, True, False),
    "zero3": (3, False, False),
    "zero3_offload": (3, True, True),
}


def test_every_file_of_the_repository_is_in_the_table():
    assert {path.stem for path in FILES.iterdir()} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_the_repositorys_deepspeed_files_hold_their_stage_and_decide_nothing_else(monkeypatch, name):
    path = FILES / f"{name}.json"
    run = validate(RunConfig, {"parallel": {"name": "deepspeed", "file": str(path)}})
    parallel = run.parallel
    assert (parallel.stage, parallel.offload_optimizer, parallel.offload_parameters) == STAGES[name]
    assert parallel.statements() == []
    content = json.loads(path.read_text())
    zero = content.pop("zero_optimization")
    assert set(content.values()) == {"auto"}
    assert not [value for value in zero.values() if value == "auto"]


def test_a_file_that_is_not_there_is_an_error_that_lists_what_is():
    with pytest.raises(ConfigError) as raised:
        config("parallel=deepspeed", f"parallel.file={FILES / 'zero4.json'}")
    for name in STAGES:
        assert f"{name}.json" in str(raised.value)
