"""Meta's tokenizer.model, read and checked: tiktoken's lines of ranks, or SentencePiece's protobuf.

    IQ== 0          the token "!" has rank (and id) 0
    Ig== 1

A tokenizer that is cut or damaged often still loads, and gives other ids than the model knows. What
Llama 3 has beside its ranks, no file says: it stands here.
"""

import base64
import binascii
import functools
import re
from collections import Counter
from pathlib import Path

from jllama.errors import InputError

FILE_NAME = "tokenizer.model"
_ADVICE = f"copy Meta's {FILE_NAME} again"
_LINE = re.compile(rb"([A-Za-z0-9+/]+=*)[ \t]+(-?[0-9]{1,18})")

# Llama 3's splitting rule and 256 special tokens, in the order of their ids (from 128,000 on).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{2 + i}|>" for i in range(245)),
)


# Text and header borders and <|eot_id|> have one name in every release of Llama 3, others not.
_FIXED_SPECIALS = {*LLAMA3_SPECIALS[:2], *LLAMA3_SPECIALS[6:8], LLAMA3_SPECIALS[9]}
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")


def is_llama3s(name: object, index: int) -> bool:
    """Whether Llama 3's special token of this number has this name in one of its releases.

    A reserved one may bear any number, since 3.0, 3.1 and Hugging Face count them differently and
    nothing uses them.
    """
    ours = LLAMA3_SPECIALS[index] if 0 <= index < len(LLAMA3_SPECIALS) else None
    reserved = isinstance(name, str) and _RESERVED.fullmatch(name) is not None
    return ours is not None and (name == ours or (reserved and ours not in _FIXED_SPECIALS))


@functools.cache
def read_ranks(content: bytes, file: Path) -> dict[bytes, int] | None:
    """tiktoken's ranks by token, or None if the file's first line is no `base64 rank`.

    Raises:
        InputError: if a line is damaged or missing: ranks are 0, 1, 2, ..., each token stands
            once, and all 256 bytes are tokens.
    """
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines or not _LINE.fullmatch(lines[0][1].strip()):
        return None
    tokens, ranks = [], []
    for number, line in lines:
        found = _LINE.fullmatch(line.strip())
        try:
            tokens.append(base64.b64decode(found[1], validate=True) if found else b"")
        except binascii.Error:
            found = None
        if found is None:
            raise InputError(f"{file}: line {number} is no `base64 rank`; {_ADVICE}")
        ranks.append(int(found[2]))
    problems = []
    if missing := sorted(set(range(len(ranks))).difference(ranks)):
        problems.append(
            f"{len(ranks):,} ranks without {missing[0]:,}, expected 0, 1, 2, ... (lowest found: "
            f"{min(ranks):,}, highest: {max(ranks):,})"
        )
    if twice := [token for token, times in Counter(tokens).items() if times > 1]:
        problems.append(f"{len(twice):,} tokens stand twice, the first is {twice[0][:20]!r}")
    if unknown := sorted({bytes([byte]) for byte in range(256)}.difference(tokens)):
        problems.append(
            f"{len(unknown)} of the 256 bytes without a token, the first {unknown[0][0]}"
        )
    if problems:
        raise InputError(f"{file}: {'; '.join(problems)}; {_ADVICE}")
    return dict(zip(tokens, ranks, strict=True))


def check_sentencepiece(content: bytes, file: Path) -> None:
    """Refuses what SentencePiece reads, but no LLaMA's tokenizer can be.

    Raises:
        InputError: if the end of the file is missing, or the begin or end token.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    size = f"({len(content):,} bytes found)"
    try:
        proto = ModelProto.FromString(content)
    except DecodeError as error:
        raise InputError(
            f"{file}: neither a SentencePiece model nor tiktoken ranks; {_ADVICE} {size}"
        ) from error
    pieces = [(piece.piece, piece.type) for piece in proto.pieces]
    if broken := [i for i, (text, _) in enumerate(pieces) if not isinstance(text, str)]:
        raise InputError(f"{file}: piece {broken[0]} is not UTF-8; {_ADVICE}")
    # They stand behind the pieces, so that a file cut between two pieces lacks them.
    specs = ("trainer_spec", "normalizer_spec")
    if missing := [spec for spec in specs if not proto.HasField(spec)]:
        raise InputError(f"{file}: the end is missing ({', '.join(missing)}); {_ADVICE} {size}")
    control, trainer, problems = proto.SentencePiece.CONTROL, proto.trainer_spec, []
    stated = {trainer.bos_piece: trainer.bos_id, trainer.eos_piece: trainer.eos_id}
    for name, token in stated.items():
        place = pieces.index((name, control)) if (name, control) in pieces else None
        if place is None or place != token:
            found = "there is none" if place is None else f"it is piece {place}"
            problems.append(f"{name!r} should be id {token} of {len(pieces)} pieces, {found}")
    if len(stated) < 2:
        problems.append(f"text begins and ends with the same token {trainer.bos_piece!r}")
    if problems:
        raise InputError(f"{file}: {'; '.join(problems)}; {_ADVICE}")
