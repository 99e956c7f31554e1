"""Frozen configs, components chosen by name, `--set` overrides, config files, and the error for wrong input."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from llmeff.core.registry import Registry, nearest

# Scalars are strict: a count cannot be given as "7", 7.0 or True. A float field also accepts an integer, but no bool.
Integer = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
BelowOne = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


class ConfigError(ValueError):
    """Error for wrong user input. It lists all problems at once.

    Args:
        problems: one line per problem, with the place, the given value and the allowed values.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def with_new_names(data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Returns a copy of the data in which renamed fields have their new names.

    If a field is given by both names, the value of the old name wins.

    >>> with_new_names({"items": 5, "budget": None}, {"items": "budget"})
    {'budget': 5}
    """
    old = {renamed[name]: value for name, value in data.items() if name in renamed}
    return {name: value for name, value in data.items() if name not in renamed} | old


class Config(BaseModel):
    """Base class of all configs. Instances are frozen, unknown fields are errors, and each field has a docstring."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        ser_json_inf_nan="strings",
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Maps old field names, which are still accepted, to the new names."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return with_new_names(data, cls.renamed) if isinstance(data, Mapping) else data

    @model_validator(mode="before")
    @classmethod
    def _name_components(cls, data: Any) -> Any:
        """Adds the name of the field's default component to each component table that has no name."""
        if not isinstance(data, Mapping):
            return data
        named = {
            name: {"name": field.default.name, **data[name]}
            for name, field in cls.model_fields.items()
            if isinstance(field.default, Component) and isinstance(data.get(name), Mapping) and "name" not in data[name]
        }
        return {**data, **named}


class Component(Config):
    """A config that is chosen by its `name` from a family (`optim.name = "adamw"`).

    A subclass declared with `family=` is the base class of a family and has a registry. A subclass of this base class
    is added to the registry if it annotates `name` with a single literal.
    """

    registry: ClassVar[Registry[Any]]
    """The members of the family, by name."""

    name: str
    """The component's name."""

    def __init_subclass__(cls, family: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lets a field typed by the family accept any member, chosen by name, and dump all fields of that member."""
        if "registry" not in cls.__dict__:
            return handler(source)
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda value, info: value.model_dump(mode=info.mode), info_arg=True
        )
        # Not `handler(source)`: from the second field of this type on, pydantic would use that schema and skip ours.
        instance = core_schema.is_instance_schema(cls)
        return core_schema.no_info_before_validator_function(cls._by_name, instance, serialization=dump)

    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "component",
                "expected a name, or a table with the key `name`. Known names: {known}.",
                {"known": ", ".join(cls.registry.names())},
            )
        name = value.get("name")
        if not isinstance(name, str) or name not in cls.registry:
            raise PydanticCustomError("component", "{problem}", {"problem": cls.registry.unknown(name)})
        return cls.registry[name].model_validate(dict(value))

    @classmethod
    def __pydantic_init_subclass__(cls, family: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if family is not None:
            cls.registry = Registry(family)
            return
        field = cls.model_fields.get("name")
        names = get_args(field.annotation) if field is not None else ()
        if len(names) == 1:
            cls.registry.add(names[0], cls)


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Splits `a.b=value` into the key's parts and the value.

    The value is read as TOML (`3e-4`, `true`, `[1, 2]`, `"x"`). `null` and `None` give None. Other text is a string.

    Raises:
        ConfigError: if there is no `=`, or a part of the key is empty.
    """
    key, equals, raw = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE with a dotted key, such as optim.lr=3e-4")
    raw = raw.strip()
    if raw in ("null", "None"):
        return path, None
    try:
        return path, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return path, raw


def override(data: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Applies `--set` settings to a copy of a config's raw data and returns the copy.

    A setting that names a component (`optim=muon` or `optim.name=muon`) selects that component with its default fields.
    It applies before any setting of the component's fields, in whatever order the settings are given. If a key is set
    twice, the later value wins.

    Raises:
        ConfigError: if a setting cannot be parsed, or sets a field of a value that has no fields.
    """
    result: dict[str, Any] = json.loads(json.dumps(data))
    parsed = []
    for path, value in map(parse_override, settings):
        names_component = len(path) > 1 and path[-1] == "name"
        parsed.append((path[:-1], {"name": value}) if names_component else (path, value))
    for path, value in sorted(parsed, key=lambda setting: len(setting[0])):
        table = result
        for depth, part in enumerate(path[:-1]):
            below = table.setdefault(part, {})
            if isinstance(below, str):  # a component given by its bare name
                below = table[part] = {"name": below}
            if not isinstance(below, dict):
                where = ".".join(path[: depth + 1])
                raise ConfigError(f"--set {'.'.join(path)}: {where} is {below!r}, which has no fields to set")
            table = below
        table[path[-1]] = value
    return result


def _fields_at(model: type[BaseModel], data: Any, location: tuple[int | str, ...]) -> list[str]:
    """Returns the field names of the config at a location, or an empty list if there is no config there."""
    annotation: Any = model
    for part in location:
        annotation = _below(annotation, part)
        below = isinstance(data, Mapping) or (isinstance(data, list | tuple) and isinstance(part, int))
        try:
            data = data[part] if below else None
        except (KeyError, IndexError):
            data = None
        if isinstance(annotation, type) and issubclass(annotation, Component):
            name = data.get("name") if isinstance(data, Mapping) else data
            if isinstance(name, str) and name in annotation.registry:
                annotation = annotation.registry[name]
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _below(annotation: Any, part: int | str) -> Any:
    """Returns the type of what a container holds: of a model's field `part`, or of the values of a dict or list.

    `annotation` is the type of the container. A union is reduced to its first member other than None.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        found: Any = None if field is None else field.annotation
    else:
        arguments = get_args(annotation)
        found = arguments[-1 if get_origin(annotation) is dict else 0] if arguments else None
    if isinstance(found, UnionType) or get_origin(found) is Union:
        (found, *_) = [kind for kind in get_args(found) if kind is not NoneType]
    return found


def _describe(model: type[BaseModel], data: Any, error: Mapping[str, Any]) -> str:
    location = tuple(error["loc"])
    where = ".".join(str(part) for part in location) or "config"
    given = error["input"]
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(model, data, location[:-1])
        return f"{where}: there is no such field.{nearest(str(location[-1]), allowed) if allowed else ''}"
    if error["type"] == "component":
        return f"{where}: {error['msg']}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if location else message
    return f"{where}: {message} (given: {given!r})"


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], data: Mapping[str, Any]) -> M:
    """Builds a config from raw data.

    Raises:
        ConfigError: if the data is wrong. It lists every problem, with the given value or the nearest known name.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [line for entry in error.errors() for line in _describe(model, data, entry).splitlines()]
        raise ConfigError(problems) from None


def read(path: Path) -> dict[str, Any]:
    """Reads a config's raw data from a TOML or JSON file.

    Raises:
        ConfigError: if the file cannot be read, is not .toml or .json, does not parse, or contains no table.
    """
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: a config must be a .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not valid UTF-8 (at byte {error.start})") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML or JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config must be a table, not {type(data).__name__}")
    return data
