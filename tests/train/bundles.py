"""A small bundle of CORE's tasks, one of each kind."""

import json

from tests.helpers import documents

CHOICES = "multiple_choice"
BASELINES = {"words": 25.0, "who": 50, "copy": 0}


def examples(count=7):
    """{label: examples} with texts that differ in length."""
    texts = [text.split() for text in documents(8 * count, seed=3, longest=9)]
    take = iter(" ".join(words) for words in texts)
    found = {"words": [], "who": [], "copy": []}
    for index in range(count):
        choices = [next(take) for _ in range(3)] + ["cat"]
        found["words"].append({"query": next(take), "choices": choices, "gold": index % 4})
        options = [f"{next(take)} the cat", f"{next(take)} a mat"]
        found["who"].append(
            {"context_options": options, "continuation": "sat on", "gold": index % 2, "more": 1}
        )
        found["copy"].append({"context": f" {next(take)} \n", "continuation": "sat"})
    found["copy"][0]["continuation"] = 12  # text, as others write it
    return found


def write_bundle(folder, tasks=None, shots=2):
    """Write the bundle; returns its folder."""
    tasks = tasks or examples()
    kinds = {"words": CHOICES, "who": "schema", "copy": "language_modeling"}
    (folder / "eval_data" / "part").mkdir(parents=True)
    text = "icl_tasks:\n"
    for label, found in tasks.items():
        text += (
            f"-\n  label: {label}\n  dataset_uri: part/{label}.jsonl\n  num_fewshot: [{shots}]\n"
            f"  icl_task_type: {kinds[label]}\n  has_categories: true\n"
        )
        if label == "words":
            text += '  continuation_delimiter: "\\nAnswer: "\n'
        lines = "\n".join(map(json.dumps, found))
        (folder / "eval_data" / "part" / f"{label}.jsonl").write_text(f"{lines}\n\n")
    (folder / "core.yaml").write_text(text)
    rows = "".join(f"{label},x,{baseline}\n" for label, baseline in BASELINES.items())
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Category,Random baseline\n{rows}")
    return folder
