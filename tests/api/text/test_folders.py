"""Text files of a model folder in the forms that real ones have."""

import json
from pathlib import Path

import pytest

from hybrid_cache.api.text.chat import ChatEncoder
from hybrid_cache.api.text.defaults import load_defaults
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart
from hybrid_cache.api.text.tokenizer import TextModel, load_chat_templates
from hybrid_cache.errors import ModelError
from tests.api.servers import write_text_model

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TOOLS = "{{ tools | length }} tools\n" + PLAIN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Without a template."""
    write_text_model(tmp_path, ())
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


# Templates


def test_a_template_in_its_older_file(folder: Path) -> None:
    """Qwen3-Omni and others have it in chat_template.json only."""
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert TextModel.load(folder).chat_templates["default"].source == PLAIN


def test_the_newer_file_of_a_template_goes_first(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="a")
    assert load_chat_templates(folder) == {"default": "a"}
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "b"}))
    assert load_chat_templates(folder) == {"default": "b"}
    (folder / "chat_template.jinja").write_text("c")
    assert load_chat_templates(folder) == {"default": "c"}


FORMS = {
    "a list of named ones": [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}],
    "named ones": {"default": PLAIN, "tool_use": TOOLS},
}


@pytest.mark.parametrize("field", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_named_templates_in_one_field(folder: Path, file: str, field: object) -> None:
    edit(folder / file, chat_template=field)
    assert load_chat_templates(folder) == {"default": PLAIN, "tool_use": TOOLS}


def test_named_templates_in_files_of_their_own(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(PLAIN)
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(TOOLS)
    (more / "rag.jinja").write_text("x")
    assert load_chat_templates(folder) == {"default": PLAIN, "tool_use": TOOLS, "rag": "x"}


def test_tools_are_written_by_the_template_that_is_named_after_them(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=FORMS["named ones"])
    text = TextModel.load(folder)
    encoder = ChatEncoder(text.tokenizer, text.chat_templates)
    said = [TemplateMessage("user", (TextPart("hi"),))]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert encoder.render(said, Rendering(tools=[tool])) == "1 tools\n[user] hi\n"
    assert encoder.render(said, Rendering()) == "[user] hi\n"


def test_more_templates_than_a_model_has_are_not_compiled(folder: Path) -> None:
    field = [{"name": str(number), "template": "{{ messages }}"} for number in range(65)]
    edit(folder / "tokenizer_config.json", chat_template=field)
    with pytest.raises(ModelError, match="chat templates, at most 64 are read"):
        TextModel.load(folder)


def test_a_template_that_is_too_long_is_refused_by_name(folder: Path) -> None:
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("x" * ((1 << 20) + 1))
    with pytest.raises(ModelError, match=r"tool_use\.jinja has 1048577 bytes, at most 1048576 are read"):
        load_chat_templates(folder)


# Ends


def test_end_tokens_of_a_text_config(tmp_path: Path) -> None:
    edit(tmp_path / "config.json", model_type="qwen3_5", text_config={"eos_token_id": [3, 5]})
    assert load_defaults(tmp_path).eos_ids == (3, 5)
    assert load_defaults(tmp_path, eos_id=4).eos_ids == (3, 4, 5)
    edit(tmp_path / "config.json", eos_token_id=2)
    assert load_defaults(tmp_path).eos_ids == (2,)
    edit(tmp_path / "generation_config.json", eos_token_id=None, temperature=0.5)
    assert load_defaults(tmp_path).eos_ids == (2,)
    edit(tmp_path / "generation_config.json", eos_token_id=[7])
    assert load_defaults(tmp_path).eos_ids == (7,)


# Files


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_byte_order_mark_is_no_part_of_a_file(folder: Path, name: str) -> None:
    before = TextModel.load(folder)
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    after = TextModel.load(folder)
    assert after.tokenizer.as_json() == before.tokenizer.as_json()
    assert after.defaults == before.defaults


def test_vocabularies_of_two_sizes(folder: Path) -> None:
    """Rows without a token are what many models have; a token without a row cannot be read."""
    last = TextModel.load(folder).tokenizer.last_token[1]
    edit(folder / "config.json", vocab_size=last + 100)
    tokenizer = TextModel.load(folder).tokenizer
    assert tokenizer.decode([last + 50]) == ""
    assert tokenizer.token_bytes(last + 50) == b""
    for nested in (False, True):
        config = {"vocab_size": last}
        (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
        with pytest.raises(
            ModelError, match=rf"the tokenizer's token '.*' has id {last}, config.json: vocab_size is {last}"
        ):
            TextModel.load(folder)
