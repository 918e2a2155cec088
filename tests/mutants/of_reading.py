"""Faults of training a model to read what another has cached: what it sees of that, and what it is compared with."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

READING = "tests/models/training/test_reading.py"
SEES = tests_of(READING, "training_sees_what_an_engine_computes")

network = partial(Mutant, "models/training/network.py")
pairs = partial(Mutant, "models/tools/pairs.py")
reading = partial(Mutant, "models/training/reading.py")

MUTANTS = [
    reading(
        "layers that are projected get the receiver's own stream",
        "if index in transfer.reads:",
        "if False:",
        SEES,
    ),
    reading(
        "recomputed layers each get what the sender's was given",
        "if index in transfer.reads:",
        "if index and transfer.ways[index] is not Way.TAKE:",
        SEES,
    ),
    reading(
        "the whole context is shared, with its last tile",
        "torch.tensor([each.shared for each in examples])",
        "torch.tensor([each.num_shared for each in examples])",
        tests_of(READING, "only_whole_tiles_of_the_context_are_the_senders"),
    ),
    reading(
        "an adapter that is repaired is compared with the model without it",
        "alone = run.teacher if start is None else",
        "alone = run.teacher if True else",
        tests_of(READING, "an_adapter_that_is_repaired_is_compared_with_itself"),
    ),
    reading(
        "the sender is trained, too",
        "@torch.no_grad()\ndef send(",
        "def send(",
        tests_of(READING, "gradients_reach_the_adapter_and_not_the_sender"),
    ),
    network(
        "windows are always the receiver's own",
        "cached(self.convolve(cached(xBC), batch))",
        "cached(self.convolve((cached(xBC), xBC)[1], batch))",
        SEES,
    ),
    network(
        "decays are the receiver's own over the sender's steps",
        "branch_decay(cached(-dt * self.A_log.float().exp()), batch)",
        "branch_decay((cached(dt), -dt * self.A_log.float().exp())[1], batch)",
        SEES,
    ),
    pairs(
        "a receiver is always compared with itself",
        "self._reference = reference or receiver",
        "self._reference = receiver",
        tests_of("tests/models/tools/test_pairs.py", "a_receiver_is_compared_with_what_is_asked_for"),
    ),
]
