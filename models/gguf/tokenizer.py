"""The tokenizer of a GGUF file as a tokenizer.json.

Two kinds are written by llama.cpp's converter for our families: byte-level BPE (`gpt2`), whose way of splitting text
into words has a name, and SentencePiece's BPE (`llama`), whose merges follow from the tokens' scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import shown
from hybrid_cache.models.gguf.metadata import Metadata

MAX_TOKEN = 4096  # characters
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
Json = dict[str, object]

# How words are told apart in text, as the tokenizers of these names say in their own files.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|" + _SLASHED
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    r"\p{N}{1,3}|" + _SLASHED
)


@dataclass(frozen=True, slots=True)
class Words:
    """How a text becomes words, and words become tokens."""

    steps: tuple[Json, ...]
    ignore_merges: bool = False  # a word that is a token is one, whatever the merges say
    adds_bos: bool = False  # where the file does not say
    composed: bool = False  # characters are put together first (NFC)


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _spelled(*, use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _by(pattern: str) -> tuple[Json, ...]:
    return _split(pattern), _spelled(use_regex=False)


_GPT2 = Words((_spelled(use_regex=True),))
_DIGITS = Words(({"type": "Digits", "individual_digits": True}, _spelled(use_regex=True)))
_FALCON = Words(
    (
        {"type": "Punctuation", "behavior": "Contiguous"},
        _spelled(use_regex=True),
        {"type": "Digits", "individual_digits": False},
        _split("[0-9][0-9][0-9]"),
    )
)
_LLAMA3 = Words(_by(_CL100K), ignore_merges=True, adds_bos=True)
WORDS: Mapping[str, Words] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4", "granite-docling", "gigachat"), _GPT2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "falcon": _FALCON,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Words(_by(_CL100K))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Words(_by(_QWEN2), composed=True)),
    "qwen35": Words(_by(_QWEN35), composed=True),
    "tekken": Words(_by(_TEKKEN), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Words(_by(_O200K))),
}


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    tokenizer: Json  # as in tokenizer.json
    config: Json  # as in tokenizer_config.json


def tokenizer_of(meta: Metadata, num_rows: int) -> GgufTokenizer:
    """num_rows: of the embedding; tokens without one that only fill the list up are left out.

    Raises ModelError, UnsupportedModel for kinds of tokenizers that have no form as tokenizer.json.
    """
    model = meta.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedModel(f"tokenizer.ggml.model is {shown(model)}, supported: gpt2, llama")
    tokens = meta.texts("tokenizer.ggml.tokens")
    if longest := next((token for token in tokens if len(token) > MAX_TOKEN), None):
        raise ModelError(f"a token has {len(longest)} characters, at most {MAX_TOKEN} are allowed")
    kinds = _kinds(meta, tokens)
    vocab: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != UNUSED or number < num_rows:
            vocab.setdefault(token, number)
    build, adds_bos = (
        (_byte_level(meta, vocab), _words(meta).adds_bos) if model == "gpt2" else (_pieces(meta, vocab), True)
    )
    added = [_added(vocab[token], token, kind) for token, kind in zip(tokens, kinds, strict=True) if _is_added(kind)]
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}
    return GgufTokenizer(tokenizer | build, _config(meta, tokens, adds_bos))


def _kinds(meta: Metadata, tokens: Sequence[str]) -> Sequence[float]:
    if not meta.has("tokenizer.ggml.token_type"):
        return [1] * len(tokens)
    kinds = meta.numbers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ModelError(f"tokenizer.ggml.token_type has {len(kinds)} items for {len(tokens)} tokens")
    return kinds


def _is_added(kind: float) -> bool:
    return kind in (CONTROL, USER_DEFINED)


def _added(number: int, token: str, kind: float) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": kind == CONTROL}


def _words(meta: Metadata) -> Words:
    name = meta.text("tokenizer.ggml.pre")
    if name not in WORDS:
        raise UnsupportedModel(f"tokenizer.ggml.pre is {shown(name)}, supported: {', '.join(WORDS)}")
    return WORDS[name]


def _byte_level(meta: Metadata, vocab: Mapping[str, int]) -> Json:
    words = _words(meta)
    merges = [merge.split(" ") for merge in meta.texts("tokenizer.ggml.merges")]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ModelError(f"tokenizer.ggml.merges has {shown(' '.join(wrong))}, expected two tokens")
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": words.ignore_merges}
    return {
        "normalizer": {"type": "NFC"} if words.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(words.steps)},
        "decoder": _spelled(use_regex=True),
        "model": model,
    }


def _pieces(meta: Metadata, vocab: Mapping[str, int]) -> Json:
    """As transformers converts SentencePiece's BPE."""
    scores = meta.numbers("tokenizer.ggml.scores")
    tokens = meta.texts("tokenizer.ggml.tokens")
    if len(scores) != len(tokens) or len(set(scores)) < 2:
        raise UnsupportedModel(
            "tokenizer.ggml.scores do not tell the tokens apart: the file does not say in which order they merge"
        )
    from transformers.convert_slow_tokenizer import generate_merges

    score_of = {token: scores[number] for token, number in vocab.items()}
    kinds = _kinds(meta, tokens)
    apart = {token for token, number in vocab.items() if kinds[number] != 1}
    prefixed = meta.flag("tokenizer.ggml.add_space_prefix", True)
    unknown = next((token for token, number in vocab.items() if kinds[number] == UNKNOWN), None)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _replace(" ", "▁")]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": generate_merges(vocab, score_of, apart),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _replace(old: str, new: str) -> Json:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _config(meta: Metadata, tokens: Sequence[str], adds_bos: bool) -> Json:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config: Json = {"add_bos_token": meta.flag("tokenizer.ggml.add_bos_token", adds_bos)}
    for name, field in names.items():
        if (number := token_id(meta, name, len(tokens))) is not None:
            config[field] = tokens[number]
    templates = {
        name.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": value
        for name, value in meta.values.items()
        if name == "tokenizer.chat_template" or name.startswith("tokenizer.chat_template.")
    }
    if templates:
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    return config


def token_id(meta: Metadata, name: str, num_tokens: int) -> int | None:
    """Of `bos`, `eos`, `eot`, ...; None where the file names none. Raises ModelError for one that is no token."""
    full = f"tokenizer.ggml.{name}_token_id"
    if not meta.has(full) or meta.values[full] in (0xFFFFFFFF, -1):
        return None
    number = meta.integer(full)
    if number >= num_tokens:
        raise ModelError(f"{full} is {number}, there are {num_tokens} tokens")
    return number
