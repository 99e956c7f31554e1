"""Applies mutants to clones of the repository, and says which of them the tests do not see.

A process loads the libraries once; each mutant is tested by a fork of it, in a clone of the last commit of its own, by the test
files that `map.toml` gives for its module, which must pass without a mutant first. First come the tests that reach the mutated
function, fast ones first, which a run without mutants has shown; what they let live meets all other tests of these files before it
counts as a survivor. A mutant is killed by a test that fails, by an import that fails, or by its time or memory; any other end stops the
campaign.

    python -m tests.mutants.campaign                    # 75 mutants a package; goes on where it was stopped
    python -m tests.mutants.campaign --packages tasks data --each 40 --seed 1
    python -m tests.mutants.campaign --again            # survivors once more, after tests were added
    python -m tests.mutants.campaign --known            # the patches beside this file
    python -m tests.mutants.campaign --write            # analysis/results/mutants.json, from what is known
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mutants.mutation import Mutant, mutants_of, mutated, operators
from tests.mutants.tracing import Order, Reach

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "analysis" / "results" / "mutants.json"
SLACK_S = 20.0
"""A mutant's tests get so many seconds of a CPU, and `PATIENCE` times what they took without it."""
PATIENCE = 4.0
WAITING = 10.0
"""And in all, if they wait for something, so many times that, or `LONGEST_S`: other processes may have the machine."""
LONGEST_S = 900.0
MOST_BYTES = 6 * 2**30
"""What a mutant's tests may hold of the machine's memory; what takes more is killed before others are."""
LEAST = 600
LEAST_EACH = 40
"""So many mutants are sampled for a result that is written: in all, and in each package."""
MOST_EQUIVALENT = 0.08
"""And of these at most such a part is said to be equivalent."""
IMPORT_FAILED = re.compile(
    r"^!+ Interrupted: \d+ errors? during collection !+$|^ImportError while loading conftest ", re.MULTILINE
)
"""What pytest says where a test file cannot be imported (exit code 2), or a `conftest.py` (exit code 4)."""
LOADED = (
    "torch", "torch._dynamo", "torch.distributed", "torch.utils.checkpoint", "torch.profiler", "transformers",
    "transformers.models.llama.modeling_llama", "transformers.masking_utils", "tokenizers", "safetensors.torch",
    "accelerate", "numpy", "scipy.stats", "pandas", "pyarrow", "pyarrow.parquet", "pyarrow.json", "pyarrow.compute",
    "pyarrow.pandas_compat", "pydantic.main", "pydantic.types", "pydantic.json_schema", "PIL.Image", "PIL.ImageDraw",
    "PIL.ImageFont", "PIL.JpegImagePlugin", "rich.console", "rich.table", "matplotlib.pyplot", "psutil", "bitsandbytes",
    "pytest_timeout", "doctest", "pdb", "zoneinfo", "_strptime", "dateutil.easter",
)  # fmt: skip
"""What takes long to import, none of it ours."""


# -- what is mutated, and what judges it


@functools.cache
def read_map() -> dict[str, dict[str, list[str]]]:
    """By package, then module: the test files that judge it."""
    with (HERE / "map.toml").open("rb") as file:
        return tomllib.load(file)


def read_equivalent() -> dict[str, str]:
    """By mutant: why nothing that the code promises tells it from the original."""
    with (HERE / "equivalent.toml").open("rb") as file:
        return tomllib.load(file)


def path_of(module: str) -> str:
    """A module's file in the repository."""
    return f"{module.replace('.', '/')}.py"


@functools.cache
def commit() -> str:
    """The last one, which the campaign is of."""
    return _git(ROOT, "rev-parse", "HEAD").strip()


@functools.cache
def committed(path: str) -> str:
    """A file as it was committed last, whatever is done to the working tree meanwhile."""
    return _git(ROOT, "show", f"{commit()}:{path}")


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def all_mutants(scratch: Path, modules: Iterable[str]) -> Iterator[Mutant]:
    """Of the working tree's modules; kept, since to look for them takes a minute."""
    folder, applied = scratch / "sites", operators()
    folder.mkdir(parents=True, exist_ok=True)
    rules = _digest((HERE / "mutation.py").read_text(encoding="utf-8"))
    for module in modules:
        source = committed(path_of(module))
        kept = folder / f"{module}.{_digest(source)}.{rules}.json"
        if not kept.exists():
            kept.write_text(json.dumps([asdict(mutant) for mutant in mutants_of(source, module, applied)]))
        yield from (Mutant(**own) for own in json.loads(kept.read_text()))


