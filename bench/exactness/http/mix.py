"""A seeded mix of all requests that the API takes: they share, branch, repeat, grow, refer to each other, are wrong."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hybrid_cache.bench.exactness.http.api import CHAT, TEXT, Asked, Reply
from hybrid_cache.bench.exactness.http.report import Json
from hybrid_cache.bench.exactness.http.texts import Texts
from hybrid_cache.models.training.dialogues import SYSTEM

CROWD = 12
LISTS = 4  # of messages side by side that come back
LONG = 400  # characters of a message that fills a page
T = TypeVar("T")


STOPS = (".", " is", "the", "code for", " now", "e", " the box", "\n", "0", "know")
TOOLS: list[Json] = [
    {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {}}}}},
]
CALL: Json = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "box"}'}}
MARK: Json = {"mode": "explicit"}
WRONG: tuple[Json, ...] = (
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"structured_outputs": {"regex": "a+"}},
    {"tools": TOOLS, "tool_choice": "required"},
    {"choreography": {"seam": 7}},
    {"choreography": {"fidelity": "best"}},
    {"choreography": {"fidelity": "composed"}, "continue_final_message": True},
    {"n": 0},
    {"temperature": -1},
    {"logit_bias": {"2147483000": 1}},
    {"stop_token_ids": [-1]},
    {"best_of": 7},
    {"suffix": "the end"},
)
NARROWED: tuple[Json, ...] = ({"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.05})


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run with a server of its own."""

    name: str
    share: float  # of all requests
    bursts: tuple[int, ...]  # requests in flight
    most_characters: int  # of a prompt, about
    answers: tuple[int, ...]  # tokens
    sequences: int = 0  # that the budget holds; 0 is the budget asked for
    tokens: int = 0  # of such a sequence
    crowds: bool = False  # at times all in flight have long answers, more than there is room for


PHASES = (
    Phase("roomy", 0.5, (1, 1, 1, 2, 3, 4, 6, 9, 12), 9000, (1, 2, 4, 8, 16, 24)),
    Phase("snug", 0.25, (1, 1, 2, 4, 8, 12), 6000, (1, 2, 4, 8, 16, 70), sequences=4, tokens=2048),
    Phase("tiny", 0.25, (1, 2, 4, 8, 12), 1600, (2, 8, 24, 70, 140), sequences=2, tokens=640, crowds=True),
)


