"""Texts and requests of a seed."""

from random import Random

WORDS = """the cat dog house tree runs small large under river stone paper quick answer which seven names letter before
after winter morning carries blue fields they never always between open reads writes often light"""


def text_of(rng: Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS.split(), k=num_words))


def talk(rng: Random, num_words: int) -> list[dict[str, str]]:
    """A conversation whose first message is one of a few, so that others find it in the cache."""
    system = "You are a friend of few words. " * (1 + rng.randrange(4) * 8)
    return [{"role": "system", "content": system}, {"role": "user", "content": text_of(rng, num_words)}]


def generation(rng: Random, num_words: int, max_tokens: int) -> tuple[str, dict[str, object]]:
    """A path and a body: chat, text or a choreography; streamed or whole; n up to 4."""
    body: dict[str, object] = {"max_tokens": max_tokens, "n": rng.choice((1, 1, 1, 2, 4)), "stream": rng.random() < 0.5}
    body |= {"temperature": rng.choice((0, 1)), "seed": rng.randrange(100)}
    if rng.random() < 0.3:
        return "/v1/completions", {"prompt": text_of(rng, num_words), **body}
    if rng.random() < 0.3:
        body["choreography"] = {"fidelity": rng.choice(("exact", "composed")), "seam": rng.choice((0, 8))}
    return "/v1/chat/completions", {"messages": talk(rng, num_words), **body}
