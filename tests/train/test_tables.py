from nanofuse.train.tables import aligned_lines


def test_columns_are_as_wide_as_their_widest_cell():
    assert list(aligned_lines(["run", "n"], [["a", "1,024"], ["longer", "7"]])) == [
        "| run    |     n |",
        "| ------ | ----: |",
        "| a      | 1,024 |",
        "| longer |     7 |",
    ]
    assert list(aligned_lines(["a", "b"], [])) == ["| a | b |", "| --- | --: |"]
