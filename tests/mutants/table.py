"""All faults that the tests are to notice."""

from tests.mutants import (
    of_activated,
    of_api,
    of_bench,
    of_cache,
    of_checkpoints,
    of_choreography,
    of_disk,
    of_engine,
    of_gguf,
    of_kernels,
    of_operations,
    of_options,
    of_ray,
    of_reading,
    of_tasks,
    of_variants,
)

MUTANTS = [
    *of_api.MUTANTS,
    *of_cache.MUTANTS,
    *of_bench.MUTANTS,
    *of_engine.MUTANTS,
    *of_tasks.MUTANTS,
    *of_choreography.MUTANTS,
    *of_kernels.MUTANTS,
    *of_variants.MUTANTS,
    *of_activated.MUTANTS,
    *of_reading.MUTANTS,
    *of_operations.MUTANTS,
    *of_options.MUTANTS,
    *of_gguf.MUTANTS,
    *of_checkpoints.MUTANTS,
    *of_disk.MUTANTS,
    *of_ray.MUTANTS,
]