def sample(mutants: Sequence[Mutant], number: int, seed: str) -> list[Mutant]:
    """So many, from lines drawn at random, so that a line of many operators counts no more than another."""
    by_line = defaultdict(list)
    for mutant in mutants:
        by_line[mutant.module, mutant.line].append(mutant)
    rng, found = random.Random(seed), []
    lines = sorted(by_line)
    while len(found) < number and lines:
        rng.shuffle(lines)
        for line in list(lines[: number - len(found)]):
            chosen = rng.choice(by_line[line])
            by_line[line].remove(chosen)
            if not by_line[line]:
                lines.remove(line)
            source = committed(path_of(chosen.module))
            if mutated(source, chosen, operators()) is not None:
                found.append(chosen)
    return found


# -- forks


class Clone:
    """A copy of the last commit, in which one mutant at a time is tested."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.exists():
            _git(ROOT, "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(folder))
        is_new = not (folder / "llmeff").exists()
        _git(folder, "fetch", "--quiet", str(ROOT), "+HEAD:refs/heads/judged")
        _git(folder, "checkout", "--quiet", "--force", "--detach", "judged")
        _git(folder, "clean", "--quiet", "-fd")
        if not is_new:
            return
        # compiles the package and the tests, which forks that test mutants do not
        warm = fork(folder, folder.with_suffix(".log"), lambda: run_tests(["--collect-only", "tests"]), compiles=True)
        os.waitpid(warm, 0)

    def put(self, path: str, source: str) -> None:
        """Writes a file; compiled forms of it are not to be taken for it."""
        (self.folder / path).write_text(source, encoding="utf-8")
        for stale in (self.folder / path).parent.glob(f"__pycache__/{Path(path).stem}.*"):
            stale.unlink()

    def restore(self) -> None:
        """As it was committed."""
        changed = _git(self.folder, "diff", "--name-only").split()
        _git(self.folder, "checkout", "--quiet", "--force", ".")
        _git(self.folder, "clean", "--quiet", "-fd")
        for path in changed:
            if path.endswith(".py") and (self.folder / path).exists():
                self.put(path, (self.folder / path).read_text(encoding="utf-8"))


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def load() -> None:
    """Imports what the tests need and mutants do not change. No threads may be started here: forks would lack them."""
    for name in LOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def fork(clone: Path, log: Path, work: Callable[[], int], *, compiles: bool = False) -> int:
    """Begins work in a fork whose `llmeff` and `tests` are the clone's; its process id, and its group's."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), write_through=True)
        os.chdir(clone)
        home = log.with_suffix(".tmp")
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        os.environ |= {"PYTHONPATH": str(clone), "TMPDIR": str(home)}
        if not compiles:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
        sys.path[:] = [str(clone), *(place for place in sys.path if place not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "llmeff")]:
            del sys.modules[name]
        sys.modules["__main__"] = types.ModuleType("__main__")  # or what the tests spawn would begin with this one
        code = work()
    except BaseException:  # noqa: BLE001 - nothing may get back into the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def end(process: int) -> None:
    """Ends a fork and all that it started."""
    for kill in (os.killpg, os.kill):  # a fork that has only begun has no group of its own yet
        with contextlib.suppress(ProcessLookupError):
            kill(process, signal.SIGKILL)


def run_tests(arguments: Sequence[str], *plugins: Any) -> int:
    """What pytest says of test files, with the one plugin that our settings name: to load the others takes a second."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plain = ["-q", "-p", "pytest_timeout", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    loaded = ["-W", "ignore:Module already imported so cannot be rewritten"]
    ending = _Ending()
    try:
        return int(pytest.main([*plain, *loaded, *arguments], plugins=[*plugins, ending]))
    except pytest.PytestUnraisableExceptionWarning:  # what a failed test left open, found after pytest's last words
        if ending.status == pytest.ExitCode.TESTS_FAILED:
            return int(ending.status)
        raise


class _Ending:
    """How pytest's session ended, whatever comes after."""

    status: int = pytest.ExitCode.INTERNAL_ERROR

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Notes it."""
        self.status = exitstatus


def finished(process: int) -> int | None:
    """A fork's exit code, below 0 for a signal; None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def cpu_s(process: int) -> float:
    """What a fork has taken of a CPU."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


# -- what reaches what


@dataclass
class Traced:
    """Of a test file's tests without mutants."""

    seconds: dict[str, float]
    """CPU seconds of each."""
    reached: dict[str, list[str]]
    """Functions that each reaches."""
    failed: list[str]
    """Tests that failed."""


