"""Tokenizers, templates and ends of answers from the metadata of GGUF files."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.gguf.metadata import Metadata
from hybrid_cache.models.gguf.text import text_folder
from hybrid_cache.models.gguf.tokenizer import WORDS, tokenizer_of
from tests.models.gguf.conftest import VOCABULARY
from tests.models.gguf.writer import write

TEXTS = (
    "Hello, 世界! It's 12345 o'clock\n\n  and  \t so on...",
    "I'LL we'Ve 3.14159 x=y+1; // öäü É e\u0301",
    " a  b   c\r\n\r\n1 22 333 4444",
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def trained(pattern: str | None) -> Tokenizer:
    """Byte-level BPE as its library trains it; None for GPT-2's own words."""
    tokenizer = Tokenizer(models.BPE())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, spelled])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str) -> Metadata:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return Metadata(values)


@pytest.mark.parametrize(("pre", "pattern"), [("gpt-2", None), ("llama-bpe", LLAMA3), ("falcon-h1", LLAMA3)])
def test_byte_level_tokenizers_give_the_tokens_of_the_library_that_trained_them(pre, pattern):
    source = trained(pattern)
    made = Tokenizer.from_str(json.dumps(tokenizer_of(metadata_of(source, pre), 420).tokenizer))
    for text in (*TEXTS, f"<|bos|>{TEXTS[0]}<|eos|>"):
        assert made.encode(text).ids == source.encode(text).ids
        assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", list(WORDS))
def test_every_way_of_splitting_words_keeps_the_text(pre):
    made = Tokenizer.from_str(json.dumps(tokenizer_of(metadata_of(trained(None), pre), 420).tokenizer))
    for text in TEXTS:
        expected = text.replace("e\u0301", "é") if WORDS[pre].composed else text
        assert made.decode(made.encode(text).ids) == expected


def test_digits_are_split_as_the_name_says():
    def words(pre: str) -> list[str]:
        made = Tokenizer.from_str(json.dumps(tokenizer_of(metadata_of(trained(None), pre), 420).tokenizer))
        return [word for word, _ in made.pre_tokenizer.pre_tokenize_str("a12345")]

    assert words("gpt-2") == ["a", "12345"]
    assert words("smollm") == ["a", *"12345"]
    assert words("qwen2") == ["a", *"12345"]
    assert words("llama-bpe") == words("gpt-4o") == ["a", "123", "45"]


def pieces(**more: object) -> Metadata:
    """SentencePiece's BPE: the more often a piece, the higher its score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "ab", "▁ab", "▁", "a", "b", "c"]
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return Metadata(values | {f"tokenizer.ggml.{name}": value for name, value in more.items()})


def test_pieces_merge_in_the_order_of_their_scores():
    made = Tokenizer.from_str(json.dumps(tokenizer_of(pieces(), 266).tokenizer))
    assert made.encode("ab").tokens == ["▁ab"]
    assert made.encode("abab</s>").tokens == ["▁ab", "ab", "</s>"]
    assert made.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("ab c", "a  bé"):
        assert made.decode(made.encode(text).ids) == text


def test_pieces_without_a_space_before_the_first():
    made = Tokenizer.from_str(json.dumps(tokenizer_of(pieces(add_space_prefix=False), 266).tokenizer))
    assert made.encode("ab").tokens == ["ab"]


def test_scores_that_are_all_the_same_are_refused():
    with pytest.raises(UnsupportedModel, match="in which order they merge"):
        tokenizer_of(pieces(scores=[-1000.0] * 266), 266)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model is 't5', supported: gpt2, llama"),
        ({"tokenizer__ggml__pre": "nobody"}, "tokenizer.ggml.pre is 'nobody', supported: gpt-2"),
        ({"tokenizer__ggml__pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "tokenizer.ggml.merges has 'a b c', expected two tokens"),
        ({"tokenizer__ggml__eos_token_id": 4000}, "tokenizer.ggml.eos_token_id is 4000, there are 304 tokens"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "tokenizer.ggml.token_type has 2 items for 304 tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_named(checkpoint, tmp_path, changes, words):
    file = write(checkpoint, tmp_path / "model.gguf", **(VOCABULARY | changes))
    with pytest.raises(ModelError, match=words.replace(".", r"\.")):
        TextModel.load(file)


def test_text_of_a_file(small):
    text = TextModel.load(small)
    assert text.tokenizer.encode_prompt("<|user|> bubo")[:2] == [1, 3]
    assert text.tokenizer.decode(text.tokenizer.encode(" bubo")) == " bubo"
    assert text.defaults.eos_ids == (2, 4)
    assert list(text.chat_templates) == ["default"]
    assert text.tokenizer.last_token[1] == 299  # tokens beyond the embedding only fill the list up


def test_the_small_files_are_made_once_and_lie_in_one_folder(small):
    folder = text_folder(small)
    assert text_folder(small) == folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_settings_of_sampling_are_the_models_defaults(checkpoint, tmp_path):
    more = {"general__sampling__temp": 0.25, "general__sampling__top_k": 7}
    defaults = TextModel.load(write(checkpoint, tmp_path / "model.gguf", **VOCABULARY, **more)).defaults
    assert (defaults.temperature, defaults.top_k) == (0.25, 7)


def test_the_embedding_has_a_row_for_each_token(checkpoint, tmp_path):
    kinds = [1] * 304
    file = write(checkpoint, tmp_path / "model.gguf", **VOCABULARY | {"tokenizer__ggml__token_type": kinds})
    with pytest.raises(ModelError, match="vocab_size is 300"):
        TextModel.load(file)
