"""Seeded random edits of JSON and safetensors files: bytes flipped, cut and inserted, values
replaced by what they cannot be, headers that claim what is not there."""

import json

ODD_VALUES = (
    None, True, -1, 0, 1, 0.5, 2**31, 2**63, 10**30, -(2**63), 1e308, float("nan"), float("inf"),
    "", "x", "1", "nan", "\ud800", "a" * 5000, [], {}, [[]], {"a": 1}, [0] * 50, [[[[[{}]]]]],
)  # fmt: skip


def edit_bytes(content, draw):
    """(content with bytes flipped, cut out or put in, what was done)."""
    way, at = draw.choice(("flip", "cut", "end", "insert")), draw.randrange(len(content))
    size = draw.choice((1, 1, 3, 40))
    if way == "flip":
        bit = 1 << draw.randrange(8)
        return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :], f"bit of byte {at}"
    if way == "cut":
        return content[:at] + content[at + size :], f"{size} bytes cut at {at}"
    if way == "end":
        return content[:at], f"cut to {at} bytes"
    return content[:at] + draw.randbytes(size) + content[at:], f"{size} bytes at {at}"


def places(value, path=()):
    """Paths of the values inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:400])
    for key, each in items:
        found += places(each, (*path, key))
    return found


def edit_json(content, draw):
    """(a JSON text with one edit, what was done)."""
    way = draw.choice(["value"] * 6 + ["remove", "remove", "add", "bytes", "bytes", "text"])
    if way == "bytes":
        return edit_bytes(content, draw)
    if way == "text":
        text = draw.choice([
            b"", b"null", b"[]", b"{}", b"0", b"nan", b"[" * 100000, b'{"a":' * 100000,
            b"\xff\xfe" + content, b"\xef\xbb\xbf" + content, content + content,
            content.replace(b'"', b"'"), content.replace(b":", b":" * 2), b"9" * 5000,
        ])  # fmt: skip
        return text, f"text {text[:20]!r}"
    tree = json.loads(content)
    long = ("num_iterations", "total_batch_size", "eval_tokens")  # more work is no fault
    place = draw.choice([p for p in places(tree) if p[-1] not in long])
    name, holder = ".".join(map(str, place)), tree
    for key in place[:-1]:
        holder = holder[key]
    if way == "remove":
        del holder[place[-1]]
    elif way == "add":
        tree[draw.choice(["extra", "", "format ", "step2"])] = draw.choice(ODD_VALUES)
    else:
        old, values = holder[place[-1]], list(ODD_VALUES)
        if isinstance(old, int) and not isinstance(old, bool):
            values += [old + 1, old - 1, -old, old * 1000, str(old), float(old)]
        if isinstance(old, str):
            values += [old[::-1], old + " ", old.upper()]
        holder[place[-1]] = draw.choice(values)
        name += f" = {holder[place[-1]]!r:.40}"
    text = json.dumps(tree)
    for number in ("NaN", "Infinity"):
        if number in text and draw.random() < 0.5:
            text = text.replace(number, "1e999")
    return text.encode(), f"{way} {name}"


def edit_tensors(content, draw):
    """(a safetensors file with one edit, what was done)."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    way = draw.choice(("bytes", "bytes", "length", "header", "header", "data", "data", "empty"))
    if way == "bytes":
        return edit_bytes(content, draw)
    if way == "length":
        value = draw.choice([0, 1, size - 1, size + 1, 2**32, 2**62, 2**64 - 1])
        return value.to_bytes(8, "little") + content[8:], f"header of {value} bytes"
    if way == "empty":
        text = draw.choice([b"", b"\0" * 8, b"\x02" + b"\0" * 7 + b"{}"])
        return text, f"text {text!r}"
    name = draw.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    if way == "data":
        start, stop = entry["data_offsets"]
        width = {"I64": 8, "I32": 4, "F32": 4}[entry["dtype"]]
        at = start + width * draw.randrange(max((stop - start) // width, 1))
        value = draw.choice([-1, 0, 2**31 - 1, -(2**31), 2 ** (8 * width - 1) - 1, 999999])
        new = (value % 2 ** (8 * width)).to_bytes(width, "little")
        return content[: 8 + size] + data[:at] + new + data[at + width :], f"{name}: {value}"
    part = draw.choice(("dtype", "shape", "data_offsets", "name", "remove"))
    if part == "name":
        header[name + "2"] = header.pop(name)
    elif part == "remove":
        header.pop(name)
    else:
        entry[part] = draw.choice({
            "dtype": ["F64", "I8", "BF16", "F32", "I32", "BOOL", "F8_E4M3", "X9", 7],
            "shape": [[], [-1], [0], [1, 2], [2**40], [2**62, 4], "a", [1.5], [True]],
            "data_offsets": [[0, 0], [8, 4], [0, 2**50], [-8, 8], [], "a"],
        }[part])  # fmt: skip
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data, f"{part} of {name}"
