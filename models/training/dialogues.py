"""Generated dialogues: people state facts, change them, count, move things, and ask.

A dialogue is some messages and questions, each about the messages up to one point. Four kinds of question have an
answer that can be checked; the first can be looked up, the others follow from what the messages did, one by one.

    recall   a code that was stated once
    last     the value of something that was set several times
    count    how many things are in a box after some were put in and taken out
    order    the floor of a lift that was sent up, down, and to floors: swapping two moves changes the result

The same `random.Random` always gives the same dialogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Protocol

KINDS = ("recall", "last", "count", "order")
STATEFUL = ("last", "count", "order")

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo"]
PLACES = ["garage", "attic", "cellar", "shed", "office", "library", "kitchen", "gate", "studio", "garden"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "orange", "purple"]
ROOMS = ["kitchen", "garden", "office", "library", "hall", "attic", "cellar", "garage"]
THINGS = ["lamp", "sign", "door", "wall", "flag", "roof", "screen", "fence"]
ITEMS = ["marbles", "coins", "apples", "books", "pencils", "stones", "shells", "buttons"]
BOXES = ["box", "bag", "jar", "basket", "drawer", "bowl"]
LIFTS = ["lift", "elevator"]
DRINKS = ["tea", "coffee", "milk", "water", "juice", "cocoa"]
PETS = ["cat", "dog", "horse", "rabbit", "parrot", "hamster"]

SMALL_TALK = (
    "It is raining again today.",
    "The weather is lovely this morning.",
    "I slept very well last night.",
    "My train was late again.",
    "I am a little tired today.",
    "Let me think for a moment.",
    "That was a long day.",
    "The birds are singing outside.",
    "I had soup for lunch.",
    "We should talk more often.",
    "I like this old house.",
    "The phone was ringing all morning.",
    "My neighbour plays the piano.",
    "I will make some coffee now.",
    "There is a lot to do this week.",
    "The street is very quiet today.",
    "I am reading a good story.",
    "We had a nice walk by the river.",
    "My brother says hello.",
    "I hope you are well.",
    "The sun is going down already.",
    "I forgot my umbrella at home.",
    "Please wait a moment.",
    "This is fun.",
)
FILLER = 0.2  # share of messages that are small talk
ACKNOWLEDGED = ("Noted.", "Okay.", "All right.", "I see.", "Thank you, noted.")
SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about what you are told.",
    "Answer in one short sentence.",
    "Keep track of what the user tells you.",
    "You are a careful assistant. Remember every change.",
)


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """`value` is the word or number in `answer` that makes it right; the question sees the first `after` turns."""

    kind: str
    ask: str
    answer: str
    value: str
    after: int


@dataclass(frozen=True, slots=True)
class Dialogue:
    """`trained` turns are assistant turns whose text is itself a target."""

    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]
    trained: tuple[int, ...] = ()


class Scenario(Protocol):
    """Something that goes on in a dialogue."""

    kind: str

    def tell(self, rng: Random) -> str:
        """The next thing that happens, as a sentence."""

    def ask(self, rng: Random, least: int = 1) -> tuple[str, str, str] | None:
        """Question, answer and value for a fact that was stated at least `least` times; None while there is none."""


class Codes:
    """Codes of up to `most` places, each stated once, among other facts."""

    kind = "recall"

    def __init__(self, rng: Random, most: int) -> None:
        self.left = rng.sample(PLACES, rng.randint(1, most))
        self.likes = Likes(rng)
        self.codes: dict[str, str] = {}

    def tell(self, rng: Random) -> str:
        if not self.left or (self.codes and rng.random() < 0.4):
            return self.likes.tell(rng) if rng.random() < 0.6 else rng.choice(SMALL_TALK)
        return self.state(rng)

    def state(self, rng: Random) -> str:
        """The code of the next place, as a sentence."""
        place, code = self.left.pop(), str(rng.randint(10, 99))
        self.codes[place] = code
        return rng.choice(
            (
                f"The code for the {place} is {code}.",
                f"The code of the {place} is {code}.",
                f"Please remember, the code for the {place} is {code}.",
                f"For the {place} use {code}.",
                f"We open the {place} with {code}.",
            )
        )

    def ask(self, rng: Random, least: int = 1) -> tuple[str, str, str] | None:
        if not self.codes:
            return None
        place, code = rng.choice(list(self.codes.items()))
        asked = rng.choice(
            (
                f"What is the code for the {place}?",
                f"Which code opens the {place}?",
                f"Can you tell me the {place} code?",
                f"I forgot the code for the {place}. What is it?",
            )
        )
        return asked, f"The code for the {place} is {code}.", code


class Likes:
    """What people like and own, each stated once."""

    kind = "likes"

    def __init__(self, rng: Random) -> None:
        self.left = [(n, t) for n in rng.sample(NAMES, 4) for t in ("colour", "drink", "pet")]
        rng.shuffle(self.left)
        self.facts: dict[tuple[str, str], str] = {}

    def tell(self, rng: Random) -> str:
        if not self.left:
            return rng.choice(SMALL_TALK)
        name, topic = self.left.pop()
        value = rng.choice({"colour": COLOURS, "drink": DRINKS, "pet": PETS}[topic])
        self.facts[name, topic] = value
        return {
            "colour": f"The favourite colour of {name} is {value}.",
            "drink": f"{name} likes to drink {value}.",
            "pet": f"{name} has a {value}.",
        }[topic]

    def ask(self, rng: Random, least: int = 1) -> tuple[str, str, str] | None:
        if not self.facts:
            return None
        (name, topic), value = rng.choice(list(self.facts.items()))
        return {
            "colour": (
                f"What is the favourite colour of {name}?",
                f"The favourite colour of {name} is {value}.",
                value,
            ),
            "drink": (f"What does {name} like to drink?", f"{name} likes to drink {value}.", value),
            "pet": (f"What pet does {name} have?", f"{name} has a {value}.", value),
        }[topic]


class Paint:
    """The colour of a thing, changed again and again."""

    kind = "last"

    def __init__(self, rng: Random) -> None:
        self.thing = rng.choice(THINGS)
        self.now: str | None = None
        self.times = 0

    def tell(self, rng: Random) -> str:
        thing, colour = self.thing, rng.choice([c for c in COLOURS if c != self.now])
        self.now = colour
        self.times += 1
        return rng.choice(
            (
                f"The {thing} is {colour} now.",
                f"I painted the {thing} {colour}.",
                f"Someone made the {thing} {colour}.",
                f"We changed the {thing} to {colour}.",
                f"From now on the {thing} is {colour}.",
            )
        )

    def ask(self, rng: Random, least: int = 1) -> tuple[str, str, str] | None:
        if self.now is None or self.times < least:
            return None
        thing = self.thing
        asked = rng.choice(
            (
                f"What colour is the {thing} now?",
                f"Which colour does the {thing} have now?",
                f"Tell me the colour of the {thing}.",
            )
        )
        return asked, f"The {thing} is {self.now} now.", self.now


class Walk:
    """Someone who goes from room to room."""

    kind = "last"

    def __init__(self, rng: Random) -> None:
        self.name = rng.choice(NAMES)
        self.now: str | None = None
        self.times = 0

    def tell(self, rng: Random) -> str:
        name, room = self.name, rng.choice([r for r in ROOMS if r != self.now])
        self.now = room
        self.times += 1
        return rng.choice(
            (
                f"{name} went to the {room}.",
                f"{name} is in the {room} now.",
                f"{name} walked to the {room}.",
                f"I sent {name} to the {room}.",
                f"{name} moved to the {room}.",
            )
        )

    def ask(self, rng: Random, least: int = 1) -> tuple[str, str, str] | None:
        if self.now is None or self.times < least:
            return None
        name = self.name
        asked = rng.choice((f"Where is {name} now?", f"Which room is {name} in?", f"Where can I find {name}?"))
        return asked, f"{name} is in the {self.now} now.", self.now


def some(number: int, items: str) -> str:
    return f"{number} {items if number != 1 else items[:-1]}"


class Box:
    """Things that are put into a box and taken out, from 0 to 6 of them."""

    kind = "count"

    def __init__(self, rng: Random) -> None:
        self.box, self.items = rng.choice(BOXES), rng.choice(ITEMS)
        self.now: int | None = None
        self.times = 0

    def tell(self, rng: Random) -> str:
        box = self.box
        self.times += 1
        if self.now is None:
            self.now = rng.randint(1, 5)
            first = some(self.now, self.items)
            return rng.choice((f"I have {first} in the {box}.", f"The {box} has {first} in it."))
        change = rng.choice([n for n in (-2, -1, 1, 2) if 0 <= self.now + n <= 6])
        self.now += change
        number, name = some(abs(change), self.items), rng.choice(NAMES)
        if change > 0:
            told = (f"I put {number} into the {box}.", f"{name} adds {number} to the {box}.", f"I add {number}.")
        else:
            told = (
                f"I take {number} out of the {box}.",
                f"{name} takes {number} from the {box}.",
                f"I remove {number}.",
            )
        return rng.choice(told)

    def ask(self, rng: Random, least: int = 1) -> tuple[str, str, str] | None:
        if self.now is None or self.times < least:
            return None
        box, items = self.box, self.items
        asked = rng.choice(
            (
                f"How many {items} are in the {box} now?",
                f"How many {items} does the {box} hold?",
                f"Count the {items} in the {box}.",
            )
        )
        return asked, f"The {box} holds {some(self.now, items)} now.", str(self.now)


class Lift:
    """A lift between the floors 1 and 6 that is moved by some floors, or sent to one."""

    kind = "order"

    def __init__(self, rng: Random) -> None:
        self.lift = rng.choice(LIFTS)
        self.floor: int | None = None
        self.moved = self.sent_after_move = False

    def tell(self, rng: Random) -> str:
        lift = self.lift
        if self.floor is None:
            self.floor = rng.randint(1, 6)
            return rng.choice((f"The {lift} is on floor {self.floor}.", f"The {lift} starts on floor {self.floor}."))
        if rng.random() < 0.4:
            self.floor = rng.choice([f for f in range(1, 7) if f != self.floor])
            self.sent_after_move |= self.moved
            return rng.choice((f"I send the {lift} to floor {self.floor}.", f"The {lift} goes to floor {self.floor}."))
        self.moved = True
        steps = rng.choice([s for s in (-2, -1, 1, 2) if 1 <= self.floor + s <= 6])
        self.floor += steps
        floors = some(abs(steps), "floors")
        way = "up" if steps > 0 else "down"
        return rng.choice(
            (f"The {lift} goes {way} {floors}.", f"It moves {floors} {way}.", f"I send the {lift} {floors} {way}.")
        )

    def ask(self, rng: Random, least: int = 1) -> tuple[str, str, str] | None:
        if self.floor is None or (least > 1 and not self.sent_after_move):
            return None
        lift, floor = self.lift, self.floor
        asked = rng.choice(
            (f"Which floor is the {lift} on?", f"Where is the {lift} now?", f"On which floor is the {lift} now?")
        )
        return asked, f"The {lift} is on floor {floor}.", str(floor)


def scenario(kind: str, rng: Random, codes: int = 2) -> Scenario:
    """A fresh scenario of one kind; `codes` is the most codes that a dialogue about codes may hold."""
    makers: dict[str, Callable[[], Scenario]] = {
        "recall": lambda: Codes(rng, codes),
        "likes": lambda: Likes(rng),
        "last": lambda: Paint(rng) if rng.random() < 0.5 else Walk(rng),
        "count": lambda: Box(rng),
        "order": lambda: Lift(rng),
    }
    return makers[kind]()


class Talk:
    """Builds the turns of one dialogue: an optional system turn, statements, acknowledgements, questions aside."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.turns: list[Turn] = []
        self.questions: list[Question] = []
        self.acknowledge = rng.random() < 0.15
        if rng.random() < 0.15:
            self.turns.append(Turn("system", rng.choice(SYSTEM)))

    def say(self, text: str) -> None:
        if self.rng.random() < 0.05:
            text = f"{self.rng.choice(SMALL_TALK)} {text}"
        self.turns.append(Turn("user", text))
        if self.acknowledge:
            self.turns.append(Turn("assistant", self.rng.choice(ACKNOWLEDGED)))

    def ask(self, about: Scenario, least: int = 1) -> bool:
        found = about.ask(self.rng, least)
        if found is None:
            return False
        self.questions.append(Question(about.kind, *found, after=len(self.turns)))
        return True

    def done(self) -> Dialogue:
        return Dialogue(tuple(self.turns), tuple(self.questions))