class Mix:
    """Seeded requests that share, branch, repeat and grow. What they are depends on earlier answers as well."""

    def __init__(self, seed: str, phase: Phase) -> None:
        self.rng = random.Random(seed)
        self._phase = phase
        self._texts = Texts(self.rng, phase.most_characters)
        self._talks: list[tuple[Json, ...]] = []  # conversations, most of which end with an answer
        self._lists: list[tuple[list[Json], int | None]] = []  # messages side by side, as choreographies take them
        self._prompts: list[str] = []
        self._tokens: list[list[int]] = [list(range(20, 120))]  # prompts and their answers
        self._named: dict[str, dict[str, Json]] = {}  # by tenant and id: messages, or answers
        self._answers: set[str] = set()  # ids
        self._sent: list[Asked] = []

    def burst(self, most: int) -> list[Asked]:
        """The next requests, which are to be in flight together."""
        if self._phase.crowds and (not self._sent or self.rng.random() < 0.15):
            return [self._crowded(self._next()) for _ in range(min(most, CROWD))]
        number = min(most, self.rng.choice(self._phase.bursts))
        return [replace(self._next(), delay_s=self.rng.choice((0, 0, 0.005, 0.02, 0.06))) for _ in range(number)]

    def _crowded(self, asked: Asked) -> Asked:
        longest = max(self._phase.answers)
        body = {**asked.body, "max_tokens": longest, "min_tokens": longest, "ignore_eos": True}
        for name in ("max_completion_tokens", "stop", "stop_token_ids", "include_stop_str_in_output"):
            body.pop(name, None)
        return replace(asked, body=body, labels=(*asked.labels, "crowded"))

    def learn(self, asked: Asked, reply: Reply) -> None:
        """Takes what later requests can go on from."""
        if reply.status != 200 or 0 not in reply.choices:
            return
        first = reply.choices[0]
        if asked.messages:
            said = _message("assistant", first.text)
            _keep(self.rng, self._talks, (*asked.messages, said))
            self._learn_names(asked, reply, said)
        elif isinstance(prompt := asked.body["prompt"], str):
            _keep(self.rng, self._prompts, prompt + first.text)
        if reply.prompts and reply.prompts[0]:
            _keep(self.rng, self._tokens, reply.prompts[0] + first.tokens)

    def _learn_names(self, asked: Asked, reply: Reply, said: Json) -> None:
        if (report := reply.report) is None:
            return
        known = self._named.setdefault(asked.salt, {})
        for name, message in zip(report.messages, asked.messages, strict=True):
            if name is not None and name not in self._answers:
                known[name] = message
        if report.answer is not None:
            known[report.answer] = said
            self._answers.add(report.answer)

    # One request

    def _next(self) -> Asked:
        rng = self.rng
        makers = (self._talk, self._list, self._choreography, self._completion, self._wrong)
        if self._sent and rng.random() < 0.13:
            old = rng.choice(self._sent[-40:])
            asked = replace(old, labels=(*(n for n in old.labels if n != "aborted"), "exact repeat"))
            asked = replace(asked, events=None, seconds=None)
        else:
            (make,) = rng.choices(makers, (22, 27, 34, 14, 3))
            asked = make()
        asked = self._with_abort(asked) if rng.random() < 0.08 else asked
        self._sent.append(asked)
        return asked

    def _with_abort(self, asked: Asked) -> Asked:
        labels = (*asked.labels, "aborted")
        if self.rng.random() < 0.3:
            return replace(asked, labels=labels, seconds=self.rng.choice((0.001, 0.01, 0.03, 0.1)))
        body = {**asked.body, "stream": True, "max_tokens": max(self._phase.answers)}
        return replace(asked, body=body, labels=(*labels, "stream"), events=self.rng.choice((1, 1, 2, 3, 6, 12)))

    def _talk(self) -> Asked:
        """A conversation: a new one, or one that grows, is edited, branches, is asked again or is continued."""
        rng = self.rng
        way = rng.choice(("new", "grow", "grow", "grow", "edit", "branch", "again", "continue", "tools"))
        old = list(rng.choice(self._talks)) if self._talks else []
        size = sum(len(str(m.get("content"))) for m in old)
        if way == "new" or not old or size > self._phase.most_characters:
            return self._chat(self._opening(), ("new conversation",))
        if way == "again":
            return self._chat(old[:-1] or old, ("regenerated",))
        if way == "continue" and old[-1]["role"] == "assistant":
            old[-1] = {**old[-1], "content": str(old[-1]["content"])[: rng.randint(1, 12)]}
            return self._chat(old, ("continue_final_message",), continue_final_message=True)
        if way == "tools":
            called: list[Json] = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
            result: list[Json] = [{"role": "tool", "tool_call_id": "call_1", "content": self._texts.question()}]
            return self._chat([*old, *called, *result], ("tools", "tool results"), tools=TOOLS)
        if way == "edit":
            at = rng.choice([i for i, m in enumerate(old) if "tool_calls" not in m and m["role"] != "tool"])
            old[at] = _message(str(old[at]["role"]), self._texts.varied(str(old[at].get("content") or "")))
            old = old if rng.random() < 0.5 else old[: at + 1]
        elif way == "branch":
            old = old[: rng.choice([end for end in range(1, len(old) + 1) if "tool_calls" not in old[end - 1]])]
        return self._chat([*old, _message("user", self._texts.any())], ("grown" if way == "grow" else f"{way}ed",))

    def _opening(self) -> list[Json]:
        rng = self.rng
        system = [_message("system", rng.choice((*SYSTEM, self._texts.any())))] if rng.random() < 0.6 else []
        return [*system, _message("user", self._texts.any())]

    def _list(self) -> Asked:
        """Messages side by side, as a choreography would have them, but exact."""
        return self._chat(self._side_by_side(exact=True), ("messages side by side",))

    def _side_by_side(self, *, exact: bool) -> list[Json]:
        """Messages of users, most of them as they stood side by side before, at times with a change.

        In most lists one message is longer for exact requests: it goes on where it ends for the others.
        """
        rng = self.rng
        if len(self._lists) < LISTS or rng.random() < 0.08:
            self._lists = [*self._lists, self._new_list()][-LISTS:]
        kept, at = rng.choice(self._lists)
        messages = list(kept)
        if at is not None and exact != (rng.random() < 0.03):
            messages[at] = _message("user", self._texts.longer(str(messages[at]["content"])))
        if rng.random() < 0.2:
            self._change(messages)
        return messages

    def _new_list(self) -> tuple[list[Json], int | None]:
        """-> messages, and which of them exact requests have longer."""
        rng = self.rng
        texts = [self._texts.any() for _ in range(rng.randint(1, 3))]
        texts[:0] = rng.choice(([], [self._texts.new()], [self._texts.question()], [self._texts.question()]))
        while len(texts) > 1 and sum(map(len, texts)) > self._phase.most_characters:
            texts.pop()
        long = [i for i, text in enumerate(texts) if len(text) > LONG]
        at = rng.choice(long) if long and rng.random() < 0.85 else None
        return [_message("user", text) for text in texts], at

    def _change(self, messages: list[Json]) -> None:
        rng, at = self.rng, self.rng.randrange(len(messages))
        way = rng.choice(("shuffle", "vary", "swap", "more", "fewer", "role"))
        if way == "shuffle":
            rng.shuffle(messages)
        elif way == "vary":
            messages[at] = {**messages[at], "content": self._texts.varied(str(messages[at]["content"]))}
        elif way == "swap":
            messages[at] = _message("user", self._texts.any())
        elif way == "more":
            messages.append(_message("user", self._texts.question()))
        elif way == "fewer" and len(messages) > 1:
            del messages[at]
        elif way == "role":
            messages[at] = {**messages[at], "role": rng.choice(("system", "assistant", "user"))}

    def _choreography(self) -> Asked:
        rng = self.rng
        if rng.random() < 0.1:
            return self._chat(self._side_by_side(exact=True), ("choreography: by ids alone",), refer=1.0)
        fidelity = rng.choice((*["composed"] * 5, "exact", "exact", "relocated"))
        messages = self._side_by_side(exact=fidelity == "exact")
        style: Json = {"fidelity": fidelity, "encode": rng.choice(("alone", "alone", "in_place"))}
        style["seam"] = rng.choice((*[0] * 9, 8, 16, 32, 64))
        labels = [f"choreography: {fidelity}"]
        for name, share, values in (
            ("order", 0.5 if fidelity == "exact" else 0.1, ("any",)),
            ("composition", 0.3, ("rotations", "permutations", "mean", "last")),
            ("positions", 0.15, ("leftmost",)),
        ):
            if rng.random() < share:
                style[name] = rng.choice(values)
                labels.append(f"{name}: {style[name]}")
        return self._chat(messages, tuple(labels), refer=rng.choice((0.0, 0.0, 0.5, 1.0)), choreography=style)

    def _chat(self, messages: Sequence[Json], labels: tuple[str, ...], refer: float = 0.0, **fields: object) -> Asked:
        rng, salt = self.rng, rng_salt(self.rng)
        messages = list(messages)
        if "choreography" not in fields and not refer and rng.random() < 0.12:
            self._mark(messages)
            labels = (*labels, "marked parts")
        options, more = self._options()
        body: Json = {"logprobs": True, "top_logprobs": rng.choice((0, 1, 3, 5)), **options, **fields}
        if salt:
            body["cache_salt"], more = salt, (*more, "cache_salt")
        if "tools" not in fields and "choreography" not in fields and rng.random() < 0.05:
            body["tools"], more = TOOLS, (*more, "tools")
        if rng.random() < 0.1:
            body["max_completion_tokens"] = body.pop("max_tokens")
        sent, resolved = self._with_references(messages, salt, refer)
        if any("ref" in m for m in sent):
            more = (*more, "refs")
            body["return_token_ids"] = True
        return Asked(CHAT, {**body, "messages": sent}, (*labels, *more), tuple(resolved))

    def _with_references(self, messages: list[Json], salt: str, share: float) -> tuple[list[Json], list[Json]]:
        """-> the messages with ids in place of some that the server knows, at times others before them; and in full."""
        rng, known = self.rng, self._named.get(salt, {})
        if share and known and rng.random() < 0.3:
            messages = [known[rng.choice(list(known))] for _ in range(rng.randint(1, 2))] + messages
        names = {_key(message): name for name, message in known.items()}
        sent: list[Json] = []
        for message in messages:
            name = names.get(_key(message))
            sent.append({"ref": name} if name is not None and rng.random() < share else message)
        return sent, messages

    def _mark(self, messages: list[Json]) -> None:
        """Splits the text of one message in parts, the first of which ends with a cache breakpoint."""
        at = self.rng.randrange(len(messages))
        content = messages[at].get("content")
        if not isinstance(content, str) or messages[at]["role"] == "tool":
            return
        middle = len(content) // 2
        mark = {**MARK, "ttl": "1s"} if self.rng.random() < 0.2 else MARK
        first: Json = {"type": "text", "text": content[:middle], "prompt_cache_breakpoint": mark}
        messages[at] = {**messages[at], "content": [first, {"type": "text", "text": content[middle:]}]}

    def _completion(self) -> Asked:
        rng = self.rng
        prompt, label = self._raw_prompt()
        options, labels = self._options()
        body: Json = {**options, "prompt": prompt, "logprobs": rng.choice((0, 1, 3, 5))}
        if rng.random() < 0.2:
            body["echo"] = True
            labels = (*labels, "echo", "prompt logprobs")
            if rng.random() < 0.3:
                del body["logprobs"]
                labels = labels[:-1]
            elif rng.random() < 0.3:
                body["max_tokens"] = 0
        if "n" in body and rng.random() < 0.5:
            body["best_of"], labels = body["n"], (*labels, "best_of")
        if rng.random() < 0.1:
            body["add_special_tokens"] = False
        if salt := rng_salt(rng):
            body["cache_salt"], labels = salt, (*labels, "cache_salt")
        return Asked(TEXT, body, ("text completion", label, *labels))

    def _raw_prompt(self) -> tuple[object, str]:
        rng = self.rng
        way = rng.choice(("text", "text", "texts", "tokens", "tokens", "lists of tokens"))
        if way == "text":
            return self._text(), "prompt: text"
        if way == "texts":
            return [self._text() for _ in range(rng.randint(2, 3))], "prompt: several texts"
        if way == "tokens":
            return self._token_prompt(), "prompt: token ids"
        return [self._token_prompt() for _ in range(rng.randint(2, 3))], "prompt: several of token ids"

    def _text(self) -> str:
        if self._prompts and self.rng.random() < 0.6:
            text = self.rng.choice(self._prompts)[: self._phase.most_characters]
            return text if self.rng.random() < 0.5 else self._texts.varied(text)
        return self._texts.any() or "x"

    def _token_prompt(self) -> list[int]:
        """The tokens of an earlier request, or some of them, at times near the edge of a tile."""
        rng, tokens = self.rng, self.rng.choice(self._tokens)[: self._phase.most_characters // 4]
        kept = rng.choice((len(tokens), len(tokens), rng.randint(1, len(tokens)), 63, 64, 65, 127, 128, 129))
        return tokens[:kept] + tokens[: rng.choice((0, 0, 1, 9))]

    def _options(self) -> tuple[Json, tuple[str, ...]]:
        rng = self.rng
        body: Json = {"temperature": 0, "max_tokens": rng.choice(self._phase.answers)}
        labels = list[str]()
        for label, share, make in OPTIONS:
            if rng.random() < share:
                body |= make(self)
                labels.append(label)
        return body, tuple(labels)

    def some_tokens(self, most: int) -> list[int]:
        """Tokens that are likely to be met."""
        return [self.rng.choice(self.rng.choice(self._tokens)[-30:]) for _ in range(self.rng.randint(1, most))]

    def _wrong(self) -> Asked:
        """What has to be refused, with or without a cache."""
        rng, foreign = self.rng, [name for known in self._named.values() for name in known]
        unknown = rng.choice(("msg_0", *foreign[:3]))
        strange: Json = {"cache_salt": "nobody", "ref": unknown}
        fields = {**rng.choice((*WRONG, strange))}
        if "best_of" in fields or "suffix" in fields:
            return Asked(TEXT, {"prompt": self._text(), **fields}, ("to be refused",))
        messages = [{"ref": fields.pop("ref")}] if "ref" in fields else [_message("user", self._texts.any())]
        return Asked(CHAT, {**fields, "messages": messages}, ("to be refused",), tuple(messages))


def rng_salt(rng: random.Random) -> str:
    return rng.choice((*[""] * 12, "a", "b"))


def _message(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def _key(message: Json) -> str:
    return json.dumps(message, sort_keys=True)


def _keep(rng: random.Random, kept: list[T], new: T, most: int = 12) -> None:
    """Adds one, in the place of another when there are too many."""
    if len(kept) == most:
        kept.pop(rng.randrange(most))
    kept.append(new)


Make = Callable[[Mix], Json]
# Name, share of requests, fields.
OPTIONS: tuple[tuple[str, float, Make], ...] = (
    ("n > 1", 0.1, lambda m: {"n": m.rng.randint(2, 4)}),
    ("temperature 1 with a seed", 0.3, lambda m: {"temperature": 1.0, "seed": m.rng.randrange(1 << 20)}),
    ("top_p, top_k or min_p", 0.1, lambda m: m.rng.choice(NARROWED)),
    ("presence_penalty", 0.05, lambda m: {"presence_penalty": m.rng.choice((-1.0, 0.5, 2.0))}),
    ("frequency_penalty", 0.05, lambda m: {"frequency_penalty": m.rng.choice((-0.5, 0.3, 1.5))}),
    ("repetition_penalty", 0.05, lambda m: {"repetition_penalty": m.rng.choice((0.8, 1.1, 1.5))}),
    ("stop strings", 0.1, lambda m: {"stop": m.rng.sample(STOPS, m.rng.randint(1, 4))}),
    ("stop_token_ids", 0.07, lambda m: {"stop_token_ids": m.some_tokens(3)}),
    ("include_stop_str_in_output", 0.06, lambda m: {"include_stop_str_in_output": True, "stop": [".", " is"]}),
    ("logit_bias", 0.07, lambda m: {"logit_bias": {str(t): m.rng.choice((-100, -3, 2, 9)) for t in m.some_tokens(4)}}),
    ("min_tokens", 0.07, lambda m: {"min_tokens": m.rng.randint(1, 20)}),
    ("ignore_eos", 0.12, lambda m: {"ignore_eos": True}),
    ("special tokens shown", 0.05, lambda m: {"skip_special_tokens": False}),
    ("token ids returned", 0.7, lambda m: {"return_token_ids": True}),
    ("stream", 0.3, lambda m: {"stream": True, "stream_options": {"include_usage": True}}),
    ("cache mode explicit", 0.1, lambda m: {"prompt_cache_options": {"mode": "explicit"}}),
    ("cache mode implicit", 0.05, lambda m: {"prompt_cache_options": {"mode": "implicit", "ttl": "1s"}}),
)
