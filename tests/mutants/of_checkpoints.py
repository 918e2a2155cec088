"""Faults of reading checkpoints: what codes mean, and which tensor a name leads to."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

FOLDERS = "tests/models/test_quantized_folders.py"
FORMS = "tests/models/test_forms.py"
READER = tests_of(FOLDERS, "gptq_and_awq_are_what_another_reader_makes_of_them")

gptq = partial(Mutant, "models/quant_methods/gptq.py")
compressed = partial(Mutant, "models/quant_methods/compressed.py")
names = partial(Mutant, "models/names.py")
context = partial(Mutant, "models/context.py")

MUTANTS = [
    gptq(
        "zero points of the older form are taken as they are", "bits).int() + self._less & most", "bits).int()", READER
    ),
    gptq("outputs stay in the order of AWQ's words", "[..., PLACES]", "[...]", READER),
    gptq(
        "inputs in another order get the groups of their places",
        "        return groups_named(weight, named, num_groups)",
        "        return torch.arange(width) // -(-width // num_groups)",
        tests_of(FOLDERS, "gptq_with_inputs_in_an_order_of_their_own"),
    ),
    compressed(
        "a few rows are scaled as the first ones",
        "part[first // self.block_rows : -(-end // self.block_rows)]",
        "part[: -(-end // self.block_rows) - first // self.block_rows]",
        tests_of(FOLDERS, "compressed_tensors"),
    ),
    names(
        "a name under two prefixes is guessed",
        "None if core(name) in found else name",
        "name",
        tests_of(FORMS, "a_name_under_two_prefixes_is_not_guessed"),
    ),
    context(
        "a stretched length is stretched once more",
        "rope.integer(TRAINED) if rope.has(TRAINED) else length",
        "length",
        tests_of(FORMS, "the_length_of_a_stretched_context_is_computed_and_said"),
    ),
]