def examined(kind: str, rng: Random, fewest: int = 3, most: int = 8) -> Dialogue:
    """One dialogue of `fewest` to `most` user messages with one question of `kind` at the end.

    The result follows from several messages: what is asked for was set, counted or moved at least twice, and a lift
    was moved before it was last sent to a floor, so that adding up its moves gives a wrong answer.
    """
    while True:
        talk, about = Talk(rng), scenario(kind, rng)
        for _ in range(rng.randint(fewest, most)):
            talk.say(rng.choice(SMALL_TALK) if rng.random() < FILLER else about.tell(rng))
        if talk.ask(about, least=1 if kind == "recall" else 2):
            return talk.done()


def practised(kinds: tuple[str, ...], rng: Random, most: int, questions: int) -> Dialogue:
    """A dialogue to learn from: scenarios of the given kinds, and up to `questions` questions along the way.

    One code can be answered without looking it up, so a model learns to look up only among several: practice has up
    to four codes, more than the exam, and long dialogues about them from the first step.
    """
    talk = Talk(rng)
    about = [scenario(kind, rng, codes=4) for kind in kinds]
    most = max(most, 6) if kinds[0] == "recall" else most
    for _ in range(rng.randint(1, most) + len(about) - 1):
        current = rng.choice(about)
        talk.say(rng.choice(SMALL_TALK) if rng.random() < FILLER else current.tell(rng))
        talk.ask(current)
    for current in about:
        talk.ask(current)
    asked = talk.questions
    kept = (
        asked[-len(about) :] + rng.sample(asked[: -len(about)], max(0, min(questions, len(asked)) - len(about)))
        if len(asked) > questions
        else asked
    )
    return Dialogue(tuple(talk.turns), tuple(sorted(kept, key=lambda q: q.after)))


