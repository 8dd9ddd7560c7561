"""The command `amulet serve --backend vllm`: runs vLLM's server with this backend's plug-ins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points

from amulet.errors import RequestError
from amulet.vllm_backend.version import check_vllm

SCHEDULER = "amulet.vllm_backend.scheduler.pair_scheduler"
PROCESSOR = "amulet.vllm_backend.processor:PairProcessor"
# vLLM loads all plug-ins of these groups unless VLLM_PLUGINS names some.
_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def serve(arguments: Sequence[str]) -> None:
    """Serve until a signal arrives.

    Args:
        arguments: those of `vllm serve`; `--help` lists them. The default model is the embedded
            one, the default host the loopback address.

    Raises:
        ModelError: this vLLM is not supported.
        RequestError: an option can't be combined with steering.
    """
    check_vllm()
    os.environ.update(environment(os.environ))
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="amulet serve --backend vllm"))
    # Otherwise the page /docs would load scripts from another host.
    parser.set_defaults(host="127.0.0.1", model=None, enable_offline_docs=True)
    # As in `amulet serve`: `cached_tokens` in the usage, `x-request-id` on responses.
    parser.set_defaults(enable_prompt_tokens_details=True, enable_request_id_headers=True)
    args = parser.parse_args(list(arguments))
    if args.model is None and args.model_tag is None:
        from amulet.models.embedded import HUB_NAME, embedded_folder

        args.model = str(embedded_folder())
        args.served_model_name = args.served_model_name or [HUB_NAME.split("/")[-1]]
    if not args.api_key:  # vLLM reads another variable
        args.api_key = os.environ.get("AMULET_API_KEY", "").split() or None
    if args.speculative_config:
        raise RequestError(
            "--speculative-config: steering needs the logits of every chosen token, "
            "and drafts would skip them; leave it out."
        )
    if args.kv_transfer_config:
        raise RequestError("--kv-transfer-config: can't be combined with steering; leave it out.")
    if args.scheduler_cls is not None:
        raise RequestError("--scheduler-cls: steering requires its own scheduler; leave it out.")
    args.scheduler_cls = SCHEDULER
    args.logits_processors = [*(args.logits_processors or ()), PROCESSOR]
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


def environment(given: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Return the variables to set; vLLM loads this kind of plug-in only if it is named."""
    named = given.get("VLLM_PLUGINS")
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        found = (plugin.name for group in _GROUPS for plugin in entry_points(group=group))
        names = list(dict.fromkeys(found))
    if "amulet" not in names:
        names.append("amulet")
    # The V2 model runner does not tell logits processors which rows are in the batch.
    return {"VLLM_PLUGINS": ",".join(names), "VLLM_USE_V2_MODEL_RUNNER": "0"}
