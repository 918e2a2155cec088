"""The headings of `serve --help`, and which options stand under each: by what somebody looks for."""

OTHER = "Other options"
PANELS = {
    "Model": """model revision dtype weights backend threads fast max_model_len chat_template tool_parser
        served_model_name special_tokens_in_content keep_billing_header""",
    "Memory and cache": """budget prefix_cache policy host_budget disk disk_budget message_book response_store
        response_store_mb response_ttl verify""",
    "Batching and queue": """max_running max_waiting max_tiles max_tiles_beside_decode max_step_ms order drain_timeout
        hung_after""",
    "Network": """host port tls_cert tls_key allow_host allow_origin forwarded_allow_ips max_connections max_body
        header_timeout body_timeout reader_timeout""",
    "Pages for a browser": "pages",
    "Routers and several servers": "kv_events_config",
    "API keys and tenants": "api_key api_key_file operator_key_file shared_cache",
    "Adapters and fine-tunes beside the model": "adapter merge_adapters variant allow_adapter_loading",
    "Sharing of cached entries between models": "sharing max_loss profile double_writing",
    "Logs and metrics": "log_level log_format log_content otlp_endpoint vllm_metrics",
    "Record of what was served": "record record_key record_limit record_memory",
    "Config file and help": "config show_config help_aliases help",
}
PLACES = {name: heading for heading, names in PANELS.items() for name in names.split()}
_ORDER = {name: position for position, name in enumerate(PLACES)}


ELSEWHERE = "No options, and often looked for"
NO_OPTIONS = [
    (
        "temperature, seed, tools, structured output (JSON schema, regex, grammar)",
        "are fields of a request: docs/serving.md; which fields there are: docs/requests.md",
    ),
    ("metrics", "GET /metrics, for Prometheus, always there; dashboard and alerts: docs/deploying.md"),
    ("why a prompt was not cached", "the header `x-cache-report: 1` has the reply say so: docs/serving.md"),
    ("what is cached, and dropping it", "hybrid-cache cache ls, show, drop"),
    ("clients of OpenAI and Anthropic", "docs/serving.md"),
    ("reverse proxy (nginx), API keys, TLS", "docs/operations.md; containers, systemd, Kubernetes: docs/deploying.md"),
    ("version, changes, vulnerabilities", "hybrid-cache --version, CHANGELOG.md, SECURITY.md"),
]
"""What somebody looks for among the options, and where it is."""


def panel_of(name: str) -> str:
    """The heading of an option, by the name of its parameter."""
    return PLACES.get(name, OTHER)


def position_of(name: str) -> int:
    """Where it stands among the others; what has no heading comes last."""
    return _ORDER.get(name, len(_ORDER))
