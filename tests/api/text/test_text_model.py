"""Loading the text side of a model folder, and what its chat template may and may not do."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from hybrid_cache.api.text import sandbox
from hybrid_cache.api.text.template import MAX_RENDERED, ChatTemplate, Clock
from hybrid_cache.api.text.text_work import LONG_TEXT
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ContextTooLong, ModelError, RequestError
from tests.api.servers import BOS, IM_END, TEMPLATE


@pytest.fixture
def folder(sum_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sum_folder, tmp_path / "model"))


def render(source: str, content: str = "Hi", **variables: object) -> str:
    template = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    return template.render([{"role": "user", "content": content}], variables, Clock()).text


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
        sum_text.tokenizer.check_characters(len(text), 100, "prompt")


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
    with pytest.raises((ModelError, RequestError), match="chat template"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) if range(99999) | sum < 0 %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call f() %}" * 18
        + "{% for i in range(9) %}{% endfor %}"
        + "{% endcall %}" * 18,
    ],
    ids=["loops", "skipping", "macros", "calls"],
)
def test_a_template_that_works_on_without_a_word_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.02)
    with pytest.raises((ModelError, RequestError), match=r"takes more than 0\.02 s"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**12 }}",
        "{{ 10**12 * [1] }}",
        "{{ (10**99)**(10**9) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=3) %}{% for i in range(60) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
    ],
)
def test_a_value_in_a_template_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises((ModelError, RequestError), match=r"a value of size \d+|a number of \d+ bits"):
        render(source)


def test_watched_loops_and_joins_mean_what_they_meant() -> None:
    assert render(
        "{% for i in range(4) if i %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}"
    ) == ("1/3,2/3,3/3")
    assert render("{% for i in [] %}a{% else %}none{% endfor %}") == "none"
    assert render("{% for i in [1, [2, [3]]] recursive %}{{ i if i is number else loop(i) }}{% endfor %}") == "123"
    assert render("{% macro f(n, m=2) %}{{ n ~ m }}{{ caller() }}{% endmacro %}{% call f(1) %}!{% endcall %}") == "12!"
    assert render("{{ 2 * 3 + 2**5 }}{{ 'a' * 2 + 'b' ~ 1.5 ~ none }}{{ [1] + [2] }}") == "38aab1.5None[1, 2]"


def test_a_template_that_fails_at_once_does_not_keep_the_model_from_loading(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    refuses = TextModel.load(folder).chat_templates["default"]
    with pytest.raises((ModelError, RequestError), match="never"):
        refuses.render([{"role": "user", "content": "Hi"}], {}, Clock())


def test_a_template_that_is_nested_too_deeply_does_not_compile(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for i in [1] %}" * 30 + "{% endfor %}" * 30)
    with pytest.raises(ModelError, match="does not compile: too many statically nested blocks"):
        TextModel.load(folder)


def set_vocab_size(folder: Path, size: int, *, nested: bool = False) -> None:
    config = {"text_config": {"vocab_size": size}} if nested else {"vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("nested", [False, True], ids=["text", "multimodal"])
def test_a_token_without_a_row_in_the_embedding_is_refused(folder: Path, nested: bool) -> None:
    last = TextModel.load(folder).tokenizer.vocab_size - 1
    set_vocab_size(folder, last, nested=nested)
    with pytest.raises(ModelError, match=rf"token '.*' has id {last}, config\.json: vocab_size is {last}$"):
        TextModel.load(folder)
    set_vocab_size(folder, last + 1, nested=nested)
    TextModel.load(folder)


def test_an_added_token_far_beyond_the_embedding_is_named(folder: Path) -> None:
    set_vocab_size(folder, 5000)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"token 'far' has id 70000, config\.json: vocab_size is 5000"):
        TextModel.load(folder)


def test_ids_without_a_token_stand_for_nothing(folder: Path) -> None:
    """Many models have more rows in the embedding than tokens, and some vocabularies have holes."""
    set_vocab_size(folder, 5000)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    hole = tokenizer["model"]["vocab"].pop(next(t for t in tokenizer["model"]["vocab"] if t.endswith("w700")))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = TextModel.load(folder).tokenizer
    for token_id in (hole, 4999):
        assert loaded.token_bytes(token_id) == b""
        assert loaded.decode([*b"Hi", token_id, *b"!"]) == "Hi!"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_a_special_token_that_the_vocabulary_lacks_is_refused(folder: Path, file: str, name: str) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    values = config if file == "tokenizer_config.json" else {}
    (folder / file).write_text(json.dumps({**values, name: {"content": "<|none|>"}}))
    with pytest.raises(
        ModelError, match=rf"{re.escape(file)}: {name} is '<\|none\|>', which the tokenizer's vocabulary"
    ):
        TextModel.load(folder)


def test_a_template_cannot_grow_without_bound() -> None:
    with pytest.raises((ModelError, RequestError), match=str(MAX_RENDERED)):
        render("{% for i in range(4000) %}{{ messages[0].content }}{% endfor %}", "x" * 9000)


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


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%900000000d' % 1 }}",
        "{{ '%.900000000f' % 1.5 }}",
        "{{ '%*d' % (900000000, 1) }}",
        "{{ '%900000000s' | format('x') }}",
        "{{ '{:>900000000}'.format('x') }}",
        "{{ '{0:{1}}'.format('x', 900000000) }}",
        "{{ 'x'.ljust(900000000) }}",
        "{{ 'x' | attr('ljust') }}{{ ('x' | attr('ljust'))(900000000) }}",
        "{{ 'x\ny' | indent(900000000) }}",
        "{{ messages | tojson(indent=900000000) }}",
        "{{ 'x'.replace('', 'y' * 10000000).replace('y', 'z' * 1000) }}",
        "{{ ('x' * 4000) | replace('x', 'y' * 16000000) }}",
        "{{ (['x' * 10000000] * 1000) | join }}",
        "{{ messages | tojson(separators=('x' * 99, ':')) }}",
        "{% set a = 'x' * 16000000 %}" + "{% set b = a[1:] %}" * 60,
        "{% set a = 'x' * 16000000 %}{% set b %}" + "{{ a }}" * 60 + "{% endset %}",
        "{% set a = 'x' * 1000000 %}{{ ('{0}' * 3000).format(a) }}",
        "{% set a = 'x' * 1000000 %}{{ ('%(a)s' * 3000) % {'a': a} }}",
        "{% set a = 'x ' * 8000000 %}{{ a.split() | length }}",
        "{{ ('x' * 16000000) | sort }}",
        "{{ ('x' * 16000000) | max }}",
        "{{ [1] | batch(400000000, 0) }}",
        "{{ 5 | round(-1000000000) }}",
        "{{ (('f' * 16000000) | int(base=16)) // 7 }}",
        "{{ ('b' * 16000000).rfind('a' ~ 'b' * 4000000) }}",
        "{{ ('b' * 16000000).strip('b' * 8000000) }}",
        "{{ messages | map(attribute='0.' * 3000000) | list }}",
        "{{ range(99999) | list | map('list') | sum(start=[]) }}",
        "{{ strftime_now('%c' * 8000000) }}",
        "{% set ns = namespace(t=1) %}{% for i in range(99999) %}{% set ns.t = (ns.t,) %}{% endfor %}{{ {ns.t: 1} }}",
        "{% set a = 'x' * 16000000 %}" + "{{ a == 'x' * 15999999 ~ 'y' }}" * 3000,
        "{% macro f() %}{% set ns.a = varargs %}{% endmacro %}{% set ns = namespace(a=1) %}{% for i in range(60) %}"
        "{{ f(ns.a, ns.a) }}{% endfor %}{{ ns.a }}",
        "{{ ('x' * 16000000) | map('replace', 'x', 'yyyyyyyy') | list }}",
        "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
        "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}",
        "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set ns.a = dict(x=ns.a, y=ns.a) %}{% endfor %}",
        "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set ns.a = namespace(x=ns.a, y=ns.a) %}{% endfor %}",
        "{% set ns = namespace(a=()) %}{% for i in range(999) %}{% set ns.a = (ns.a, 'x' * 9000000 ~ i) %}{% endfor %}",
    ],
)
def test_what_a_template_calls_cannot_fill_the_memory_or_the_day(source: str) -> None:
    started_s = time.thread_time()
    with pytest.raises((ModelError, RequestError), match="chat template"):
        render(source)
    assert time.thread_time() - started_s < 6


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum(n=2000000) }}",
        "{{ 'x' | center(80) }}",
        "{{ 'a b' | wordwrap(1) }}",
        "{{ 'http://x' | urlize }}",
        "{{ [1] | slice(100000000) }}",
    ],
)
def test_filters_and_functions_are_those_of_a_list(source: str) -> None:
    with pytest.raises((ModelError, RequestError), match="chat template"):
        render(source)


def test_blocks_that_call_each_other_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.02)
    blocks = "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() * 0 }}}}{{{{ self.b{i + 1}() * 0 }}}}{{% endblock %}}"
        for i in range(40)
    )
    with pytest.raises((ModelError, RequestError), match="takes more than"):
        render(blocks + "{% block b40 %}{% endblock %}")


def test_what_templates_do_with_text_and_lists() -> None:
    source = (
        "{{ 'a,b'.split(',') | join('+', attribute=none) }} {{ 'a\nb' | indent(2) }} {{ '%s-%03d' % ('x', 7) }} "
        "{{ '%s' | format('y') }} {{ '{} {:>4}'.format(1, 2) }} {{ 'abc'.replace('b', '-', 1) }} {{ [3, 1] | sort }} "
        "{{ messages | map(attribute='role') | list }} "
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ {'a': 1} | dictsort }} "
        "{{ {'a': [1]} | tojson(indent=1) }} {{ messages[0].nothing | default('d') }} {{ 'X' | lower }}"
    )
    assert render(source) == ("a+b a\n  b x-007 y 1    2 a-c [1, 3] ['user'] 1 [('a', 1)] {\n \"a\": [\n  1\n ]\n} d x")


def test_a_template_of_absurd_numbers_does_not_compile() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{{ 0x" + "f" * 4000 + " }}", {})


def test_the_length_of_a_conversation_takes_no_time() -> None:
    source = "{% for m in messages %}{{ (messages | length) - loop.index }}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 1000} for _ in range(2000)]
    assert len(ChatTemplate(source, {}).render(messages, {}, Clock()).text) == sum(len(str(i)) for i in range(2000))


def test_a_tokenizer_that_makes_the_library_panic_is_refused_in_a_line(sum_folder: Path, tmp_path: Path) -> None:
    """Merges are read without the prefix of what continues a word, however long it is."""
    folder = Path(shutil.copytree(sum_folder, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["continuing_subword_prefix"] = 40 * "#"
    settings["model"]["merges"] = [["a", "b"]]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="cannot be read: the tokenizer is not understood"):
        TextModel.load(folder)
