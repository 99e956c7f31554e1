"""Names find their things; a wrong one is answered with the nearest and all of them."""

import pytest

from llmeff.core.registry import Registry


@pytest.fixture
def fruit() -> Registry[int]:
    registry = Registry[int]("fruit")
    registry.add("pear", 1)
    registry.add("apple", 2)
    return registry


def test_things_are_found_by_name(fruit):
    assert fruit["pear"] == 1
    assert fruit.names() == ["apple", "pear"]
    assert "apple" in fruit
    assert "plum" not in fruit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("appel", "unknown fruit 'appel'. Did you mean 'apple'? Known: apple, pear."),
        ("xyz", "unknown fruit 'xyz'. Known: apple, pear."),
        (None, "a fruit needs a name. Known: apple, pear."),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(fruit, name, message):
    assert fruit.unknown(name) == message


def test_a_wrong_name_is_no_key(fruit):
    with pytest.raises(ValueError, match="Did you mean 'apple'"):
        fruit["appel"]


def test_a_name_is_taken_once(fruit):
    with pytest.raises(ValueError, match="'pear' is registered twice: 1 and 3"):
        fruit.add("pear", 3)
