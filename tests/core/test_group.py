"""What processes say to one another."""

from llmeff.core import group
from llmeff.core.config import ConfigError
from llmeff.core.dist import world
from tests.ranks import ranks


def errs_on_rank_one():
    try:
        with group.agreed():
            if world().rank == 1:
                raise ConfigError(["the disk is full", "and so is the other"])
    except ConfigError as error:
        return error.problems
    return None


def test_what_is_wrong_on_one_rank_is_said_on_all():
    assert ranks(2).run(errs_on_rank_one) == [["the disk is full", "and so is the other"]] * 2


def what_the_main_rank_gives():
    return group.from_main(f"of rank {world().rank}"), group.totals([{"a": 1, "b": 0}, {"a": world().rank, "b": 0}])


def test_the_main_rank_gives_and_counts_add_up():
    assert ranks(2).run(what_the_main_rank_gives) == [("of rank 0", {"a": 3, "b": 1})] * 2


def least_of_all():
    return group.least(7 - world().rank)


def test_the_least_of_all_ranks():
    assert ranks(2).run(least_of_all) == [6, 6]
    assert group.least(5) == 5