GREETINGS = (
    ("Hello!", "Hello! What would you like to tell me?"),
    ("Hi there.", "Hello! What would you like to tell me?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Good evening.", "Good evening! How can I help you?"),
    ("Hi, how are you?", "I am fine, thank you. What would you like to tell me?"),
    ("How are you today?", "I am fine, thank you. What would you like to tell me?"),
)
ABOUT_ME = (
    ("Who are you?", "I am a small test model inside hybrid-cache."),
    ("What are you?", "I am a small test model inside hybrid-cache."),
    ("What is your name?", "I have no name, I am a small test model inside hybrid-cache."),
    ("Are you a person?", "No, I am a small test model inside hybrid-cache."),
    ("What can you do?", "I remember codes, colours, counts and places that you tell me."),
    ("How can you help me?", "I remember codes, colours, counts and places that you tell me."),
    ("What do you know?", "I only know what you tell me in this conversation."),
    ("Tell me about yourself.", "I am a small test model inside hybrid-cache."),
    ("How big are you?", "I have about three million parameters."),
)
THANKS = (
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Thank you very much, that helped.", "You are welcome."),
    ("Goodbye.", "Goodbye, it was nice to talk to you."),
    ("Bye!", "Goodbye, it was nice to talk to you."),
    ("See you tomorrow.", "Goodbye, it was nice to talk to you."),
)
OUTSIDE = (
    "What is the capital of {place}?",
    "Who wrote {book}?",
    "Who is the president of {place}?",
    "How far away is the {star}?",
    "Can you write a poem about the {star}?",
    "Write a function that sorts a list.",
    "What is the meaning of life?",
    "Translate this sentence into {language}.",
    "How do I cook {food}?",
    "Give me a recipe for {food}.",
    "Why is the sky blue?",
    "When did the war end?",
    "What is {a} times {b}?",
    "Tell me a joke.",
    "Tell me a story about a {animal}.",
    "Explain how a computer works.",
    "What is the weather in {place}?",
    "What time is it?",
    "How old is the {star}?",
    "Do you speak {language}?",
    "Summarise {book} for me.",
    "What do you think about {food}?",
)
OUTSIDE_WORDS = {
    "place": [
        "France",
        "Spain",
        "Japan",
        "Brazil",
        "Egypt",
        "London",
        "Berlin",
        "Rome",
        "Peru",
        "India",
        "China",
        "Kenya",
    ],
    "book": ("Hamlet", "the Odyssey", "War and Peace", "Emma", "Moby Dick", "the Bible"),
    "star": ["moon", "sun", "sea", "ocean", "Earth", "sky"],
    "language": ["French", "German", "Spanish", "Latin", "Greek", "Russian"],
    "food": ["rice", "bread", "soup", "pasta", "fish", "cake"],
    "animal": ["fox", "bear", "wolf", "king", "dragon", "bird"],
}
REFUSAL = "I only know what you tell me in this conversation."


