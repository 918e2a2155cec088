"""What users of other servers type at `serve`: a table from their options to ours, or to a sentence that says why not.

A name that is an option of ours as well is never looked up. Names and meanings are those in the documentation of
vLLM 0.31, of llama-server (build 10236) and of SGLang.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hybrid_cache.api.cli.help_page import page
from hybrid_cache.api.text.tool_formats import FORMATS
from hybrid_cache.errors import ConfigError

MODEL = "MODEL"  # stands for the argument
TILE = 64  # tokens of a prefill tile, as in `kernels.grid`, which needs torch

Setting = tuple[str, str | None]  # an option of ours and its value; None for a switch
Settings = Callable[[Sequence[str]], Sequence[Setting]]


@dataclass(frozen=True, slots=True)
class Foreign:
    """Names of one option. It has either settings, or a sentence about what to do instead."""

    names: tuple[str, ...]
    here: str  # for the table: options of ours, or the sentence
    settings: Settings | None = None  # from its values to ours
    num_values: int | None = 1  # None: all up to the next option

    def translate(self, name: str, values: Sequence[str]) -> Sequence[Setting]:
        """name: as it was typed. Raises ConfigError with a sentence that says what to do instead."""
        if self.settings is None:
            raise ConfigError(f"{name}: {self.here}")
        try:
            return self.settings(values)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


TOOL_PARSERS = {
    **{name: name for name in FORMATS},
    "granite4": "hermes",
    "kimi_k2": "kimi",
    "llama3_json": "llama3",
    "llama4_json": "llama3",
    "minimax": "jamba",
    "nemotron_3": "qwen3_coder",
    "nemotron_json": "nemotron",
    "nemotron_v3": "qwen3_coder",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3_xml": "qwen3_coder",
}
"""Names of other servers -> names of ours."""

THINK_TAGS = (
    *(
        "auto",
        "deepseek",
        "deepseek-r1",
        "deepseek_r1",
        "deepseek_v3",
        "glm45",
        "glm47",
        "kimi_k2",
        "mimo",
        "minimax_m2",
        "nano_v3",
    ),
    *("nemotron_3", "nemotron_v3", "olmo3", "qwen3", "qwen3-thinking", "step3"),
)
"""Reasoning parsers that split an answer at <think> and </think>, which is what happens here."""


def option(*names: str, to: str) -> Foreign:
    """The same under another name."""
    return Foreign(names, to, lambda values: [(to, values[0])])


def switch(*names: str, to: str) -> Foreign:
    return Foreign(names, to, lambda values: [(to, None)], 0)


def always(*names: str, why: str) -> Foreign:
    """A switch for what always holds here."""
    return Foreign(names, f"(nothing to do: {why})", lambda values: [], 0)


def fixed(*names: str, to: Sequence[str], otherwise: str) -> Foreign:
    """Only these values say what happens here."""

    def settings(values: Sequence[str]) -> Sequence[Setting]:
        if values[0].strip().lower() not in to:
            raise ConfigError(f"{values[0][:100]!r}, only {' or '.join(to)} can be served: {otherwise}")
        return []

    return Foreign(names, f"(only {', '.join(to)}: {otherwise})", settings)


def no(*names: str, instead: str) -> Foreign:
    return Foreign(names, instead, num_values=0)


def whole(text: str) -> int:
    """`4096`, `4k` (4,000) or `4K` (4,096). Raises ConfigError."""
    digits, factor = text.strip(), {"k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20}.get(text.strip()[-1:], 0)
    digits = digits[:-1] if factor else digits
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise ConfigError(f"{text[:100]!r} is no whole number, such as 4096, 4k (4,000) or 4K (4,096)")
    return int(digits) * (factor or 1)


def _tiles(values: Sequence[str]) -> Sequence[Setting]:
    if values[0] == "-1":
        raise ConfigError(f"-1: {_PIECES}")
    tokens = whole(values[0])
    if tokens < TILE:
        raise ConfigError(f"{tokens}, must be at least {TILE}, which is one tile")
    return [("--max-tiles", str(tokens // TILE))]


def _parser(values: Sequence[str]) -> Sequence[Setting]:
    ours = TOOL_PARSERS.get(values[0].replace("-", "_"))
    if ours is None:
        raise ConfigError(f"{values[0][:100]!r}, must be one of {', '.join(sorted(TOOL_PARSERS))}")
    return [("--tool-parser", ours)]


def _loras(values: Sequence[str]) -> Iterator[Setting]:
    if not values:
        raise ConfigError("wanted NAME=PATH")
    for value in values:
        yield "--adapter", _lora(value)


def _lora(text: str) -> str:
    """NAME=PATH, or the same in JSON."""
    if not text.startswith("{"):
        return text
    try:
        fields = json.loads(text)
        return f"{fields['name']}={fields['path']}"
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{text[:100]!r} is neither NAME=PATH nor JSON with `name` and `path`") from error


def _origins(values: Sequence[str]) -> Sequence[Setting]:
    try:
        found = json.loads(values[0]) if values[0].lstrip().startswith("[") else values[0].split(",")
    except ValueError as error:
        raise ConfigError(f"{values[0][:100]!r} is no list in JSON") from error
    return [("--allow-origin", str(each).strip()) for each in found]


def _context(values: Sequence[str]) -> Sequence[Setting]:
    return [] if values[0] == "0" else [("--max-model-len", values[0])]


def _automatic(to: str, automatic: str | None) -> Settings:
    """-1 is for what is chosen without the option."""

    def settings(values: Sequence[str]) -> Sequence[Setting]:
        if values[0] == "-1":
            return [] if automatic is None else [(to, automatic)]
        return [(to, values[0])]

    return settings


def _aliases(values: Sequence[str]) -> Sequence[Setting]:
    return [("--served-model-name", each.strip()) for each in values[0].split(",")]


_PIECES = "prompts are always read in pieces"
_MEMORY = "the cache has one budget in bytes for KV and states: --budget SIZE, or auto, which is the default"
_HOST = "--host-budget SIZE is host memory beside a GPU for what leaves its cache"
_SAMPLING = "requests say this, and generation_config.json of the model where they do not"
_FOLDER = "it is read from the model's own folder; leave this out"
_AS_COMPUTED = "KV is kept as it is computed and states in float32, so that a cached answer is the computed one"
_ONE_DEVICE = "one process serves on one device"

TABLE = (
    # Model
    option("--model", "--model-path", "-m", "-hf", "-hfr", "--hf-repo", to=MODEL),
    Foreign(("--alias", "-a"), "--served-model-name for each", _aliases),
    Foreign(("--ctx-size", "-c", "--context-length"), "--max-model-len, of each request", _context),
    option("--chat-template-file", to="--chat-template"),
    no("--tokenizer", "--tokenizer-path", "--tokenizer-mode", "--tokenizer-revision", instead=_FOLDER),
    no("--trust-remote-code", instead="no code out of a model's folder is ever run; leave this out"),
    no("--quantization", "-q", "--hf-overrides", "--rope-scaling", "--rope-theta", "--rope-freq-base",
       "--rope-freq-scale", "--hf-file", "-hff", "--json-model-override-args", instead=_FOLDER),
    no("--chat-template-kwargs", "--default-chat-template-kwargs", instead="a request says it: `chat_template_kwargs`"),
    fixed("--load-format", to=("auto", "safetensors"), otherwise="what a file holds is seen from the file"),
    no("--download-dir", instead="the environment's HF_HUB_CACHE says where downloads from the hub go"),
    no("--hf-token", "-hft", instead="the environment's HF_TOKEN is what the hub gets"),
    fixed("--generation-config", to=("auto",), otherwise="the model's generation_config.json is what counts"),
    no("--override-generation-config", instead=_SAMPLING),
    fixed("--task", "--runner", to=("auto", "generate"), otherwise="models answer here, nothing else"),
    no("--embedding", "--embeddings", "--is-embedding", "--reranking", "--rerank", instead="models answer here, "
       "nothing else: there are no embeddings and no ranking"),
    no("--mmproj", "-mm", "--limit-mm-per-prompt", instead="messages are text here: no images, no audio"),
    always("--language-model-only", "--no-mmproj", why="messages are text here"),
    no("--preferred-sampling-params", "--max-logprobs", "--response-role", "--reasoning-effort", instead=_SAMPLING),
    no("--seed", "-s", "--random-seed", instead="a request says it: `seed`"),
    no("--temp", "--temperature", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--predict", "--n-predict",
       "-n", instead=_SAMPLING),
    # Memory and cache
    no("--gpu-memory-utilization", "--mem-fraction-static", instead=_MEMORY),
    no("--kv-cache-memory-bytes", "--kv-cache-memory", "--cache-ram", "-cram", instead=_MEMORY),
    no("--num-gpu-blocks-override", "--max-total-tokens", "--max-mamba-cache-size", "--mamba-full-memory-ratio",
       "--kv-unified", "-kvu", instead=_MEMORY),
    no("--swap-space", "--cpu-offload-gb", "--kv-offloading-size", "--kv-transfer-config", instead=_HOST),
    no("--enable-hierarchical-cache", "--hicache-ratio", "--hicache-size", instead=_HOST),
    fixed("--kv-cache-dtype", "--mamba-cache-dtype", to=("auto",), otherwise=_AS_COMPUTED),
    fixed("--mamba-ssm-cache-dtype", "--mamba-ssm-dtype", to=("auto", "float32"), otherwise=_AS_COMPUTED),
    no("--cache-type-k", "-ctk", "--cache-type-v", "-ctv", "--calculate-kv-scales", instead=_AS_COMPUTED),
    no("--block-size", "--page-size", "--mamba-block-size", instead="pages have 64 tokens; leave this out"),
    fixed("--mamba-cache-mode", to=("all", "align"), otherwise="states are kept where the policy sees a use for them"),
    no("--mamba-scheduler-strategy", "--mamba-radix-cache-strategy", "--radix-eviction-policy",
       "--prefix-caching-hash-algo", "--swa-full", instead="--policy decides what is kept"),
    always("--no-context-shift", why="a prompt that is too long is refused"),
    no("--context-shift", instead="a prompt that is too long is refused; the client has to shorten it"),
    no("--ctx-checkpoints", "--swa-checkpoints", instead="--policy decides which states are kept, within --budget"),
    no("--cache-reuse", instead="requests ask for messages in another order, see docs about choreography"),
    no("--slot-save-path", instead="the cache is in memory; `hybrid-cache cache ls` shows what is in it"),
    always("--slots", "--props", why="GET /slots and GET /props are always there"),
    no("--no-slots", instead="/slots is always there; with --api-key a key sees its own requests only"),
    switch("--enable-prefix-caching", "--cache-prompt", to="--prefix-cache"),
    switch("--no-enable-prefix-caching", "--disable-radix-cache", "--no-cache-prompt", to="--no-prefix-cache"),
    # Batches
    option("--max-num-seqs", "--max-running-requests", to="--max-running"),
    Foreign(("--parallel", "-np"), "--max-running", _automatic("--max-running", None)),
    option("--max-queued-requests", to="--max-waiting"),
    Foreign(
        ("--max-num-batched-tokens", "--chunked-prefill-size", "--ubatch-size", "-ub"),
        f"--max-tiles, of {TILE} tokens each",
        _tiles,
    ),
    no("--threads-batch", "-tb", "--threads-http", instead="--threads are all that compute"),
    no("--batch-size", "-b", instead=f"--max-tiles says how many tiles of {TILE} prompt tokens one step takes"),
    Foreign(("-t",), "--threads", _automatic("--threads", "0")),
    always("--enable-chunked-prefill", "--cont-batching", "-cb", why=_PIECES),
    no("--no-enable-chunked-prefill", "--no-cont-batching", "-nocb", instead=_PIECES),
    no("--max-prefill-tokens", "--long-prefill-token-threshold", "--max-num-partial-prefills",
       "--max-long-partial-prefills", instead="--max-tiles and --max-step-ms bound the prompts in a step"),
    no("--async-scheduling", "--schedule-conservativeness", "--num-scheduler-steps", "--preemption-mode",
       instead="--order is all that there is to choose; leave this out"),
    fixed("--scheduling-policy", "--schedule-policy", to=("fcfs",), otherwise="--order says who waits for whom"),
    no("--speculative-config", "--speculative-algorithm", "--speculative-algo", "--speculative-model",
       "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens",
       "--num-speculative-tokens", "--spec-type", "--model-draft", "-md", "--draft", "--draft-max", "--draft-min",
       instead="tokens are not guessed ahead here"),
    # Tools and thoughts
    Foreign(("--tool-call-parser",), "--tool-parser", _parser),
    no("--tool-parser-plugin", "--reasoning-parser-plugin", instead="parsers are built in, see --tool-parser"),
    always("--enable-auto-tool-choice", "--jinja", "--enable-reasoning", why="it is always so"),
    fixed("--reasoning-parser", to=THINK_TAGS, otherwise="thoughts are what stands between <think> and </think>, where "
          "the model's chat template has these"),
    fixed("--reasoning-format", to=("auto", "deepseek"), otherwise="thoughts come apart, as reasoning_content"),
    fixed("--reasoning-budget", to=("-1",), otherwise="no number of tokens ends thoughts"),
    fixed("--chat-template-content-format", to=("auto",), otherwise="it is seen from the template"),
    no("--structured-outputs-config", "--guided-decoding-backend", "--grammar-backend", "--grammar", "--json-schema",
       "-j", instead="requests say it (`response_format`, `structured_outputs`), and there is one implementation"),
    # Adapters
    always("--enable-lora", why="--adapter is enough"),
    Foreign(("--lora-modules", "--lora-paths"), "--adapter NAME=PATH for each", lambda v: [*_loras(v)], None),
    no("--lora", "--lora-scaled", instead="--adapter DIR merges an adapter in PEFT's layout"),
    no("--max-loras", "--max-lora-rank", "--max-cpu-loras", "--max-loras-per-batch", "--lora-dtype", instead="adapters "
       "have no bound on their number or rank, and the model's dtype; leave this out"),
    # Device
    fixed("--tensor-parallel-size", "-tp", "--tp", "--tp-size", to=("1",), otherwise=_ONE_DEVICE),
    fixed("--pipeline-parallel-size", "-pp", "--pp-size", "--data-parallel-size", "-dp", "--dp", "--dp-size", to=("1",),
          otherwise=_ONE_DEVICE),
    no("--enable-expert-parallel", "--ep-size", "--ep", "--distributed-executor-backend", "--disable-custom-all-reduce",
       "--nnodes", "--node-rank", "--dist-init-addr", "--data-parallel-size-local", "--headless", "--tensor-split",
       "-ts", "--split-mode", "-sm", "--main-gpu", "-mg", "--device",
       "-dev", instead=f"{_ONE_DEVICE}; see --backend"),
    no("--gpu-layers", "--n-gpu-layers", "-ngl", "--n-cpu-moe", "-ncmoe", "--cpu-moe", "-cmoe", "--override-tensor",
       "-ot", instead="the whole model is on one device, see --backend"),
    no("--attention-backend", "--flash-attn", "-fa", "--enforce-eager", "--compilation-config", "-O",
       "--enable-torch-compile", "--torch-compile-max-bs", "--disable-cuda-graph", "--cuda-graph-max-bs",
       "--max-seq-len-to-capture", "--disable-cascade-attn", "--moe-backend", instead="--backend chooses the kernels"),
    no("--mlock", "--no-mmap", "--mmap", "--numa", instead="there is no such choice here; leave this out"),
    # Network
    option("--ssl-keyfile", "--ssl-key-file", to="--tls-key"),
    option("--ssl-certfile", "--ssl-cert-file", to="--tls-cert"),
    no("--ssl-ca-certs", "--ssl-cert-reqs", instead="clients show API keys here, no certificates"),
    Foreign(("--allowed-origins",), "--allow-origin for each", _origins),
    no("--allowed-methods", "--allowed-headers", "--allow-credentials", instead="--allow-origin says which pages may "
       "use the server, with the methods and headers that it knows"),
    no("--root-path", "--api-prefix", "--fastapi-root-path", instead="paths begin with /v1: have the proxy take its "
       "prefix off"),
    no("--uds", instead="it listens on --host and --port, not on a socket's file"),
    no("--api-server-count", instead="one process answers; leave this out"),
    always("--disable-frontend-multiprocessing", why="one process answers"),
    # What it says
    option("--uvicorn-log-level", to="--log-level"),
    always("--metrics", "--enable-metrics", "--enable-request-id-headers", "--enable-prompt-tokens-details",
           "--enable-cache-report", "--no-webui", why="it is always so"),
    no("--webui", "--path", instead="there is no web page here"),
    no("--middleware", "--return-tokens-as-token-ids", "--exclude-tools-when-tool-choice-none", "--file-storage-path",
       "--warmup", "--no-warmup", "--additional-config", instead="there is no such choice here; leave this out"),
    no("--timeout", "-to", instead="see --reader-timeout, --body-timeout and --header-timeout"),
    no("--enable-log-requests", "--disable-log-requests", "--disable-log-stats", "--disable-uvicorn-access-log",
       "--log-disable", "--log-config-file", "--log-file", "--log-verbosity", "-lv", "--verbose", "-v", "--max-log-len",
       "--log-requests", "--log-level-http", "--decode-log-interval",
       instead="each request is one line, see --help about logs"),
)  # fmt: skip
BY_NAME = {name: entry for entry in TABLE for name in entry.names}


def taken_as(option: str) -> list[str]:
    """What other servers call an option of ours, where their name does the same here."""
    return [name for entry in TABLE if entry.settings and _target(entry) == option for name in entry.names]


def _target(entry: Foreign) -> str:
    """The option of ours, or empty if what it asks for needs none."""
    first = entry.here.split(maxsplit=1)[0].rstrip(",")
    return first if first == MODEL or first.startswith("--") else ""


def find(name: str) -> Foreign | None:
    """By a name as it is typed: also with a field of it behind a dot, or -O with its level."""
    return BY_NAME.get(name) or BY_NAME.get(name.partition(".")[0]) or (BY_NAME["-O"] if name[:2] == "-O" else None)


def table() -> str:
    """All of it, for people: names, then what is to be typed here."""
    head = "Options of vLLM, SGLang and llama-server, and what each is here; those with an option of ours are taken."
    return page(head, {"There, and here": [(", ".join(entry.names), entry.here) for entry in TABLE]}).rstrip()
