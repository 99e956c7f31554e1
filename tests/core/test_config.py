"""Configs: components by name, overrides in any order, errors that name the nearest right thing."""

import json
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from llmeff.core.config import (
    Component,
    Config,
    ConfigError,
    Count,
    Fraction,
    NotNegative,
    Positive,
    override,
    parse_override,
    read,
    validate,
)


class Engine(Component, family="engine"):
    name: str
    power: Positive = 1.0
    """kW"""


class Steam(Engine):
    name: Literal["steam"] = "steam"
    pressure: NotNegative = 2.0
    """bar"""


class Electric(Engine):
    name: Literal["electric"] = "electric"
    recovery: Fraction = 0.5
    """Of braking energy"""


class Wheels(Config):
    count: Count = 4
    """How many"""


class Car(Config):
    engine: Engine = Steam()
    """What drives it"""
    wheels: Wheels = Wheels()
    """What it stands on"""


def test_component_is_dumped_whole_and_read_back_equal():
    car = Car(engine=Electric(recovery=0.25))
    assert validate(Car, json.loads(car.model_dump_json())) == car


@pytest.mark.parametrize(
    "settings",
    [
        ["engine=electric", "engine.recovery=0.1", "wheels.count=3"],
        ["engine.recovery=0.1", "wheels.count=3", "engine=electric"],
        ["engine.recovery=0.1", "engine.name=electric", "wheels.count=3"],
    ],
)
def test_a_named_component_replaces_the_other_before_its_fields_are_set(settings):
    data = override(Car(engine=Steam(pressure=9)).model_dump(mode="json"), settings)
    assert validate(Car, data) == Car(engine=Electric(recovery=0.1), wheels=Wheels(count=3))


def test_a_component_without_a_name_is_of_the_default_kind():
    assert validate(Car, {"engine": {"pressure": 7}}) == Car(engine=Steam(pressure=7))


def test_of_two_settings_of_one_key_the_later_wins():
    assert override({}, ["wheels.count=3", "wheels.count=6"]) == {"wheels": {"count": 6}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=3e-4", 3e-4),
        ("a=3", 3),
        ("a=true", True),
        ("a=[1, 2]", [1, 2]),
        ('a="3"', "3"),
        ("a=word", "word"),
        ("a=null", None),
        ("a=../b c", "../b c"),
    ],
)
def test_values_are_toml_or_else_text(text, value):
    assert parse_override(text) == (("a",), value)


@pytest.mark.parametrize("text", ["a", "=3", "a..b=3", ""])
def test_a_setting_without_key_and_value_is_refused(text):
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse_override(text)


def test_a_setting_through_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"wheels\.count is 4, which has no fields to set"):
        override({"wheels": {"count": 4}}, ["wheels.count.x=1"])


def test_all_problems_come_in_one_error_each_with_the_nearest_name():
    with pytest.raises(ConfigError) as raised:
        validate(Car, {"engine": {"name": "steam", "presure": 3, "power": -1}, "weels": {}, "wheels": {"count": True}})
    text = str(raised.value)
    assert len(raised.value.problems) == 4
    assert "engine.presure: there is no such field. Did you mean 'pressure'?" in text
    assert "engine.power: Input should be greater than 0 (given: -1)" in text
    assert "weels: there is no such field. Did you mean 'wheels'?" in text
    assert "wheels.count: Input should be a valid integer (given: True)" in text


class Depot(Config):
    spare: Engine | None = None
    """Kept behind"""
    engines: dict[str, Engine] = Field(default_factory=dict)
    """By number"""
    cars: tuple[Car, ...] | None = None
    """In their order"""


STEAM = {"name": "steam", "presure": 3}


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"spare": STEAM}, "spare"),
        ({"engines": {"7": STEAM}}, r"engines\.7"),
        ({"cars": [{}, {"engine": STEAM}]}, r"cars\.1\.engine"),
    ],
)
def test_the_nearest_field_is_found_wherever_it_may_stand(data, where):
    with pytest.raises(
        ConfigError, match=rf"^{where}\.presure: .* Did you mean 'pressure'\? Known: name, power, pressure\."
    ):
        validate(Depot, data)


@pytest.mark.parametrize("given", ["stem", {"name": "stem"}, {"name": None}, 3, None])
def test_an_unknown_component_names_the_known_ones(given):
    with pytest.raises(ConfigError, match=r"^engine: .*electric, steam"):
        validate(Car, {"engine": given})


@pytest.mark.parametrize("given", ["7", 7.0, True, 0, None])
def test_counts_are_strict(given):
    with pytest.raises(ConfigError, match=r"^wheels\.count"):
        validate(Car, {"wheels": {"count": given}})


@pytest.mark.parametrize("given", [float("nan"), float("inf"), "1", True])
def test_reals_are_strict_and_finite(given):
    with pytest.raises(ConfigError, match=r"^engine\.power"):
        validate(Car, {"engine": {"name": "steam", "power": given}})


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Car().wheels = Wheels(count=3)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):

        class Again(Engine):
            name: Literal["steam"] = "steam"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", b"", r"a \.toml or \.json file"),
        ("c.toml", b"a = ", "is not valid TOML or JSON"),
        ("c.json", b"{", "is not valid TOML or JSON"),
        ("c.json", b"[1]", "a config must be a table, not list"),
        ("c.toml", b"a = '\xff'", "is not valid UTF-8"),
    ],
)
def test_config_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_a_config_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")


def test_a_family_may_stand_in_many_fields_of_one_config():
    class Ferry(Config):
        engine: Engine = Steam()
        spare: dict[str, Engine]
        more: tuple[Engine, ...] = ()

    spare = {"name": "electric", "recovery": 0.25}
    own = validate(Ferry, {"spare": {"one": spare}, "more": [spare]})
    assert own.spare["one"] == own.more[0] == Electric(recovery=0.25)
    assert validate(Ferry, own.model_dump(mode="json")) == own
