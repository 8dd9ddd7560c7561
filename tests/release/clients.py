"""Clients of OpenAI's API, unmodified, against the server, each in an environment of its own.

    python -m tests.release.clients [CLIENT ...] [--keep FOLDER]

The server runs in this process, with a model whose answers are listed here. The newest release of
each client is installed, and its script in `tests/release/client` runs. The environments are in a
temporary folder in Amulet's cache folder; with `--keep` they stay in FOLDER for the next run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from amulet import Amulet, minilm
from amulet.cache_folder import cache_folder
from amulet.serve.app import create_app
from tests.models import ScriptedModel
from tests.release.environments import Environment, bare, report
from tests.serve.conftest import listening
from tests.templates import family_tokenizer

CLIENTS = {
    "openai": ("openai",),
    "openai-agents": ("openai-agents",),
    "pydantic-ai": ("pydantic-ai-slim[openai]",),
    "instructor": ("instructor",),
    "litellm": ("litellm",),
    "smolagents": ("smolagents[openai]",),
    "haystack-ai": ("haystack-ai",),
    "autogen": ("autogen-agentchat", "autogen-ext[openai]"),
    "dspy": ("dspy",),
    "langchain-openai": ("langchain-openai",),
    "llama-index": ("llama-index-llms-openai-like",),
}
"""What pip is told to install for each client; the first is the client itself."""

SCRIPTS = Path(__file__).parent / "client"
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
ANSWERS = {
    "Observation:\nsun in": CALL % ("final_answer", '{"answer": "Sunny."}'),  # smolagents' form
    "sun in": "Sunny.",
    '"name": "Mood"': CALL % ("Mood", '{"mood": "good"}'),
    '"name": "final_result"': CALL % ("final_result", '{"mood": "good"}'),
    "Which mood": '{"mood": "good"}',
    "Which weather": CALL % ("weather", '{"city": "Rome"}'),
    "one short sentence": "Steered.",
    "Which capital": "[[ ## answer ## ]]\nRome\n\n[[ ## completed ## ]]",  # dspy's form
    "": "Plain.",
}
"""What the model answers, by the first of these texts that the prompt contains."""


def environment_of(client: str, folder: Path) -> Environment:
    """Return a client's environment with its newest release; a new one, unless there is one."""
    environment = Environment(folder / client)
    if not environment.python.exists():
        bare(environment.folder)
    environment.pip("install", "--quiet", "--upgrade", *CLIENTS[client])
    return environment


def script_of(client: str) -> Path:
    """Return the path of a client's script."""
    return SCRIPTS / f"try_{client.replace('-', '_')}.py"


def versions(client: str, environment: Environment) -> str:
    """Return the versions of a client and of the package openai under it."""
    names = [name.partition("[")[0] for name in (*CLIENTS[client], "openai")]
    return environment.versions(*dict.fromkeys(names))


def main() -> int:
    """Run the clients; return how many failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--keep", type=Path, help="a folder in which the environments stay")
    arguments = parser.parse_args()
    clients = arguments.clients or list(CLIENTS)
    if unknown := set(clients) - set(CLIENTS):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    tokenizer = family_tokenizer("qwen")
    model = ScriptedModel(tokenizer, ANSWERS)
    model.config.max_position_embeddings = 2**16  # a token is a byte, and agents have long prompts
    app = create_app(Amulet(model, tokenizer), name="m")
    embeds = "" if minilm.installed() is None else "embeddings"
    cache_folder().mkdir(parents=True, exist_ok=True)
    failed = []
    with (
        tempfile.TemporaryDirectory(dir=cache_folder(), prefix="clients-") as temporary,
        listening(app, keep_alive=True) as (url, _),
    ):
        for client in clients:
            try:
                environment = environment_of(client, (arguments.keep or Path(temporary)).absolute())
                print(f"{client}: {versions(client, environment)}", flush=True)
                environment.run(str(script_of(client)), f"{url}/v1", embeds)
            except RuntimeError as error:
                print(error, flush=True)
                failed.append(client)
    return report("clients", len(clients), failed)


if __name__ == "__main__":
    sys.exit(main())
