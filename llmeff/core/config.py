"""Frozen configs, components chosen by name, overrides, and errors that say what was given and what is allowed."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from llmeff.core.registry import Registry, nearest

# Scalars are strict: "7", 7.0 and True are not counts. A float field takes an integer, never a bool.
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
    """Everything that is wrong with what the user asked for, in one error.

    Args:
        problems: one line each: where, what was given, what is allowed.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def with_new_names(data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """A table's content under today's names. If a field is also given by its old name, that value wins.

    >>> with_new_names({"items": 5, "budget": None}, {"items": "budget"})
    {'budget': 5}
    """
    old = {renamed[name]: value for name, value in data.items() if name in renamed}
    return {name: value for name, value in data.items() if name not in renamed} | old


class Config(BaseModel):
    """Base of all configs: frozen, no unknown fields, each field described by its docstring."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        ser_json_inf_nan="strings",
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of fields, which are still read, with their new names."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return with_new_names(data, cls.renamed) if isinstance(data, Mapping) else data

    @model_validator(mode="before")
    @classmethod
    def _name_components(cls, data: Any) -> Any:
        """Where a component is expected, a table without a name takes the name of the field's default."""
        if not isinstance(data, Mapping):
            return data
        named = {
            name: {"name": field.default.name, **data[name]}
            for name, field in cls.model_fields.items()
            if isinstance(field.default, Component) and isinstance(data.get(name), Mapping) and "name" not in data[name]
        }
        return {**data, **named}


class Component(Config):
    """A config chosen by its `name` within a family (`optim.name = "adamw"`).

    A direct subclass that gives `family=` opens a registry. Classes below it that set a default `name` enter it.
    """

    registry: ClassVar[Registry[Any]]

    name: str
    """The component's name."""

    def __init_subclass__(cls, family: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A field typed by the family accepts any member: validated by its name, dumped in full."""
        if "registry" not in cls.__dict__:
            return handler(source)
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda value, info: value.model_dump(mode=info.mode), info_arg=True
        )
        # not the family's own model: from the second field of this type on, pydantic would recognize it and use it alone
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
                "give a name or a table with a name, one of {known}",
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
    """Splits `a.b=value`. The value is TOML (`3e-4`, `true`, `[1, 2]`, `"x"`), `null`, or else a plain string.

    Raises:
        ConfigError: there is no `=` or no key.
    """
    key, equals, raw = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE with a dotted key, as in optim.lr=3e-4")
    raw = raw.strip()
    if raw in ("null", "None"):
        return path, None
    try:
        return path, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return path, raw


def override(data: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Applies `--set` settings to a config's raw data.

    A setting that names a component (`optim=muon`, `optim.name=muon`) replaces it by that component's defaults, before
    any setting of its fields, whatever their order on the command line. If a key is set twice, the later value wins.

    Raises:
        ConfigError: a setting does not parse, or its key leads through a value that is not a table.
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
                raise ConfigError(f"--set {'.'.join(path)}: {where} is {below!r}, not a table")
            table = below
        table[path[-1]] = value
    return result


def _fields_at(model: type[BaseModel], data: Any, location: tuple[int | str, ...]) -> list[str]:
    """The field names allowed in the place of an unknown field."""
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
    """The type of a field, of a table's values or of a list's items; for an optional type, the type without None."""
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
    """Validates raw data.

    Raises:
        ConfigError: lists every problem, with the value given and the nearest right name.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [line for entry in error.errors() for line in _describe(model, data, entry).splitlines()]
        raise ConfigError(problems) from None


def read(path: Path) -> dict[str, Any]:
    """Reads a TOML or JSON config.

    Raises:
        ConfigError: the file is absent, not TOML or JSON, or does not parse.
    """
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: a config must be a .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: does not parse ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config must be a table, not {type(data).__name__}")
    return data
