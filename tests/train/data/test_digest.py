"""The digest of data: of texts, their split and the tokenizer, however the files hold them."""

import pyarrow as pa
import pyarrow.parquet as pq

from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.digest import data_digest


def test_the_digest_is_of_texts_splits_and_tokenizer(tmp_path):
    def digest(name, train, val, tokenizer="t", **options):
        folder = tmp_path / name
        folder.mkdir()
        for index, texts in enumerate((train, val)):
            table = pa.table({"text": pa.array(texts, pa.string())})
            pq.write_table(table, folder / f"shard_{index:05d}.parquet", **options)
        return data_digest(ParquetCorpus(folder), tokenizer)

    texts = ["ab", "c", "", None]
    first = digest("a", texts, ["d"])
    assert first.partition("-")[0] == "5" and len(first) == 18
    assert digest("b", texts, ["d"], row_group_size=1, compression="zstd") == first
    others = [
        digest("c", ["a", "bc", "", None], ["d"]),
        digest("d", ["ab", "c", None, ""], ["d"]),
        digest("e", ["ab", "c", ""], [None, "d"]),
        digest("f", texts, ["e"]),
        digest("g", texts, ["d"], tokenizer="u"),
    ]
    assert len({first, *others}) == 6
