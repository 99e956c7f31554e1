"""`tools/structure.py` sees what it is there to see."""

import pytest

from tests.scripts import load_script

grimp = pytest.importorskip("grimp")
pytest.importorskip("radon")

structure = load_script("tools/structure.py")


def graph_of(*imports):
    graph = grimp.ImportGraph()
    for importer, imported in imports:
        for module in (importer, imported):
            if module not in graph.modules:
                graph.add_module(module)
        graph.add_import(importer=importer, imported=imported)
    return graph


def test_a_room_is_a_package_and_no_module_beside_the_rooms():
    assert structure.room_of("llmeff.core.config") == structure.room_of("llmeff.core") == "core"
    assert structure.room_of("llmeff") is structure.room_of("llmeff.train") is None


def test_a_pair_of_rooms_counts_once_each_way():
    graph = graph_of(
        ("llmeff.optim.sgd", "llmeff.core.config"), ("llmeff.optim.lion", "llmeff.core.config"),
        ("llmeff.optim.sgd", "llmeff.optim.optimizer"), ("llmeff.core.log", "llmeff.optim.sgd"),
        ("llmeff.train", "llmeff.cli"), ("llmeff.record.environment", "llmeff"),
    )  # fmt: skip
    assert structure.room_imports(graph) == {("optim", "core"), ("core", "optim")}


def test_cycles_are_found_whole_and_once():
    round_trip = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("x", "y"), ("y", "x")]
    assert sorted(structure.cycles(graph_of(*round_trip))) == [["a", "b", "c"], ["x", "y"]]
    assert structure.cycles(graph_of(("a", "b"), ("b", "c"), ("a", "c"))) == []


def test_a_function_too_complex_fails_by_its_own_limit(monkeypatch, capsys):
    found = [("lab", "llmeff/lab/arms.py:1 _summarize", 11), ("lab", "llmeff/lab/arms.py:9 race", 11),
             ("core", "llmeff/core/log.py:1 _summarize", 16), ("core", "llmeff/core/log.py:2 say", 17)]  # fmt: skip
    monkeypatch.setattr(structure, "complexities", lambda: iter(found))
    monkeypatch.setattr(structure, "cycles", lambda graph: [])
    monkeypatch.setattr(
        structure.grimp, "build_graph", lambda *given, **more: graph_of(("llmeff.optim", "llmeff.core"))
    )
    assert structure.main() == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: llmeff/lab/arms.py:1 _summarize: complexity is 11, but at most 10 is allowed",
        "error: llmeff/core/log.py:2 say: complexity is 17, but at most 16 is allowed",
    ]
    monkeypatch.setattr(structure, "complexities", lambda: iter(found[1:3]))
    assert structure.main() == 0
    monkeypatch.setattr(structure, "cycles", lambda graph: [["a", "b"]])
    assert structure.main() == 1


def test_complexity_is_that_of_the_code():
    found = [number for room, name, number in structure.complexities() if room == "optim" and name.endswith(" resolve")]
    assert sorted(found) == [1, 3]  # of Muon: left open or not, and one format or the other
