"""Mutants: small random mistakes in the code, to see which of them the tests find.

    python -m tests.mutants make FILE --seed 1 --count 300    needs the extra `mutants`
    python -m tests.mutants run FILE --out RESULT --jobs 14   needs what the tests need

`make` draws places in train/, model/ and kernels/ that an operator of cosmic-ray can change, and
one change for each: another operator, constant or comparison, a `not`, a decorator less. Left out
are Triton's kernels, annotations, and `is` against `==`, which are the same for nearly every value
here. `run` tries each mutant in a copy of the tree, on the CPU, with the mirror of its file alone:
tests/PATH/test_NAME.py, or what tests/mirrors.py says. A mutant is killed if the mirror fails, or
takes longer than 10 s and three times what it takes without it.
"""

import argparse
import ast
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mirrors import mirror

ROOT = Path(__file__).parent.parent
LEFT_OUT = re.compile(r"NoOp|Variable|(Eq_Is|Is_Eq|NotEq_IsNot|IsNot_NotEq)$")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "runs", "shared", "build", "dist")


def closed_spans(tree):
    """Where no mutant goes: positions (line, column) of kernels and annotations, first and end."""
    for node in ast.walk(tree):
        decorators = getattr(node, "decorator_list", [])
        if any("triton." in ast.unparse(x) for x in decorators):
            yield (decorators[0].lineno, 0), (node.end_lineno, node.end_col_offset)
        for x in filter(None, (getattr(node, name, None) for name in ("annotation", "returns"))):
            yield (x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)


