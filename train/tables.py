"""Tables for a terminal that are Markdown as well."""


def aligned_lines(head, rows):
    """A table line by line: its first column to the left, the others to the right.

    Args:
        head: the columns' names.
        rows: lists of as many strings.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    marks = [f"{'-' * (width - 1)}{'-' if i == 0 else ':'}" for i, width in enumerate(widths)]
    for cells in (head, [mark.rjust(3, "-") for mark in marks], *rows):
        first, *others = zip(cells, widths, strict=True)
        shown = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        yield f"| {' | '.join(shown)} |"
