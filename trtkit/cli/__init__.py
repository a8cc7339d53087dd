"""The `trtkit` command: one module per verb, imported only when that verb runs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import click

from trtkit import __version__

# verb -> (module, line for `trtkit --help`). The line stands here so that `--help` imports no verb.
VERBS = {
    "demo": ("trtkit.cli.demo", "Everything, on the tiny model, with the embedded Triton server."),
    "config": ("trtkit.cli.config", "List, copy and check build configs."),
    "inspect": ("trtkit.cli.inspect", "What is in a source, checkpoint, engine or model repository."),
    "convert": ("trtkit.cli.convert", "Convert a Hugging Face checkpoint to a TRT-LLM checkpoint."),
    "verify": ("trtkit.cli.verify", "Read a checkpoint back and compare it with its source."),
    "evaluate": ("trtkit.cli.evaluate", "What a conversion or quantisation costs, on held-out text."),
    "build": ("trtkit.cli.build", "Convert and compile what a build config describes."),
    "repo": ("trtkit.cli.repo", "Model repositories: generate, lint, compare, versions."),
    "deploy": ("trtkit.cli.deploy", "Start, watch and stop Triton."),
    "validate": ("trtkit.cli.validate", "Check a served model against its contract and its source."),
    "loadtest": ("trtkit.cli.loadtest", "Measure latency and throughput of a served model."),
    "releases": ("trtkit.cli.releases", "Which container, TRT-LLM, TensorRT and driver go together."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[name][0]).command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _silence_stdout()  # a reader that has seen enough (`| head`) is no failure
            ctx.exit(0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1) if args else []
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="trtkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error, before its cause and fix.")
@click.pass_obj
def group(run: dict[str, bool] | None, debug: bool) -> None:
    """From a Hugging Face checkpoint to a served, validated, load-tested Triton deployment.

    \b
    Example:
      trtkit demo
      trtkit convert ./Llama-3.1-8B ./checkpoint --tp 2

    Results go to stdout (tables, or JSON with --json), progress and logs to stderr. A command that fails with --json
    before it has a result prints {"error": {"cause", "fix", "exit_code"}} there.
    Exit codes: 0 done, 1 a check failed, 2 wrong usage or config, 3 the environment lacks something,
    130 interrupted. Shell completion: eval "$(_TRTKIT_COMPLETE=bash_source trtkit)" (or zsh_source, fish_source).
    """
    if run is not None:
        run["debug"] = debug


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script: an expected failure becomes a cause line, a fix line and an exit code."""
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored
        signal.signal(signal.SIGINT, interrupt)
    for name in ("stdout", "stderr"):  # None when the caller closed them
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - as long as the process
    run = {"debug": False, "answered": False}
    failure: tuple[str, str] | None = None
    try:
        result = group.main(args=args, standalone_mode=False, obj=run)
        code = result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        failure, code = (error.format_message(), "see --help"), 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("interrupted", err=True)
        failure, code = ("interrupted", ""), 130
    except Exception as error:
        if run["debug"]:
            import traceback

            traceback.print_exc()
        if interrupted:  # numpy's import turns the interrupt into an ImportError
            cause, fix, code = "interrupted", "", 130
        else:
            cause, fix, code = _explained(error)
        _print_error(cause, fix)
        failure = cause, fix
    if failure is not None and not run["answered"] and _wants_json(sys.argv[1:] if args is None else args):
        _answer(*failure, code)
    sys.exit(code)


def _explained(error: Exception) -> tuple[str, str, int]:
    """Cause, fix and exit code of an error."""
    from trtkit.errors import TrtkitError

    if isinstance(error, TrtkitError):
        return error.cause, error.fix, error.exit_code
    if isinstance(error, OSError):
        import errno

        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return str(error), "free disk space and run again" if full else "check the path and its permissions", 3
    fix = "this is a bug in trtkit: please report it with the output of `trtkit --debug ...`"
    return f"unexpected {type(error).__name__}: {error}", fix, 1


def _print_error(cause: str, fix: str) -> None:
    for line in cause.splitlines():
        click.secho(f"error: {line}", fg="red", err=True)
    if fix:
        click.echo(f"  fix: {fix}", err=True)


def _wants_json(args: list[str]) -> bool:
    """Whether the command line has --json; looked for in its words, since a wrong one cannot be parsed."""
    return "--json" in (args[: args.index("--")] if "--" in args else args)


def _answer(cause: str, fix: str, code: int) -> None:
    """The failure as JSON, for programs. A standard output that takes nothing more changes nothing."""
    import json

    try:
        click.echo(json.dumps({"error": {"cause": cause, "fix": fix, "exit_code": code}}, ensure_ascii=False))
    except OSError:
        _silence_stdout()


def _silence_stdout() -> None:
    """What is still buffered goes nowhere, instead of failing again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
