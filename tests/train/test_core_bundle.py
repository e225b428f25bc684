"""Bundles of CORE's tasks: what is read, and what is refused."""

import json
import random

import pytest

from nanofuse.train.core_bundle import Choice, load_bundle
from nanofuse.train.errors import UserError
from tests.train.bundles import examples, write_bundle


def test_reads_what_is_there(tmp_path):
    words, who, copy = load_bundle(write_bundle(tmp_path / "b"))
    assert [t.label for t in (words, who, copy)] == ["words", "who", "copy"]
    assert [t.kind for t in (words, who, copy)] == [
        "multiple_choice", "schema", "language_modeling",
    ]  # fmt: skip
    assert [t.shots for t in (words, who, copy)] == [2, 2, 2]
    assert [t.delimiter for t in (words, who, copy)] == ["\nAnswer: ", " ", " "]
    assert [t.baseline for t in (words, who, copy)] == [25, 50, 0]
    order = examples()["words"]
    random.Random(1337).shuffle(order)
    assert words.examples == [Choice(**example) for example in order]
    assert sorted(e.continuation for e in copy.examples)[0] == "12"
    assert load_bundle(tmp_path / "b", 3)[0].examples == words.examples[:3]


EDITS = {  # file, what is in place of what, message
    "not YAML": ("core.yaml", "icl_tasks:", "icl_tasks: [", "is not YAML"),
    "no tasks": ("core.yaml", "icl_tasks:", "tasks:", "icl_tasks: Field required"),
    "a kind": ("core.yaml", "schema", "essay", "icl_task_type must be one of multiple_choice"),
    "shots": ("core.yaml", "[2]", "[-1]", "num_fewshot must be at least 0"),
    "twice": ("core.yaml", "label: who", "label: words", "has the task words twice"),
    "no file": ("core.yaml", "part/who", "part/why", r"why\.jsonl cannot be read \(No such file"),
    "no row": ("eval_meta_data.csv", "who", "why", "has no random baseline of who"),
    "no number": ("eval_meta_data.csv", "50", "half", "lacks a label or a number"),
    "no column": ("eval_meta_data.csv", "Random", "Chosen", "lacks a label or a number"),
    "certain": ("eval_meta_data.csv", "50", "100", "baseline of who is not from 0"),
    "gold": ("eval_data/part/who.jsonl", '"gold": 1', '"gold": 2', "line 2 .*gold is none of the"),
    "choices": ("eval_data/part/words.jsonl", '"gold": 3', '"gold": 4', "line 4 .*none of the"),
    "no gold": ("eval_data/part/who.jsonl", "gold", "silver", "line 1 .*gold: Field required"),
    "no JSON": ("eval_data/part/copy.jsonl", "{", "", "line 1 is no language_modeling .*not JSON"),
    "a blank": ("eval_data/part/copy.jsonl", '"sat"', '" "', "line 2 .*continuation: String"),
}


@pytest.mark.parametrize("name", EDITS)
def test_refusals_name_file_and_line(tmp_path, name):
    file, old, new, message = EDITS[name]
    path = write_bundle(tmp_path / "b") / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as refused:
        load_bundle(tmp_path / "b")
    assert str(tmp_path / "b") in str(refused.value) and "\n" not in str(refused.value)


def test_nothing_there(tmp_path):
    with pytest.raises(
        UserError, match=r"core\.yaml cannot be read .*--core-bundle takes a folder"
    ):
        load_bundle(tmp_path)
    path = write_bundle(tmp_path / "b") / "eval_data" / "part" / "copy.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no example"):
        load_bundle(tmp_path / "b")
    path.write_bytes(json.dumps({"context": "ü"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="is not a file of a bundle"):
        load_bundle(tmp_path / "b")