def traced(scratch: Path, path: str) -> Traced | None:
    """What is known of a test file as it now is; None if nothing."""
    kept = _trace_file(scratch, path)
    return Traced(**json.loads(kept.read_text())) if kept.exists() else None


def _trace_file(scratch: Path, path: str) -> Path:
    return scratch / "traces" / f"{path.replace('/', '.')}.{_digest(committed(path))}.json"


def trace(scratch: Path, clone: Path, path: str) -> int:
    """In a fork: runs a test file and writes down what it reaches."""
    reach = Reach(clone / "llmeff")
    run_tests([path], reach)
    found = Traced(dict(reach.seconds), {name: sorted(own) for name, own in reach.reached.items()}, reach.failed)
    kept = _trace_file(scratch, path)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(found)))
    partial.replace(kept)
    return 0


# -- a campaign


@dataclass
class Case:
    """A mutant or a patch on its way."""

    name: str
    files: dict[str, str]
    """Sources by path."""
    stages: list[tuple[list[str], float]]
    """Tests in order, and seconds of a CPU that they may take."""
    row: dict[str, Any] = field(default_factory=dict)
    """What is recorded of it."""
    start_s: float = 0.0
    limit_s: float = 0.0
    begun_s: float = 0.0
    process: int = 0
    stage: int = 0


def stages(scratch: Path, files: Sequence[str], function: str | None) -> list[tuple[list[str], float]]:
    """First the tests that reach a function, then all others; in each, what takes least time comes first."""
    seconds: dict[str, float] = {}
    near = set()
    for path in files:
        known = traced(scratch, path)
        if known is None:
            raise SystemExit(f"{path}: was not traced")
        seconds |= {name: took for name, took in known.seconds.items() if name not in known.failed}
        near |= {name for name, reached in known.reached.items() if function in reached}
    ordered = sorted(seconds, key=lambda name: seconds[name])
    parts = [[name for name in ordered if (name in near) == is_near] for is_near in (True, False)]
    return [(part, SLACK_S + PATIENCE * sum(seconds[name] for name in part)) for part in parts if part]


def verdict(name: str, code: int | None, log: Path) -> str:
    """What a fork's exit code says of a mutant or patch whose tests pass without it; None for one that took too long.

    Raises:
        SystemExit: The tests came to no end that says anything, as where memory was short or pytest itself failed.
    """
    if code is None:
        return "timeout"
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return "survived"
    if code == pytest.ExitCode.TESTS_FAILED:
        return "killed"
    is_import = code in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.USAGE_ERROR)
    if is_import and IMPORT_FAILED.search(log.read_text(encoding="utf-8", errors="replace")):
        return "killed"
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    raise SystemExit(f"{name}: its tests ended {how}, neither passed nor failed; see {log}")


def in_parallel(clones: Sequence[Clone], cases: Iterable[Case], scratch: Path) -> Iterator[Case]:
    """Each case once its end is known, with `row["result"]` killed, timeout or survived, and `row["exit_code"]`."""
    waiting, running = iter(cases), dict[Clone, Case]()
    free = list(clones)
    try:
        while True:
            while free and (case := next(waiting, None)) is not None:
                clone = free.pop()
                for path, source in case.files.items():
                    clone.put(path, source)
                case.start_s = time.monotonic()
                _begin(case, clone, scratch)
                running[clone] = case
            if not running:
                return
            time.sleep(0.05)
            for clone, case in list(running.items()):
                code = finished(case.process)
                is_over = code is None and _takes_too_much(case)
                if code is None and not is_over:
                    continue
                end(case.process)
                if is_over:
                    os.waitpid(case.process, 0)
                del running[clone]
                log = scratch / f"{clone.folder.name}.log"
                result = verdict(case.name, code, log)
                if result == "survived" and case.stage + 1 < len(case.stages):
                    case.stage += 1
                    _begin(case, clone, scratch)
                    running[clone] = case
                    continue
                seconds = round(time.monotonic() - case.start_s, 1)
                case.row |= {"result": result, "exit_code": code, "seconds": seconds, "by": _killer(log)}
                clone.restore()
                free.append(clone)
                yield case
    finally:
        for case in running.values():
            end(case.process)


