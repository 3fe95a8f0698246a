"""Rows as training sees them."""

from jllama.text.rows import make_examples


def examples_of(rows, tokenizer, style="plain", **more):
    settings = {"max_seq_len": 512, "train_on_prompt": False, "skip_bad_rows": 0} | more
    return make_examples(rows, tokenizer, style, source="rows.json", **settings)