def places(source):
    """{(line, column): [(operator, occurrence)]} of what cosmic-ray can change in a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    spans, nodes = list(closed_spans(ast.parse(source))), list(ast_nodes(get_ast(source)))
    found = {}
    for name in sorted(name for name in operator_names() if not LEFT_OUT.search(name)):
        operator = get_operator(name)()
        positions = [p for node in nodes for p in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            if not any(low <= start < high for low, high in spans):
                found.setdefault(start, []).append((name, occurrence))
    return found


def mutant(file, source, operator, occurrence):
    """A mutant as JSON: `old`, at character `start` of the file, becomes `new`. None where the code
    would mean the same, or nothing to Python."""
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    try:
        changed = MutationVisitor.mutate_code(source, get_operator(operator)(), occurrence)
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except (SyntaxError, AttributeError):  # AttributeError: cosmic-ray's, of `except a.b`
        return None
    start = len(os.path.commonprefix([source, changed]))
    tail = len(os.path.commonprefix([source[start:][::-1], changed[start:][::-1]]))
    old, new = source[start : len(source) - tail], changed[start : len(changed) - tail]
    place = {"file": file, "line": source.count("\n", 0, start) + 1, "start": start}
    return {**place, "operator": operator.rpartition("/")[2], "old": old, "new": new}


def write(path, mutants):
    Path(path).write_text("[\n" + ",\n".join(map(json.dumps, mutants)) + "\n]\n")


def make(args):
    try:
        import cosmic_ray  # noqa: F401
    except ImportError:
        sys.exit("error: `make` needs cosmic-ray: pip install -e '.[mutants]'")
    paths = [
        p for room in ("train", "model", "kernels") for p in sorted((ROOT / room).rglob("*.py"))
    ]
    sources = {p.relative_to(ROOT).as_posix(): p.read_text() for p in paths}
    sources = {f: source for f, source in sources.items() if args.only in (None, f)}
    found = [(f, place) for f in sources for _, place in sorted(places(sources[f]).items())]
    draw = random.Random(args.seed)
    draw.shuffle(found)
    made = (mutant(file, sources[file], *draw.choice(choices)) for file, choices in found)
    chosen = itertools.islice(filter(None, made), args.count)
    mutants = [{"number": number, **one} for number, one in enumerate(chosen)]
    write(args.file, mutants)
    print(f"{len(mutants)} mutants in {args.file}, of {len(found)} places")


def try_mirror(tree, name, limit):
    """Run a mirror in a tree: (whether it passed, the test that failed, seconds)."""
    folder = tree.with_suffix(".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    folders = dict.fromkeys(("TMPDIR", "HYPOTHESIS_STORAGE_DIRECTORY"), str(folder))
    flags = dict.fromkeys(("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"), "1")
    libraries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(tree), *(os.path.abspath(x) for x in libraries if x)])
    env = {**os.environ, **folders, **flags, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    pytest = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", name]
    command = ["bash", "-c", 'ulimit -v 25000000; exec "$@"', "-", *pytest]
    began = time.monotonic()
    with open(folder / "output", "w+") as output:
        run = subprocess.Popen(
            command, cwd=tree, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = run.wait(limit)
        except subprocess.TimeoutExpired:
            status = "time"
        with contextlib.suppress(ProcessLookupError):  # the tests leave nothing running
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        output.seek(0)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output.read(), re.MULTILINE)
    reason = "time" if status == "time" else failed[1] if failed else f"status {status}"
    return status == 0, None if status == 0 else reason, time.monotonic() - began


def run(args):
    mutants = json.loads(Path(args.file).read_text())
    mutants = [m for m in mutants if args.only in (None, m["file"])]
    mutants = [m for m in mutants if not args.numbers or m["number"] in args.numbers]
    ends, clean, mine = time.monotonic() + args.seconds, {}, threading.local()

    def start_worker():
        mine.tree = Path(tempfile.mkdtemp(dir=folder)) / "tree"
        mine.tree.parent.chmod(0o755)  # some tests become another user
        shutil.copytree(ROOT, mine.tree, ignore=NOT_COPIED)

    def measure(name):
        clean[name] = try_mirror(mine.tree, name, args.slowest)

    def attempt(one):
        name = mirror(one["file"])
        passed, reason, seconds = clean[name]
        if not passed or time.monotonic() > ends:
            return {**one, "result": "not run", "by": reason}
        source, end = (ROOT / one["file"]).read_text(), one["start"] + len(one["old"])
        if source[one["start"] : end] != one["old"]:
            return {**one, "result": "not run", "by": "another version of the file"}
        path = mine.tree / one["file"]
        path.write_text(source[: one["start"]] + one["new"] + source[end:])
        passed, reason, seconds = try_mirror(mine.tree, name, 10 + 3 * seconds)
        path.write_text(source)
        result = "survived" if passed else "timeout" if reason == "time" else "killed"
        print(f"{one['number']} {one['file']}:{one['line']} {result} {reason}", flush=True)
        return {**one, "result": result, "by": reason, "seconds": round(seconds, 1)}

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        pool = ThreadPoolExecutor(args.jobs, initializer=start_worker)
        list(pool.map(measure, sorted({mirror(m["file"]) for m in mutants})))
        for name, (passed, reason, _) in clean.items():
            if not passed:
                print(f"{name} fails without a mutant: {reason}")
        results = list(pool.map(attempt, mutants))
    write(args.out, results)
    print(dict(Counter(one["result"] for one in results)))


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("make", make), ("run", run)):
        command = commands.add_parser(name)
        command.add_argument("file", help="the mutants, as JSON")
        command.add_argument("--only", metavar="PATH", help="mutants of this file alone")
        command.set_defaults(function=function)
    commands.choices["make"].add_argument("--seed", type=int, default=1)
    commands.choices["make"].add_argument("--count", type=int, default=300)
    command.add_argument("--out", required=True, help="JSON with what became of each")
    command.add_argument("--numbers", type=int, nargs="*", help="these mutants alone")
    command.add_argument("--jobs", type=int, default=1)
    command.add_argument("--seconds", type=float, default=1e9, help="then start no more mutants")
    command.add_argument("--slowest", type=float, default=300, help="seconds a mirror may take")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