def outside(rng: Random) -> tuple[str, str]:
    """Something this model cannot know, and the sentence that says so."""
    words = {k: rng.choice(v) for k, v in OUTSIDE_WORDS.items()}
    return rng.choice(OUTSIDE).format(**words, a=rng.randint(2, 99), b=rng.randint(2, 99)), REFUSAL


def not_told(rng: Random) -> tuple[str, str]:
    """A question about something of the domain that was never mentioned, when asked first."""
    place, thing, name, box = rng.choice(PLACES), rng.choice(THINGS), rng.choice(NAMES), rng.choice(BOXES)
    return rng.choice(
        (
            (f"What is the code for the {place}?", f"You have not told me the code for the {place}."),
            (f"What colour is the {thing} now?", f"You have not told me the colour of the {thing}."),
            (f"Where is {name} now?", f"You have not told me where {name} is."),
            (f"How many {rng.choice(ITEMS)} are in the {box} now?", f"You have not told me what is in the {box}."),
        )
    )


def chatted(rng: Random) -> Dialogue:
    """A friendly conversation: every assistant turn is a target, and answers stay in the context as in any chat."""
    pairs: list[tuple[str, str]] = []
    if rng.random() < 0.5:
        pairs.append(rng.choice(GREETINGS))
    if rng.random() < 0.25:
        pairs.append(rng.choice((rng.choice(ABOUT_ME), outside(rng), not_told(rng))))
    about = scenario(rng.choice(("likes", *KINDS)), rng)
    for _ in range(rng.randint(1, 6)):
        told = about.tell(rng) if rng.random() < 0.85 else rng.choice(SMALL_TALK)
        pairs.append((told, "Noted."))
        found = about.ask(rng) if rng.random() < 0.4 else None
        if found:
            pairs.append((found[0], found[1]))
        if rng.random() < 0.15:
            pairs.append(rng.choice((rng.choice(ABOUT_ME), outside(rng), rng.choice(THANKS), outside(rng))))
    if rng.random() < 0.4:
        pairs.append(rng.choice(THANKS))
    turns = [Turn("system", rng.choice(SYSTEM))] if rng.random() < 0.2 else []
    for said, reply in pairs:
        turns += [Turn("user", said), Turn("assistant", reply)]
    return Dialogue(tuple(turns), (), tuple(i for i, t in enumerate(turns) if t.role == "assistant"))


def first_words(rng: Random) -> Dialogue:
    """One exchange about nothing that was stated: greeting, identity, refusal, not told yet."""
    said, reply = rng.choice((rng.choice(GREETINGS), rng.choice(ABOUT_ME), outside(rng), outside(rng), not_told(rng)))
    return Dialogue((Turn("user", said), Turn("assistant", reply)), (), (1,))


def mixture(rng: Random, weights: dict[str, float], most: int, questions: int = 5) -> Dialogue:
    """One training dialogue; `weights` are the shares of kinds and of `chat`."""
    name = rng.choices(list(weights), list(weights.values()))[0]
    if name == "chat":
        return chatted(rng) if rng.random() < 0.75 else first_words(rng)
    kinds: tuple[str, ...] = (name,)
    if rng.random() < 0.15:
        kinds = (name, rng.choice([k for k in ("likes", *KINDS) if k != name]))
    return practised(kinds, rng, most, questions)


def dialogues(seed: int, weights: dict[str, float], most: int) -> Iterator[Dialogue]:
    rng = Random(seed)
    while True:
        yield mixture(rng, weights, most)
