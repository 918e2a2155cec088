"""Faults of reading GGUF files: a weight that comes out otherwise than it went in, a bound that is not kept."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

FAMILIES = "tests/models/gguf/test_families.py"
FILES = "tests/models/gguf/test_files.py"
SAME = tests_of(FAMILIES, "a_file_computes_what_its_checkpoint_computes")

delta_net = partial(Mutant, "models/gguf/delta_net.py")
file = partial(Mutant, "models/gguf/file.py")
rules = partial(Mutant, "models/gguf/rules.py")
text = partial(Mutant, "models/gguf/text.py")
tokenizer = partial(Mutant, "models/gguf/tokenizer.py")

MUTANTS = [
    rules(
        "rotated pairs stay side by side", "return pairs.transpose(1, 2).reshape(tensor.shape)", "return tensor", SAME
    ),
    rules("norms keep the one that was added", "return tensor - 1", "return tensor", SAME),
    rules("all experts are the first", "rule, expert=expert)", "rule, expert=0)", SAME),
    delta_net(
        "heads of values stay in the order of all groups in turn",
        "return in_turn.transpose(0, 1).reshape(tensor.shape)",
        "return tensor",
        SAME,
    ),
    file(
        "a tensor may lie beyond the end of its file",
        "if info.start + kind.num_bytes(info.shape) > size:",
        "if info.start > size:",
        tests_of(FILES, "a_file_that_ends_inside_its_last_tensor_is_cut"),
    ),
    text(
        "an answer ends at one token only",
        'for name in ("eos", "eot", "eom")}',
        'for name in ("eos",)}',
        tests_of("tests/models/gguf/test_text.py", "text_of_a_file"),
    ),
    tokenizer(
        "tokens without a row in the embedding are kept",
        "if kind != UNUSED or number < num_rows:",
        "if True:",
        tests_of("tests/models/gguf/test_text.py", "text_of_a_file"),
    ),
]
