"""What processes say to one another."""

from llmeff.core import group
from llmeff.core.dist import world
from tests.ranks import ranks


def least_of_all():
    return group.least(7 - world().rank)


def test_the_least_of_all_ranks():
    assert ranks(2).run(least_of_all) == [6, 6]
    assert group.least(5) == 5
