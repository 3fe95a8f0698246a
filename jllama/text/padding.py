"""A padding token for which the embedding has no row: it is no token here.

Alpaca's `[PAD]` is 32000, and many a fine-tune kept the 32,000 rows of its base. transformers opens
such a folder; no text needs the token, and no answer holds it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jllama.folders.json_files import decoded, parse
from jllama.text.hf_files import ADDED, TOKENIZER_CONFIG, TOKENIZER_JSON, Words


def without_padding(
    files: Mapping[str, bytes], words: Words, rows: int, folder: Path
) -> dict[str, bytes]:
    """A tokenizer's files without a padding token behind the rows of the embedding.

    Any other token behind them stays, and so does one that begins or ends a text.

    Args:
        files: by their names in a model folder; `words` is what they say.
        folder: where they lie, for errors.
    """
    pad = words.names.get("pad_token")
    if pad is None or pad in (words.bos, words.eos) or any(token >= rows for token in words.ends):
        return dict(files)

    def stays(name: Any, token: Any) -> bool:
        return name != pad or not str(token).isdecimal() or int(token) < rows

    def name(entry: Any) -> Any:
        return entry.get("content") if isinstance(entry, dict) else None

    found = dict(files)
    for file in files.keys() & {ADDED, TOKENIZER_JSON, TOKENIZER_CONFIG}:
        content: Any = parse(decoded(files[file], folder / file), str(folder / file))
        if file == ADDED:
            content = {text: token for text, token in content.items() if stays(text, token)}
        elif isinstance(listed := content.get("added_tokens"), list):
            kept = [x for x in listed if name(x) != pad or stays(pad, x.get("id"))]
            content["added_tokens"] = kept
        elif isinstance(numbered := content.get("added_tokens_decoder"), dict):
            content["added_tokens_decoder"] = {
                n: x for n, x in numbered.items() if stays(name(x), n)
            }
        found[file] = json.dumps(content).encode()
    return found
