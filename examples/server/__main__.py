"""The command line: loads the model and the adapters and serves them until a signal comes."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import FrameType

import click
import uvicorn

from examples.server.app import create_app
from examples.server.batching import Worker
from examples.server.engine import load_engine

__all__ = ["Server", "main"]

_log = logging.getLogger("examples.server")


class Server(uvicorn.Server):
    """uvicorn's server, with a way to end that loses no request.

    From the first SIGTERM or SIGINT on, requests are answered with 503, on new connections too.
    Once those taken have their answers, or ``grace`` seconds are over, uvicorn shuts down as it
    does. A second signal ends the process without waiting.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float) -> None:
        super().__init__(config)
        self.worker, self.grace = worker, grace
        self._last_moment: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests; called by the signal."""
        if self._last_moment is None:
            self.worker.refuse()
            self._last_moment = time.monotonic() + self.grace
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down; asked ten times a second."""
        over = self._last_moment is not None and time.monotonic() > self._last_moment
        if over or (self._last_moment is not None and self.worker.idle):
            self.should_exit = True
        return await super().on_tick(counter)


_count = click.IntRange(min=1)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", required=True, help="Folder or hub id of the frozen decoder.")
@click.option(
    "--adapters",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with a saved adapter in each subfolder, whose name is the task's.",
)
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 for any free one.")
@click.option("--max-batch", default=16, type=_count, help="Rows of a batch.")
@click.option(
    "--max-wait-ms",
    default=5.0,
    type=click.FloatRange(min=0),
    help="How long a request waits for others to share its batch.",
)
@click.option("--queue", default=64, type=_count, help="Requests that wait; more get 503.")
@click.option("--max-new-tokens", default=128, type=_count, help="Of an answer.")
@click.option("--max-text-tokens", default=1024, type=_count, help="Of a text; adapters set less.")
@click.option("--max-body-bytes", default=65536, type=_count, help="Of a request.")
@click.option(
    "--grace-seconds",
    default=60.0,
    type=click.FloatRange(min=0),
    help="After a signal, for requests that were taken.",
)
def main(
    model: str,
    adapters: Path,
    host: str,
    port: int,
    max_batch: int,
    max_wait_ms: float,
    queue: int,
    max_new_tokens: int,
    max_text_tokens: int,
    max_body_bytes: int,
    grace_seconds: float,
) -> None:
    """Serve one frozen decoder with many adapters: GET /health and /adapters, POST /generate."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    _log.setLevel(logging.INFO)
    try:
        engine = load_engine(model, adapters, max_text_tokens)
    except (ValueError, TypeError, OSError) as error:
        raise click.UsageError(str(error)) from error
    worker = Worker(engine, max_batch=max_batch, max_wait=max_wait_ms / 1000, queue=queue)
    app = create_app(
        engine,
        worker,
        max_new_tokens=max_new_tokens,
        max_body_bytes=max_body_bytes,
        grace=grace_seconds,
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # a careless client puts texts into the path
        timeout_graceful_shutdown=max(1, round(grace_seconds)),
    )
    Server(config, worker, grace_seconds).run()
    _log.info("ended: %s", ", ".join(f"{n} {name}" for name, n in worker.counts().items()))


if __name__ == "__main__":
    main()
