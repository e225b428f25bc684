"""CORE written plainly: an example at a time, a sequence at a time, all logits, no padding."""

import json
import random

import torch


def plain_core(model, tokenizer, folder, config, baselines, most=None):
    """({label: accuracy}, CORE) of the files of a bundle.

    Args:
        config: {label: (kind, shots, delimiter)}.
        most: examples of a task.
    """
    accuracies, centred = {}, []
    for label, (kind, shots, delimiter) in config.items():
        lines = (folder / "eval_data" / "part" / f"{label}.jsonl").read_text().strip().split("\n")
        data = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(data)
        data = data[:most]
        right = 0
        for index in range(len(data)):
            others = [i for i in range(len(data)) if i != index]
            picked = random.Random(1234 + index).sample(others, shots)
            right += ask(model, tokenizer, kind, delimiter, data[index], [data[i] for i in picked])
        accuracies[label] = right / len(data)
        guess = baselines[label] / 100
        centred.append((accuracies[label] - guess) / (1 - guess))
    return accuracies, sum(centred) / len(centred)


def ask(model, tokenizer, kind, delimiter, example, shots):
    """Whether one example is answered rightly."""
    prefix = ""
    for shot in shots:
        if kind == "multiple_choice":
            prefix += shot["query"] + delimiter + shot["choices"][shot["gold"]] + "\n\n"
        elif kind == "schema":
            prefix += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"]
            prefix += "\n\n"
        else:
            prefix += shot["context"].strip() + delimiter + str(shot["continuation"]) + "\n\n"
    if kind == "language_modeling":
        start = prefix + example["context"].strip() + delimiter
        before = encode(tokenizer, start.strip())
        whole = encode(tokenizer, start + str(example["continuation"]))
        assert whole[: len(before)] == before
        logits = logits_of(model, whole)
        return all(
            int(logits[at - 1].argmax()) == whole[at] for at in range(len(before), len(whole))
        )
    if kind == "multiple_choice":
        rows = [encode(tokenizer, prefix + example["query"] + delimiter + choice)
                for choice in example["choices"]]  # fmt: skip
        shared = 0
        while all(len(row) > shared and row[shared] == rows[0][shared] for row in rows):
            shared += 1
        starts = [shared for _ in rows]
    else:
        rows = [encode(tokenizer, prefix + context + delimiter + example["continuation"])
                for context in example["context_options"]]  # fmt: skip
        shared = 0
        while all(len(row) > shared and row[-1 - shared] == rows[0][-1 - shared] for row in rows):
            shared += 1
        starts = [len(row) - shared for row in rows]
    means = []
    for row, start in zip(rows, starts, strict=True):
        nats = -logits_of(model, row).log_softmax(-1)
        each = [float(nats[at - 1, row[at]]) for at in range(start, len(row))]
        means.append(sum(each) / len(each) if each else float("inf"))
    best = min(range(len(means)), key=lambda i: means[i])
    return best == example["gold"]


def encode(tokenizer, text):
    return [tokenizer.bos, *tokenizer.encode(text)]


@torch.no_grad()
def logits_of(model, row):
    return model(torch.tensor([row]))[0]  # (T, V)
