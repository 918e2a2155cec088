"""The commands that measure. Each is imported when it runs."""

from collections.abc import Callable
from importlib import import_module

import typer

from hybrid_cache.api.cli.help_page import SearchedCommand

app = typer.Typer(help="Measurements.", no_args_is_help=True)


def _bench(name: str, module: str, summary: str) -> None:
    """Mounts `hybrid_cache.bench.MODULE:NAME`, which is imported when the command runs or is asked for help."""

    def run(context: typer.Context) -> None:
        command: Callable[..., None] = getattr(import_module(f"hybrid_cache.bench.{module}"), name.replace("-", "_"))
        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        inner.command(cls=SearchedCommand)(command)
        raise typer.Exit(inner(context.args, prog_name=context.command_path, standalone_mode=False) or 0)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=summary, add_help_option=False, context_settings=settings)(run)


_bench("serve", "serving.command", "Measure an OpenAI-compatible server on the prompts that a prefix cache meets.")
_bench("exactness", "exactness.command", "Count the bits in which cache on and cache off differ.")
_bench(
    "policy", "policy.command", "Replay traces through cache policies: what does each save, and what would be possible?"
)
_bench(
    "published",
    "policy.marconi_evaluation",
    "Repeat Marconi's evaluation on synthetic trajectories, next to the published hit rates.",
)
_bench(
    "kernels", "kernels.command", "Time every operation against the roofline, the portable backend and other libraries."
)
_bench(
    "choreography",
    "choreography.command",
    "Time workflows whose agents read each other's messages, and count what reuse costs in answers.",
)
_bench("agents", "agents.command", "Simulate agents that wait for tools: orders of service side by side.")
_bench("turns", "turns.command", "Count how much of an agent's next turn comes from the cache, by chat template.")
_bench(
    "decode", "engine.decode", "Time whole steps of a model, with shared prefixes, next to the rates of this machine."
)
_bench("activated", "engine.activated", "Time the first token of an activated adapter behind what its base has read.")
_bench("grammar", "engine.grammar", "Time decode steps with a JSON schema on every row, and without.")
_bench("bookkeeping", "engine.bookkeeping", "Time the cache's own work in large trees.")
_bench("kv-events", "engine.events", "Time a busy engine with KV events published, and without.")
_bench(
    "variants",
    "variants.command",
    "Measure what models that share a base lose, save and serve when one reads what another has cached.",
)
_bench(
    "pipeline",
    "variants.live",
    "Play agents that are variants of one base on a server: each by itself, and reading what the others have cached.",
)
