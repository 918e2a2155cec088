"""Faults of the server's edges: what a client's text becomes, whose turn it is, how much anybody may take."""

from functools import partial

from tests.mutants.mutant import Mutant

MARKS = ("tests/api/text/test_marks.py",)
SEGMENTS = ("tests/api/text/test_segments.py",)
WORK = ("tests/api/text/test_text_work.py",)
CALLS = ("tests/api/text/test_call_deltas.py",)
SCHEMAS = ("tests/api/text/test_tool_schemas.py",)
GRAMMARS = ("tests/api/text/test_grammars.py",)
STORE = ("tests/api/server/test_response_store.py",)
LLM = ("tests/api/test_llm.py",)
RESPONSES = ("tests/api/server/test_responses.py",)
FOREIGN = ("tests/api/server/test_foreign_fields.py",)
ANTHROPIC = ("tests/api/server/test_anthropic.py",)
RECORD = ("tests/api/server/test_record.py",)
FORMS = ("tests/api/server/test_client_forms.py",)

marks = partial(Mutant, "hybrid_cache/api/text/marks.py")
chat = partial(Mutant, "hybrid_cache/api/text/chat.py")
template = partial(Mutant, "hybrid_cache/api/text/template.py")
work = partial(Mutant, "hybrid_cache/api/text/text_work.py")
incoming = partial(Mutant, "hybrid_cache/api/text/incoming.py")
values = partial(Mutant, "hybrid_cache/api/text/json_pieces.py")
calls = partial(Mutant, "hybrid_cache/api/text/call_readers.py")
answers = partial(Mutant, "hybrid_cache/api/text/answer_parser.py")
text_values = partial(Mutant, "hybrid_cache/api/text/text_values.py")
tool_schemas = partial(Mutant, "hybrid_cache/api/text/tool_schemas.py")
call_grammars = partial(Mutant, "hybrid_cache/api/text/tool_grammars.py")
store = partial(Mutant, "hybrid_cache/api/server/response_store.py")
llm = partial(Mutant, "hybrid_cache/api/llm.py")
turns = partial(Mutant, "hybrid_cache/api/server/openai/response_turns.py")
remarks = partial(Mutant, "hybrid_cache/api/server/remarks.py")
fields = partial(Mutant, "hybrid_cache/api/server/schemas/common.py")
orders = partial(Mutant, "hybrid_cache/api/text/orders.py")
lines = partial(Mutant, "hybrid_cache/api/server/recording/lines.py")
record_file = partial(Mutant, "hybrid_cache/api/server/recording/record_file.py")
thinking = partial(Mutant, "hybrid_cache/api/server/openai/thinking.py")

