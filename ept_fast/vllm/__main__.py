"""``python -m ept_fast.vllm``: adapters written for vLLM, and vLLM's OpenAI server with them."""

from __future__ import annotations

import os
from typing import Any

import click

from ept_fast.config import check_choice
from ept_fast.interchange.vllm import export_vllm
from ept_fast.prompts.base import prompt_class
from ept_fast.vllm import adapter_folders, engine_arguments


class _Commands(click.Group):
    """Errors that the package raises on purpose are one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ImportError, OSError, ValueError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """EPT adapters in vLLM."""


@main.command()
@click.argument("adapter")
@click.argument("folder")
def export(adapter: str, folder: str) -> None:
    """Write ADAPTER, a saved adapter of a decoder, into the new FOLDER for vLLM."""
    from ept_fast.transformers.hub import find_adapter

    saved = find_adapter(adapter)
    check_choice("task", saved.values["task"], ("CAUSAL_LM",))
    if saved.peft is not None:
        raise ValueError(
            "adapter: expected a prompt alone, got one with layers of PEFT, which would be lost"
        )
    _, config, num_tasks, tensors = saved.prompt
    prompt = prompt_class(config).from_tensors(config, tensors, num_tasks=num_tasks)
    export_vllm(prompt, folder, base_model=saved.values["base_model"])
    click.echo(folder)


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="All other options are those of vLLM's server.",
)
@click.option("--model", required=True, help="Folder of the frozen model.")
@click.option("--adapters", required=True, help="Folder of adapters, each in one of its own.")
@click.option("--num-virtual-tokens", type=int, help="The most of an adapter; default: these.")
@click.option("--max-length", type=int, help="The longest text of an adapter's offset; likewise.")
@click.option("--rank", type=int, help="The largest of an adapter; likewise.")
@click.option("--max-adapters", type=int, help="The most in one batch; default: all of these.")
@click.pass_context
def serve(context: click.Context, /, model: str, adapters: str, **sizes: Any) -> None:
    """Serve a model and its adapters; a request names its adapter as its model.

    With VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 adapters are added, replaced and removed over HTTP.
    """
    named = {name: value for name, value in sizes.items() if value is not None}
    arguments = engine_arguments(model, adapters, **named)
    others = os.environ.get("VLLM_PLUGINS")
    os.environ["VLLM_PLUGINS"] = "ept_fast" if others is None else f"{others},ept_fast"

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", arguments.pop("model"), *context.args])
    for name, value in arguments.items():
        if getattr(args, name) != parser.get_default(name):
            raise click.UsageError(f"--{name.replace('_', '-')} follows from --adapters.")
        setattr(args, name, value)
    folders = adapter_folders(adapters).items()
    args.lora_modules = [
        *(args.lora_modules or ()),
        *(LoRAModulePath(name, folder) for name, folder in folders),
    ]
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))


if __name__ == "__main__":
    main(prog_name="python -m ept_fast.vllm")
