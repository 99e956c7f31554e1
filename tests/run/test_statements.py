"""What states a run's values beside its config: DeepSpeed files, launchers and their flags."""

import json
from pathlib import Path

import pytest

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.run.prepare import check_world

FILES = Path(__file__).resolve().parents[2] / "ds_configs"
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
        ([], {"WORLD_SIZE": "2"}, ["parallel.ranks is 1", "says 2", "set parallel to one of ddp, deepspeed, fsdp"]),
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


ACCUMULATION = "train.batch 8 / (parallel.ranks 2 x train.micro_batch 2) is 2 micro-batches per step in the config"
GIVEN = "but accelerate launch --"


@pytest.mark.parametrize(
    ("settings", "environment", "problem"),
    [
        (
            ["parallel=ddp", "parallel.ranks=2"],
            {"WORLD_SIZE": "4"},
            "parallel.ranks is 2 in the config, but the launcher (WORLD_SIZE) says 4: use --set parallel.ranks=4",
        ),
        (
            [],
            {"WORLD_SIZE": "2"},
            "parallel.ranks is 1 in the config, but the launcher (WORLD_SIZE) says 2: use --set parallel.ranks=2 and set "
            "parallel to one of ddp, deepspeed, fsdp",
        ),
        (
            ZERO,
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            f"{ACCUMULATION}, {GIVEN}gradient_accumulation_steps says 4: change one of these three values",
        ),
        (
            ZERO,
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            f"precision is 'fp32' in the config, {GIVEN}mixed_precision says 'bf16': use --set precision=bf16",
        ),
        (
            ["parallel=ddp", "parallel.ranks=2"],
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            f"parallel.stage is None in the config, {GIVEN}zero_stage says 3: use --set parallel.stage=3",
        ),
        (
            ZERO,
            {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            f"parallel.offload_parameters is False in the config, {GIVEN}offload_param_device says True: "
            "use --set parallel.offload_parameters=true",
        ),
        (
            ZERO,
            {"ACCELERATE_GRADIENT_CLIPPING": "0.0"},
            f"train.clip_norm is 1.0 in the config, {GIVEN}gradient_clipping says None: use --set train.clip_norm=null",
        ),
        (
            ZERO,
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            f"runtime.compile is 'off' in the config, {GIVEN}dynamo_backend says 'INDUCTOR': leave the flag out",
        ),
        (
            ["parallel=ddp", "parallel.ranks=2"],
            {"ACCELERATE_USE_FSDP": "true"},
            "parallel is 'ddp' in the config, but accelerate launch was given --use_fsdp: leave the flag out, or set "
            "parallel to the strategy that the flag selects",
        ),
    ],
)
def test_what_disagrees_is_said_with_what_to_give_instead(monkeypatch, settings, environment, problem):
    ranks = "2" if settings else "1"
    assert problems(monkeypatch, settings, {"WORLD_SIZE": ranks} | UNSAID | environment) == [problem]


def test_who_is_about_to_start_the_ranks_is_none_of_them(monkeypatch):
    """Before processes are started, their number is nobody's statement; what a file states of the rest is."""
    asked = config(*ZERO)
    check_world(asked, is_started=False)
    with pytest.raises(ConfigError, match=r"parallel\.ranks is 2 in the config, but .* says 1"):
        check_world(asked)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="precision is 'fp32'") as raised:
        check_world(asked, is_started=False)
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize("micro_batch", ["auto", 1, 2, 4])
def test_micro_batches_that_are_yet_to_be_found_agree_with_any_number_of_them(monkeypatch, micro_batch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    asked = config("parallel=ddp", "parallel.ranks=2", f"train.micro_batch={micro_batch}")
    if micro_batch in ("auto", 2):
        check_world(asked)
    else:
        with pytest.raises(ConfigError, match=f"is {4 // micro_batch} micro-batches per step"):
            check_world(asked)


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
        ({"gradient_accumulation_steps": 4}, ["is 2 micro-batches per step", "(gradient_accumulation_steps) says 4"]),
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
    assert {path.stem for path in FILES.glob("*.json")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_the_repositorys_deepspeed_files_hold_their_stage_and_decide_nothing_else(monkeypatch, name):
    path = FILES / f"{name}.json"
    run = validate(RunConfig, {"parallel": {"name": "deepspeed", "file": str(path)}})
    parallel = run.parallel
    assert (parallel.stage, parallel.offload_optimizer, parallel.offload_parameters) == STAGES[name]
    assert parallel.external_settings() == []
    content = json.loads(path.read_text())
    zero = content.pop("zero_optimization")
    assert set(content.values()) == {"auto"}
    assert not [value for value in zero.values() if value == "auto"]


def test_a_file_that_is_not_there_is_an_error_that_lists_what_is():
    with pytest.raises(ConfigError) as raised:
        config("parallel=deepspeed", f"parallel.file={FILES / 'zero4.json'}")
    for name in STAGES:
        assert f"{name}.json" in str(raised.value)