def _begin(case: Case, clone: Clone, scratch: Path) -> None:
    wanted, case.limit_s = case.stages[case.stage]
    case.begun_s = time.monotonic()
    files = list(dict.fromkeys(name.partition("::")[0] for name in wanted))
    case.process = fork(
        clone.folder, scratch / f"{clone.folder.name}.log", lambda: run_tests(["-x", *files], Order(wanted))
    )


def _takes_too_much(case: Case) -> bool:
    """Of a CPU, of time, or of memory."""
    with contextlib.suppress(psutil.Error):
        if psutil.Process(case.process).memory_info().rss > MOST_BYTES:
            return True
    waited_s = time.monotonic() - case.begun_s
    return cpu_s(case.process) > case.limit_s or waited_s > max(LONGEST_S, WAITING * case.limit_s)


def _killer(log: Path) -> str | None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = ("FAILED ", "ERROR ", "ImportError while loading conftest ")
    return next((line.split(" - ")[0] for line in lines if line.startswith(said)), None)


class Record:
    """Results as JSON lines; a line counts as long as the mutated module is what it was."""

    def __init__(self, path: Path):
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # cut off when it was stopped
                    row = json.loads(line)
                    self.rows[row["mutant"]] = row

    def known(self, mutant: Mutant, source: str) -> dict[str, Any] | None:
        """What was found of a mutant."""
        row = self.rows.get(mutant.name)
        return row if row is not None and row["source"] == _digest(source) else None

    def add(self, row: dict[str, Any]) -> None:
        """One more."""
        self.rows[row["mutant"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def chosen(options: argparse.Namespace) -> dict[str, list[Mutant]]:
    """The sampled mutants of each package, by seed.

    A sample stays as it was drawn, here or for the committed result, whatever lines move: names outlive edits to other
    functions, and for a mutant that is gone another is drawn.
    """
    found = {}
    for package, modules in read_map().items():
        if package in options.packages:
            there = {mutant.name: mutant for mutant in all_mutants(options.scratch, modules)}
            kept = options.scratch / f"sample-{package}-{options.each}-{options.seed}.json"
            names = json.loads(kept.read_text()) if kept.exists() else _committed_sample(package, options.seed)
            own = [there[name] for name in names if name in there][: options.each]
            others = [mutant for mutant in there.values() if mutant not in own]
            own += sample(others, options.each - len(own), f"{options.seed} {package}")
            kept.write_text(json.dumps([mutant.name for mutant in own]))
            found[package] = own
    return found


def _committed_sample(package: str, seed: int) -> list[str]:
    """Names of the mutants that the committed result is of; none if it is of another seed."""
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    names: list[str] = result["packages"][package]["mutants"] if result.get("seed") == seed else []
    return names


def trace_all(options: argparse.Namespace, clones: Sequence[Clone], paths: Iterable[str]) -> None:
    """Runs test files without mutants, those of which nothing is known yet."""
    missing = [path for path in dict.fromkeys(paths) if traced(options.scratch, path) is None]
    free, running = list(clones), dict[int, tuple[Clone, str]]()
    while missing or running:
        while free and missing:
            clone, path = free.pop(), missing.pop(0)
            log = options.scratch / f"{clone.folder.name}.log"
            running[
                fork(clone.folder, log, lambda c=clone, p=path: trace(options.scratch, c.folder, p), compiles=True)
            ] = clone, path
        time.sleep(0.1)
        for process, (clone, path) in list(running.items()):
            if (code := finished(process)) is not None:
                end(process)
                del running[process]
                free.append(clone)
                known = traced(options.scratch, path)
                if known is None:
                    raise SystemExit(f"{path}: its tests did not end ({code}); see {options.scratch}")
                print(
                    f"traced {path}: {sum(known.seconds.values()):.1f} s, failed: {known.failed or 'none'}", flush=True
                )


def control(scratch: Path, clones: Sequence[Clone], paths: Iterable[str]) -> None:
    """Runs test files without a mutant, those that have not passed at this commit yet.

    Raises:
        SystemExit: One has no test that passes, or does not pass as mutants' tests are run.
    """
    passed = scratch / "passed" / commit()
    passed.mkdir(parents=True, exist_ok=True)
    cases = {}
    for path in dict.fromkeys(paths):
        if not (passed / path.replace("/", ".")).exists():
            cases[f"no mutant, {path}"] = path
    without = [Case(name, {}, stages(scratch, [path], None)) for name, path in cases.items()]
    if empty := [case.name for case in without if not case.stages]:
        raise SystemExit(f"{'; '.join(empty)}: no test passes, so that none can judge a mutant")
    for case in in_parallel(clones, without, scratch):
        if case.row["exit_code"] != pytest.ExitCode.OK:
            raise SystemExit(f"{case.name}: the tests fail without a mutant, see {scratch}: {case.row}")
        (passed / cases[case.name].replace("/", ".")).touch()


def untested(options: argparse.Namespace, record: Record) -> list[Mutant]:
    """The sampled mutants that are not said to be equivalent and of which nothing is known, or survivors if asked again."""
    equivalent, found = read_equivalent(), []
    for mutant in (mutant for own in chosen(options).values() for mutant in own if mutant.name not in equivalent):
        known = record.known(mutant, committed(path_of(mutant.module)))
        if known is None or (options.again and known["result"] == "survived"):
            found.append(mutant)
    random.Random(0).shuffle(found)  # so that what is known at any time is of all packages
    return found


def campaign(options: argparse.Namespace) -> None:
    """Tests what is sampled and not known yet."""
    load()
    clones = [Clone(options.scratch / f"clone-{number}") for number in range(options.processes)]
    judges = {module: files for own in read_map().values() for module, files in own.items()}
    trace_all(
        options,
        clones,
        (path for package in options.packages for files in read_map()[package].values() for path in files),
    )
    record, applied = Record(options.scratch / "results.jsonl"), operators()
    asked = untested(options, record)
    control(options.scratch, clones, (path for mutant in asked for path in judges[mutant.module]))

    def cases() -> Iterator[Case]:
        for mutant in asked:
            source = committed(path_of(mutant.module))
            changed = mutated(source, mutant, applied)
            assert changed is not None
            reached = f"{mutant.module}:{mutant.function}"
            yield Case(
                mutant.name, {path_of(mutant.module): changed}, stages(options.scratch, judges[mutant.module], reached),
                {"mutant": mutant.name, "line": mutant.line, "source": _digest(source), "commit": commit()},
            )  # fmt: skip

    for case in in_parallel(clones, cases(), options.scratch):
        record.add(case.row)
        print(f"{case.row['result']:>8} {case.row['seconds']:6.1f} s  {case.name}  {case.row['by'] or ''}", flush=True)
    summarise(options, record)


def scores(options: argparse.Namespace, record: Record) -> dict[str, dict[str, Any]]:
    """By package: how many were sampled, left out, tested and killed, and which survived."""
    equivalent, found = read_equivalent(), {}
    for package, mutants in chosen(options).items():
        counted = [mutant for mutant in mutants if mutant.name not in equivalent]
        rows = []
        for mutant in counted:
            row = record.known(mutant, committed(path_of(mutant.module)))
            rows += [row] if row is not None else []
        survivors = sorted(row["mutant"] for row in rows if row["result"] == "survived")
        found[package] = {
            "sampled": len(mutants), "equivalent": len(mutants) - len(counted), "tested": len(rows),
            "killed": len(rows) - len(survivors),
            "score": round((len(rows) - len(survivors)) / len(rows), 4) if rows else None, "survivors": survivors,
            "mutants": [mutant.name for mutant in mutants],
        }  # fmt: skip
    return found


def summarise(options: argparse.Namespace, record: Record) -> dict[str, dict[str, Any]]:
    """Prints the scores."""
    found = scores(options, record)
    for package, own in found.items():
        score = "-" if own["score"] is None else f"{own['score']:.1%}"
        print(
            f"{package:<10} sampled {own['sampled']:4} equivalent {own['equivalent']:3} tested {own['tested']:4} killed {own['killed']:4} {score}"
        )
    tested, killed = (sum(own[key] for own in found.values()) for key in ("tested", "killed"))
    print(f"in all     {killed} of {tested} killed: {killed / max(1, tested):.1%}")
    return found


def shortfalls(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What scores lack to be a result: all packages, mutants of each and in all, tests of all that is not equivalent."""
    for package in read_map():
        own = found.get(package, {"sampled": 0, "equivalent": 0, "tested": 0})
        if own["sampled"] < LEAST_EACH:
            yield f"{package}: {own['sampled']} sampled, at least {LEAST_EACH} are needed"
        if missing := own["sampled"] - own["equivalent"] - own["tested"]:
            yield f"{package}: {missing} of {own['sampled']} sampled were not tested"
    sampled, equivalent = (sum(own[key] for own in found.values()) for key in ("sampled", "equivalent"))
    if sampled < LEAST:
        yield f"in all: {sampled} sampled, at least {LEAST} are needed"
    if equivalent > MOST_EQUIVALENT * sampled:
        yield f"in all: {equivalent} of {sampled} said to be equivalent, at most {MOST_EQUIVALENT:.0%} may be"


def command(each: int, seed: int) -> str:
    """Tests such a sample of all packages, what is known of it left out."""
    return f"make mutants ARGS='--each {each} --seed {seed}'"


def write(options: argparse.Namespace) -> None:
    """The committed result.

    Raises:
        SystemExit: Something sampled was not tested, or the sample is too small.
    """
    record = Record(options.scratch / "results.jsonl")
    found = summarise(options, record)
    if problems := list(shortfalls(found)):
        each = max(options.each, LEAST_EACH, math.ceil(LEAST / len(read_map())))
        lines = [f"{RESULTS.name} is not written:", *problems, f"go on with: {command(each, options.seed)}"]
        raise SystemExit("\n  ".join(lines))
    tested, killed = (sum(own[key] for own in found.values()) for key in ("tested", "killed"))
    names = {mutant.name for own in chosen(options).values() for mutant in own}
    seconds = [row["seconds"] for name, row in record.rows.items() if name in names]
    content = {
        "command": command(options.each, options.seed),
        "seed": options.seed,
        "commit": commit(),
        "seconds_a_mutant": round(sum(seconds) / max(1, len(seconds)), 1),
        "tested": tested, "killed": killed, "score": round(killed / max(1, tested), 4),
        "by_operator": dict(Counter(name.split(":")[2].split("_")[0] for own in found.values() for name in own["survivors"])),
        "packages": found,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# -- patches


def patches() -> dict[str, tuple[Path, list[str]]]:
    """By name: each patch, and the test files that its first lines name."""
    found = {}
    for path in sorted(HERE.glob("*.patch")):
        judges = [
            line.removeprefix("Judged by: ") for line in path.read_text().splitlines() if line.startswith("Judged by: ")
        ]
        found[path.stem] = path, judges
    return found


def known_faults(options: argparse.Namespace) -> int:
    """Applies each patch and runs its tests, which must pass without it; how many live.

    Raises:
        SystemExit: The tests fail without a patch, or came to no end that says anything.
    """
    load()
    clone, log, alive = Clone(options.scratch / "clone-0"), options.scratch / "clone-0.log", 0
    for judges in dict.fromkeys(tuple(files) for _, files in patches().values()):
        code = _exit_code(clone, log, judges)
        if code != pytest.ExitCode.OK:
            raise SystemExit(f"{', '.join(judges)}: the tests fail without the patch (exit code {code}), see {log}")
    for name, (path, files) in patches().items():
        start_s = time.monotonic()
        _git(clone.folder, "apply", str(path))
        for changed in _git(clone.folder, "diff", "--name-only").split():
            clone.put(changed, (clone.folder / changed).read_text(encoding="utf-8"))
        code = _exit_code(clone, log, files)
        clone.restore()
        result = verdict(name, code, log)
        alive += result == "survived"
        said = "LIVES" if result == "survived" else result
        print(f"{said:>8} {time.monotonic() - start_s:6.1f} s  {name}  {_killer(log) or ''}", flush=True)
    return alive


def _exit_code(clone: Clone, log: Path, files: Sequence[str]) -> int:
    """Of test files as the clone now is; a test that takes too long fails, by our settings of pytest."""
    process = fork(clone.folder, log, lambda: run_tests(["-x", *files]))
    while (code := finished(process)) is None:
        time.sleep(0.05)
    end(process)
    return code


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--packages", nargs="+", default=list(read_map()), choices=list(read_map()))
    parser.add_argument("--each", type=int, default=75, help="mutants of each package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=int(os.environ.get("PROCESSES", "2")))
    parser.add_argument("--scratch", type=Path, default=ROOT / ".mutants", help="clones, traces and results so far")
    parser.add_argument("--again", action="store_true", help="test survivors once more")
    parser.add_argument("--known", action="store_true", help="apply the patches beside this file instead")
    parser.add_argument("--write", action="store_true", help="write analysis/results/mutants.json and test nothing")
    options = parser.parse_args()
    options.scratch = options.scratch.resolve()
    options.scratch.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if options.known:
        return known_faults(options)
    write(options) if options.write else campaign(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
