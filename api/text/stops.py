"""Stop strings as requests and model folders give them."""

MAX_STOPS = 16  # OpenAI takes 4
MAX_STOP_LENGTH = 256


def stops_of(value: object) -> list[str] | None:
    """A stop string or a list of them, as JSON has it. Raises ValueError for what is out of bounds."""
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings, at most {MAX_STOPS} are allowed")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise ValueError(f"a stop string has {len(stop)} characters, must have 1 to {MAX_STOP_LENGTH}")
    return list(stops)
