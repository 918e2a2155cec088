"""Loading the text side of a model folder, and what its chat template may and may not do."""

import json
import shutil
from pathlib import Path

import pytest

from hybrid_cache.api.template import MAX_RENDERED, ChatTemplate, Clock
from hybrid_cache.api.tokenizer import LONG_TEXT, TextModel
from hybrid_cache.errors import ContextTooLong, ModelError, RequestError
from tests.api.servers import BOS, IM_END, TEMPLATE


@pytest.fixture
def folder(sum_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sum_folder, tmp_path / "model"))


def render(source: str, content: str = "Hi", **variables: object) -> str:
    template = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    return template.render([{"role": "user", "content": content}], variables, Clock())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "{", "tokenizer"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", "{nope", "tokenizer_config.json cannot be read"),
        ("generation_config.json", "\x00", "generation_config.json cannot be read"),
        ("chat_template.jinja", "{% for m in messages %}", "the chat template does not compile"),
    ],
)
def test_a_broken_file_is_named_in_one_line(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ModelError) as error:
        TextModel.load(folder)
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_or_that_is_none(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is not there"):
        TextModel.load(folder)
    with pytest.raises(ModelError, match="is not a folder"):
        TextModel.load(folder / "nowhere")


def test_a_folder_in_an_older_format_is_converted(folder: Path) -> None:
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|bos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TextModel.load(folder).tokenizer
    assert tokenizer.encode("Hi") == [*b"Hi"]
    assert tokenizer.eos_id == IM_END


def test_what_generation_config_says_is_the_default(folder: Path) -> None:
    config = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.1, "eos_token_id": [3, 5]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    defaults = TextModel.load(folder).defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.5, 0.9, 7)
    assert defaults.repetition_penalty == 1.1
    assert defaults.eos_ids == (3, 5, IM_END)
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    assert TextModel.load(folder).defaults.temperature == 0
    (folder / "generation_config.json").unlink()
    assert TextModel.load(folder).defaults.temperature == 1


def test_a_template_in_the_config_and_one_for_tools(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    for value, names in (("only", {"default"}), (named, {"default", "tool_use"})):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        assert set(TextModel.load(folder).chat_templates) == names


def test_a_bos_token_is_added_to_texts_where_the_model_wants_it(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    tokenizer = TextModel.load(folder).tokenizer
    assert tokenizer.encode_prompt("Hi") == [BOS, *b"Hi"]
    assert tokenizer.encode_prompt("<|bos|>Hi") == [BOS, *b"Hi"]
    assert tokenizer.encode("Hi") == [*b"Hi"]


def test_long_text_has_the_same_tokens(sum_text: TextModel) -> None:
    text = "Grüße <|im_end|>" * LONG_TEXT
    piece = "Grüße <|im_end|>"
    assert sum_text.tokenizer.encode(text) == sum_text.tokenizer.encode(piece) * LONG_TEXT
    with pytest.raises(ContextTooLong, match=str(len(text))):
        sum_text.tokenizer.check_size(text, 100, "prompt")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ messages.nothing.nothing }}",
        "{{ raise_exception('no') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_can_neither_look_around_nor_change_anything(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        render(source)


def test_a_template_cannot_grow_without_bound() -> None:
    with pytest.raises(RequestError, match=str(MAX_RENDERED)):
        render("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "x" * 1000)


def test_what_hugging_face_templates_use() -> None:
    assert render("{{ messages | tojson }}", "é<") == '[{"role": "user", "content": "é<"}]'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}a{{ messages[0].content }}{% endgeneration %}b") == "aHib"
    assert render("{{ strftime_now('%Y') }}{{ eos_token }}").endswith("<|im_end|>")
    assert render("  {% if x %}\n  a\n  {% endif %}\nb", x=True) == "  a\nb"


def test_arguments_of_tool_calls_go_as_the_template_wants_them() -> None:
    assert not ChatTemplate(TEMPLATE, {}).takes_argument_text  # it would quote a text
    shows = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    assert ChatTemplate(shows, {}).takes_argument_text