MUTANTS = [
    lines(
        "a record's hashes have no key",
        "blake2b(data, digest_size=NAME_BYTES, key=self._key, person=kind)",
        "blake2b(data, digest_size=NAME_BYTES, person=kind)",
        RECORD,
    ),
    record_file(
        "half a line stays on a full disk",
        "            os.ftruncate(self._file, self.num_bytes)\n            raise",
        "            raise",
        RECORD,
    ),
    llm(
        "who asks for no cache gets it all the same",
        'if options.get("use_cache", True):',
        "if True:",
        LLM,
    ),
    turns(
        "an answered call is left out when it broke off",
        ' and item.status == "incomplete" and item.call_id not in answered',
        ' and item.status == "incomplete"',
        RESPONSES,
    ),
    fields(
        "a refusal has no code that clients know",
        "RequestError(message, param=name, code=entry.code)",
        "RequestError(message, param=name)",
        ANTHROPIC,
    ),
    llm("an option that there is not is ignored", "    if unknown:\n", "    if False:\n", LLM),
    llm(
        "more prompts than can wait are refused",
        "asyncio.Semaphore(engine.max_waiting)",
        "asyncio.Semaphore(1 << 20)",
        LLM,
    ),
    llm("a closed model is asked", "if not self._end.alive:\n            work", "if False:\n            work", LLM),
    fields(
        "a field that asks for something is ignored",
        "if entry is None or fate is not Fate.REFUSED:",
        "if fate is not None:",
        FOREIGN,
    ),
    remarks(
        "a header has names as clients write them", 'return _ODD.sub("?", name[: MAX_NAME + 1])', "return name", FOREIGN
    ),
    Mutant(
        "hybrid_cache/api/text/left_out.py",
        "what the system says later is taken for what it said before",
        'if found < 0 or (role == "system" and place > 0):',
        "if found < 0:",
        ("tests/api/text/test_left_out.py",),
    ),
    orders("an empty user speaks last", "messages[:place], TemplateMessage", "messages, TemplateMessage", FORMS),
    thinking(
        "what a request sets by name gives way",
        "**_documents(text, asked), **own}",
        "**_documents(text, asked)}",
        FORMS,
    ),
    marks(
        "a noncharacter that a client sends is a mark",
        '        text = _MARK.sub(rf"{QUOTE}\\g<0>", text)\n        if self',
        "        if self",
        MARKS,
    ),
    marks(
        "only the first character of a span counts",
        "clients[i] < end",
        "clients[i] == start",
        MARKS,
    ),
    marks("keys of JSON stay what they are", "{self.value(key): self.value", "{key: self.value", MARKS),
    marks("lists are shown with stand-ins", "repr(_plain(value))).translate(_ALL)", "repr(_plain(value)))", MARKS),
    chat(
        "who asks is quoted like who answers",
        'if message.role == "assistant" else self._quoting',
        "if message else 0",
        MARKS,
    ),
    chat(
        "a literal span is tokenised like any text",
        "self._tokenizer.encode_literal(text[begin",
        "self._encode(text[begin",
        MARKS,
    ),
    chat(
        "an answer continues anywhere behind its content",
        "            if rendered.parts and rendered.text == text:\n                return rendered.parts[-1]",
        "            return text.rfind(content.strip()) + len(content.strip())",
        MARKS,
    ),
    chat("an opening is no cut", "if opening and rendered.text.startswith(opening, end):", "if False:", SEGMENTS),
    template(
        "messages out of order have ends",
        "        starts, end = {}, None\n    return",
        "        pass\n    return",
        MARKS,
    ),
    work(
        "tenants come in the order of their names",
        "min(self._waiting, key=self._shares.served)",
        "min(self._waiting)",
        WORK,
    ),
    work("short texts do not go first", "PASSED_BY_S * size", "PASSED_BY_S * 0", WORK),
    work(
        "work goes on though nobody waits",
        "            job.dropped = True\n            self._remove(tenant, job)",
        "            self._remove(tenant, job)",
        WORK,
    ),
    work(
        "work that nobody waits for is begun",
        "            job.dropped = True\n            self._remove(tenant, job)",
        "            job.dropped = True",
        WORK,
    ),
    incoming(
        "what has been read is kept to the end",
        "self._text, self._place = self._text[self._place :] + text, 0",
        "self._text += text",
        CALLS,
    ),
    incoming("a mark that has begun is let out", " - marks.begun(self._text, self._place)", "", CALLS),
    values(
        "half a character is let out",
        "        if high and not low:\n            yield LOST",
        "        if high and not low:\n            yield high",
        CALLS,
    ),
    values("a brace in quotes is lost", 'last = "}" if said.endswith("}") else ""', 'last = ""', CALLS),
    values(
        "a comma too many stays",
        "if at != closer:\n            return said + comma, True",
        "if at:\n            return said + comma, True",
        CALLS,
    ),
    calls("any name is a tool's", "if name not in tools:", "if not name:", CALLS),
    calls("a call that broke off is complete", "yield CallDone(False)", "yield CallDone(True)", CALLS),
    calls("marks end values within strings", "if (yield from text.char()) in JSON.brackets:", "if False:", CALLS),
    answers("ids come twice", "return CallBegun(item.name) if repeated else item", "return item", CALLS),
    answers("text within a section is lost", 'rest = mark + "".join(read)', "rest = mark", CALLS),
    call_grammars(
        "parameters that may be left out are left out",
        "for j in range(min(first + 1, len(needed)))",
        "for j in range(first, min(first + 1, len(needed)))",
        GRAMMARS,
    ),
    text_values("a text holds the tag that ends it", "(({texts}) & ~{within})", "({texts})", SCHEMAS),
    text_values("an escaped dollar sign is an anchor", "% 2 == 0:  # else", "% 2 >= 0:  # else", SCHEMAS),
    tool_schemas("values are schemas, too", "if key in _VALUES:", "if False:", SCHEMAS),
    store("anybody deletes a response", '"name = ? AND owner = ?", name, owner', '"name = ?", name', STORE),
    store("a response continues another owner's", "WHERE owner = ?2 ORDER", "WHERE ?2 != '' ORDER", STORE),
    store("a use of a response is none of those it continues", "name IN (SELECT name FROM chain)", "name = ?1", STORE),
    store("the tenant with least makes room", "tenant = max(self._held", "tenant = min(self._held", STORE),
    store(
        "what fails leaves wrong counts",
        "                self._count()\n            raise",
        "                pass\n            raise",
        STORE,
    ),
    turns("a result without a call is let in", "open_calls.pop(item.call_id, item) is item", "False", RESPONSES),
    turns("a call stays open", "    if open_calls:\n", "    if False:\n", RESPONSES),
]
